"""Files of public corpora: where they lie, and fetched once from where their authors publish them."""

from __future__ import annotations

import http.client
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info

from lightning_perl.data.reading import is_html

Part: TypeAlias = Literal["train", "val", "test"]
_SECONDS = 30.0


@dataclass(frozen=True)
class Remote:
    """A file in its official place.

    Attributes:
        path: Its place below the data folder, with forward slashes.
        url: Where it is published.
        sha256: Its checksum in hexadecimal, or how that begins; None where the authors may change the file.
    """

    path: str
    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class Corpus:
    """A corpus of ``corpora.yaml``, which says what these are; ``remotes`` are empty without an official place."""

    home: str
    layouts: tuple[dict[Part, str], ...]
    remotes: tuple[Remote, ...] = ()

    def files(self, folder: Path) -> list[tuple[Part, Path]]:
        """Returns the files of the first layout that has any below the data folder, and their splits."""
        for layout in self.layouts:
            patterns = [(part, pattern) for part in layout for pattern in layout[part].split()]
            files = [(part, file) for part, name in patterns for file in matching(folder, name)]
            if files:
                return files
        return []


@cache
def corpora() -> dict[str, Corpus]:
    """Returns what ``corpora.yaml`` says of each corpus."""
    table = yaml.safe_load(Path(__file__).with_name("corpora.yaml").read_text(encoding="utf-8"))
    read = {}
    for name, entry in table.items():
        folders = [f"{folder}/" for folder in entry.get("folders", ())] or [""]
        named = [
            f"{below}{file}".split() for below, file in product(folders, entry.get("files", ()))
        ]
        remotes = tuple(
            Remote(f"{entry['folder']}/{file}", f"{entry['url']}/{file}", *sums)
            for file, *sums in named
        )
        read[name] = Corpus(entry["home"], tuple(entry["layouts"]), remotes)
    return read


def matching(folder: Path, pattern: str) -> list[Path]:
    """Returns the files of a pattern in their order; a file and its gzip are one file."""
    files = {str(file).removesuffix(".gz"): file for file in folder.glob(f"{pattern}.gz")}
    files |= {str(file): file for file in folder.glob(pattern)}
    return [files[name] for name in sorted(files)]


def fetch_all(remotes: Sequence[Remote], folder: Path) -> None:
    """Downloads what is not below ``folder``, plain or gzip-compressed.

    Files appear under their names when all of them are whole and have the right checksums: a download that stopped
    leaves no half corpus, which a later run would take for the whole.

    Raises:
        FileNotFoundError: One could not be downloaded; says what to put where by hand.
        ValueError: What came is a web page or has another checksum. It is not kept.
    """
    missing = [
        remote for remote in remotes if not matching(folder, remote.path.removesuffix(".gz"))
    ]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        for number, remote in enumerate(missing):
            rank_zero_info(f"Downloading {remote.url} to {folder / remote.path}")
            _download(remote, Path(scratch, str(number)), folder / remote.path)
        for number, remote in enumerate(missing):
            file = folder / remote.path
            file.parent.mkdir(parents=True, exist_ok=True)
            Path(scratch, str(number)).replace(file)


def _download(remote: Remote, target: Path, file: Path) -> None:
    patience = socket.getdefaulttimeout()
    # torch.hub has no timeout of its own: a server that falls silent would be waited for without end.
    socket.setdefaulttimeout(_SECONDS)
    try:
        torch.hub.download_url_to_file(remote.url, str(target), remote.sha256, progress=False)
    except RuntimeError as error:
        raise ValueError(
            f"{remote.url}: {error}; nothing was kept. Try again; if it stays so, the authors changed the file: "
            f"look at what changed, then put it at {file} by hand."
        ) from error
    except (http.client.HTTPException, OSError) as error:
        raise FileNotFoundError(
            f"No {file}, and it could not be downloaded ({error}). Download {remote.url} on a machine with a "
            f"network and put it at {file}, or point data.data_dir at a folder that has it."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    with target.open("rb") as content:
        if is_html(content.read(512)):
            raise ValueError(
                f"{remote.url} sent a web page in place of {file.name}; nothing was kept. Open the address in a "
                f"browser, download the file and put it at {file}."
            )
