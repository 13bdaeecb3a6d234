"""Latents on disk: one file that is overwritten after each step, so that no finished step is ever lost.

A safetensors file with one fp32 tensor ``latents [1, f, c, h, w]`` and, in its metadata, what they were made from.
It is written to a temporary name, flushed and renamed: at any moment the file on disk is whole. `solostep decode`
reads the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import OutputError, UsageError
from .files import replacing

FORMAT = 1
SUFFIX = ".latents.safetensors"


@dataclass
class SavedLatents:
    """Latents after ``step`` of ``steps``, with the identity of the run that made them.

    ``identity`` is everything that the result depends on but the seed: model, texts, settings, precision, image.
    ``info`` is for people and for `decode`: prompt, model, frames, sizes.
    """

    latents: Tensor
    step: int
    steps: int
    seed: int
    seed_given: bool
    identity: dict[str, Any]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def save_latents(path: Path, saved: SavedLatents) -> None:
    """Writes the file in one atomic step.

    Raises:
        OutputError: it could not be written (disk full, no permission); an earlier file is as it was.
    """
    from safetensors.torch import save

    described = {k: getattr(saved, k) for k in ("step", "steps", "seed", "seed_given", "identity", "info")}
    metadata = {"solostep": json.dumps({"format": FORMAT, **described}, ensure_ascii=False)}
    data = save({"latents": saved.latents.detach().cpu().float().contiguous()}, metadata=metadata)
    try:
        with replacing(path) as temporary, temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OutputError(
            f"{path} could not be written ({error.strerror}); free space there or give another -o."
        ) from error


def read_latents(path: Path) -> SavedLatents:
    """Reads latents back.

    Raises:
        UsageError: no such file, or not one of ours, or damaged.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise UsageError(f"{path}: there is no such file of latents; check the name.")
    try:
        with safe_open(str(path), framework="pt") as file:
            described = json.loads((file.metadata() or {})["solostep"])
            latents = file.get_tensor("latents").clone()
        if described.pop("format") != FORMAT or latents.ndim != 5 or latents.dtype != torch.float32:
            raise ValueError("another format")
        return SavedLatents(latents=latents, **described)
    except Exception as error:
        raise UsageError(
            f"{path} is not a file of latents that solostep wrote, or it is damaged ({type(error).__name__}); "
            "give another file."
        ) from None


def lock(path: Path, folder: Path, held: contextlib.ExitStack) -> None:
    """Keeps a second process from working on the same latents; the lock ends with ``held``, or with the process.

    Raises:
        UsageError: another process has it.
        OutputError: the folders of the latents or of the lock cannot be made.
    """
    from filelock import FileLock, Timeout

    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    try:
        for needed in (folder, path.parent):
            needed.mkdir(parents=True, exist_ok=True)
        held.enter_context(FileLock(folder / f"{name}.lock", timeout=0))
    except Timeout:
        raise UsageError(f"Another process is already making {path}; wait for it, or choose another output.") from None
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder} cannot be written ({error.strerror}); set SOLOSTEP_CACHE to a folder that can."
        ) from error


def find_resumable(path: Path, identity: dict[str, Any], seed: int | None) -> SavedLatents | None:
    """What an earlier run of the same generation left at ``path``; None if there is nothing worth keeping.

    Raises:
        UsageError: the file belongs to another generation and is not finished: going on would lose it.
    """
    if not path.exists():
        return None
    try:
        saved = read_latents(path)
    except UsageError:
        raise UsageError(
            f"{path} is in the way and is not a file of latents; move it, or choose another output."
        ) from None
    same_seed = saved.seed == seed if seed is not None else not saved.seed_given
    if saved.identity == identity and same_seed:
        return saved
    if saved.finished or saved.step == 0:  # nothing in it would be lost
        return None
    changed = sorted(k for k in identity if saved.identity.get(k) != identity[k]) or ["seed"]
    raise UsageError(
        f"{path} holds an unfinished generation (step {saved.step} of {saved.steps}) that differs in "
        f"{', '.join(changed)}; finish it with its own settings, delete it, or choose another output."
    )


def holds_finished(path: Path) -> bool:
    """Whether final latents lie at ``path``."""
    with contextlib.suppress(UsageError):
        return read_latents(path).finished
    return False


def save_or_rescue(path: Path, saved: SavedLatents) -> Path:
    """Saves final latents; if their place fails (disk full), to the temporary folder. Returns where they are.

    Raises:
        OutputError: neither place could be written.
    """
    try:
        save_latents(path, saved)
        return path
    except OutputError as first:
        rescue = Path(tempfile.gettempdir()) / path.name
        try:
            save_latents(rescue, saved)
        except OutputError:
            raise first from None
        return rescue
