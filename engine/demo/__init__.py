"""The embedded demo model: a small Step-Video that is used where no model is named, and the script that trained it."""

from __future__ import annotations

from pathlib import Path


def demo_model(image_to_video: bool = False) -> Path:
    """The folder of the embedded demo model, text-to-video or image-to-video."""
    return Path(__file__).parent / ("ti2v" if image_to_video else "t2v")
