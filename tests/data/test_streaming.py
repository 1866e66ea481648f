"""Own data that is read while training."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.data import PreferenceDataModule, tokenization
from lightning_perl.data.reading import jsonl_rows
from tests.data.counts import check_counts

Build = Callable[..., PreferenceDataModule]


@pytest.fixture
def build(tokenizer_dir: Path) -> Build:
    def make(train: Any, **arguments: Any) -> PreferenceDataModule:  # noqa: ANN401
        defaults: dict[str, Any] = {"streaming": True, "batch_size": 4, "shuffle_block": 32}
        defaults |= {"val_fraction": 0.0}
        module = PreferenceDataModule(str(tokenizer_dir), train, **defaults | arguments)
        module.setup()
        return module

    return make


def rows(count: int, prompts: int = 100) -> list[dict[str, object]]:
    return [
        {"prompt": f"question {n % prompts}", "chosen": f"good {n}", "rejected": f"bad {n}"}
        for n in range(count)
    ]


def write(file: Path, found: Iterable[object]) -> Path:
    with file.open("w") as lines:
        lines.writelines(f"{json.dumps(row)}\n" for row in found)
    return file


def texts(module: PreferenceDataModule, batches: Iterable[RatedBatch | PromptBatch]) -> list[str]:
    return [
        str(module.tokenizer.decode(ids, skip_special_tokens=True))
        for batch in batches
        for ids in batch.ids
    ]


def test_a_stream_yields_what_is_yielded_in_memory(build: Build, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", rows(200))
    stream, whole = (build(file, streaming=streams) for streams in (True, False))
    for _ in range(2):
        assert sorted(texts(stream, stream.train_dataloader())) == sorted(
            texts(whole, whole.train_dataloader())
        )
    check_counts(stream.report, 200)
    assert stream.report.splits["train"] == whole.report.splits["train"]


@pytest.mark.parametrize("streaming", [True, False])
def test_what_a_chat_template_changes_is_noted_once(tokenizer_dir: Path, streaming: bool) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    talk = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    told = PreferenceDataModule(
        tokenizer, [{"messages": talk}], val_fraction=0.0, streaming=streaming
    )
    told.setup()
    for _ in range(2):
        list(told.train_dataloader())
    noted = "dialogs whose last answer alone counts: the template rewrites others"
    assert told.report.notes == {noted: 1}


def test_validation_rows_of_their_own_are_held_in_memory(build: Build, tmp_path: Path) -> None:
    val = write(tmp_path / "val.jsonl", rows(6))
    module = build(rows(40), val=val)
    assert len(texts(module, module.train_dataloader())) == 80
    assert len(texts(module, module.val_dataloader())) == 12
    assert len(module.val_dataloader()) == 2
    check_counts(module.report, 46)
    with pytest.raises(
        ValueError, match=r"a stream is not divided. Name the validation rows in data.val"
    ):
        build(rows(40), val_fraction=0.1)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("stop", [3, 8, 13])
def test_a_resumed_stream_goes_on_where_it_stopped(
    build: Build, tmp_path: Path, stop: int, mixed: bool
) -> None:
    found = rows(70)
    found[5]["rejected"] = found[5]["chosen"]
    files = [write(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((found, rows(9)))]
    train = {str(file): 1.0 for file in files} if mixed else files[0]
    whole, first, second = (build(train, on_bad_row="reject") for _ in range(3))
    straight = list(whole.train_dataloader())
    loader, rest = first.train_dataloader(), second.train_dataloader()
    seen = [batch for _, batch in zip(range(stop), loader, strict=False)]
    rest.load_state_dict(loader.state_dict())
    seen += list(rest)
    assert texts(second, seen) == texts(second, straight)
    assert [batch.row.tolist() for batch in seen] == [batch.row.tolist() for batch in straight]
    check_counts(second.report, second.report.rows)
    if not mixed:
        # Good rows that are read past are not counted; bad ones are, when they are read.
        assert second.report.rejected == {"identical pair": 1}
        assert second.report.rows == 70 - (stop // 8 and loader.state_dict()["rows"])


@pytest.mark.parametrize("kind", ["rated", "prompts"])
def test_rows_keep_their_number_in_the_stream(build: Build, tmp_path: Path, kind: str) -> None:
    parts = (rows(25), [{**row, "prompt": "other"} for row in rows(25)])
    files = [str(write(tmp_path / f"{n}.jsonl", part)) for n, part in enumerate(parts)]
    module = build(files, rows=kind)
    loader = module.train_dataloader()
    numbered = [
        {
            int(row): text
            for batch in loader
            for row, text in zip(batch.row, texts(module, [batch]), strict=True)
        }
        for _ in range(2)
    ]
    # A pair is two rows.
    assert len(numbered[0]) == (100 if kind == "rated" else 50)
    assert numbered[0] == numbered[1]


def test_bad_rows_stop_a_stream_or_are_counted_once(build: Build, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows(20)]
    lines[0] = "{"
    lines[7] = json.dumps({"prompt": "q"})
    lines[9] = json.dumps({"prompt": "q", "chosen": "a " * 300, "rejected": "b"})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    module = build(file, on_bad_row="reject")
    loader = module.train_dataloader()
    for _ in range(3):
        assert len(texts(module, loader)) == 34
    assert module.report.rejected == {
        "broken JSON": 1,
        "missing column": 1,
        "answer longer than the window": 1,
    }
    check_counts(module.report, 20)
    for number, reason in ((1, "broken JSON"), (8, "missing column"), (10, "the answer takes")):
        with pytest.raises(ValueError, match=rf"rows.jsonl:{number}: .*{reason}"):
            read(build(file))
        lines[number - 1] = json.dumps(rows(1)[0])
        file.write_text("\n".join(lines))


def read(module: PreferenceDataModule) -> list[str]:
    return texts(module, module.train_dataloader())


@pytest.mark.parametrize("weighted", [False, True])
def test_a_file_that_breaks_off_is_counted_once(
    build: Build, tmp_path: Path, weighted: bool
) -> None:
    lines = [json.dumps({"prompt": f"p {n}", "response": f"{n * n}"}).encode() for n in range(900)]
    short = tmp_path / "short.jsonl.gz"
    short.write_bytes(gzip.compress(b"\n".join(lines))[:-2000])
    before = len(list(jsonl_rows(short, lambda *_: None)))
    page = tmp_path / "page.csv"
    page.write_text("<html>404</html>")
    files = [str(short), str(page), str(write(tmp_path / "long.jsonl", rows(3 * before)))]
    train = dict.fromkeys(files, 1.0) if weighted else files
    module = build(train, on_bad_row="reject")
    loader = module.train_dataloader()
    for _ in range(2):
        texts(module, loader)
        assert module.report.rejected == {"truncated gzip": 1, "web page": 1}
    check_counts(module.report, module.report.rows)
    # Mixed, the rows of the short file are drawn again.
    assert (module.report.rows == 4 * before + 2) == (not weighted)
    with pytest.raises(ValueError, match=r"page.csv:1: web page"):
        build(train)
    with pytest.raises(ValueError, match=r"short.jsonl.gz:\d+: truncated gzip"):
        read(build({files[0]: 1.0, files[2]: 1.0} if weighted else files[:1]))


def test_a_file_that_is_not_there_stops_before_training(build: Build, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No file"):
        build([str(tmp_path / "no.jsonl")])
    with pytest.raises(ValueError, match=r"no training row is left(.|\n)*1 missing column"):
        read(build([{"prompt": "q"}], on_bad_row="reject"))


def test_memory_does_not_grow_with_the_file(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "MOST_CACHED", 10)
    row = {"response": "yes", "label": 1}
    file = write(
        tmp_path / "rows.jsonl", ({**row, "prompt": f"{n} {'espresso ' * 40}"} for n in range(1000))
    )
    read(build(rows(4)))  # what is imported and made once
    peaks = []
    for streaming in (True, False):
        tracemalloc.start()
        module = build(file, streaming=streaming, shuffle_block=64)
        assert sum(len(batch.ids) for batch in module.train_dataloader()) == 1000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 2 * peaks[0] < peaks[1]
    assert peaks[0] < 1.5e6
