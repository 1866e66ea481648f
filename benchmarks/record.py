"""What the measuring scripts share: children that print JSON, the machine, reports made of sections."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "transformers", "peft")


def processor() -> str:
    """What the CPU calls itself."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """Date, hardware and versions in one line."""
    parts = [date.today().isoformat(), f"{processor()}, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    for package in PACKAGES:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "; ".join(parts)


def shown(command: Sequence[str]) -> str:
    """A command as it stands in a report: this interpreter is ``python``, paths start from here."""
    words = ["python" if word == sys.executable else word for word in command]
    return shlex.join(os.path.relpath(word) if Path(word).is_absolute() else word for word in words)


def run_json(command: Sequence[str]) -> dict[str, Any]:
    """Run a command; what the JSON object in its last line says.

    Args:
        command: Its words. ``python`` alone is this interpreter.

    Raises:
        RuntimeError: It failed, or its last line is no JSON object; with the end of what it said.
    """
    words = [sys.executable if word == "python" else word for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        said = "\n".join([*lines[-5:], *done.stderr.strip().splitlines()[-15:]])
        raise RuntimeError(
            f"{shown(command)} ended with status {done.returncode} and without a JSON object in its last "
            f"line:\n{said}"
        )
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def write_section(report: Path, heading: str, title: str, lines: Sequence[str]) -> None:
    """Put a section into a report; one of the same title is replaced, the others stay.

    Args:
        report: Markdown file, made if missing.
        heading: Its first line, without the mark.
        title: Of the section, without the mark.
        lines: What stands below.
    """
    text = report.read_text(encoding="utf-8") if report.exists() else f"# {heading}\n"
    first, *sections = text.split("\n## ")
    fresh = "\n".join([title, "", *lines]).rstrip() + "\n"
    titles = [section.partition("\n")[0] for section in sections]
    if title in titles:
        sections[titles.index(title)] = fresh
    else:
        sections.append(fresh)
    report.parent.mkdir(parents=True, exist_ok=True)
    whole = "\n\n## ".join(part.rstrip("\n") for part in (first, *sections))
    report.write_text(whole + "\n", encoding="utf-8")


def words_of(report: Path, heading: str = "## What it shows") -> list[str]:
    """The section of a report that was written by hand, which stands last and is kept."""
    said = report.read_text(encoding="utf-8").partition(heading)[2] if report.exists() else ""
    return [heading, *said.rstrip().splitlines()[1:]] if said.strip() else []


def write_study(report: Path, title: str, about: str | None, body: Iterable[str]) -> None:
    """Write a report: title, the script's docstring below its first line, the machine, the body, words by hand.

    Args:
        report: Markdown file, made if missing.
        title: Its first line, without the mark.
        about: The script's docstring; its commands stand indented.
        body: The lines that the script makes of its runs.
    """
    said = (about or "").partition("\n\n")[2].replace("    python", "\n    python", 1)
    made = "\n".join(body).rstrip()
    lines = [
        f"# {title}",
        *said.rstrip().splitlines(),
        "",
        machine(),
        "",
        made,
        "",
        *words_of(report),
    ]
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def study_parser(
    about: str | None, root: str, seeds: Sequence[int] = ()
) -> argparse.ArgumentParser:
    """The flags of a study of a trunk whose runs are kept: a JSON per run below ``root``; no seeds, no flag."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trunk", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path(root), help="where runs are kept")
    if seeds:
        parser.add_argument("--seeds", type=int, nargs="*", default=list(seeds))
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="only the report, of finished runs")
    return parser
