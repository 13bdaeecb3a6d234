"""Kernels that were found wrong on a card. Who examined them (the engine) says so here, once; their operators then take
plain torch in their place, which is slower and takes more memory.

Names are those of operators_check.py, such as ``gelu int8``. Of one process; nothing is remembered elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_REFUSED: dict[int, frozenset[str]] = {}
ROWS = 4096
"""Rows that plain torch takes at a time in place of a kernel: it makes several fp32 copies."""


def refuse(device: torch.device, names: Iterable[str]) -> None:
    """From now on these kernels are not used on a card; those named before are again."""
    _REFUSED[device.index or 0] = frozenset(names)


def refused_on(device: torch.device) -> list[str]:
    """Those that are not used on a card."""
    return sorted(_REFUSED.get(device.index or 0, ())) if device.type == "cuda" else []


def is_refused(name: str, device: torch.device) -> bool:
    return bool(_REFUSED) and device.type == "cuda" and name in _REFUSED.get(device.index or 0, ())


def form(dtype: torch.dtype) -> str:
    """How an output's type is called in the names of operators."""
    return {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}.get(dtype, "16 bits")


def by_rows(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """``function(x)``, one tensor or several, whose rows are those of ``x``; on a card, some rows at a time."""
    if not x.is_cuda or x.ndim < 2 or len(x) <= ROWS:
        return function(x)
    parts = [function(rows) for rows in x.split(ROWS)]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts, strict=True)))
