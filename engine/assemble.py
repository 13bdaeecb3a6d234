"""A model folder put together from another one: what is copied, what is referred to, and what is checked before.

The networks that are written anew (by a conversion or an import) are left out of it. A file gets its name when it is
whole; one that is there already with its name and size is not copied again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import COMPONENTS, ModelFolder, network_root
from .config import PRESETS
from .errors import OutputError, UsageError
from .headers import read_json

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".so"}
"""Endings of files that are weights or programs. Of these only what the model uses is taken along."""
LEGAL = ("license", "licence", "notice", "copying")
CHUNK = 16 << 20


@dataclass(frozen=True)
class Copy:
    """A file that is taken along as it is."""

    source: Path
    target: Path

    @property
    def size(self) -> int:
        return self.source.stat().st_size

    @property
    def is_done(self) -> bool:
        return self.target.is_file() and self.target.stat().st_size == self.size


@dataclass(frozen=True)
class Rest:
    """What a new folder holds beside the networks that are written anew."""

    copies: tuple[Copy, ...]
    index: Mapping[str, Any]
    """What its model_index.json says."""
    shared: Path | None = None
    """The folder that networks are taken from without a copy."""
    unlinked: tuple[str, ...] = ()
    """Networks that had to be copied although they were to be linked."""


def plan_rest(model: ModelFolder, out: Path, written: Iterable[str], link: bool) -> Rest:
    """The rest of a model, copied to ``out``, or with ``link`` left where it is and named in model_index.json."""
    written = set(written)
    roots = {name: network_root(model.root, name) for name in COMPONENTS}
    others = [name for name in COMPONENTS if name not in written]
    shared = None
    if link and others:  # model_index.json has room for one folder: the one with the most bytes
        sizes = {roots[name]: 0 for name in others}
        for name in others:
            sizes[roots[name]] += model.components[name].stored_bytes
        shared = max(sizes, key=lambda root: sizes[root])
    copies: dict[Path, Copy] = {}

    def take(source: Path, root: Path) -> None:
        target = out / source.relative_to(root)
        copies.setdefault(target, Copy(source, target))

    for name in COMPONENTS:
        root = roots[name]
        if name in written:
            for file in _beside_weights(root / name):
                if not file.name.endswith(".index.json") and file.name != "quantization.json":
                    take(file, root)
        elif root != shared:
            for file in (*model.components[name].files, *_beside_weights(root / name)):
                take(file, root)
    for root in dict.fromkeys((model.root, *roots.values())):
        for file in sorted(root.iterdir()):
            if file.is_file() and file.name.lower().startswith(LEGAL):
                take(file, root)
        for file in _beside_weights(root / "scheduler"):
            take(file, root)
    unlinked = tuple(name for name in others if shared is not None and roots[name] != shared)
    return Rest(tuple(copies.values()), _model_index(model, out, shared), shared, unlinked)


def _beside_weights(folder: Path) -> Iterator[Path]:
    """Configurations, tokenizers, licences: the files of a folder that are no weights, without hidden ones."""
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.is_file() and file.suffix not in WEIGHTS and not any(part.startswith(".") for part in inside.parts):
            yield file


def _model_index(model: ModelFolder, out: Path, shared: Path | None) -> dict[str, Any]:
    """The source's, with the preset (Turbo shows nowhere but in the name of its folder) and with what is shared."""
    path = model.root / "model_index.json"
    index = read_json(path) if path.exists() else {"_class_name": "StepVideoPipeline"}
    section = {key: value for key, value in index.get("solostep", {}).items() if key != "shared"}
    preset = section.get("preset") or (model.preset.name if model.preset.name in PRESETS else "t2v")
    section["preset"] = "ti2v" if model.is_image_to_video else preset
    if shared is not None:
        beside = shared.parent == out.parent
        section["shared"] = f"../{shared.name}" if beside else str(shared)
    return {**index, "solostep": section}


def check_place(out: Path, model: ModelFolder) -> None:
    """Refuses an output folder that is part of the source, or the other way round.

    Raises:
        UsageError: and says which.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"-o {out} is a file; give the name of a new folder.")
    for root in dict.fromkeys((model.root, *(network_root(model.root, name) for name in COMPONENTS))):
        if out == root:
            raise UsageError(f"-o {out} is the model itself, which is never written to; give the name of a new folder.")
        if root in out.parents:
            raise UsageError(f"-o {out} is inside the model {root}; give a folder outside of it.")
        if out in root.parents:
            raise UsageError(f"-o {out} holds the model {root}; give the name of a new folder.")


def check_space(out: Path, needed: int) -> None:
    """Raises OutputError if the disk of ``out`` has less than ``needed`` bytes."""
    place = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"{out} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "free some, or give a folder on another disk with -o."
        )


def copy_files(copies: Iterable[Copy], progress: Callable[[str, int, int], None]) -> None:
    """Copies what is not there yet.

    Raises:
        OSError: a file cannot be read or written.
    """
    left = [copy for copy in copies if not copy.is_done]
    total, done = sum(copy.size for copy in left), 0
    for copy in left:
        copy.target.parent.mkdir(parents=True, exist_ok=True)
        part = copy.target.with_name(f".{copy.target.name}.part")
        try:
            with copy.source.open("rb") as source, part.open("wb") as target:
                while chunk := source.read(CHUNK):
                    target.write(chunk)
                    done += len(chunk)
                    progress("copy the rest", done, total)
                target.flush()
                os.fsync(target.fileno())
            os.replace(part, copy.target)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file in one atomic step.

    Raises:
        OSError: it could not be written; an earlier file is as it was.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            json.dump(values, stream, ensure_ascii=False, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
