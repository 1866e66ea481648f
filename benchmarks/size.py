"""How large the package is: lines by room, longest bodies, deepest nesting, constructor plumbing, tests.

    python benchmarks/size.py --tree ../before

All lines of all ``.py`` files count. A *body* is a function without signature and docstring. *Nesting* counts
if, for, while, with, try and match within a function (an ``elif`` is no deeper than its ``if``). *Plumbing* is
what constructors in ``data`` and ``modules`` take to declare arguments and hand them on: the lines of their
signatures, of ``Args:`` in their classes' docstrings, of ``super().__init__(...)``, and of ``self.name = name``;
the last tree of version 0.1 has 1,170.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

LIMITS = {
    "package": 12500, "data": 3600, "plumbing": 350, "longest body": 40, "deepest nesting": 3,
    "modules/ppo.py": 170, "modules/reinforce.py": 90, "modules/inpo.py": 110, "longest other leaf": 80,
    "longest loss file": 45, "tests per package line": 1.25,
}  # fmt: skip
LEAVES = [
    "dpo",
    "grpo",
    "kto",
    "raft",
    "remax",
    "rloo",
    "sft",
    "superhf",
]
PLUMBED = ("data", "modules")
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith)
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef


class Function(NamedTuple):
    """A function: where it stands, the lines of its body, and how deep it nests."""

    place: str
    body: int
    nesting: int


def docstring_of(node: ast.AST) -> ast.Expr | None:
    """The statement that is the docstring of a module, class or function."""
    if not isinstance(node, ast.Module | ast.ClassDef | DEFINITIONS) or not ast.get_docstring(node):
        return None
    first = node.body[0]
    return first if isinstance(first, ast.Expr) else None


def depth(node: ast.AST) -> int:
    """How deep blocks nest below a node; functions and classes within start anew."""
    deepest = 0
    for name, value in ast.iter_fields(node):
        parts = value if isinstance(value, list) else [value]
        chained = name == "orelse" and isinstance(node, ast.If) and len(parts) == 1
        for part in parts:
            if isinstance(part, ast.AST) and not isinstance(part, ast.ClassDef | DEFINITIONS):
                block = isinstance(part, BLOCKS) and not (chained and isinstance(part, ast.If))
                deepest = max(deepest, block + depth(part))
    return deepest


def functions(tree: ast.AST, file: str) -> Iterator[Function]:
    """Every function of a file."""
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS):
            documented = docstring_of(node)
            rest = node.body[1:] if documented else node.body
            size = (node.end_lineno or 0) - rest[0].lineno + 1 if rest else 0
            yield Function(f"{file}:{node.lineno} {node.name}", size, depth(node))


def arguments_documented(node: ast.ClassDef) -> int:
    """Lines of ``Args:`` in a class's docstring."""
    count, inside = 0, False
    for line in (ast.get_docstring(node) or "").splitlines():
        inside = line == "Args:" or (inside and (not line or line.startswith(" ")))
        count += inside and bool(line)
    return count


def plumbing(tree: ast.AST) -> Counter[str]:
    """Lines of plumbing in a file's constructors, by kind."""
    found: Counter[str] = Counter()
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        found["documented"] += arguments_documented(owner)
        for function in owner.body:
            if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                found["declared"] += function.body[0].lineno - function.lineno
                for node in ast.walk(function):
                    match node:
                        case ast.Call(func=ast.Attribute(attr="__init__")):
                            found["handed on"] += (node.end_lineno or 0) - node.lineno + 1
                        case ast.Assign(
                            targets=[ast.Attribute(attr=name)], value=ast.Name(id=given)
                        ):
                            found["kept"] += name == given
    return found


def size(path: Path, tree: ast.AST) -> Counter[str]:
    """Lines, code and docstrings of a file; what is left is blank or comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    written: set[int] = set()
    for docstring in filter(None, map(docstring_of, ast.walk(tree))):
        written.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    code = sum(
        number not in written and line.strip()[:1] not in ("", "#")
        for number, line in enumerate(lines, 1)
    )
    return Counter(lines=len(lines), code=code, docstrings=len(written))


def print_rooms(rooms: dict[str, Counter[str]]) -> None:
    """A line per room, the largest last, and their sum."""
    columns = ("lines", "code", "docstrings", "tests")
    print("".join(f"{column:>12}" for column in columns))
    by_lines = sorted(rooms.items(), key=lambda room: room[1]["lines"])
    for room, counted in [*by_lines, ("all", sum(rooms.values(), Counter()))]:
        print("".join(f"{counted[column]:12}" for column in columns) + f"  {room}")


def main() -> None:
    """Print the counts; with ``--limits`` exits with 1 where one is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="a checkout")
    parser.add_argument("--shown", type=int, default=12, help="longest bodies that are shown")
    parser.add_argument("--limits", action="store_true", help=f"refuse more than {LIMITS}")
    args = parser.parse_args()
    package = args.tree / "lightning_perl"
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    found: dict[str, float] = {}
    every: list[Function] = []
    pipes: Counter[str] = Counter()
    for path in sorted(package.rglob("*.py")):
        file, tree = path.relative_to(package), ast.parse(path.read_text(encoding="utf-8"))
        counted = size(path, tree)
        rooms[file.parts[0]].update(counted)
        found[file.as_posix()] = counted["lines"]
        every.extend(functions(tree, file.as_posix()))
        pipes.update(plumbing(tree) if file.parts[0] in PLUMBED else {})
    for path in sorted((args.tree / "tests").rglob("*.py")):
        room = path.relative_to(args.tree / "tests").parts[0].removeprefix("test_")
        lines = len(path.read_text(encoding="utf-8").splitlines())
        rooms[room if room in rooms else "other tests"]["tests"] += lines
    print_rooms(rooms)
    total = sum(rooms.values(), Counter[str]())
    bodies, deep = (
        sorted(every, key=key, reverse=True) for key in map(attrgetter, ("body", "nesting"))
    )
    shown = [f"{f.body:5} lines  {f.place}" for f in bodies[: args.shown]]
    shown += [
        f"{f.nesting:5} deep  {f.place}" for f in deep if f.nesting > LIMITS["deepest nesting"]
    ]
    print("\n".join(["", *shown, "", f"plumbing: {dict(pipes)}"]))
    found |= {
        "package": total["lines"],
        "data": rooms["data"]["lines"],
        "plumbing": pipes.total(),
        "longest other leaf": max(found[f"modules/{leaf}.py"] for leaf in LEAVES),
        "longest loss file": max(n for file, n in found.items() if file.startswith("losses/")),
        "longest body": bodies[0].body,
        "deepest nesting": deep[0].nesting,
        "tests per package line": total["tests"] / total["lines"],
    }
    broken = [name for name, most in LIMITS.items() if found.get(name, 0) > most]
    for name, most in LIMITS.items():
        mark = "  BROKEN" * (name in broken)
        print(f"{name}: {round(found.get(name, 0), 3)} (at most {most}){mark}")
    sys.exit(bool(args.limits and broken))


if __name__ == "__main__":
    main()
