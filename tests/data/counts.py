"""What every report must satisfy, whatever the corpus."""

from __future__ import annotations

from lightning_perl.data.report import DataReport


def check_counts(report: DataReport, rows: int) -> None:
    """Every row read is kept, rejected, a duplicate or left out; ``rows`` are counted elsewhere."""
    splits = list({id(split): split for split in report.splits.values()}.values())
    for split in splits:
        labels = split.up + split.down + split.even + split.pairs + split.unlabelled
        assert split.kept == labels
        assert split.kept == split.prompt_tokens.total()
        answered = split.up + split.down + split.even + 2 * split.pairs
        assert answered <= split.response_tokens.total() <= answered + split.unlabelled
        assert 0 <= split.longer_chosen <= split.pairs
    kept = sum(split.kept for split in splits)
    repeated = report.duplicates + sum(split.duplicates for split in splits)
    assert report.rows == rows
    assert rows == kept + report.rejected.total() + repeated + report.left_out.total()
