"""Tests of downloads, from a server on this machine and from file addresses."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lightning_perl.data import corpus
from lightning_perl.data.corpus import Remote, fetch_all

ROWS = b'{"a": 1}\n' * 1000
SHA = hashlib.sha256(ROWS).hexdigest()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files in ``tmp_path / "site"``."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(ROWS)
    (folder / "page.jsonl").write_bytes(b"<!DOCTYPE html><html>Please log in</html>")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_is_fetched_once(site: str, tmp_path: Path) -> None:
    remote = Remote("corpus/rows.jsonl", f"{site}/rows.jsonl", SHA)
    fetch_all([remote], tmp_path / "data")
    file = tmp_path / "data/corpus/rows.jsonl"
    assert file.read_bytes() == ROWS
    assert files(tmp_path / "data") == ["corpus/rows.jsonl"]
    (tmp_path / "site/rows.jsonl").write_bytes(b"changed")
    fetch_all([remote], tmp_path / "data")
    assert file.read_bytes() == ROWS


@pytest.mark.parametrize(("wanted", "present"), [("a.json", "a.json.gz"), ("a.json.gz", "a.json")])
def test_a_file_and_its_gzip_are_one_file(tmp_path: Path, wanted: str, present: str) -> None:
    (tmp_path / present).touch()
    fetch_all([Remote(wanted, "file:///nowhere")], tmp_path)
    assert files(tmp_path) == [present]


def test_another_checksum_is_not_kept(site: str, tmp_path: Path) -> None:
    remote = Remote("rows.jsonl", f"{site}/rows.jsonl", "0" * 64)
    with pytest.raises(ValueError, match=rf'expected "0{{64}}", got "{SHA}"\); nothing was kept'):
        fetch_all([remote], tmp_path / "data")
    assert files(tmp_path / "data") == []


def test_a_web_page_is_not_kept(site: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sent a web page in place of rows.jsonl; nothing was"):
        fetch_all([Remote("rows.jsonl", f"{site}/page.jsonl")], tmp_path / "data")
    assert files(tmp_path / "data") == []


def test_without_a_network_the_error_says_what_to_put_where(site: str, tmp_path: Path) -> None:
    for url in (f"{site}/none.jsonl", "http://127.0.0.1:9/rows.jsonl", "file:///nowhere/x"):
        words = rf"No .*data/c/rows.jsonl, .*Download {url} on .* put it at .*data/c/rows.jsonl"
        with pytest.raises(FileNotFoundError, match=words):
            fetch_all([Remote("c/rows.jsonl", url)], tmp_path / "data")
    assert files(tmp_path / "data") == []


def test_a_server_that_is_silent_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_SECONDS", 0.2)
    # The kernel accepts the connection; nobody answers.
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        url = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
        start = time.monotonic()
        with pytest.raises(FileNotFoundError, match="timed out"):
            fetch_all([Remote("rows.jsonl", url)], tmp_path)
        assert time.monotonic() - start < 5
    assert files(tmp_path) == []


def test_a_corpus_comes_whole_or_not_at_all(site: str, tmp_path: Path) -> None:
    remotes = [Remote(name, f"{site}/{name}") for name in ("rows.jsonl", "none", "page.jsonl")]
    with pytest.raises(FileNotFoundError, match="none"):
        fetch_all(remotes, tmp_path / "data")
    assert files(tmp_path / "data") == []
    fetch_all(remotes[:1], tmp_path / "data")
    assert files(tmp_path / "data") == ["rows.jsonl"]
