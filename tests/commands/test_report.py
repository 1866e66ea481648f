"""``report``: what stands in the page, and that it needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_perl.cli import main
from lightning_perl.commands.report import report
from lightning_perl.commands.trained import series_of

METRICS = """step,epoch,rollout/score,rollout/kl,val/score,odd,train/loss
0,0,1.0,0.0,,,0.5
1,0,2.0,0.5,1.5,,
2,0,,,2.5,7,nan
"""


class Page(HTMLParser):
    """Tags that are open, and what a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.images: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        given = dict(attrs)
        self.images += [given.get("alt") or ""] * (tag == "img")
        source = given.get("src") or given.get("href") or "data:"
        self.fetched += [source] * (not source.startswith("data:"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my runs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(METRICS)
    rows = [
        {"step": step, "prompt": "a <b>?", "before": "<script>", "after": f"at {step}",
         "score_before": None, "score_after": 1.25}
        for step in (1, 2)
    ]  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "config.yaml").write_text("model:\n  trunk: <x>\ndata:\n  train: rows\n")
    (folder.parent / "latest").symlink_to("version_0")
    return folder


def test_a_page_that_needs_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(run.parent)])
    target = run.parent / "latest" / "report.html"
    assert capsys.readouterr().out == f"wrote {target}\n"
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == page.fetched == []
    titles = ["Score", "KL to the reference, nats per response", "Loss", "rollout/score over KL"]
    assert page.images == titles
    # Texts stay text, and the last samples alone are shown.
    assert "<script>" not in text
    assert "[not finite]\n&lt;script&gt;" in text
    assert "[+1.25]\nat 2" in text
    assert "at 1" not in text
    assert "trunk: &lt;x&gt;" in text
    assert re.search(r'<td>val/score</td><td class="number">2.5</td>', text)


def test_series_have_their_steps_and_gaps(run: Path) -> None:
    series = series_of(run / "metrics.csv")
    assert series["val/score"] == [(1.0, 1.5), (2.0, 2.5)]
    assert series["odd"] == [(2.0, 7.0)]
    assert "epoch" not in series


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no metrics.csv. Give a run's folder"):
        main(["report", str(tmp_path)])


def test_a_run_that_was_killed_in_a_line_is_reported_without_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = run / "samples.jsonl"
    samples.write_text(samples.read_text()[:-9])
    page = report(run).read_text()
    assert "Answers at step 1" in page
    assert "samples.jsonl:2: broken JSON" in capsys.readouterr().out
    (run / "metrics.csv").write_text("step,val/score\n1,much\n")
    with pytest.raises(ValueError, match=r"metrics.csv is no table of numbers .*'much'"):
        report(run)
