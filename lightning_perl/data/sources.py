"""Where a user's own rows come from: files, data sets of the hub, Python lists, several of them."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from lightning_perl.data.files import (
    BadRowHook,
    arrow_rows,
    csv_rows,
    json_rows,
    jsonl_rows,
    parquet_rows,
)
from lightning_perl.packaged import unpackaged

T = TypeVar("T")
Rows: TypeAlias = Iterator[tuple[str, Mapping[str, Any]]]
Sources: TypeAlias = list[Any] | dict[str, float] | str | Path
"""A file (``packaged:NAME`` for one of this package), a name of the hub, a list of rows, a list of files
and names, or a mapping from files and names to weights."""

_READERS: dict[str, Callable[[Path, BadRowHook], Rows]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
_HUB = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?::([^/]+))?")


class HubName(NamedTuple):
    """A data set of the Hugging Face hub, written ``owner/name`` or ``owner/name/config:split``."""

    name: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Source:
    """One place that rows come from: a path, a name of the hub, or the rows themselves.

    ``argument`` is the one that named it, for error messages; ``weight`` its share in a mixture.
    """

    argument: str
    place: str | Sequence[Mapping[str, Any]]
    weight: float | None = None

    def rows(self, bad_row: BadRowHook, streaming: bool = False) -> Rows:
        """Yields ``(where, row)``; ``streaming`` reads a data set of the hub while it is fetched."""
        if not isinstance(self.place, str):
            return _listed(self.argument, self.place, bad_row)
        if self.hub is not None:
            name = f"{self.hub.name}:{self.hub.split}"
            table = self._load(self.hub, streaming).with_format("arrow")
            rows = arrow_rows(table.iter(batch_size=1024), name, bad_row)
            return ((f"{name}:{number}", row) for number, row in rows)
        file = Path(self.place).expanduser()
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

    @property
    def hub(self) -> HubName | None:
        """The data set of the hub that is meant; None where it is a file, or should be one."""
        if not isinstance(self.place, str):
            return None
        path = Path(self.place).expanduser()
        name = _HUB.fullmatch(self.place)
        # As with models: where OWNER is a folder here, or the end says so, a path was meant.
        if name is None or path.exists() or path.parent.is_dir() or _suffix(path) in _READERS:
            return None
        return HubName(name[1], name[2], name[3] or "train")

    def fetch(self) -> None:
        """Fetches a data set of the hub into its cache; does nothing for files and lists."""
        if self.hub is not None:
            self._load(self.hub, streaming=False)

    def _load(self, hub: HubName, streaming: bool) -> Any:  # noqa: ANN401 (datasets has no types)
        # Imported where it is needed: it takes seconds, and most runs read files.
        import datasets

        try:
            return datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=streaming)
        # An OSError: no network, offline mode, no such data set; a ValueError: no such config, split.
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise FileNotFoundError(
                f"{self.argument}: {self.place!r} is no file here (looked from {Path.cwd()}), and the hub did "
                f"not give it: {reason}. With a network, check the name, config and split at "
                f"https://huggingface.co/datasets/{hub.name}. Without one, download its .parquet, .jsonl or .csv "
                f"files from there elsewhere, copy them here, and set {self.argument} to their path."
            ) from error


def sources_of(value: Sources, argument: str) -> list[Source]:
    """Returns the sources that an argument names; see :data:`Sources`."""
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
        # An element that is no row is a bad row, with its number.
        if not any(isinstance(place, str | Path) for place in value):
            return [Source(argument, value)]
    raise ValueError(
        f"{argument} must be a file, a name of the hub, a list of rows (mappings), a list of files "
        f"and names, or a mapping from files and names to weights; got {str(value)[:80]!r}."
    )


def shuffled_stream(
    read: Sequence[Callable[[], Iterator[T]]],
    weights: Sequence[float] | None,
    buffer: int,
    seed: int,
    epoch: int,
) -> Iterator[T]:
    """Yields from several streams, shuffled by ``datasets``: a function of (seed, epoch).

    Args:
        read: Opens a stream at its start. None of the streams is empty.
        weights: Draw from the streams in these proportions until each was read through; one that is
            through before begins again. None: each stream once.
        buffer: Elements that are in memory to be shuffled.
        seed: Seed of the order.
        epoch: Every epoch has its own order.
    """
    if not read:
        return
    import datasets
    from datasets.iterable_dataset import ExamplesIterable

    def examples(number: int) -> Iterator[tuple[object, dict[str, bytes]]]:
        # Pickled: datasets would cast all rows to the columns and types of the first one.
        for place, element in enumerate(read[number]()):
            yield (0, place), {"element": pickle.dumps(element)}

    info = datasets.DatasetInfo(features=datasets.Features({"element": datasets.Value("binary")}))
    streams = [
        datasets.IterableDataset(ExamplesIterable(examples, {"number": number}), info=info)
        for number in range(len(read))
    ]
    if weights is None:
        mixture = datasets.concatenate_datasets(streams)
    else:
        shares = [weight / sum(weights) for weight in weights]
        mixture = datasets.interleave_datasets(
            streams, shares, seed=seed, stopping_strategy="all_exhausted"
        )
    mixture = mixture.shuffle(seed=seed, buffer_size=buffer)
    mixture.set_epoch(epoch)
    for example in mixture:
        yield pickle.loads(example["element"])


def _suffix(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def _listed(argument: str, rows: Sequence[Mapping[str, Any]], bad_row: BadRowHook) -> Rows:
    for number, row in enumerate(rows, start=1):
        where = f"{argument}:{number}"
        if isinstance(row, Mapping):
            yield where, row
        else:
            bad_row("wrong type", f"{where}: expected a mapping, got {type(row).__name__}.")
