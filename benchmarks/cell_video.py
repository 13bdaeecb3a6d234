"""The videos of a cell beside those of its reference, in the metrics that are to be had here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from solostep.benchmarks.results import VIDEO
from solostep.benchmarks.video_metrics import METRICS, available, compare
from solostep.engine.config import FPS, GenerationSettings

INFINITE = ("psnr", "psnr_video", "xpsnr")
"""Of equal videos these are infinite, which JSON has no number for: null stands for it."""


class Compared:
    """Compares videos of one size. What cannot be measured, for want of ffmpeg or of pixels, is added to ``notes`` at
    once, and is no reason to lose the rest."""

    def __init__(self, settings: GenerationSettings, notes: list[str]) -> None:
        told = available((settings.num_frames, settings.height, settings.width, 3))
        notes += [f"No {name}: {told[name]}" for name in METRICS if told[name] is not True]
        self.metrics = tuple(name for name in METRICS if told[name] is True)

    def __call__(self, frames: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
        """The metrics of uint8 ``[F, H, W, 3]``."""
        found = compare(np.array(frames), np.array(reference), fps=FPS, metrics=self.metrics)
        return {k: None if k in INFINITE and v is not None and math.isinf(v) else v for k, v in found.items()}


def by_metric(videos: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None] | None] | None:
    """Each metric's values, pair by pair; None for one that is not to be had: null among PSNRs means equal videos."""
    if not videos:
        return None
    return {name: [v[name] for v in videos] if name in videos[0] else None for name in VIDEO}
