"""Statistics of the activations inside a DiT's blocks: how far they are from normal random numbers.

What decides how much a number format hurts a network is how its activations are distributed: a few channels far above
the others, a mean that all tokens share, hidden units that are mostly near zero, attention that looks at few keys.
:class:`Recorder` stands in the place of a block, gives what the block itself gives, and measures on the way.

Memory: one activation in fp32 beside the block's own (2 GB of the 30B model's hidden layer for every 20,000 tokens).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from solostep.engine.models.transformer import RopeTable, SelfAttention, TransformerBlock, apply_rope

STREAM = "stream"
"""What goes into a block."""
LINEARS = {
    "attn1.wqkv": "q, k, v",
    "attn1.wo": "attention out",
    "attn2.wq": "text query",
    "attn2.wo": "text out",
    "ff.net.0.proj": "up",
    "ff.net.2": "down",
}
"""The linears of a block that see every token, and what they are called in tables."""
FAR = 6
"""A channel whose root mean square is so many times the median channel's is an outlier."""
QUERIES = 64
"""Rows of attention that an entropy is measured on."""

Numbers = dict[str, float]


def distribution(x: Tensor) -> Numbers:
    """Of an activation ``[..., S, C]``:

    - ``peak``: the largest value against the root mean square of all;
    - ``channels``: the largest value of the worst channel against that of the median channel;
    - ``outliers``: the share of channels whose root mean square is above :data:`FAR` times the median channel's;
    - ``kurtosis``: E x^4 / (E x^2)^2, which is 3 for a normal distribution of mean 0;
    - ``mean``: the share of the energy that is in the channels' means over tokens, the same for every token;
    - ``small``: the share of values below a tenth of the root mean square (0.08 of a normal distribution).
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    square = rows.square()
    energy = square.mean().clamp_min(1e-30)
    largest, power = rows.abs().amax(0), square.mean(0).sqrt()
    found = {
        "peak": largest.max() / energy.sqrt(),
        "channels": largest.max() / largest.median().clamp_min(1e-30),
        "outliers": (power > FAR * power.median()).float().mean(),
        "kurtosis": square.square().mean() / energy.square(),
        "mean": rows.mean(0).square().mean() / energy,
        "small": (square < 0.01 * energy).float().mean(),
    }
    return {name: float(value) for name, value in found.items()}


def attention_numbers(attn: SelfAttention, qkv: Tensor, rope: RopeTable) -> Numbers:
    """Of self-attention's weights, from the qkv product ``[1, S, 3 d]``:

    - ``entropy``: of a row of the softmax, against that of a uniform one (0 to 1): mean over heads and sampled queries;
      ``sharpest`` and ``flattest`` of the heads' own means;
    - ``key mean``: the share of the keys' energy, before their norm, that is in their mean over tokens.
    """
    heads = qkv.float().unflatten(-1, (-1, 3 * attn.head_dim))
    q, k, _ = heads.chunk(3, dim=-1)
    shared = k.mean(1).square().sum() / k.square().mean(1).sum().clamp_min(1e-30)
    tokens = qkv.shape[1]
    picked = torch.linspace(0, tokens - 1, min(QUERIES, tokens), device=qkv.device).round().long()
    table = tuple(t.float() for t in rope)
    q = _normed(attn.q_norm, q[:, picked])
    q = apply_rope(q, (table[0][picked], table[1][picked]))[0].transpose(0, 1)
    k = apply_rope(_normed(attn.k_norm, k), (table[0], table[1]))[0].transpose(0, 1)
    entropies = []
    for one, keys in zip(q, k, strict=True):  # a head at a time: 64 rows of 75,888 scores
        weights = ((one @ keys.t()) * attn.head_dim**-0.5).softmax(-1)
        entropies.append(torch.special.entr(weights).sum(-1).mean() / math.log(max(tokens, 2)))
    found = [float(e) for e in entropies]
    return {
        "entropy": statistics.fmean(found), "sharpest": min(found), "flattest": max(found), "key mean": float(shared),
    }  # fmt: skip


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    return cast(Tensor, nn.functional.rms_norm(x, (x.shape[-1],), None, cast(float, norm.eps))) * cast(
        Tensor, norm.weight
    ).to(x.dtype)


class Recorder(nn.Module):
    """A block that measures what passes through it, and gives what the block gives.

    Attributes:
        found: per place (a linear's path, :data:`STREAM`, ``attention``) the numbers of each row.
    """

    def __init__(self, block: nn.Module, rows: Sequence[int] | None = None) -> None:
        super().__init__()
        self.block = cast(TransformerBlock, block)
        self.rows = None if rows is None else set(rows)
        self.row = 0
        self.found: dict[str, list[Numbers]] = defaultdict(list)

    def forward(self, x: Tensor, context: Tensor, modulation: Tensor, rope: RopeTable) -> Tensor:
        wanted = self.rows is None or self.row in self.rows
        self.row += 1
        if not wanted:
            return cast(Tensor, self.block(x, context, modulation, rope))
        handles = []
        for name in LINEARS:

            def look(module: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> None:
                self.found[name].append(distribution(args[0]))
                if name == "attn1.wqkv":
                    self.found["attention"].append(attention_numbers(self.block.attn1, out, rope))

            handles.append(self.block.get_submodule(name).register_forward_hook(look))
        try:
            out = cast(Tensor, self.block(x, context, modulation, rope))
        finally:
            for handle in handles:
                handle.remove()
        numbers = distribution(x)
        size = torch.linalg.vector_norm(x.float())
        numbers["rms"] = float(size) / x.numel() ** 0.5
        numbers["added"] = float(torch.linalg.vector_norm(out.float() - x.float()) / size.clamp_min(1e-30))
        numbers["finite"] = float(torch.isfinite(out).all())
        self.found[STREAM].append(numbers)
        return out


def record(samples: Any, rows: Sequence[int] | None = None) -> list[dict[str, Numbers]]:
    """Runs samples (engine.activations.TransformerSamples, or synthetic ones) and returns for each block, in order, the
    numbers of each place, averaged over the samples ``rows`` (default: all)."""
    chosen = list(range(len(samples.labels))) if rows is None else list(rows)
    recorders: list[Recorder] = []
    found: list[dict[str, Numbers]] = []

    def wrap(i: int, block: nn.Module) -> nn.Module:
        if recorders:
            found.append(_means(recorders.pop().found))
        recorders.append(Recorder(block))
        return recorders[0]

    samples.run(samples.blocks.each(wrap), chosen)
    found.append(_means(recorders.pop().found))
    return found


def _means(found: Mapping[str, Sequence[Numbers]]) -> dict[str, Numbers]:
    return {
        place: {key: statistics.fmean(row[key] for row in rows) for key in rows[0]} for place, rows in found.items()
    }


def summary(blocks: Iterable[Mapping[str, Numbers]]) -> dict[str, Numbers]:
    """The median over blocks of every number, for each place; beside it the growth of the stream from the first block's
    input to the last one's."""
    all_blocks = list(blocks)
    made = {
        place: {key: statistics.median(b[place][key] for b in all_blocks) for key in all_blocks[0][place]}
        for place in all_blocks[0]
    }
    stream = [b[STREAM] for b in all_blocks]
    made[STREAM] |= {
        "growth": stream[-1]["rms"] / max(stream[0]["rms"], 1e-30),
        "least added": min(s["added"] for s in stream),
        "most added": max(s["added"] for s in stream),
        "largest rms": max(s["rms"] for s in stream),
        "finite": min(s["finite"] for s in stream),
    }
    return made
