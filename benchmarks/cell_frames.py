"""The frames of a result: a few of the first pair and a short clip, made small, and the reference's beside them; and of
the pair that is furthest from the reference.

A file `ID.frames.npz` with `index` (which frames), `frames` uint8 [4, H, W, 3], `clip` uint8 [n, h, w, 3], and for a
mode `reference_frames` and `reference_clip`. Of several pairs, `worst` is the index of the one whose latents end
furthest off, and if that is not the first, `worst_frames` and `worst_reference_frames` are its frames.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from solostep.engine.errors import OutputError
from solostep.engine.files import replacing

FRAMES = 4
"""Frames of the first pair that a result shows, the first and the last among them."""
CLIP_FRAMES, CLIP_SIDE = 34, 256
"""Of the short clip beside them: so many frames, from the first on, and at most so many pixels a side."""


def write_frames(path: Path, made: np.ndarray, reference: np.ndarray | None, clip: bool = True) -> dict[str, Any]:
    """Writes the file of one pair; gives its name and which frames it shows.

    Raises:
        OutputError: it could not be written.
    """
    index = list(dict.fromkeys(round(i * (len(made) - 1) / (FRAMES - 1)) for i in range(FRAMES)))
    arrays: dict[str, np.ndarray] = {"index": np.array(index)}
    for prefix, frames in (("", made), ("reference_", reference)):
        if frames is not None:
            arrays |= {f"{prefix}frames": frames[index]} | ({f"{prefix}clip": short_clip(frames)} if clip else {})
    _write(path, arrays)
    return {"file": path.name, "index": index}


def put_together(path: Path, first: Path, worst: int | None, file: Path | None) -> dict[str, Any]:
    """Writes a result's file from those of its first pair and of its worst one, the pair ``worst``; None: there is
    but one pair.

    Raises:
        OutputError: it could not be written.
    """
    with np.load(first, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    told: dict[str, Any] = {"file": path.name, "index": arrays["index"].tolist()}
    if worst is not None:
        told["worst"], arrays["worst"] = worst, np.array(worst)
    if worst and file is not None:
        with np.load(file, allow_pickle=False) as stored:
            arrays |= {f"worst_{name}": stored[name] for name in ("frames", "reference_frames")}
    _write(path, arrays)
    return told


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
    except OSError as error:
        raise OutputError(f"{path} could not be written ({error.strerror}); free space there.") from error


def short_clip(frames: np.ndarray) -> np.ndarray:
    """The first frames, made smaller by whole factors: uint8 ``[n, h, w, 3]``."""
    some = torch.from_numpy(np.array(frames[:CLIP_FRAMES])).permute(0, 3, 1, 2).float()
    factor = math.ceil(max(some.shape[2:]) / CLIP_SIDE)
    if factor > 1:
        some = torch.nn.functional.avg_pool2d(some, factor)
    return some.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
