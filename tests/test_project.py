"""The project's own files: versions, bounds, README commands, config headers, nothing private."""

from __future__ import annotations

import ast
import gzip
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from packaging.requirements import Requirement

import lightning_perl
from lightning_perl import modules
from lightning_perl.commands.parsing import _arguments
from lightning_perl.data import PreferenceDataModule
from tests.test_floors import imported_names

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest itself depends on tomli there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
CONFIGS = sorted(
    [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("lightning_perl/quickstart/**/*.yaml")]
)


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def marked_block(text: str, marker: str) -> str:
    """Returns the one bash block that follows the line `<!-- marker -->`, as .ci/run reads it."""
    (block,) = re.findall(rf"^<!-- {marker} -->\n\s*^```bash\n(.*?)^```$", text, re.M | re.S)
    return str(block)


def texts_of_the_repository() -> Iterator[tuple[str, str]]:
    """Yields (path, text) of every text that is tracked or not yet added, without what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content[:8192]:
            yield name, content.decode("utf-8")


def test_version_is_the_same_everywhere() -> None:
    version = project()["version"]
    assert version == lightning_perl.__version__
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_importing_the_root_is_cheap() -> None:
    code = "import sys, lightning_perl; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_malicious_lightning_uploads_are_excluded() -> None:
    (requirement,) = [r for r in project()["dependencies"] if re.match(r"lightning\b", r)]
    assert {"!=2.6.2", "!=2.6.3"} <= set(requirement.removeprefix("lightning").split(","))


def test_constraints_pin_every_requirement_within_its_bounds() -> None:
    text = (ROOT / "constraints.txt").read_text("utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", text, re.M))
    extras = project()["optional-dependencies"]
    for line in [*project()["dependencies"], *extras["test"], *extras["quantization"]]:
        wanted = Requirement(line)
        assert wanted.name == project()["name"] or pins[wanted.name] in wanted.specifier, line


def test_every_requirement_has_its_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    start = lines.index("dependencies = [")
    end = lines.index("[tool.hatch.build.targets.wheel]")
    bare = [
        line
        for before, line in zip(lines[start:end], lines[start + 1 : end], strict=False)
        if re.match(r'\s+"', line) and "#" not in line and not before.strip().startswith("#")
    ]
    assert bare == []


def test_every_imported_package_is_required() -> None:
    required = {re.split(r"[^\w-]", r)[0].replace("-", "_") for r in project()["dependencies"]}
    # PyYAML is imported as yaml.
    sources = packages_distributions().items()
    required |= {name for name, owners in sources if required & {*map(str.lower, owners)}}
    for path in ROOT.glob("lightning_perl/**/*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        names = imported_names(tree, path.relative_to(ROOT).parts[:-1])
        imported = {name.partition(".")[0] for _, name in names}
        assert imported <= required | sys.stdlib_module_names | {"lightning_perl"}, path


@pytest.mark.parametrize("marker", ["quickstart-command", "test-command"])
def test_readme_has_the_marked_command(marker: str) -> None:
    block = marked_block((ROOT / "README.md").read_text("utf-8"), marker)
    # One command: in a block of several, `set -e` does not see a failure left of `&&`.
    commands = block.replace("\\\n", " ").strip().splitlines()
    assert len(commands) == 1
    assert commands[0].startswith("pip install ")
    assert " -c constraints.txt && " in commands[0]


def test_the_marked_command_must_stand_once() -> None:
    block = "<!-- test-command -->\n```bash\npytest\n```\n"
    assert marked_block(block, "test-command") == "pytest\n"
    for text in (block + block, "", "<!-- test-command -->\nText.\n\n```bash\npytest\n```\n"):
        with pytest.raises(ValueError, match="values to unpack"):
            marked_block(text, "test-command")


def test_pre_commit_runs_what_the_gate_runs() -> None:
    gate = re.findall(r'^step "([^"]+)" (.+)$', (ROOT / ".ci" / "run").read_text("utf-8"), re.M)
    hooks = re.findall(
        r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text("utf-8"), re.M
    )
    assert hooks
    assert hooks == [command for name, command in gate if name == command]


# Joined here, so that this file does not name them either. A folder of that name inside a longer
# path (`a/work/b`) or a URL is nobody's machine.
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:" + "|".join(("work", "root")) + ")/")


@pytest.mark.parametrize("name", ["work", "root"])
def test_machine_path_is_seen(name: str) -> None:
    assert MACHINE_PATH.search(f'open("/{name}/x")')
    assert MACHINE_PATH.search(f"/{name}/x")
    assert not MACHINE_PATH.search(f"https://example.org/{name}/x a/{name}/b ../{name}/c ~/{name}/")


def test_no_file_names_a_machine_path() -> None:
    named = [
        f"{path}: {line.strip()[:100]}"
        for path, text in texts_of_the_repository()
        for line in text.splitlines()
        if MACHINE_PATH.search(line)
    ]
    assert named == []


def phrases(text: str) -> Iterator[tuple[str, ...]]:
    """Yields every run of 14 words, which two texts share only when one was copied."""
    words = re.findall(r"[a-z0-9']+", text.replace(r"\n", " ").lower())
    return zip(*(words[start:] for start in range(14)), strict=False)


def test_copied_phrase_is_seen() -> None:
    row = '{"text": "a b c d e f g h i j k l m n", "rating": 1}'
    assert set(phrases("A b, c d e f.\ng h i j k l m n!")) & set(phrases(row))
    assert not set(phrases("a b c d e f g h i j k l m")) & set(phrases(row))


def test_no_file_holds_rows_of_the_corpora() -> None:
    archives = sorted(DATA.rglob("*.gz"))
    if not archives:
        pytest.skip("needs ../shared/data")
    ours = {phrase: path for path, text in texts_of_the_repository() for phrase in phrases(text)}
    copied = set()
    for archive in archives:
        rows = gzip.decompress(archive.read_bytes()).decode("utf-8")
        copied |= {f"{ours[phrase]}: {' '.join(phrase)}" for phrase in ours.keys() & phrases(rows)}
    assert copied == set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_config_opens_with_three_comment_lines(path: Path) -> None:
    command, source, hardware = path.read_text("utf-8").splitlines()[:3]
    # The command that runs it, the source of its values, the hardware it was run on.
    assert command.startswith("# ")
    assert "lightning_perl" in command
    assert path.name in command
    assert re.match(r"# .{10,}", source)
    assert re.match(r"# .{3,}", hardware)


def test_the_page_for_trl_s_users_names_arguments_that_exist() -> None:
    page = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
    checked = 0
    for section in page.split("\n## ")[1:]:
        classes = [
            getattr(modules, name) for name in re.findall(r"`(\w+)`", section.split("\n")[0])
        ]
        for line in re.findall(r"^\| `?.*\|$", section, re.MULTILINE):
            _, theirs, ours, *_ = line.split("|")
            if "---" in line or theirs.strip() == "TRL":
                continue
            for name in re.findall(r"`([\w.]+)`", ours):
                owner, dot, argument = name.rpartition(".")
                others: dict[str, list[Any]] = {
                    "data": [PreferenceDataModule],
                    "trainer": [Trainer],
                }
                owners = others.get(owner, classes)
                known = set().union(*(_arguments(f"{o.__module__}.{o.__name__}") for o in owners))
                assert (argument if dot else name) in known, line
                checked += 1
    assert checked > 40
