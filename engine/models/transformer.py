"""The Step-Video DiT: 48 blocks of 3D full attention, conditioned on two text encoders and one timestep.

Official parameter names, official order of roundings. Every row of a batch goes through a block on its own, one
after the other: the two guidance branches need no more activation memory than one plus a second residual stream, and
a video never depends on what else is in its batch.

Memory of one row at S tokens and width d, beside the weights: the residual stream S d, qkv 3 S d, the feed-forward
hidden 4 S d (S = 75,888 and d = 6,144 at 544x992x204: 0.93 GB a unit in bf16).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TransformerConfig

if TYPE_CHECKING:
    from .fused import FusedBlocks, Parking

ROPE_SPLIT = (64, 32, 32)
"""Channels of a head that carry the frame, row and column position, in this order."""

RopeTable = tuple[Tensor, Tensor]
"""cos and sin, each ``[S, 1, 128]``, in the type of the tokens."""


def rope_angles(length: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin ``[length, width]`` of one axis, on the CPU so that every device gets the same bits.

    Quirk: the angle is rounded to the token type before cos and sin. In bf16 an angle between 32 and 64 has a step
    of 0.25 rad; it is what the released weights were run with.
    """
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    angles = (torch.arange(length, dtype=torch.float32)[:, None] * inv_freq).to(dtype)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


@lru_cache(maxsize=2)
def rope_table(fhw: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu") -> RopeTable:
    """Tables ``[f*h*w, 1, 128]`` for tokens in the order frame, row, column. The last ones are kept: every step and
    every block needs the same."""
    with torch.inference_mode(False):  # what is kept may be wanted where gradients are
        tables: tuple[list[Tensor], list[Tensor]] = ([], [])
        for axis, (length, width) in enumerate(zip(fhw, ROPE_SPLIT, strict=True)):
            shape = [1, 1, 1, width]
            shape[axis] = length
            for table, values in zip(tables, rope_angles(length, width, dtype), strict=True):
                table.append(values.view(shape).expand(*fhw, width))
        cos, sin = (torch.cat(t, dim=-1).reshape(math.prod(fhw), 1, sum(ROPE_SPLIT)).to(device) for t in tables)
        return cos, sin


def apply_rope(x: Tensor, rope: RopeTable) -> Tensor:
    """Rotates ``x [B, S, H, 128]``; channel i of each part is paired with i + width / 2 (half-split)."""
    cos, sin = rope
    turned = []
    for part in x.split(ROPE_SPLIT, dim=-1):
        first, second = part.chunk(2, dim=-1)
        turned += [-second, first]
    return x * cos + torch.cat(turned, dim=-1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in fp32; rounded to the input's type before the weight is applied."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # Without a weight, rms_norm computes in fp32 and rounds once; the weight then multiplies the rounded value.
        return F.rms_norm(x, (x.shape[-1],), None, self.eps) * self.weight


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v on ``[B, S, H, D]`` tensors; returns ``[B, S, H * D]``."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """3D full attention. ``wqkv`` is read as [heads, 3 D]: q, k and v interleaved per head."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def forward(self, x: Tensor, rope: RopeTable) -> Tensor:
        q, k, v = self.wqkv(x).unflatten(-1, (-1, 3 * self.head_dim)).chunk(3, dim=-1)
        q = apply_rope(self.q_norm(q), rope)
        k = apply_rope(self.k_norm(k), rope)
        return self.wo(attend(q, k, v))


class CrossAttention(nn.Module):
    """Attention on text tokens; ``wkv`` is read as [heads, 2 D]. No rotary embedding."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wkv = nn.Linear(dim, 2 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x [B, S, d]``, ``context [B, L, d]``; ``mask [B, S, L]``, true where a key is seen, is for padded text."""
        q = self.q_norm(self.wq(x).unflatten(-1, (-1, self.head_dim)))
        k, v = self.wkv(context).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        return self.wo(attend(q, self.k_norm(k), v, None if mask is None else mask[:, None]))


class GELUProjection(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """d -> 4 d, tanh-GELU, -> d, without biases."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Index 1 is the dropout of the official module; it holds no tensors, but fixes the name net.2.
        self.net = nn.ModuleList([GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention and feed-forward, modulated and gated by the timestep, with plain cross-attention between."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        # eps 1e-5 is LayerNorm's default: the official block does not hand the model's norm_eps on.
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn1 = SelfAttention(dim, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.attn2 = CrossAttention(dim, head_dim)
        self.ff = FeedForward(dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))

    def forward(
        self, x: Tensor, context: Tensor, modulation: Tensor, rope: RopeTable, mask: Tensor | None = None
    ) -> Tensor:
        """``x [B, S, d]``, ``context [B, L, d]``, ``modulation [B, 6 d]`` (the model's one adaLN output)."""
        table = self.scale_shift_table + modulation.unflatten(-1, (6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unsqueeze(2).unbind(1)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1, rope)
        x = x + self.attn2(x, context, mask)
        return x + gate2 * self.ff(self.norm2(x) * (1 + scale2) + shift2)


def sinusoid(values: Tensor, width: int = 256) -> Tensor:
    """``[B]`` -> ``[B, width]`` in fp32: cos half first, then sin half (Ho et al. 2020, flipped as in DiT)."""
    half = width // 2
    freqs = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScalarEmbedding(nn.Module):
    """A number -> sinusoid in fp32 -> linear, SiLU, linear in the weights' type."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(256, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, values: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid(values).to(self.linear_1.weight.dtype))))


class TimestepEmbeddings(nn.Module):
    def __init__(self, dim: int, use_additional_conditions: bool) -> None:
        super().__init__()
        self.timestep_embedder = ScalarEmbedding(dim)
        if use_additional_conditions:
            self.motion_score_embedder = ScalarEmbedding(dim)


class AdaLayerNormSingle(nn.Module):
    """PixArt's adaLN-single: one linear makes the six modulation vectors for all blocks."""

    def __init__(self, dim: int, use_additional_conditions: bool) -> None:
        super().__init__()
        self.emb = TimestepEmbeddings(dim, use_additional_conditions)
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor, motion_score: float | None = None) -> tuple[Tensor, Tensor]:
        """Returns the modulation ``[B, 6 d]`` and the embedding ``[B, d]`` (for the head)."""
        dtype = self.linear.weight.dtype
        # Quirk: the timestep is rounded to the model's type, then multiplied by 1000 in this type.
        embedding = self.emb.timestep_embedder(timestep.to(dtype) * 1000)
        if motion_score is not None:
            # Quirk: the motion score is rounded to the model's type too, but not multiplied.
            score = torch.full_like(timestep, motion_score, dtype=dtype)
            embedding = embedding + self.emb.motion_score_embedder(score)
        return self.linear(F.silu(embedding)), embedding


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """``[N, c, h, w]`` -> ``[N, h w, d]``."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class CaptionProjection(nn.Module):
    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        text = F.layer_norm(text, (text.shape[-1],), eps=1e-6)
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


def text_lengths(mask: Tensor, *, official_rounding: bool = False, dtype: torch.dtype = torch.bfloat16) -> list[int]:
    """Number of visible text tokens of each row of ``mask [B, L]`` (a prefix of ones).

    The official pipeline casts the mask to the model's type before it sums it, so that in bf16 a count above 256 is
    rounded to a multiple of 2 (277 becomes 276): a long prompt loses its last token or gains one of padding. That
    helps nobody, so the exact count is the default; ``official_rounding`` reproduces the release.
    """
    counts = mask.to(dtype).sum(dim=1, dtype=dtype) if official_rounding else mask.to(torch.int64).sum(dim=1)
    return [int(n) for n in counts]


class StepVideoTransformer(nn.Module):
    """The 30B video DiT (text-to-video), or with ``use_additional_conditions`` its image-to-video sibling.

    Source: stepvideo/modules/model.py (Step-Video-T2V and Step-Video-TI2V), arXiv 2502.10248 and 2503.11251.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, head_dim = config.inner_dim, config.attention_head_dim
        conditioned = config.use_additional_conditions
        self.pos_embed = PatchEmbed(config.in_channels * (2 if conditioned else 1), dim, config.patch_size)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(dim, head_dim) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaln_single = AdaLayerNormSingle(dim, conditioned)
        self.caption_projection = CaptionProjection(config.caption_channels[0], dim)
        self.clip_projection = nn.Linear(config.caption_channels[1], dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def embed_text(self, llm: Tensor, clip: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Context of each row, cut to its length: ``[1, lengths[i], d]``. CLIP tokens stand before the LLM's.

        ``llm [B, L, c1]``, ``clip [B, 77, c2]``; ``lengths`` count both (see :func:`text_lengths`). Does not depend
        on the timestep: once per prompt is enough.
        """
        return [
            torch.cat([self.clip_projection(c), self.caption_projection(t)], dim=1)[:, :length]
            for t, c, length in zip(llm.split(1), clip.split(1), lengths, strict=True)
        ]

    def embed_latents(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[B, f, c, h, w]`` -> tokens ``[B, f h w, d]``; the condition latent joins on the channel axis."""
        if self.config.use_additional_conditions:
            if condition is None:
                raise ValueError("an image-to-video model needs condition_latents [B, f, c, h, w]")
            latents = torch.cat([latents, condition], dim=2)
        return self.pos_embed(latents.flatten(0, 1)).unflatten(0, (latents.shape[0], -1)).flatten(1, 2)

    def head(self, hidden: Tensor, embedding: Tensor, fhw: tuple[int, int, int]) -> Tensor:
        """Tokens ``[B, f h w, d]`` -> ``[B, f, c, h p, w p]``; patches are read as (p, q, channel)."""
        # The table is added to the timestep embedding itself, not to the six modulation vectors.
        shift, scale = (self.scale_shift_table + embedding[:, None]).unsqueeze(2).unbind(1)
        hidden = F.layer_norm(hidden, (hidden.shape[-1],), eps=self.config.norm_eps) * (1 + scale) + shift
        p = self.config.patch_size
        x = self.proj_out(hidden).unflatten(1, fhw).unflatten(-1, (p, p, self.config.out_channels))
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Sequence[Tensor],
        condition_latents: Tensor | None = None,
        motion_score: float | None = None,
        blocks: Iterable[nn.Module] | None = None,
        fused: FusedBlocks | None = None,
        parking: Parking | None = None,
    ) -> Tensor:
        """Velocity ``[B, f, c, h, w]`` of ``latents [B, f, c, h, w]`` at ``timestep [B]`` (0 noise ... 1 video).

        ``context`` comes from :meth:`embed_text`; ``condition_latents`` (like ``latents``) and ``motion_score`` are
        for image-to-video models. ``blocks`` is where the blocks come from, by default the module's own; ``fused`` runs
        them in place of their own ``forward``, with its own text, and then ``parking`` is where the residual streams of
        all rows but one wait.

        Raises:
            ValueError: no condition for an image-to-video model; ``parking`` without ``fused``.
        """
        if parking is not None and fused is None:
            raise ValueError("rows are parked between fused blocks only")
        p = self.config.patch_size
        fhw = (latents.shape[1], latents.shape[3] // p, latents.shape[4] // p)
        rope = rope_table(fhw, latents.dtype, latents.device)
        if not self.config.use_additional_conditions:
            motion_score = None
        # Everything runs row by row, the small layers too: a matrix product of more rows may round otherwise.
        times = [self.adaln_single(t, motion_score) for t in timestep.split(1)]
        conditions = [None] * len(times) if condition_latents is None else condition_latents.split(1)
        embedded = (self.embed_latents(x, c) for x, c in zip(latents.split(1), conditions, strict=True))
        if fused is not None:  # a single frame's tokens lie with channels apart, as the convolution gives them
            embedded = (x.contiguous() for x in embedded)
        rows = list(embedded) if parking is None else []
        parked = None if parking is None else parking.park(embedded, len(times))
        for index, block in enumerate(self.transformer_blocks if blocks is None else blocks):
            for i, row in enumerate(rows) if parked is None else parked.turns():
                modulation, _ = times[i]
                if fused is not None:
                    final = None if parked is None else parked.final
                    fused(index, i, cast(TransformerBlock, block), row, modulation, rope, final)
                else:
                    rows[i] = block(row, context[i], modulation, rope)
        turns = enumerate(rows) if parked is None else parked.turns()
        velocities = {i: self.head(row, times[i][1], fhw) for i, row in turns}
        return torch.cat([velocities[i] for i in range(len(times))])
