"""Which of our files the bits of a reference run come from, and what they hold: the pipeline's imports, followed.

Everything that :mod:`solostep.engine.pipeline` imports, directly or not, at the top of a file or in a function, counts:
a change in any of it makes references anew, which costs a run for each, where one that was missed would measure drift
against numbers of other code. Only what :data:`APART` names is left out, and a test holds that no run of the official
numerics calls any of it. Cost: parsing 50 files, 0.3 s once a process.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START = "engine/pipeline.py"
APART = (
    "engine/demo/__init__.py", "engine/rates.py", "engine/sensitivity.py", "engine/video.py",
)  # fmt: skip
"""Imported by functions that a reference run does not call: they find the demo model, tell seconds, measure recipes,
and write mp4 files."""


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """Our own files that one imports, wherever in it."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(filter(None, (node.module or "").split(".")))
            if node.level:  # all of our packages lie one below the other, with the root above them
                base = ("solostep", *package[: len(package) - node.level + 1], *base)
            names = [base, *((*base, alias.name) for alias in node.names)]
        for name in names:
            if name[:1] == ("solostep",) and len(name) > 1:
                place = root.joinpath(*name[1:])
                yield from (p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file())


def official_files(root: Path = ROOT) -> list[Path]:
    """The files that a run of the official numerics may come to."""
    found, left = set[Path](), [root / START]
    while left:
        file = left.pop()
        if file not in found and file.relative_to(root).as_posix() not in APART:
            found.add(file)
            left += _imported(file, root)
    return sorted(found)


@functools.cache
def official_code(root: Path = ROOT) -> str:
    """Identity of the code that makes a reference's bits."""
    digest = hashlib.sha256()
    for file in official_files(root):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
