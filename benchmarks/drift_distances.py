"""Relative L2 distances and cosines in fp64. Of equal tensors they are exactly 0 and 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from solostep.engine.errors import SolostepError


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in fp64.

    Raises:
        SolostepError: the reference is zero, or something is not finite: no number could be told.
    """
    size = float(torch.linalg.vector_norm(b.double()))
    error = float(torch.linalg.vector_norm(a.double() - b.double()))
    if not (math.isfinite(error) and math.isfinite(size) and size > 0):
        raise SolostepError(f"An error cannot be measured: the difference is {error} and the reference {size}.")
    return error / size


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two tensors, in fp64; exactly 1 for equal ones, since sqrt(n n) is n."""
    x, y = a.double().flatten(), b.double().flatten()
    both, own, other = (float(torch.dot(p, q)) for p, q in ((x, y), (x, x), (y, y)))
    if own == 0 or other == 0:
        raise SolostepError("The angle to a velocity that is zero cannot be measured.")
    return max(-1.0, min(1.0, both / math.sqrt(own * other)))
