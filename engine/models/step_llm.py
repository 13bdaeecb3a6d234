"""Step-LLM, the text encoder: a causal decoder whose only sense of position is a distance bias.

Attention is softmax(q k / sqrt(D) - slope_head * sqrt(i - j)) over j <= i. The official code calls a closed CUDA
operator for it; the formula is the public PyTorch form of the same operator in Step-Audio, a variant of ALiBi
(Press et al. 2022) with the square root of the distance. Without the bias the text has no order at all.
Official parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention_causal import biased_causal_attention, has_biased_kernel
from ..config import StepLLMConfig
from .transformer import RMSNorm


def alibi_slopes(num_heads: int) -> list[float]:
    """One slope a head: 2^(-8 k / n) for the first n = 2^floor(log2 heads), then every second of the next series."""
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * k / n) for k in range(1, n + 1)]
    return slopes + [2.0 ** (-4.0 * k / n) for k in range(1, 2 * (num_heads - n) + 1, 2)]


def attention_bias(num_heads: int, length: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """``[heads, length, length]``: -slope * sqrt(i - j) for j <= i, -inf above the diagonal.

    Quirk: in bf16 the bias is rounded to bf16 before it is added.
    """
    position = torch.arange(length, dtype=torch.float32)
    distance = position[:, None] - position
    slopes = torch.tensor(alibi_slopes(num_heads), dtype=torch.float32)
    bias = -slopes[:, None, None] * distance.clamp(min=0).sqrt()
    return bias.masked_fill(distance < 0, float("-inf")).to(device, dtype)


class Attention(nn.Module):
    """Grouped-query attention; ``wqkv`` holds all query heads first, then k and v of each group.

    Its bias is the ``[heads, S, S]`` of :func:`attention_bias`, or slopes ``[heads]`` for the kernel without it.
    """

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_groups
        self.hidden = config.hidden_size
        self.wqkv = nn.Linear(self.hidden, self.hidden + 2 * self.groups * self.head_dim, bias=False)
        self.wo = nn.Linear(self.hidden, self.hidden, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, kv = self.wqkv(x).split([self.hidden, 2 * self.groups * self.head_dim], dim=-1)
        if bias.ndim == 1:
            q, (k, v) = q.unflatten(-1, (-1, self.head_dim)), kv.unflatten(-1, (self.groups, -1)).chunk(2, dim=-1)
            rows = [biased_causal_attention(*row, bias) for row in zip(q, k, v, strict=True)]
            return self.wo(torch.stack(rows).flatten(2))
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = kv.unflatten(-1, (self.groups, 2 * self.head_dim)).transpose(1, 2).chunk(2, dim=-1)
        repeat = q.shape[1] // self.groups  # group g serves the query heads g * repeat ... (g + 1) * repeat - 1
        k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU; ``w1`` gives [gate, up]."""

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, 2 * config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.ffn_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.feed_forward(self.ffn_norm(x))


class Embeddings(nn.Module):
    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Layers(nn.Module):
    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))


class StepLLM(nn.Module):
    """Token ids ``[B, S]`` -> hidden states ``[B, S, hidden]``, with no final norm.

    There is no padding mask, as in the official code: padding stands at the end and attention is causal, so it cannot
    reach the tokens before it. Rows run one at a time: a prompt's embedding does not depend on its batch.
    """

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = Embeddings(config)
        self.transformer = Layers(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = list(self.tok_embeddings.word_embeddings(input_ids).split(1))
        run_layers(self.config, self.transformer.layers, rows)
        return torch.cat(rows)


def run_layers(config: StepLLMConfig, layers: Iterable[nn.Module], rows: list[Tensor]) -> None:
    """Rows ``[1, S, hidden]``, one or more and all of one length, through layers that may come one after the other.

    Results take the rows' places in the list: with many rows, two of each would be more than a layer. Each row goes
    alone: how a product is rounded can depend on how many rows it has.
    """
    bias = _bias(config, rows[0])
    for layer in layers:
        for i, row in enumerate(rows):
            rows[i] = layer(row, bias)


def work_bytes(config: StepLLMConfig, length: int) -> int:
    """What a layer takes, at most, beside its weights and its input, for a row of ``length`` tokens.

    Counted in fp32, which parts of it are in whatever the network's type is: the norms, projections and repeated keys
    and values; the inner widths, gated; bias and scores where no kernel does without them.
    """
    heads = config.num_attention_heads
    return 4 * length * (8 * config.hidden_size + 4 * config.ffn_width + 3 * heads * length)


def _bias(config: StepLLMConfig, x: Tensor) -> Tensor:
    """As Attention takes it: slopes where there is a kernel for them."""
    heads = config.num_attention_heads
    if has_biased_kernel(x, config.head_dim) and not torch.is_grad_enabled():
        return torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=x.device)
    return attention_bias(heads, x.shape[1], x.dtype, x.device)
