"""Clips that are drawn, not recorded: one shape on a plain background, 17 frames, on any device.

Shapes are signed distance functions, so an edge is smooth without supersampling. A clip is fully determined by its
attributes (see captions.py) and eight uniform numbers; all the randomness of a batch is in those, which keeps drawing
usable inside a CUDA graph. Shapes have a radius of a quarter of the side or more (3 latent cells across) and move at
most a third of the side in a clip: what crosses the 16x16x8 compression well.

Speed is the first uniform number, s. It scales what a motion does in a clip: the distance moved (0.10 to 0.34 of the
side), the height of a bounce (0.08 to 0.24), the angle turned (20 to 65 degrees), the factor grown (1.3 to 1.8). The
motion score of a clip is 2 + 18 s, the range 2 to 20 of the image-to-video model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .captions import COLOURS, KINDS, MOTIONS, Attributes, combinations

SIZE = 96
FRAMES = 17
UNIFORMS = 8
"""Uniform numbers behind one clip: speed, radius, place along and across the path, turning sense, three spare."""
RAMP = 2.0
"""Width of an edge in pixels."""

COLOUR_RGB = (
    (0.90, 0.10, 0.10), (1.00, 0.55, 0.05), (0.98, 0.90, 0.15), (0.10, 0.70, 0.20),
    (0.10, 0.85, 0.90), (0.10, 0.25, 0.90), (0.60, 0.15, 0.80), (1.00, 1.00, 1.00),
)  # fmt: skip
BACKGROUND_RGB = (
    (0.05, 0.05, 0.06), (0.95, 0.95, 0.95), (0.50, 0.50, 0.50),
    (0.13, 0.25, 0.62), (0.14, 0.42, 0.22), (0.95, 0.66, 0.74),
)  # fmt: skip


def shape_distance(kind: int, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance of points to a shape of radius about 1, negative inside; y grows downwards."""
    name = KINDS[kind]
    if name == "circle":
        return (x * x + y * y).sqrt() - 1.0
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.86
    if name == "triangle":
        # Three half-planes at the inradius, half of the circumradius 1.12.
        slanted = x.abs() * (math.sqrt(3) / 2) - y * 0.5
        return torch.maximum(slanted, y) - 0.56
    if name == "star":
        return _star(x, y, outer=1.12, inner=0.48)
    if name == "ring":
        return ((x * x + y * y).sqrt() - 0.75).abs() - 0.27
    if name == "cross":
        along = torch.maximum(x.abs() - 1.0, y.abs() - 0.34)
        return torch.minimum(along, torch.maximum(x.abs() - 0.34, y.abs() - 1.0))
    raise ValueError(f"unknown kind {kind}")


def _star(x: Tensor, y: Tensor, outer: float, inner: float) -> Tensor:
    """Five points, one of them up: all ten half edges are folded onto one, the line from a tip to a notch."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    radius = (x * x + y * y).sqrt()
    along, across = radius * angle.cos(), radius * angle.sin()
    notch = (inner * math.cos(sector / 2), inner * math.sin(sector / 2))
    edge = (notch[0] - outer, notch[1])
    length = math.hypot(*edge)
    return ((along - outer) * edge[1] - across * edge[0]) / length


@dataclass(frozen=True)
class Batch:
    """Drawn clips: ``video [B, F, 3, H, W]`` in [-1, 1], ``cover [B, F, 1, H, W]`` in [0, 1] where the shape is, and
    ``edge``, like it, near its contour."""

    video: Tensor
    cover: Tensor
    edge: Tensor


class Painter:
    """Draws clips on one device. Holds the few constant tables, so that drawing itself moves nothing to the device."""

    def __init__(self, device: torch.device | str = "cpu", size: int = SIZE, frames: int = FRAMES) -> None:
        self.device, self.size, self.frames = torch.device(device), size, frames
        self.colours = torch.tensor(COLOUR_RGB, device=device) * 2 - 1
        self.backgrounds = torch.tensor(BACKGROUND_RGB, device=device) * 2 - 1
        pixels = (torch.arange(size, device=device) + 0.5) / size
        self.x, self.y = pixels.view(1, 1, 1, size), pixels.view(1, 1, size, 1)
        self.time = torch.linspace(0, 1, frames, device=device).view(1, frames)

    def paths(self, motion: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Centre x, y, radius and angle over time, each ``[B, F]``, in units of the side and radians."""
        # No torch.where with plain numbers: it may copy them to the device, which a graph cannot hold.
        speed, radius, along, across, sense = (v[:, None] for v in u[:, :5].unbind(1))
        t = self.time
        where = [(motion == i)[:, None] for i in range(len(MOTIONS))]
        left, right, up, down, bounce, rotate, grow, shrink = where
        horizontal, vertical = left | right, up | down
        zero = torch.zeros_like(t * speed)

        radius = 0.25 + 0.06 * radius + zero
        factor = 1.3 + 0.5 * speed
        size = torch.where(shrink, 1 - t, t)
        big = 0.29 + (radius - 0.25)
        radius = torch.where(grow | shrink, big * (1 / factor + (1 - 1 / factor) * size), radius)
        largest = radius.amax(dim=1, keepdim=True)

        distance = 0.10 + 0.24 * speed
        height = 0.08 + 0.16 * speed
        # Falls to the floor and comes back once; the exponent makes it slower at the top.
        hop = -height * (0.5 - (1 - (2 * t - 1).abs()) ** 1.4)
        forwards = 1 - 2 * (left | up).float()
        path = torch.where(bounce, hop, torch.where(horizontal | vertical, forwards * distance * (t - 0.5), zero))
        reach = torch.where(bounce, height, torch.where(horizontal | vertical, distance, zero)) / 2
        # Shifts that keep the whole shape in the frame; 1.1 radii is where the longest tips end.
        shift_along = (2 * along - 1) * (0.48 - 1.1 * largest - reach).clamp(min=0)
        shift_across = (2 * across - 1) * (0.48 - 1.1 * largest).clamp(min=0, max=0.1)
        on_x = path * horizontal
        centre_x = 0.5 + on_x + torch.where(horizontal, shift_along, shift_across)
        centre_y = 0.5 + path - on_x + torch.where(horizontal, shift_across, shift_along.clamp(-0.1, 0.1))
        turn = (2 * (sense >= 0.5).float() - 1) * (20 + 45 * speed) * (math.pi / 180)
        angle = torch.where(rotate, turn * t, zero)
        return centre_x, centre_y, radius, angle

    def __call__(self, attributes: Tensor, u: Tensor) -> Batch:
        """Draws clips of ``attributes [B, 4]`` from uniform numbers ``u [B, 8]``."""
        kind, colour, background, motion = attributes.unbind(1)
        centre_x, centre_y, radius, angle = (v[:, :, None, None] for v in self.paths(motion, u))
        dx, dy = (self.x - centre_x) / radius, (self.y - centre_y) / radius
        cos, sin = angle.cos(), angle.sin()
        x, y = dx * cos + dy * sin, dy * cos - dx * sin
        distance = shape_distance(0, x, y)
        for i in range(1, len(KINDS)):
            distance = torch.where((kind == i).view(-1, 1, 1, 1), shape_distance(i, x, y), distance)
        pixels = distance * radius * self.size
        cover = (0.5 - pixels / RAMP).clamp(0, 1)[:, :, None]
        ground = self.backgrounds[background][:, None, :, None, None]
        video = ground + cover * (self.colours[colour][:, None, :, None, None] - ground)
        return Batch(video, cover, torch.exp(-((pixels / 4) ** 2))[:, :, None])


def motion_score(u: Tensor) -> Tensor:
    """The motion score ``[B]`` of clips, 2 (slow) to 20 (fast), from their uniform numbers ``[B, 8]``."""
    return 2 + 18 * u[:, 0]


def attribute_table(test: bool, device: torch.device | str = "cpu") -> Tensor:
    """All combinations of the training or the test set, ``[N, 4]``."""
    return torch.tensor(combinations(test), device=device)


def pick(table: Tensor, u: Tensor) -> Tensor:
    """Rows of a table chosen by uniform numbers ``u [B]``."""
    return table[(u * table.shape[0]).long().clamp(max=table.shape[0] - 1)]


def draw_clips(
    attributes: list[Attributes], seed: int, device: torch.device | str = "cpu", size: int = SIZE
) -> tuple[Batch, Tensor]:
    """Seeded clips of given attributes, the same on every device; also returns their uniform numbers."""
    u = torch.rand(len(attributes), UNIFORMS, generator=torch.Generator().manual_seed(seed)).to(device)
    return Painter(device, size)(torch.tensor(attributes, device=device), u), u


def to_frames(video: Tensor) -> Tensor:
    """``[B, F, 3, H, W]`` in [-1, 1] -> uint8 ``[B, F, H, W, 3]``."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(0, 1, 3, 4, 2)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip, values in [-1, 1] (clamped)."""
    error = (a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


assert len(COLOUR_RGB) == len(COLOURS)
