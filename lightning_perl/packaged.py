"""Files that come with the package: ``packaged:quickstart/trunk`` is found wherever a path is asked for."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PREFIX = "packaged:"


def unpackaged(source: str) -> str:
    """The path of a ``packaged:`` name; any other source as it is.

    Raises:
        FileNotFoundError: The package has no such file.
    """
    if not source.startswith(PREFIX):
        return source
    path = Path(str(files("lightning_perl").joinpath(source.removeprefix(PREFIX))))
    if not path.exists():
        raise FileNotFoundError(
            f"{source}: lightning_perl ships no such file; it ships packaged:quickstart/trunk and "
            "packaged:quickstart/orders/prompts_train.jsonl.gz (also rated_, pairs_; also _val, _test)."
        )
    return str(path)
