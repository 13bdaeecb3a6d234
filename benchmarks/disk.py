"""What the reference runs of cells still take of the disk.

References that are there, whole or begun, are found by what they are made from. What lies there of other code, weights,
texts or settings is of no use to them, and is not counted. Cost: reading a small file a reference, and the latents of
those that are begun.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from solostep.benchmarks.matrix import Matrix, Planned, reference_key
from solostep.benchmarks.reference import CODE, FOLDER, PART, RUN, kept_latents
from solostep.benchmarks.reference_code import official_code
from solostep.benchmarks.results import read_json
from solostep.engine.errors import UsageError


def bytes_to_come(matrix: Matrix, planned: Sequence[Planned], work: Path) -> int:
    """Bytes that the references of cells take beside what a folder of work has of them."""
    wanted = matrix.references(planned)
    for key, there in _there(matrix, work / FOLDER):
        if key in wanted:
            wanted[key] = max(0, wanted[key] - there)
    return sum(wanted.values())


def _there(matrix: Matrix, folder: Path) -> Iterator[tuple[str, int]]:
    """The references that this code uses or goes on with: what each is made from, and its bytes."""
    for place in folder.iterdir() if folder.is_dir() else ():
        try:
            key = _begun(place) if place.name.endswith(PART) else _finished(matrix, place)
        except (OSError, UsageError, KeyError, TypeError):  # damaged, or in work: made again
            continue
        if key is not None:
            # Of the frames of one that is begun nothing is used.
            files = place.glob("latents/*") if place.name.endswith(PART) else place.rglob("*")
            yield key, sum(file.stat().st_size for file in files if file.is_file())


def _finished(matrix: Matrix, place: Path) -> str | None:
    made = read_json(place / "identity.json")
    weights = {name: c.fingerprint for name, c in matrix.folder.components.items()}
    ours = {"code": official_code(), "torch": torch.__version__, "weights": weights}
    if any(made[name] != value for name, value in ours.items()) or (made["device"][0] == "cpu") != (
        matrix.device.type == "cpu"
    ):
        return None
    return reference_key(made["texts"], made["settings"], made["seed"])


def _begun(place: Path) -> str | None:
    if (place / CODE).read_text(encoding="utf-8") != official_code():
        return None
    saved = kept_latents(place / RUN)
    return None if saved is None else reference_key(saved.info["texts"], saved.identity["settings"], saved.seed)
