"""Tests on tiny files in the corpora's true layout, and on the real files where they are."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.data import TaskmasterDataModule, taskmaster
from lightning_perl.data.corpus import Remote
from lightning_perl.data.rows import Item, Pair, Row, Splits, Turn, assign_folds, hold_out
from lightning_perl.data.taskmaster import dialog_key
from tests.data.counts import check_counts
from tests.data.golden import assert_golden
from tests.data.taskmaster_files import (
    GREETING,
    agent,
    dialog,
    rated,
    thumbs,
    user,
    write,
)

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
Build = Callable[..., TaskmasterDataModule]


@pytest.fixture
def build(tmp_path: Path, tokenizer_dir: Path) -> Build:
    def make(**arguments: Any) -> TaskmasterDataModule:
        defaults: dict[str, Any] = {"tokenizer": str(tokenizer_dir), "max_tokens": 256}
        return TaskmasterDataModule(data_dir=tmp_path, **defaults | arguments)

    return make


UTTERANCE = {"speaker": "user", "text": "x"}


def single(items: Iterable[Item]) -> list[Row]:
    return [item for item in items if not isinstance(item, Pair)]


def read_all(module: TaskmasterDataModule) -> list[Row]:
    return single(item for split in module.read() for item in split)


def test_both_coffee_formats_become_the_same_turns(build: Build, tmp_path: Path) -> None:
    write(tmp_path / "taskmaster-coffee/reward/reward_00.json.gz", thumbs(1))
    write(tmp_path / "taskmaster-coffee/data/data_00.json.gz", [dialog(0)])
    rows = read_all(build())
    demonstration = next(row for row in rows if row.label is None)
    assert demonstration.context == (Turn("user", "latte number 0 please"),)
    assert demonstration.response == (
        Turn("agent", 'call get_menu_items {"query": "latte"}'),
        Turn("api", 'get_menu_items {"ok": true}'),
        Turn("agent", "call show_menu"),
        Turn("api", 'show_menu {"ok": tru'),
        Turn("agent", "Done."),
    )
    up, down = (next(row for row in rows if row.label == label) for label in (1.0, 0.0))
    assert up.response == (Turn("agent", 'call get_menu_items {"query": "espresso"}'),)
    assert down.context[2:] == (*up.response, Turn("api", 'get_menu_items {"items": ["é"]}'))
    assert (up.imitate, down.imitate, demonstration.imitate) == (True, False, True)
    assert up.dialog == down.dialog


def test_from_raw_text_to_ids_and_back(build: Build, tmp_path: Path) -> None:
    write(tmp_path / "TM-4-2024/reward/reward_00.json", thumbs())
    module = build(demonstrations=False, folds=2, batch_size=3)
    module.setup("fit")
    assert module.splits is not None
    rows = single(module.splits.train)
    for batch in module.train_dataloader():
        assert isinstance(batch, RatedBatch)
        for ids, mask, response, number, label in zip(
            batch.ids,
            batch.attention_mask,
            batch.response_mask,
            batch.row,
            batch.label,
            strict=True,
        ):
            row = rows[int(number)]
            start = "".join(
                f"{'User' if turn.role == 'user' else 'API'}: {turn.text}\n"
                if turn.role != "agent"
                else f"Agent: {turn.text}<eos>"
                for turn in row.context
            )
            answer = f" {row.response[0].text.strip()}<eos>"
            assert module.tokenizer.decode(ids[mask]) == f"<bos>{start}Agent:{answer}"
            assert module.tokenizer.decode(ids[response]) == answer
            assert float(label) == row.label


def test_repeated_rows_are_used_once_and_conflicts_counted(build: Build, tmp_path: Path) -> None:
    once = thumbs()
    again = [once[0], once[0], {**once[1], "reward": 1.0}]
    write(tmp_path / "taskmaster-coffee/reward/reward_00.json", once + again)
    module = build(demonstrations=False)
    assert len(read_all(module)) == len(once) + 1
    assert (module.report.duplicates, module.report.conflicts) == (2, 1)
    words = r"reward_00.json:2: conflicting labels: .*reward_00.json:43 says the opposite"
    with pytest.raises(ValueError, match=words):
        build(demonstrations=False, keep_conflicts=False, on_bad_row="raise").read()
    module = build(demonstrations=False, keep_conflicts=False)
    assert len(read_all(module)) == len(once) - 1
    assert module.report.rejected == {"conflicting labels": 2}


def test_empty_contexts_and_empty_api_names_are_rows(build: Build, tmp_path: Path) -> None:
    empty = [rated([], agent("We open at 8.")), rated([], {"role": "agent", "api": {"": {}}})]
    write(tmp_path / "taskmaster-coffee/reward/reward_00.json", [*thumbs(), *empty])
    rows = read_all(build(demonstrations=False))
    texts = [row.response[0].text for row in rows if not row.context]
    assert sorted(texts) == ["We open at 8.", "call {}"]


def test_prompts_are_the_distinct_contexts(build: Build, tmp_path: Path) -> None:
    start = [GREETING, user("hi")]
    rows = thumbs(8) + [rated(start, agent(f"answer {n}")) for n in range(4)]
    write(tmp_path / "taskmaster-coffee/reward/reward_00.json", rows)
    # The largest group, the four answers to one context, is in fold 0.
    module = build(demonstrations=False, rows="prompts", val_fraction=0.0, folds=2, fold=1)
    module.setup()
    assert module.splits is not None
    contexts = {row.context for row in single(module.splits.train)}
    assert len(contexts) == len(module.splits.train) - 3
    batches = list(module.train_dataloader())
    assert all(isinstance(batch, PromptBatch) for batch in batches)
    numbers = sorted(number for batch in batches for number in batch.row.tolist())
    assert numbers == list(range(len(contexts)))
    for batch in batches:
        for ids, mask in zip(batch.ids, batch.mask, strict=True):
            assert str(module.tokenizer.decode(ids[mask])).endswith("Agent:")
            assert bool(mask[-1])


def test_folds_are_disjoint_by_dialog_and_the_same_for_every_seed(
    build: Build, tmp_path: Path
) -> None:
    write(tmp_path / "taskmaster-coffee/reward/reward_00.json", thumbs())
    tested: Counter[str] = Counter()
    for fold in range(5):
        splits = build(demonstrations=False, fold=fold).read()
        assert splits == build(demonstrations=False, fold=fold, seed=7).read()
        groups = [{row.dialog for row in single(split)} for split in splits]
        assert not groups[0] & groups[1]
        assert not (groups[0] | groups[1]) & groups[2]
        assert all(groups)
        tested.update(groups[2])
    assert set(tested.values()) == {1}
    assert len(tested) == 20


def test_train_folds_keep_a_judge_apart(build: Build, tmp_path: Path) -> None:
    write(tmp_path / "taskmaster-coffee/reward/reward_00.json", thumbs())
    policy = build(demonstrations=False, train_folds=[1, 2]).read()
    judge = build(demonstrations=False, train_folds=[3, 4]).read()
    seen = [{row.dialog for row in single(s.train + s.val)} for s in (policy, judge)]
    assert not seen[0] & seen[1]
    assert policy.test == judge.test


def test_folds_are_balanced_and_independent_of_the_order_of_rows() -> None:
    groups = [str(n) for n in range(30) for _ in range(1 + n % 7)]
    folds = assign_folds(groups, 5)
    assert folds == assign_folds(reversed(groups), 5)
    sizes = Counter(folds[group] for group in groups)
    assert max(sizes.values()) - min(sizes.values()) <= 1
    held = hold_out(groups, 0.2)
    assert held == hold_out(reversed(groups), 0.2)
    assert len(held) == 6


def test_short_contexts_are_grouped_with_their_answer() -> None:
    hello, wish, answer = Turn("agent", "hello"), Turn("user", "tea"), Turn("agent", "Sure")
    assert dialog_key((hello, wish), (answer,)) == dialog_key((hello, wish, answer, wish), (wish,))
    assert dialog_key((), (hello,)) != dialog_key((), (answer,))
    assert dialog_key((hello,), (wish,)) == dialog_key((hello, wish), (answer,))


def test_demonstrations_are_split_by_their_words(build: Build, tmp_path: Path) -> None:
    dialogs = [dialog(number % 30) for number in range(60)]
    for row in dialogs[30:]:
        row["utterances"][0]["annotations"][3]["value"] = '{"order_id": "2"}'
    write(tmp_path / "taskmaster-coffee/data/data_00.json", [*dialogs, dialogs[0]])
    module = build(thumbs=False)
    splits = module.read()
    assert [len(split) for split in splits] == [48, 6, 6]
    groups = [{row.dialog for row in single(split)} for split in splits]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 30
    assert module.report.duplicates == 1


def test_both_forms_of_the_ticketing_dialogs(build: Build, tmp_path: Path) -> None:
    utterances = [
        {"index": 0, "speaker": "user", "text": "Emma, please.", "apis": [], "segments": []},
        {
            "index": 1,
            "speaker": "assistant",
            "text": "One moment.",
            "apis": [
                {
                    "name": "find_theaters",
                    "index": 1,
                    "args": {"name.movie": "Emma"},
                    "response": {"name.theater": ["Roxy", "Odeon"]},
                }
            ],
        },
        {"index": 2, "speaker": "assistant", "text": "Roxy or Odeon?", "segments": []},
        {"index": 3, "speaker": "user", "text": "bye", "apis": []},
    ]
    row = {"conversation_id": "dlg-1", "vertical": "Movie Tickets", "utterances": utterances}
    write(tmp_path / "TM-3-2020/data/data_00.json", [row])
    table = tmp_path / "TM-3-2020/splits/train/train-aa.tsv"
    table.parent.mkdir(parents=True)
    table.write_text("<U>hi\t[A]x\td\n")
    (demonstration,) = read_all(build(task="ticketing", thumbs=False))
    assert demonstration.context == (Turn("user", "Emma, please."),)
    assert demonstration.response == (
        Turn("agent", "One moment."),
        Turn("agent", 'call find_theaters {"name.movie": "Emma"}'),
        Turn("api", 'find_theaters {"name.theater": ["Roxy", "Odeon"]}'),
        Turn("agent", "Roxy or Odeon?"),
    )
    (tmp_path / "TM-3-2020/data/data_00.json").unlink()
    (turn,) = read_all(build(task="ticketing", thumbs=False))
    assert turn.response == (Turn("agent", "x"),)


@pytest.mark.parametrize("task", ["coffee", "ticketing"])
def test_what_is_missing_is_fetched(
    build: Build, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[Remote] = []
    monkeypatch.setattr(taskmaster, "fetch_all", lambda remotes, _: wanted.extend(remotes))
    release = {"coffee": "TM-4-2024", "ticketing": "TM-3-2020"}[task]
    build(task=task, demonstrations=False).prepare_data()
    number = {"coffee": 7, "ticketing": 8}[task]
    assert [remote.path for remote in wanted] == [
        f"{release}/reward/reward_{n:02d}.json" for n in range(number)
    ]
    assert all(remote.url.endswith(f"/{remote.path}") and remote.sha256 for remote in wanted)
    write(tmp_path / f"{release}/reward/reward_00.json", thumbs())
    wanted.clear()
    build(task=task).prepare_data()
    number = {"coffee": 8, "ticketing": 20}[task]
    assert [remote.path for remote in wanted] == [
        f"{release}/data/data_{n:02d}.json" for n in range(number)
    ]


def test_a_dialog_without_an_agent_turn_is_counted(build: Build, tmp_path: Path) -> None:
    lonely = dialog(1)
    lonely["utterances"] = lonely["utterances"][2:]
    write(tmp_path / "taskmaster-coffee/data/data_00.json", [lonely, dialog(2)])
    module = build(thumbs=False)
    module.setup()
    assert module.report.rejected == {"dialog without an agent turn": 1}


def test_linearised_ticketing_turns(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "TM-3-2020/splits/train/train-bc.tsv"
    file.parent.mkdir(parents=True)
    rows = [
        (
            '<PR>find_movies<PRAN>name.movie<PRAV>Mulan<PRAV>"Emma"<C><S><A>Hello.<U>What is on?'
            "<PN>find_movies<PAN>location<PAV>nearby<PAN>genre<PAV>a<PAV>b",
            '[A]Mulan and "Emma".',
            "dlg-1",
        ),
        ("<U>tickets please<C><U>hi<A>hello", "[PN]book[PAN]count[PAV]two", "dlg-2"),
        ("<U>hi", "[A]Let me see.[PN]find_movies", "dlg-3"),
    ]
    with file.open("w", newline="") as lines:
        csv.writer(lines, "excel-tab").writerows(rows)
    first, second, third = sorted(
        read_all(build(task="ticketing", thumbs=False, val_fraction=0.0)), key=lambda row: row.where
    )
    assert first.context == (
        Turn("agent", "Hello."),
        Turn("user", "What is on?"),
        Turn("agent", 'call find_movies {"location": "nearby", "genre": ["a", "b"]}'),
        Turn("api", 'find_movies {"name.movie": ["Mulan", "\\"Emma\\""]}'),
    )
    assert first.response == (Turn("agent", 'Mulan and "Emma".'),)
    assert second.context[-1] == Turn("user", "tickets please")
    assert second.response == (Turn("agent", 'call book {"count": "two"}'),)
    assert third.response == (Turn("agent", "Let me see."), Turn("agent", "call find_movies {}"))
    assert [row.dialog for row in (first, second, third)] == ["dlg-1", "dlg-2", "dlg-3"]


@pytest.mark.parametrize("task", ["coffee", "ticketing"])
def test_a_missing_file_says_what_to_download(build: Build, tmp_path: Path, task: str) -> None:
    release = {"coffee": "TM-4-2024", "ticketing": "TM-3-2020"}[task]
    words = (
        rf"No reward_\*.json \(or reward_\*.json.gz\) in .*taskmaster-{task}/reward .*Download "
        rf"{release}/reward/reward_\*.json of "
        "https://github.com/google-research-datasets/Taskmaster"
    )
    with pytest.raises(FileNotFoundError, match=words):
        build(task=task, demonstrations=False).read()


def test_a_file_and_its_gzip_are_read_once_and_the_folder_itself_will_do(
    build: Build, tmp_path: Path
) -> None:
    write(tmp_path / "reward/reward_00.json", thumbs())
    write(tmp_path / "reward/reward_00.json.gz", thumbs())
    module = build(demonstrations=False)
    assert len(read_all(module)) == 40
    assert not module.report.notes


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("reward", 3, "expected an object, got int"),
        ("reward", {"context": "[]"}, "KeyError: 'generation'"),
        ("reward", {**thumbs(1)[0], "context": "[{"}, "JSONDecodeError"),
        ("reward", {**thumbs(1)[0], "context": []}, "TypeError: the JSON object must be str"),
        ("reward", rated([], agent("x"), 0.5), "the reward must be 0.0 or 1.0, got 0.5"),
        ("reward", rated([], {"role": "cook", "text": ""}), "not a turn: .*cook"),
        ("data", "hello", "not a spoken utterance: h"),
        ("data", [{"speaker": "cook", "text": "x"}], "not a spoken utterance: .*cook"),
        (
            "data",
            [{**UTTERANCE, "annotations": [{"name": 1}]}],
            "KeyError: 'value'|KeyError: 'context'",
        ),
        ("data", [{**UTTERANCE, "annotations": 1}], "not iterable"),
        ("data", [{**UTTERANCE, "apis": [{"name": "book"}]}], "KeyError: 'args'"),
        ("sft", "<U>hi\t[A]x", "expected 3, got 2"),
        ("sft", "hi<U>\t[A]x\td", "text before the first tag: 'hi'"),
        ("sft", "<U>hi<PAV>x\t[A]x\td", "<PAV> without the name"),
        ("sft", "<U>hi\t[U]x\td", "a turn that is not the agent's"),
        (
            "sft",
            '<U>hi\t[A]x\t"d\r\n<U>hi\t[A]x\td',
            r"broken table: no table .unexpected end of data\)",
        ),
    ],
)
def test_what_is_not_the_corpus_names_file_and_row(
    build: Build, tmp_path: Path, name: str, bad: object, words: str
) -> None:
    task, file = "coffee", tmp_path / f"taskmaster-coffee/{name}/{name}_00.json"
    if name == "reward":
        write(file, [thumbs(1)[0], bad])
    elif name == "data":
        write(file, [dialog(0), {"utterances": bad}])
    else:
        task, file = "ticketing", tmp_path / "taskmaster-ticketing/sft/train-bc.tsv"
        file.parent.mkdir(parents=True)
        file.write_text(f"<U>hi\t[A]x\td\r\n{bad}\r\n", newline="")
    read: dict[str, Any] = {"task": task, "thumbs": name == "reward"}
    read["demonstrations"] = not read["thumbs"]
    with pytest.raises(ValueError, match=f"{file.name}:2: .*{words}"):
        build(on_bad_row="raise", **read).read()
    module = build(**read)
    assert len(read_all(module)) == 1
    assert module.report.rejected.total() == 1


def test_a_live_tokenizer_will_do_and_held_out_rows_come_in_order(
    build: Build, tmp_path: Path, tokenizer_dir: Path
) -> None:
    write(tmp_path / "taskmaster-coffee/reward/reward_00.json", thumbs())
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    module = build(tokenizer=tokenizer, demonstrations=False, val_batch_size=3)
    module.setup()
    assert module.tokenizer is tokenizer
    for loader in (module.test_dataloader(), module.predict_dataloader()):
        batches = list(loader)
        assert [number for batch in batches for number in batch.row.tolist()] == list(range(8))
        assert len(batches) == 3


def test_broken_files_among_good_ones_are_a_rejection_each(build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "taskmaster-coffee"
    write(folder / "reward/reward_00.json", thumbs(10))
    write(folder / "data/data_00.json", [dialog(number) for number in range(5)])
    (folder / "reward/reward_01.json.gz").write_bytes(gzip.compress(b"[]")[:-4])
    (folder / "reward/reward_02.json").write_text("<html>404</html>")
    (folder / "data/data_01.json").write_text("[")
    module = build()
    module.setup()
    assert module.report.rejected == {"truncated gzip": 1, "web page": 1, "broken JSON": 1}
    check_counts(module.report, 28)
    with pytest.raises(ValueError, match=r"data_01.json:1: broken JSON"):
        build(on_bad_row="raise").setup()
    (folder / "reward/reward_00.json").unlink()
    with pytest.raises(ValueError, match=r"no training row is left(.|\n)*1 truncated gzip, 1 web"):
        build(demonstrations=False).setup()


def test_deep_json_names_file_and_line(build: Build, tmp_path: Path) -> None:
    deep = "[" * 9000 + "]" * 9000
    module = build(demonstrations=False, on_bad_row="raise")
    file = tmp_path / "taskmaster-coffee/reward/reward_00.json"
    file.parent.mkdir(parents=True)
    file.write_text(f'[\n{{"context": "]]",\n"a": {deep}}}]')
    words = r"reward_00.json:3: broken JSON \(nested too deeply, column 9005\)"
    with pytest.raises(ValueError, match=words):
        module.read()
    write(file, [thumbs(1)[0], {**thumbs(1)[0], "generation": deep}])
    with pytest.raises(ValueError, match=r"json:2: broken row: .*nested too"):
        build(demonstrations=False, on_bad_row="raise").read()


@pytest.mark.parametrize(("dialogs", "sizes"), [(1, [1, 0, 0]), (3, [2, 1, 0]), (10, [8, 1, 1])])
def test_few_demonstrations_keep_one_for_validation(
    build: Build, tmp_path: Path, dialogs: int, sizes: list[int]
) -> None:
    rows = [dialog(number) for number in range(dialogs)]
    write(tmp_path / "taskmaster-coffee/data/data_00.json", rows)
    assert [len(split) for split in build(thumbs=False).read()] == sizes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"demonstrations": False, "thumbs": False}, "nothing to read"),
        ({"fold": 5}, "data.fold must be from 0 to data.folds - 1, got fold 5 of 5"),
        ({"train_folds": [0, 1]}, r"data.train_folds must be some of \[1, 2, 3, 4\]"),
        ({"train_folds": []}, "data.train_folds must be some of"),
        ({"max_response_tokens": 256}, "leave room for a prompt below data.max_tokens = 256"),
    ],
)
def test_bad_arguments_are_refused_at_construction(
    build: Build, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build(**arguments)


def real(tokenizer_dir: Path, task: str, **arguments: Any) -> TaskmasterDataModule:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    defaults: dict[str, Any] = {"tokenizer": tokenizer_dir, "task": task}
    return TaskmasterDataModule(data_dir=SHARED, **defaults | arguments)


def test_real_coffee_thumbs(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = real(tokenizer_dir, "coffee", demonstrations=False)
    labels: Counter[float | None] = Counter()
    divide = module._divide_thumbs

    def count_and_divide(items: list[Item], splits: Splits) -> None:
        labels.update(row.label for row in single(items))
        divide(items, splits)

    monkeypatch.setattr(module, "_divide_thumbs", count_and_divide)
    rows = read_all(module)
    assert labels == {1.0: 2_775, 0.0: 453}
    assert len(rows) == 2_997
    assert module.report.duplicates == 231
    assert not module.report.rejected
    assert sum(not row.context for row in rows) == 6
    # 881 groups of the first two turns, the six empty contexts being one of them.
    assert len({row.dialog for row in rows if row.context}) == 880


def test_real_ticketing_thumbs(tokenizer_dir: Path) -> None:
    module = real(tokenizer_dir, "ticketing", demonstrations=False)
    rows = read_all(module)
    assert len(rows) + module.report.duplicates == 3_667
    assert module.report.conflicts == 5
    assert len({row.dialog for row in rows}) == 271
    assert sum(not row.response[0].text for row in rows) == 4
    assert max(len(row.context) for row in rows) == 86


def test_real_demonstrations(tokenizer_dir: Path) -> None:
    coffee = real(tokenizer_dir, "coffee", thumbs=False)
    rows = read_all(coffee)
    assert len(rows) + coffee.report.duplicates == 3_710
    assert len({row.dialog for row in rows}) == 3_710 - 23
    assert all(row.context[0].role == "user" for row in rows)
    assert all(row.response[-1].role == "agent" for row in rows)
    ticketing = real(tokenizer_dir, "ticketing", thumbs=False)
    rows = read_all(ticketing)
    assert len(rows) + ticketing.report.duplicates == 1_517
    # 1,462 ids; the one repeated row was all there is of its second id.
    assert len({row.dialog for row in rows}) == 1_461
    first = Counter(row.response[0].text.startswith("call ") for row in rows)
    assert abs(first[True] - 549) <= 1


@pytest.mark.parametrize("task", ["coffee", "ticketing"])
def test_no_real_context_leaks_into_another_split(tokenizer_dir: Path, task: str) -> None:
    splits = real(tokenizer_dir, task, demonstrations=False).read()
    first = single(splits.train + splits.val)
    seen = {row.context[:length] for row in first for length in range(2, len(row.context) + 1)}
    held = single(splits.test)
    assert len(held) > 500
    assert not [row.where for row in held if len(row.context) >= 2 and row.context in seen]
    prefixes = {row.context[:length] for row in held for length in range(2, len(row.context) + 1)}
    assert not [row.where for row in first if len(row.context) >= 2 and row.context in prefixes]


def test_real_ticketing_contexts_are_cut_from_the_left_and_the_counts_add_up(
    tokenizer_dir: Path,
) -> None:
    module = real(tokenizer_dir, "ticketing", demonstrations=False)
    module.setup()
    report = module.report
    assert report.splits["train"].cut_turns > 1_000
    assert max(report.splits["train"].prompt_tokens) <= 512 - 128
    kept = sum(split.kept for split in report.splits.values())
    assert report.rows == 3_667 == kept + report.duplicates + report.rejected.total()
    assert report.rejected["empty answer"] == 4
    batch = next(iter(module.val_dataloader()))
    assert isinstance(batch, RatedBatch)
    assert torch.equal(batch.row, torch.arange(8))


@pytest.mark.parametrize("task", ["coffee", "ticketing"])
def test_three_real_rows_from_raw_text_to_tokens_and_back(tokenizer_dir: Path, task: str) -> None:
    module = real(tokenizer_dir, task, demonstrations=False)
    files = sorted((SHARED / f"taskmaster-{task}/reward").glob("*.gz"))
    raw = json.loads(gzip.decompress(files[0].read_bytes()))
    by_place = {row.where: row for row in read_all(module)}
    for number in (1, 2, 3):
        generation = json.loads(raw[number - 1]["generation"])
        row = by_place[f"{files[0]}:{number}"]
        assert row.label == raw[number - 1]["reward"]
        assert len(row.context) == len(json.loads(raw[number - 1]["context"]))
        encoded = module.encoder.encode(row, 2_048, 256)
        assert_golden(module, row, encoded)
        answer = row.response[0].text
        if "api" in generation:
            ((name, arguments),) = generation["api"].items()
            assert answer == f"call {name} {json.dumps(arguments, ensure_ascii=False)}"
        else:
            assert answer == generation["text"]
