"""The frames of a result: a few of the first pair and a short clip, made small, and the reference's beside them.

A file `ID.frames.npz` with `index` (which frames), `frames` uint8 [4, H, W, 3], `clip` uint8 [n, h, w, 3], and for a
mode `reference_frames` and `reference_clip`.
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


def write_frames(path: Path, made: np.ndarray, reference: np.ndarray | None) -> dict[str, Any]:
    """Writes the file; gives its name and which frames it shows.

    Raises:
        OutputError: it could not be written.
    """
    index = list(dict.fromkeys(round(i * (len(made) - 1) / (FRAMES - 1)) for i in range(FRAMES)))
    arrays: dict[str, np.ndarray] = {"index": np.array(index)}
    for prefix, frames in (("", made), ("reference_", reference)):
        if frames is not None:
            arrays |= {f"{prefix}frames": frames[index], f"{prefix}clip": short_clip(frames)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
    except OSError as error:
        raise OutputError(f"{path} could not be written ({error.strerror}); free space there.") from error
    return {"file": path.name, "index": index}


def short_clip(frames: np.ndarray) -> np.ndarray:
    """The first frames, made smaller by whole factors: uint8 ``[n, h, w, 3]``."""
    some = torch.from_numpy(np.array(frames[:CLIP_FRAMES])).permute(0, 3, 1, 2).float()
    factor = math.ceil(max(some.shape[2:]) / CLIP_SIDE)
    if factor > 1:
        some = torch.nn.functional.avg_pool2d(some, factor)
    return some.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
