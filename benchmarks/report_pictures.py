"""Pictures for the page: frames of the reference and a mode side by side with their amplified difference, and a short
loop of both. All are WebP inside the page (`data:` addresses).

The difference is |a - b| times one factor for all modes of a group, so that they can be compared; it is said beside
them. Cost: pictures are made smaller and coarser until a group's fit into its share of the page (`BUDGET` bytes in
all). Error: frames of up to 160 pixels are kept to the bit, larger ones go through WebP; numbers are never taken from
pictures.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from solostep.benchmarks.report_data import Group, Row
from solostep.engine.errors import UsageError

BUDGET = 5_500_000
"""Bytes of all pictures of a page, before base64 adds a third."""
SMALL = 160
"""Frames up to this width are kept to the bit."""
FACTORS = (1, 2, 5, 10, 20, 50, 100)
SHOWN = 3
"""Frames side by side."""
GAP = 4


@dataclass(frozen=True)
class Pictures:
    """Of one mode: frames beside the reference's as one picture, and a loop of both."""

    name: str
    still: bytes
    size: tuple[int, int]
    loop: bytes | None
    loop_size: tuple[int, int]
    about: str = ""


@dataclass(frozen=True)
class Gallery:
    """All pictures of a group: ``modes`` of the ``first`` pair, ``worst`` of each mode's own worst one, where that is
    another; ``first_is_worst`` names the modes of which it is not."""

    factor: int
    indices: list[int]
    fps: float
    first: str
    modes: list[Pictures]
    worst: list[Pictures]
    first_is_worst: list[str]


def read_frames(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a frames file: ``frames`` [n, H, W, 3], ``clip``, and the reference's, ``reference_...``; ``index``
    is which frames they are; ``worst`` a pair's index, and ``worst_...`` its frames and the reference's.

    Raises:
        UsageError: the file is there and is not one.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UsageError(f"{path} cannot be read as frames ({error}); delete it and run its cell again.") from None
    kept = {k: v for k, v in found.items() if v.dtype == np.uint8 and v.ndim == 4 and v.shape[-1] == 3 and len(v)}
    if "frames" not in kept:
        raise UsageError(f"{path} holds no frames (an array `frames` of uint8, [n, H, W, 3]); run its cell again.")
    index = found.get("index")
    own = index is not None and index.shape == kept["frames"].shape[:1]
    if "worst" in found and found["worst"].shape == ():
        kept["worst"] = found["worst"]
    return kept | {"index": index if own else np.arange(len(kept["frames"]))}


def gallery(group: Group, budget: int = BUDGET, fps: float = 25.0) -> Gallery | None:
    """Pictures of every mode that has frames of the reference's size; None: there are none to show."""
    found = [(row, _with_reference(group, row)) for row in [*group.floors, *group.modes]]
    there = [(row, frames) for row, frames in found if frames is not None]
    if not there:
        return None
    pairs = [(row.name, frames) for row, frames in there]
    worst = [
        (row.name, own, _pair_text(group, row, int(frames["worst"])))
        for row, frames in there
        if (own := _worst(frames))
    ]
    same = [row.name for row, frames in there if "worst" in frames and not frames["worst"] and group.pairs > 1]
    chosen = _chosen(min(len(f["frames"]) for _, f in pairs))
    factor = amplification([(f["frames"][chosen], f["reference_frames"][chosen]) for _, f in pairs])
    for width, quality in ((320, 82), (256, 75), (192, 65), (128, 50)):
        made = [_pictures(name, frames, chosen, factor, width, quality, fps) for name, frames in pairs]
        more = [
            replace(_pictures(name, frames, chosen, factor, width, quality, fps), about=about)
            for name, frames, about in worst
        ]
        if sum(len(m.still) + len(m.loop or b"") for m in [*made, *more]) <= budget:
            break
    first = _pair_text(group, there[0][0], 0)
    return Gallery(factor, [int(pairs[0][1]["index"][i]) for i in chosen], fps, first, made, more, same)


def _worst(frames: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The worst pair's frames under the names that the first one's have; empty if that is the first, or unknown."""
    own, base = frames.get("worst_frames"), frames.get("worst_reference_frames")
    if own is None or base is None or "worst" not in frames or not own.shape == base.shape == frames["frames"].shape:
        return {}
    return {"frames": own, "reference_frames": base}


def _pair_text(group: Group, row: Row, index: int) -> str:
    """Prompt and seed of a pair, as far as the result with the row's frames tells them."""
    for result in group.results:
        same = row.frames and result.frames and Path(result.frames["file"]).name == row.frames.name
        if same and index < len(result.pairs):
            return f"{result.pairs[index]['prompt']} (seed {result.pairs[index]['seed']})"
    return ""


def _with_reference(group: Group, row: Row) -> dict[str, np.ndarray] | None:
    """A mode's frames with the reference's, from its own file or the reference's; None: one of them is missing."""
    if row.frames is None or not row.frames.is_file():
        return None
    found = read_frames(row.frames)
    base = group.reference.frames if group.reference else None
    if "reference_frames" not in found and base is not None and base.is_file():
        found |= {f"reference_{k}": v for k, v in read_frames(base).items() if k in ("frames", "clip")}
    if "reference_frames" not in found or found["reference_frames"].shape != found["frames"].shape:
        return None
    return found


def _chosen(n: int) -> list[int]:
    """First, middle and last."""
    return sorted({round(i * (n - 1) / (SHOWN - 1)) for i in range(SHOWN)})


def amplification(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
    """The largest factor at which the median mode's differences (their 99th percentile) still fit into 255."""
    tops = sorted(float(np.percentile(difference(a, b), 99)) for a, b in pairs)
    top = tops[len(tops) // 2]
    return max((f for f in FACTORS if f * top <= 255), default=1) if top else FACTORS[-1]


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.int16) - b.astype(np.int16))


def _pictures(
    name: str,
    frames: Mapping[str, np.ndarray],
    chosen: Sequence[int],
    factor: int,
    width: int,
    quality: int,
    fps: float,
) -> Pictures:
    lines = []
    for i in chosen:
        a, b = frames["frames"][i], frames["reference_frames"][i]
        amplified = np.minimum(difference(a, b) * factor, 255).astype(np.uint8)
        lines.append(_beside([_scaled(b, width), _scaled(a, width), _scaled(amplified, width)]))
    still = _below(lines)
    loop, size = None, (0, 0)
    clip, other = frames.get("clip"), frames.get("reference_clip")
    if clip is not None and other is not None and clip.shape == other.shape:
        both = [_beside([_scaled(b, width), _scaled(a, width)]) for a, b in zip(clip, other, strict=True)]
        loop, size = _animation(both, quality, fps), both[0].size
    return Pictures(name, _webp(still, quality), still.size, loop, size)


def _scaled(frame: np.ndarray, width: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(frame))
    if picture.width <= width:
        return picture
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS)


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """In a row with a gap, which is transparent: it has the page's colour."""
    made = Image.new("RGBA", (sum(p.width for p in pictures) + GAP * (len(pictures) - 1), pictures[0].height))
    x = 0
    for picture in pictures:
        made.paste(picture, (x, 0))
        x += picture.width + GAP
    return made


def _below(pictures: Sequence[Image.Image]) -> Image.Image:
    made = Image.new("RGBA", (pictures[0].width, sum(p.height for p in pictures) + GAP * (len(pictures) - 1)))
    y = 0
    for picture in pictures:
        made.paste(picture, (0, y))
        y += picture.height + GAP
    return made


def _webp(picture: Image.Image, quality: int) -> bytes:
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=quality, lossless=picture.width <= 3 * SMALL + 2 * GAP, method=4)
    return data.getvalue()


def _animation(pictures: Sequence[Image.Image], quality: int, fps: float) -> bytes:
    """A loop without end; milliseconds a frame are whole numbers."""
    data = io.BytesIO()
    lossless = pictures[0].width <= 2 * SMALL + GAP
    pictures[0].save(
        data,
        "WEBP",
        save_all=True,
        append_images=list(pictures[1:]),
        duration=round(1000 / fps),
        loop=0,
        quality=quality,
        lossless=lossless,
        method=3,
    )
    return data.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()
