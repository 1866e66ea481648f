"""Where rows of one's own come from: files, data sets of the hub, Python lists, several of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeAlias, TypeVar

from lightning_perl.data.files import (
    BadRowHook,
    csv_rows,
    json_rows,
    jsonl_rows,
    parquet_rows,
)
from lightning_perl.packaged import unpackaged

T = TypeVar("T")
Rows: TypeAlias = Iterator[tuple[str, Mapping[str, Any]]]
Sources: TypeAlias = list[Any] | dict[str, float] | str | Path
"""A file, a name of the hub, a list of rows, a list of files and names, or their weights."""

_READERS: dict[str, Callable[[Path, BadRowHook], Rows]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
_HUB = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?::([^/]+))?")


class HubName(NamedTuple):
    """A data set of the Hugging Face hub, written ``owner/name``, ``owner/name/config:split``.

    Attributes:
        name: ``owner/name``.
        config: One of its configurations, or None.
        split: As ``datasets`` writes it, also ``train[:1000]``.
    """

    name: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Source:
    """One place that rows come from.

    Attributes:
        argument: The argument that named it, for error messages.
        place: A path or a name of the hub; or the rows themselves.
        weight: Its share among the others; None where rows are not weighted.
    """

    argument: str
    place: str | Sequence[Mapping[str, Any]]
    weight: float | None = None

    def rows(self, bad_row: BadRowHook, streaming: bool = False) -> Rows:
        """Yields ``(where, row)``.

        Args:
            bad_row: Gets what is not a row at all, and a file that cannot be read to its end.
            streaming: Read a data set of the hub while it is fetched, not as a whole first.

        Raises:
            FileNotFoundError: Neither a file nor a data set of the hub that can be had.
            ValueError: A file of a format that is not read.
        """
        if not isinstance(self.place, str):
            return _listed(self.argument, self.place, bad_row)
        hub = self.hub
        if hub is not None:
            return self._hub_rows(hub, streaming)
        return self._file_rows(Path(self.place).expanduser(), bad_row)

    @property
    def hub(self) -> HubName | None:
        """The data set of the hub that is meant; None where it is a file, or should be one."""
        if not isinstance(self.place, str):
            return None
        path = Path(self.place).expanduser()
        found = _HUB.fullmatch(self.place)
        # As with models: where OWNER is a folder here, or the end says so, a path was meant.
        if found is None or path.exists() or path.parent.is_dir() or _suffix(path) in _READERS:
            return None
        return HubName(found[1], found[2], found[3] or "train")

    def fetch(self) -> None:
        """Fetches a data set of the hub into its cache; does nothing for files and lists.

        Raises:
            FileNotFoundError: It cannot be had.
        """
        if self.hub is not None:
            self._load(self.hub, streaming=False)

    def _load(self, hub: HubName, streaming: bool) -> Any:  # noqa: ANN401 (datasets has no types)
        # Here, because it takes a second and most runs read files.
        import datasets

        try:
            return datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=streaming)
        # An OSError: no network, offline mode, no such data set; a ValueError: no such config, split.
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise FileNotFoundError(
                f"{self.argument}: {self.place!r} is no file here (looked from {Path.cwd()}), and "
                f"the hub did not give it: {reason}. With a network, check the "
                f"name, config and split at https://huggingface.co/datasets/{hub.name}. Without "
                "one, download its .parquet, .jsonl or .csv files from there elsewhere, copy them "
                f"here, and set {self.argument} to their path."
            ) from error

    def _hub_rows(self, hub: HubName, streaming: bool) -> Rows:
        name = ":".join((hub.name, hub.split))
        for number, row in enumerate(self._load(hub, streaming), start=1):
            yield f"{name}:{number}", row

    def _file_rows(self, file: Path, bad_row: BadRowHook) -> Rows:
        if not file.is_file():
            raise FileNotFoundError(
                f"No file {str(file)!r} ({self.argument}; looked from {Path.cwd()}). Give the path "
                "of a .jsonl, .json, .csv or .parquet file, or owner/name of a data set of the hub."
            )
        suffix = _suffix(file)
        if suffix not in _READERS or file.name.endswith(".parquet.gz"):
            raise ValueError(
                f"{file}: cannot read {''.join(file.suffixes)!r} files. Use .jsonl, .json, .csv "
                "(also with .gz) or .parquet."
            )
        return _READERS[suffix](file, bad_row)


def sources_of(value: Sources, argument: str) -> list[Source]:
    """Returns the sources that an argument names.

    Args:
        value: A file (``packaged:NAME`` for one of this package), a name of the hub, a list of rows,
            a list of files and names, or a mapping from files and names to weights.
        argument: Its name, for error messages.

    Raises:
        ValueError: None of these, or a weight that is not above 0.
        FileNotFoundError: The package has no such file.
    """
    if isinstance(value, str | Path):
        return [Source(argument, unpackaged(str(value)))]
    if isinstance(value, Mapping) and value:
        for place, weight in value.items():
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"{argument}: the weight of {place!r} must be above 0, got {weight}. Leave out "
                    "what is not wanted."
                )
        return [
            Source(argument, unpackaged(str(place)), float(weight))
            for place, weight in value.items()
        ]
    if isinstance(value, list) and value:
        if all(isinstance(place, str | Path) for place in value):
            return [Source(argument, unpackaged(str(place))) for place in value]
        # What is not a row is a bad row, with its number.
        if not any(isinstance(place, str | Path) for place in value):
            return [Source(argument, value)]
    raise ValueError(
        f"{argument} must be a file, a name of the hub, a list of rows (mappings), a list of files "
        f"and names, or a mapping from files and names to weights; got {str(value)[:80]!r}."
    )


def mixed(
    read: Sequence[Callable[[], Iterator[T]]], weights: Sequence[float], order: Random
) -> Iterator[T]:
    """Yields from several streams in proportion to their weights, until each was read through.

    The one that is through first begins again, so nothing of a longer one is ever skipped. One that
    has nothing is not opened again.

    Args:
        read: Opens a stream at its start.
        weights: Chances of the streams; their sum does not matter.
        order: Decides which is next.
    """
    streams = [start() for start in read]
    chances = list(weights)
    unread = set(range(len(streams)))
    begun: set[int] = set()
    while unread:
        (number,) = order.choices(range(len(streams)), chances)
        try:
            found = next(streams[number])
        except StopIteration:
            unread.discard(number)
            if number not in begun:
                chances[number] = 0.0
            streams[number] = read[number]()
            continue
        begun.add(number)
        yield found


def _suffix(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def _listed(argument: str, rows: Sequence[Mapping[str, Any]], bad_row: BadRowHook) -> Rows:
    for number, row in enumerate(rows, start=1):
        where = f"{argument}:{number}"
        if isinstance(row, Mapping):
            yield where, row
        else:
            bad_row("wrong type", f"{where}: expected a mapping, got {type(row).__name__}.")
