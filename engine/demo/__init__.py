"""The embedded demo model: what is used where no model is named."""

from __future__ import annotations

from pathlib import Path


def demo_model() -> Path:
    """The folder of the embedded demo model."""
    from .noise_model import noise_model

    return noise_model()
