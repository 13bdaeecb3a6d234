"""What a clip shows, read off its pixels by plain image measurement: no learned judge.

- background: the median of a border 4 pixels wide over all frames, named by the nearest palette colour;
- colour: the median of the pixels farthest from the background (3 % of all), named likewise;
- where the shape is: each pixel's place between those two colours, 0 ... 1;
- kind: the shape of five frames, brought to one place and one area, against templates of every kind at every angle;
- motion: growth of the area first, then the way of the centroid, there or there and back, then a change of the outline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import KINDS, MOTIONS, ROUND, Attributes
from .data import BACKGROUND_RGB, COLOUR_RGB, shape_distance

ASPECTS = ("kind", "colour", "background", "motion")
NO_MOTION = len(MOTIONS)
GRID = 32
HALF_WIDTH = 1.1
"""Half the side of the normalised window, in square roots of the shape's area: a star reaches 1.0."""
_LEFT, _RIGHT, _UP, _DOWN, _BOUNCE, _ROTATE, _GROW, _SHRINK = range(len(MOTIONS))


@dataclass(frozen=True)
class Reading:
    """What was read off one clip. ``attributes`` are indices as in captions.py; a motion of 8 means none."""

    attributes: Attributes
    speed: float
    """Mean way of the centroid in pixels per frame."""

    def right(self, asked: Attributes) -> dict[str, bool]:
        return {name: a == b for name, a, b in zip(ASPECTS, self.attributes, asked, strict=True)}


def _cover(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frames ``[F, 3, H, W]`` in [0, 1] -> background and shape colour ``[3]``, cover ``[F, H, W]``."""
    inner = torch.zeros(frames.shape[2:], dtype=torch.bool, device=frames.device)
    inner[4:-4, 4:-4] = True
    ground = frames[:, :, ~inner].transpose(0, 1).flatten(1).median(dim=1).values
    pixels = frames.transpose(0, 1).flatten(1)
    far = (pixels - ground[:, None]).square().sum(0)
    chosen = far.topk(max(1, far.numel() * 3 // 100)).indices
    colour = pixels[:, chosen].median(dim=1).values
    axis = (colour - ground) / (colour - ground).square().sum().clamp(min=1e-4)
    cover = ((frames - ground.view(3, 1, 1)) * axis.view(3, 1, 1)).sum(1).clamp(0, 1)
    # Half of the way counts: below it is noise on the background, above it noise on the shape.
    return ground, colour, ((cover - 0.5) * 4 + 0.5).clamp(0, 1)


def _centroids(cover: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids ``[F, 2]`` (x, y) and areas ``[F]`` in pixels."""
    height, width = cover.shape[1:]
    area = cover.sum((1, 2)).clamp(min=1.0)
    x = (cover.sum(1) * (torch.arange(width, device=cover.device) + 0.5)).sum(1) / area
    y = (cover.sum(2) * (torch.arange(height, device=cover.device) + 0.5)).sum(1) / area
    return torch.stack([x, y], dim=1), area


def _window(cover: Tensor, centre: Tensor, area: Tensor) -> Tensor:
    """Shapes brought to one place and area: ``[F, GRID, GRID]``."""
    height, width = cover.shape[1:]
    line = (torch.arange(GRID, device=cover.device) + 0.5) / GRID * 2 - 1
    reach = HALF_WIDTH * area.sqrt()
    x = centre[:, :1] + line * reach[:, None]
    y = centre[:, 1:] + line * reach[:, None]
    grid = torch.stack(
        [(x / width * 2 - 1)[:, None].expand(-1, GRID, -1), (y / height * 2 - 1)[:, :, None].expand(-1, -1, GRID)], -1
    )
    return F.grid_sample(cover[:, None], grid, align_corners=False)[:, 0]


def _templates(device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows of every kind at every angle ``[N, GRID * GRID]``, and the kind of each ``[N]``."""
    line = ((torch.arange(160, device=device) + 0.5) / 80 - 1) * 1.4
    y, x = torch.meshgrid(line, line, indexing="ij")
    covers, kinds = [], []
    for kind, name in enumerate(KINDS):
        for degrees in range(0, 5 if name in ROUND else 120, 5):
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            distance = shape_distance(kind, x * cos + y * sin, y * cos - x * sin)
            covers.append((0.5 - distance * (80 / 1.4) / 2).clamp(0, 1))
            kinds.append(kind)
    cover = torch.stack(covers)
    return _window(cover, *_centroids(cover)).flatten(1), torch.tensor(kinds, device=device)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of soft masks, ``[N, P]`` and ``[M, P]`` -> ``[N, M]``."""
    both = a @ b.T
    return both / (a.square().sum(1)[:, None] + b.square().sum(1) - both).clamp(min=1e-6)


def _kind(windows: Tensor, templates: tuple[Tensor, Tensor]) -> int:
    overlap = _overlap(windows.flatten(1), templates[0])
    scores = [overlap[:, templates[1] == kind].amax(dim=1).mean() for kind in range(len(KINDS))]
    return int(torch.stack(scores).argmax())


def _motion(centre: Tensor, area: Tensor, windows: Tensor, size: int) -> int:
    growth = float(area[-3:].mean() / area[:3].mean())
    if growth > 1.35:
        return _GROW
    if growth < 1 / 1.35:
        return _SHRINK
    way = centre[-2:].mean(0) - centre[:2].mean(0)
    dx, dy = (float(v) / size for v in way)
    if max(abs(dx), abs(dy)) > 0.05:
        if abs(dx) > abs(dy):
            return _LEFT if dx < 0 else _RIGHT
        return _UP if dy < 0 else _DOWN
    ends = (centre[:2].mean(0) + centre[-2:].mean(0)) / 2
    if float(centre[len(centre) // 2 - 1 : len(centre) // 2 + 2].mean(0)[1] - ends[1]) / size > 0.035:
        return _BOUNCE
    flat = windows.flatten(1)
    if float(_overlap(flat[:1], flat).amin()) < 0.9:
        return _ROTATE
    return NO_MOTION


def read_clip(frames: Tensor, templates: tuple[Tensor, Tensor] | None = None) -> Reading:
    """Reads one clip of uint8 frames ``[F, H, W, 3]``."""
    device = frames.device
    values = frames.permute(0, 3, 1, 2).float() / 255
    ground, colour, cover = _cover(values)
    centre, area = _centroids(cover)
    picked = torch.linspace(0, len(frames) - 1, 5, device=device).round().long()
    windows = _window(cover[picked], centre[picked], area[picked])
    nearest = [
        int((torch.tensor(palette, device=device) - found).square().sum(1).argmin())
        for palette, found in ((COLOUR_RGB, colour), (BACKGROUND_RGB, ground))
    ]
    kind = _kind(windows, templates if templates is not None else _templates(device))
    motion = _motion(centre, area, windows, frames.shape[1])
    speed = float((centre[1:] - centre[:-1]).square().sum(1).sqrt().mean())
    return Reading((kind, nearest[0], nearest[1], motion), speed)


def read_clips(videos: Tensor | Sequence[Tensor]) -> list[Reading]:
    """Reads clips, each uint8 ``[F, H, W, 3]``."""
    if len(videos) == 0:
        return []
    templates = _templates(videos[0].device)
    return [read_clip(video, templates) for video in videos]


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracies(readings: Sequence[Reading], asked: Sequence[Attributes]) -> dict[str, dict[str, float]]:
    """Share of clips with each aspect right, with its interval; ``direction`` is motion where left ... down was asked,
    ``all`` is all four right."""
    marks = [r.right(a) for r, a in zip(readings, asked, strict=True)]
    groups = {name: [m[name] for m in marks] for name in ASPECTS}
    groups["direction"] = [m["motion"] for m, a in zip(marks, asked, strict=True) if a[3] <= _DOWN]
    groups["all"] = [all(m.values()) for m in marks]
    table = {}
    for name, values in groups.items():
        low, high = wilson(sum(values), len(values))
        table[name] = {
            "accuracy": sum(values) / max(len(values), 1), "low": low, "high": high, "n": len(values)
        }  # fmt: skip
    return table


def summary(table: dict[str, dict[str, float]]) -> str:
    """One line of the accuracies."""
    return "  ".join(f"{name} {row['accuracy']:.3f}" for name, row in table.items())
