"""Files of public corpora, fetched once from where their authors publish them."""

from __future__ import annotations

import hashlib
import http.client
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lightning.pytorch.utilities import rank_zero_info

from lightning_perl.data.files import is_html

_SECONDS = 30.0
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A file in its official place.

    Attributes:
        path: Where it belongs below the data folder, with forward slashes.
        url: Where it is published.
        sha256: Of the published bytes, in hexadecimal; None where the authors may change the file.
    """

    path: str
    url: str
    sha256: str | None = None


def fetch(remote: Remote, folder: Path) -> Path:
    """Returns the local file, downloaded unless it is there; see :func:`fetch_all`."""
    return fetch_all([remote], folder)[0]


def fetch_all(remotes: Sequence[Remote], folder: Path) -> list[Path]:
    """Returns the local files, downloaded unless they are there, plain or gzip-compressed.

    Files appear under their names when all of them are whole and have the right checksums: a
    download that stopped leaves no half corpus, which a later run would take for the whole.

    Args:
        remotes: What to fetch.
        folder: The data folder; made if need be.

    Raises:
        FileNotFoundError: One could not be downloaded; says what to put where by hand.
        ValueError: What came is a web page or has another checksum. It is not kept.
    """
    files = [_present(folder / remote.path) for remote in remotes]
    if all(file.is_file() for file in files):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        parts: dict[Path, Path] = {}
        for remote, file in zip(remotes, files, strict=True):
            if not file.is_file():
                rank_zero_info(f"Downloading {remote.url} to {file}")
                parts[file] = Path(scratch, str(len(parts)))
                with parts[file].open("wb") as target:
                    _download(remote, target, file)
        for file, part in parts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            part.replace(file)
    return files


def _present(file: Path) -> Path:
    """Returns the file, or its plain or compressed twin if that is there instead."""
    plain = file.with_name(file.name.removesuffix(".gz"))
    twins = (file, plain, plain.with_name(f"{plain.name}.gz"))
    return next((twin for twin in twins if twin.is_file()), file)


def _download(remote: Remote, target: IO[bytes], file: Path) -> None:
    digest = hashlib.sha256()
    head = b""
    try:
        with urllib.request.urlopen(remote.url, timeout=_SECONDS) as source:
            while chunk := source.read(_CHUNK):
                head = head or chunk[:512]
                digest.update(chunk)
                target.write(chunk)
    # Timeouts and closed connections while reading are OSError or HTTPException.
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise FileNotFoundError(
            f"No {file}, and it could not be downloaded ({error}). Download {remote.url} on a "
            f"machine with a network and put it at {file}, or point data.data_dir at a folder that "
            "has it."
        ) from error
    if is_html(head):
        raise ValueError(
            f"{remote.url} sent a web page in place of {file.name}; nothing was kept. Open the "
            f"address in a browser, download the file and put it at {file}."
        )
    if remote.sha256 is not None and digest.hexdigest() != remote.sha256:
        raise ValueError(
            f"{remote.url} has the SHA-256 {digest.hexdigest()}, expected {remote.sha256}; nothing "
            "was kept. Try again; if it stays so, the authors changed the file: look at what "
            f"changed, then put it at {file} by hand."
        )
