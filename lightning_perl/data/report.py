"""What became of the rows: read, kept, rejected and why, how long, how labelled."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lightning_perl.data.rows import BadRow, PromptExample, RatedExample
from lightning_perl.metrics import auroc


@dataclass
class SplitReport:
    """What became of the rows of one split; a pair is one row.

    ``up``, ``down`` and ``even`` count the kept rows with a label above, below and in the middle (0.5),
    ``unlabelled`` demonstrations and prompts; ``duplicates`` are repeated prompts (``rows: prompts``), and
    ``cut_turns`` turns that did not fit the window. Lengths are histograms, so a stream of any length takes no
    memory. Of ``longer_chosen`` pairs the chosen answer has more tokens; a tie counts half.
    """

    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    up: int = 0
    down: int = 0
    even: int = 0
    pairs: int = 0
    unlabelled: int = 0
    cut_turns: int = 0
    prompt_tokens: Counter[int] = field(default_factory=Counter)
    response_tokens: Counter[int] = field(default_factory=Counter)
    up_tokens: Counter[int] = field(default_factory=Counter)
    down_tokens: Counter[int] = field(default_factory=Counter)
    longer_chosen: float = 0.0

    @property
    def rows(self) -> int:
        """Rows that came into the split."""
        return self.kept + self.rejected.total() + self.duplicates

    def keep(self, example: RatedExample | PromptExample) -> None:
        """Counts a row, a pair or a prompt that is kept."""
        self.kept += 1
        self.cut_turns += example.cut_turns
        if isinstance(example, PromptExample):
            self.unlabelled += 1
            self.prompt_tokens[len(example.ids)] += 1
            return
        self.prompt_tokens[example.rows[0].response_mask.index(True)] += 1
        lengths = [sum(row.response_mask) for row in example.rows]
        self.response_tokens.update(lengths)
        label, length = example.rows[0].label, lengths[0]
        if len(lengths) == 2:
            self.pairs += 1
            self.longer_chosen += (length > lengths[1]) + 0.5 * (length == lengths[1])
        elif label is None:
            self.unlabelled += 1
        elif label > 0.5:
            self.up += 1
            self.up_tokens[length] += 1
        elif label < 0.5:
            self.down += 1
            self.down_tokens[length] += 1
        else:
            self.even += 1

    @property
    def chosen_longer(self) -> float | None:
        """Share of the pairs whose chosen answer is the longer one, ties half; None without any."""
        return self.longer_chosen / self.pairs if self.pairs else None

    @property
    def length_auroc(self) -> float | None:
        """AUROC of an answer's length as a predictor of its thumb; None without both thumbs."""
        if not (self.up and self.down):
            return None
        lengths = [*self.up_tokens.elements(), *self.down_tokens.elements()]
        return auroc(torch.tensor(lengths), torch.arange(len(lengths)) < self.up)

    def _lengths(self) -> dict[str, tuple[int, int, int]]:
        """Median, 95% quantile and maximum of the tokens."""
        lengths = {"prompt": self.prompt_tokens, "response": self.response_tokens}
        return {
            name: (quantile(counts, 0.5), quantile(counts, 0.95), max(counts))
            for name, counts in lengths.items()
            if counts
        }

    def numbers(self) -> dict[str, float]:
        """Returns what a logger can draw, by name."""
        names = ("rows", "kept", "duplicates", "up", "down", "pairs", "unlabelled", "cut_turns")
        numbers = {name: getattr(self, name) for name in (*names, "chosen_longer", "length_auroc")}
        numbers["rejected"] = self.rejected.total()
        for name, values in self._lengths().items():
            places = (f"{name}_tokens_{suffix}" for suffix in ("median", "95", "max"))
            numbers |= dict(zip(places, values, strict=True))
        return {name: float(number) for name, number in numbers.items() if number is not None}

    def __str__(self) -> str:
        """Returns one line."""
        losses = {"rejected": self.rejected.total(), "repeated": self.duplicates}
        lost = "".join(f", {count} {name}" for name, count in losses.items() if count)
        parts = [f"{self.rows} rows, {self.kept} kept{lost}"]
        if not self.kept:
            return parts[0]
        labels = {
            "thumbs up": self.up,
            "down": self.down,
            "in the middle": self.even,
            "pairs": self.pairs,
            "without a label": self.unlabelled,
        }
        parts.append(", ".join(f"{name} {count}" for name, count in labels.items() if count))
        if self.chosen_longer is not None:
            parts.append(f"chosen is the longer in {self.chosen_longer:.1%}")
        if self.length_auroc is not None:
            parts.append(f"AUROC of the length alone {self.length_auroc:.3f}")
        parts += [
            f"{name} tokens median {median}, 95% {most}, max {longest}"
            for name, (median, most, longest) in self._lengths().items()
        ]
        return "; ".join([*parts, f"{self.cut_turns} turns cut"])


@dataclass
class DataReport:
    """What was read, and what became of it.

    Every row read is kept in one split, rejected (``rejected`` has those of the splits, too), a duplicate (here of
    the whole corpus, dropped before it was divided) or left out, since it belongs to no split. A test split that
    is the validation split counts once. ``conflicts`` are answers with both thumbs, and pairs in both orders.
    ``template`` says how turns were written.
    """

    splits: dict[str, SplitReport] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    conflicts: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    #: Columns that were not read, and of how many rows.
    unread: Counter[str] = field(default_factory=Counter)
    #: Where the rejected rows are, and why they are.
    messages: list[tuple[str, BadRow]] = field(default_factory=list)
    template: str = ""

    @property
    def rows(self) -> int:
        """Rows read; a pair is one."""
        splits = {id(split): split for split in self.splits.values()}.values()
        divided = sum(split.kept + split.duplicates for split in splits)
        return divided + self.rejected.total() + self.duplicates + self.left_out.total()

    def reject(self, where: str, error: BadRow) -> None:
        """Counts a row that cannot be used."""
        self.rejected[error.reason] += 1
        self.messages.append((where, error))

    def numbers(self) -> dict[str, float]:
        """Returns what a logger can draw: ``data/rows``, ``data/train_kept`` and so on."""
        losses = {"rejected": self.rejected.total(), "left_out": self.left_out.total()}
        counts = {"rows": self.rows, "duplicates": self.duplicates, "conflicts": self.conflicts}
        numbers = {f"data/{name}": float(count) for name, count in (counts | losses).items()}
        for name, split in self.splits.items():
            numbers |= {f"data/{name}_{key}": value for key, value in split.numbers().items()}
        return numbers

    def __str__(self) -> str:
        """Returns a line of totals, one per split, and one for each kind of loss."""
        notable = {"duplicates dropped": self.duplicates, "conflicting labels": self.conflicts}
        total = "".join(f", {count} {name}" for name, count in notable.items() if count)
        # Where there are no test rows of their own, measures of a test are those of the validation.
        same = self.splits.get("test") is self.splits.get("val")
        lines = [f"{self.rows} rows read{total}"] + [
            f"{name}: {'the validation rows' if name == 'test' and same else report}"
            for name, report in self.splits.items()
        ]
        titled = {
            "rejected": self.rejected,
            "left out": self.left_out,
            "noted": self.notes,
            "columns not read": self.unread,
        }
        for title, counts in titled.items():
            if counts:
                items = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
                lines.append(f"{title}: {items}")
        if self.template:
            lines.append(f"template: {self.template}")
        # Names of columns may hold half a surrogate pair, which no terminal takes.
        return "\n".join(lines).encode(errors="backslashreplace").decode()

    def write_rejected(self, file: Path) -> None:
        """Lists the rejected rows: file, line, reason and message."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="", encoding="utf-8", errors="backslashreplace") as table:
            rows = csv.writer(table)
            rows.writerow(("file", "line", "reason", "message"))
            for where, error in self.messages:
                file_name, _, line = where.rpartition(":")
                rows.writerow((file_name, line, error.reason, error))


def quantile(counts: Counter[int], share: float) -> int:
    """Returns the smallest value that at least ``share`` of the counted values do not exceed."""
    below = 0
    for value in sorted(counts):
        below += counts[value]
        if below >= share * counts.total():
            return value
    raise ValueError("quantile of nothing.")
