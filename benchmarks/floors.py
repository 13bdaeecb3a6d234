"""Noise floors: bf16 runs that round otherwise than the reference and are no less right.

- ``floor-backend``: fused blocks with bf16 attention by another back end than torch's own choice;
- ``floor-order``: the official order of operations, but every linear of a block sums over its input channels in another
  order: weight columns and activations are permuted alike, by a fixed permutation for each width.

A mode whose drift is not above these cannot be told from bf16 on other hardware. In exact arithmetic both are the
reference; in fp64 the difference is below 1e-14. The permuted columns are made at every use: a copy of one weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solostep.engine.config import GenerationSettings
from solostep.engine.errors import SolostepError
from solostep.engine.memory import Memory
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.progress import Progress
from solostep.engine.request import Job
from solostep.engine.streaming import PlacedTransformer
from solostep.kernels.attention import BACKENDS

SEED = 0x5010
OTHER_BACKENDS = ("hopper", "triton", "math")
"""Back ends for bf16 that are not torch's choice, the preferred one first."""
QUADRATIC_TOKENS = 8192
"""Up to so many tokens, attention that keeps all of q k^T is tolerable (0.13 GB a head in bf16)."""


@functools.lru_cache(maxsize=16)
def channel_order(width: int, device: torch.device) -> Tensor:
    """The permutation of a linear's input channels; the same for all linears of a width."""
    with torch.inference_mode(False):  # it is kept
        return torch.randperm(width, generator=torch.Generator().manual_seed(SEED + width)).to(device)


class PermutedLinear(nn.Linear):
    """A linear that sums over its input channels in another order."""

    def forward(self, x: Tensor) -> Tensor:
        order = channel_order(self.in_features, x.device)
        return F.linear(x[..., order], self.weight[:, order], self.bias)


def permute(module: nn.Module) -> nn.Module:
    """Makes every plain linear in ``module`` sum in another order; gives the module.

    Parameters keep their names and places, so blocks go on streaming: only the class of the linears is another.
    """
    for linear in module.modules():
        if type(linear) is nn.Linear:
            linear.__class__ = PermutedLinear
    return module


class PermutedMemory(Memory):
    """Memory of a pipeline whose transformer's blocks are permuted as soon as they are placed."""

    def transformer(self, job: Job, say: Progress) -> PlacedTransformer:
        placed = super().transformer(job, say)
        for block in placed.network.transformer_blocks:
            permute(block)
        return placed


class PermutedPipeline(StepVideoPipeline):
    """The pipeline, with linears that sum in another order."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.memory.__class__ = PermutedMemory


def other_backend(settings: GenerationSettings, device: torch.device) -> str:
    """A back end for bf16 attention that is not the one of the official numerics.

    Raises:
        SolostepError: there is none for this device and length.
    """
    tokens = settings.latent_frames * settings.latent_height * settings.latent_width
    for name in OTHER_BACKENDS:
        backend = BACKENDS[name]
        fits = tokens <= QUADRATIC_TOKENS or not backend.quadratic
        if fits and backend.available(device, "bf16") is None:
            return name
    raise SolostepError(
        f"There is no second back end for bf16 attention of {tokens} tokens on {device}; leave the role floor-backend "
        "out, or make a smaller or shorter clip."
    )


def floor_options(role: str, options: dict[str, Any], settings: GenerationSettings, device: torch.device) -> dict:
    """The pipeline's options of a floor, from those that were given."""
    if role == "floor-order":
        return options | {"precision": "bf16", "attention": "official", "attention_backend": None}
    backend = options.get("attention_backend") or other_backend(settings, device)
    return options | {"precision": "bf16", "attention": "bf16", "attention_backend": backend}
