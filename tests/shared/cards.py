"""The cards that kernels are compiled for without one."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

CARDS = 80, 86, 89, 90, 100, 120
SOME = 80, 89, 90, 120
"""What every run compiles passes over rows for; --all: each card. sm_86 has sm_80's instructions in sm_89's memory.
What is compiled for sm_100 with --all only, is not proved by another: its matrix instructions are its own."""
MATRICES = 80, 89, 90, 100, 120
"""What every run compiles attention and products for, which are little but matrix instructions."""


def is_whole(config: pytest.Config) -> bool:
    """Whether each variant is compiled for each card."""
    return bool(config.getoption("--all"))


def compiled(config: pytest.Config, cards: Iterable[int], some: tuple[int, ...]) -> tuple[int, ...]:
    """Of ``cards``, those that this run compiles for: all, or those among ``some``."""
    return tuple(arch for arch in cards if arch in some or is_whole(config))
