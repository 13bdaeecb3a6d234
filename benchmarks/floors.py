"""Noise floors: bf16 runs that round otherwise than the reference and are no less right.

Both compute the official blocks, in the official order of operations and with the official roundings, but for one
thing:

- ``floor-backend``: torch computes attention by another of its back ends than the one that it chooses by itself (cuDNN,
  flash, efficient; on a CPU, and for short clips, the plain form). Where no other one gives other bits, keys and values
  go in another order, of which attention is independent (``permuted``);
- ``floor-order``: every linear of a block sums over its input channels in another order: weight columns and activations
  are permuted alike, by a fixed permutation for each width.

A mode whose drift is not above these cannot be told from bf16 on other hardware. Our own fused blocks are no floor but
a mode, ``bf16``: they would judge themselves. In exact arithmetic the floors are the reference; in fp64 the difference
is below 1e-14. Memory: permuted columns, and permuted keys and values, are made at every use: a copy of one weight, or
of k and v; the plain form of attention holds all scores in fp32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from solostep.engine.config import GenerationSettings, TransformerConfig
from solostep.engine.errors import UsageError
from solostep.engine.memory import Memory
from solostep.engine.models.transformer import CrossAttention, RopeTable, SelfAttention, attend
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.precision import OFFICIAL
from solostep.engine.progress import Progress
from solostep.engine.rates import TEXT_TOKENS
from solostep.engine.request import Job
from solostep.engine.streaming import PlacedTransformer
from solostep.kernels.attention import BACKENDS

SEED = 0x5010
KERNELS = {
    "cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH",
}  # fmt: skip
"""torch's own kernels for attention, in the order in which they are tried beside its choice."""
PERMUTED = "permuted"
"""In the place of a kernel: torch's choice, with keys and values in another order."""
OTHERS = (*KERNELS, PERMUTED)
QUADRATIC_TOKENS = 8192
"""Up to so many tokens the plain form, which holds all scores, is tolerable (0.27 GB a head, a few times)."""
PROBED_HEADS = 2

Change = Callable[[nn.Module], nn.Module]
"""What makes a floor of a loaded block, in place."""


# --- another order of a linear's sums -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def channel_order(width: int, device: torch.device) -> Tensor:
    """The permutation of a linear's input channels, the same for all linears of a width; and that of keys."""
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


# --- another back end of attention --------------------------------------------------------------------------------


class _OtherOrder(TorchFunctionMode):
    """Attention by torch's own choice, of keys and values in another order."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:  # the DiT has no causal one
            q, k, v = args
            order = channel_order(k.shape[-2], k.device)
            args = q, k[..., order, :], v[..., order, :]
        return func(*args, **kwargs)


def attended_by(name: str | None) -> AbstractContextManager[Any]:
    """While it is open, torch's attention is computed by one of :data:`OTHERS`; None is torch's own choice."""
    if name is None:
        return contextlib.nullcontext()
    return _OtherOrder() if name == PERMUTED else sdpa_kernel(getattr(SDPBackend, KERNELS[name]))


class OtherSelfAttention(SelfAttention):
    """The official self-attention by another back end."""

    attended_by: str

    def forward(self, x: Tensor, rope: RopeTable) -> Tensor:
        with attended_by(self.attended_by):
            return super().forward(x, rope)


class OtherCrossAttention(CrossAttention):
    """The official cross-attention by another back end."""

    attended_by: str

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        with attended_by(self.attended_by):
            return super().forward(x, context, mask)


def attend_by(module: nn.Module, name: str) -> nn.Module:
    """Makes the official attentions in ``module`` use another back end; gives the module. As :func:`permute`, it
    changes classes only."""
    for part in module.modules():
        if type(part) in (SelfAttention, CrossAttention):
            part.__class__ = OtherSelfAttention if type(part) is SelfAttention else OtherCrossAttention
            part.attended_by = name
    return module


def _candidates(tokens: int, device: torch.device) -> Iterator[str]:
    for name in KERNELS:
        backend = BACKENDS[name]
        fits = tokens <= QUADRATIC_TOKENS or not backend.quadratic
        if fits and backend.available(device, "bf16") is None:
            yield name


@functools.lru_cache(maxsize=16)
def other_backend(tokens: int, device: torch.device, head_dim: int = 128) -> tuple[str, str]:
    """What computes attention of a floor at this length, one of :data:`OTHERS`; and in words, what it is and what
    stands in the reference.

    Tried on two heads of random numbers: torch's own choice, then each of its kernels. The first that gives other bits
    is taken; those that give the same ones are, or might as well be, what torch itself took.
    """
    shape, generator = (1, tokens, PROBED_HEADS, 3 * head_dim), torch.Generator().manual_seed(SEED)
    q, k, v = torch.randn(shape, generator=generator).to(device, torch.bfloat16).chunk(3, dim=-1)
    q, k = q.contiguous(), k.contiguous()  # v lies in the product of all three, as in a block
    own, same = attend(q, k, v), []
    for name in _candidates(tokens, device):
        try:
            with attended_by(name):
                made = attend(q, k, v)
                attend(q, k[:, :TEXT_TOKENS], v[:, :TEXT_TOKENS].contiguous())  # cross-attention has it, too
        except RuntimeError:  # torch says so of a kernel that does not take these shapes or this card
            continue
        if not torch.equal(made, own):
            known = f" ({' or '.join(same)})" if same else ""
            return name, f"torch's {name} kernel in place of its own choice{known}"
        same.append(name)
    return PERMUTED, "torch's own choice with keys and values in another order; no other kernel gives other bits"


def attention_of_floor(asked: str | None, tokens: int, device: torch.device, head_dim: int = 128) -> tuple[str, str]:
    """What computes attention of floor-backend: as asked, else as :func:`other_backend` finds it; and a sentence on it.

    Raises:
        UsageError: ``asked`` is not among :data:`OTHERS`, or not to be had here.
    """
    if asked is None:
        name, words = other_backend(tokens, device, head_dim)
        return name, f"Attention of this floor: {words}."
    if asked not in OTHERS:
        raise UsageError(f"The attention of floor-backend is one of {', '.join(OTHERS)}, not {asked}.")
    if asked != PERMUTED and asked not in _candidates(tokens, device):
        reason = BACKENDS[asked].available(device, "bf16") or f"all scores of {tokens} tokens are too many"
        raise UsageError(f"The attention back end {asked} is not to be had for floor-backend on {device}: {reason}.")
    return asked, f"Attention of this floor: {asked}, as asked."


# --- floors as pipelines ------------------------------------------------------------------------------------------


class ChangedMemory(Memory):
    """Memory of a pipeline whose transformer's blocks are changed as soon as they are placed."""

    change: Change

    def transformer(self, job: Job, say: Progress) -> PlacedTransformer:
        placed = super().transformer(job, say)
        for block in placed.network.transformer_blocks:
            self.change(block)
        return placed


class ChangedPipeline(StepVideoPipeline):
    """The pipeline, with blocks that are changed."""

    def __init__(self, *arguments: Any, change: Change, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.memory.__class__ = ChangedMemory
        self.memory.change = change


def clip_tokens(settings: GenerationSettings, config: TransformerConfig) -> int:
    """Of the transformer."""
    return settings.latent_frames * settings.latent_height * settings.latent_width // config.patch_size**2


def floor_options(options: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's options of a floor, from those that were given."""
    return options | {"precision": "bf16", "attention": OFFICIAL, "attention_backend": None}


def change_of(
    role: str, asked: str | None, settings: GenerationSettings, config: TransformerConfig, device: torch.device
) -> tuple[Change, str | None, str | None]:
    """What makes a floor; of ``floor-backend`` also the attention that it has (``asked``, or another one than torch's
    choice), and a sentence that says so.

    Raises:
        UsageError: ``asked`` is not to be had here.
    """
    if role == "floor-order":
        return permute, None, None
    tokens = clip_tokens(settings, config)
    name, words = attention_of_floor(asked, tokens, device, config.attention_head_dim)
    return functools.partial(attend_by, name=name), name, words
