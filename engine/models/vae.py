"""Video-VAE version 2: 17 frames of H x W <-> 3 latent frames of H/16 x W/16.

Convolutions are causal in time (two zero frames in front, never replicated), group norms look at one frame at a time,
and the middle attention is causal in token order. Chunks of 17 frames (3 latents) are coded on their own and the two
frames at each border are blended afterwards. Inside, tensors are ``[B, C, T, H, W]``; outside, ``[B, T, C, H, W]``.

Official parameter names. Source: stepvideo/vae/vae.py, arXiv 2502.10248 section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention_causal import frame_causal_attention, has_wide_kernel
from ..config import CHUNK_FRAMES, CHUNK_LATENTS, VAEConfig

Past = dict[int, Tensor]
"""Of each causal convolution, by identity, the last input frames: what it needs to go on with the frames after them."""

GROUPS = 32
MAX_ELEMENTS = 2**30
"""Largest tensor handed to one convolution or norm: kernels index with 32 bits, and 20 frames of 544x992 with 256
channels are 2.8e9 elements. Larger ones go through in slices of whole frames, which changes no result."""
FOREIGN_FRAMES = 3
"""Every doubling of time starts with copies of the first frame, which the causal chunk does not own."""
QUERY_SLICE = 2048
"""Queries of the middle attention that are computed at once; a chunk has 42,160 tokens at 544x992."""


def _by_frames(fn: Callable[[Tensor], Tensor], x: Tensor, channels: int) -> Tensor:
    """Applies ``fn``, which treats frames (dim 2) alike and apart, in slices under :data:`MAX_ELEMENTS`."""
    frames = max(1, MAX_ELEMENTS // (max(channels, x.shape[1]) * x.shape[0] * x.shape[3] * x.shape[4]))
    if frames >= x.shape[2]:
        return fn(x)
    return _gather([fn(part) for part in x.split(frames, dim=2)])


def _gather(parts: list[Tensor]) -> Tensor:
    """Joins slices along time and lets go of each as it is copied."""
    first = parts[0]
    out = first.new_empty(*first.shape[:2], sum(p.shape[2] for p in parts), *first.shape[3:])
    start = 0
    for i in range(len(parts)):
        out[:, :, start : start + parts[i].shape[2]] = parts[i]
        start += parts[i].shape[2]
        parts[i] = first = out  # nothing but the joined tensor stays alive
    return out


class GroupNorm(nn.GroupNorm):
    """32 groups, statistics of each frame on its own (the official code's version-2 switch)."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return _by_frames(self._norm, x, x.shape[1])

    def _norm(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2)
        return self._norm_frames(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)

    def _norm_frames(self, x: Tensor) -> Tensor:
        if _rounds_once(self, x):
            normed = F.group_norm(x.float(), GROUPS, self.weight.float(), self.bias.float(), self.eps)
            return normed.to(x.dtype)
        return super().forward(x)


def _rounds_once(module: nn.Module, x: Tensor) -> bool:
    """Whether a layer of the encoder has to be computed in fp32, to round once in bf16 on CUDA as on the CPU.

    cuDNN rounds a convolution before it adds the bias, and torch's CUDA group norm rounds mean and deviation. The
    encoder's log variance is a small difference of large numbers: each of the two moves it by 4 %, and without them a
    card is as near to the official CPU run as that is to itself on another build (2 %). Image-to-video encodes one
    frame, so this costs a fraction of a second. The decoder keeps the fast kernels, as the official program does.
    """
    flagged = getattr(module, "round_once", False)
    return flagged and x.is_cuda and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()


class CausalConv3d(nn.Module):
    """3-D convolution with ``kernel - 1`` zero frames in front in time and symmetric zeros in space."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.front, self.stride = kernel - 1, stride
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding=(0, kernel // 2, kernel // 2))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """With ``past``, ``x`` are the frames after those of the call before; it is updated. Only for stride 1."""
        front, stride = self.front, self.stride
        if past is not None and front:
            before = past.get(id(self))
            if before is None:
                before = x.new_zeros(*x.shape[:2], front, *x.shape[3:])
            x = torch.cat([before, x], dim=2)
            past[id(self)] = x[:, :, -front:].clone()  # a view would keep all of x
            front = 0
        outputs = (x.shape[2] + front - self.conv.kernel_size[0]) // stride + 1
        widest = max(x.shape[1] * stride * stride, self.conv.out_channels)
        step = max(1, MAX_ELEMENTS // (widest * x.shape[0] * x.shape[3] * x.shape[4]))
        parts = []
        for start in range(0, outputs, step):
            first = start * stride - front  # the first input frame that this slice needs; negative: a zero frame
            last = (min(start + step, outputs) - 1) * stride - front + self.conv.kernel_size[0]
            frames = x[:, :, max(first, 0) : last]
            if first < 0:
                frames = F.pad(frames, (0, 0, 0, 0, -first, 0))
            parts.append(_convolve(self.conv, frames))
        return parts[0] if len(parts) == 1 else _gather(parts)


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv, twice, plus the input (through a 1x1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = CausalConv3d(in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        # The zero frames come after norm and SiLU, that is, they really are zero where the convolution reads them.
        h = self.conv1(F.silu(self.norm1(x), inplace=_may_write(x)), past)
        h = self.conv2(F.silu(self.norm2(h), inplace=_may_write(x)), past)
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return h.add_(x) if _may_write(x) else x + h


def _may_write(x: Tensor) -> bool:
    """Whether intermediate results may be overwritten; in training, autograd still needs them."""
    return not torch.is_grad_enabled()


class CausalTokenAttention(nn.Module):
    """One head over all t*h*w tokens, causal in raster order (within a frame as well)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = CausalConv3d(channels, channels, kernel=1)
        self.k = CausalConv3d(channels, channels, kernel=1)
        self.v = CausalConv3d(channels, channels, kernel=1)
        self.proj_out = CausalConv3d(channels, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).contiguous() for conv in (self.q, self.k, self.v))
        if has_wide_kernel(q, q.shape[2]) and not torch.is_grad_enabled():
            out = frame_causal_attention(q, k, v)
        else:
            out = causal_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(out.transpose(1, 2).unflatten(2, x.shape[2:]))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention ``[B, H, S, D]`` in slices of queries, so that S x S scores never exist at once."""
    length = q.shape[2]
    if length <= QUERY_SLICE:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    position = torch.arange(length, device=q.device)
    out = torch.empty_like(q)
    for start in range(0, length, QUERY_SLICE):
        end = min(start + QUERY_SLICE, length)
        mask = position[start:end, None] >= position[:end]
        out[:, :, start:end] = F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, :end], v[:, :, :end], attn_mask=mask
        )
    return out


class MiddleBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = CausalTokenAttention(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample2d(nn.Module):
    """Halves height and width of each frame; zero padding only on the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return _by_frames(lambda part: _frame_conv(self.conv, F.pad(part, (0, 1, 0, 1))), x, x.shape[1])


class Downsample3d(nn.Module):
    """Halves time, height and width with one strided causal convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _frame_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    frames = x.transpose(1, 2)
    return _convolve(conv, frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


def _convolve(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    if _rounds_once(conv, x) and conv.bias is not None:
        # Products of bf16 numbers are exact in fp32.
        return conv._conv_forward(x.float(), conv.weight.float(), conv.bias.float()).to(x.dtype)  # type: ignore[arg-type]
    return conv(x)


def _nearest(x: Tensor, *, time: bool) -> Tensor:
    """Doubles height and width, and time if asked, by copies."""
    b, c, t, h, w = x.shape
    x = x[:, :, :, None, :, None, :, None].expand(b, c, t, 2 if time else 1, h, 2, w, 2)
    return x.reshape(b, c, t * (2 if time else 1), 2 * h, 2 * w)


class Upsample2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return _by_frames(lambda part: _frame_conv(self.conv, _nearest(part, time=False)), x, 4 * x.shape[1])


class UpsampleBlock(nn.Module):
    """silu(norm2(conv2(silu(norm1(conv1 x)))) + x) + x: the input is added twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels)
        self.norm1 = GroupNorm(channels)
        self.conv2 = CausalConv3d(channels, channels)
        self.norm2 = GroupNorm(channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x, past)), inplace=_may_write(x))
        h = self.norm2(self.conv2(h, past))
        return F.silu(h + x) + x


class Upsample3d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3d = UpsampleBlock(channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return self.conv3d(_nearest(x, time=True), past)


def channels_to_space_time(x: Tensor) -> Tensor:
    """``[B, 8 C, T, H, W]`` -> ``[B, C, 2 T - 1, 2 H, 2 W]``: channels are read as [C, t, h, w]; frame 0 is dropped."""
    x = x.unflatten(1, (-1, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, 1:]


def space_time_to_channels(x: Tensor) -> Tensor:
    """``[B, C, 2 T - 1, 2 H, 2 W]`` -> ``[B, 8 C, T, H, W]``, with one zero frame in front."""
    x = F.pad(x, (0, 0, 0, 0, 1, 0))
    x = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def average_channels(x: Tensor, channels: int) -> Tensor:
    """Averages consecutive groups of channels down to ``channels``."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


class PatchConv(nn.Module):
    """A causal convolution beside a pixel (un)shuffle; only holds the official name ``conv.conv``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.Module):
    """One resolution: its residual blocks, then its change of resolution, if any."""

    def __init__(self, blocks: list[nn.Module], name: str = "", resample: nn.Module | None = None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.resample = name
        if resample is not None:
            self.add_module(name, resample)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        for block in self.block:
            x = block(x, past)
        if not self.resample:
            return x
        resample = getattr(self, self.resample)
        return resample(x) if past is None else resample(x, past)


class Encoder(nn.Module):
    """``[B, 3, T, H, W]`` -> ``[B, 2 z, T', H/16, W/16]`` (mean and log variance); 17 frames -> 3, 1 -> 1."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.encoder_ch * m for m in config.encoder_ch_mult]
        self.z32 = 32 * config.z_channels
        self.moments = 2 * config.z_channels
        self.conv_in = CausalConv3d(config.in_channels, config.encoder_ch)
        self.down = nn.ModuleList()
        last = config.encoder_ch
        for i, width in enumerate(widths):
            blocks: list[nn.Module] = [
                ResnetBlock(last if j == 0 else width, width) for j in range(config.num_res_blocks)
            ]
            last = width if blocks else last
            resample = None
            if i < len(widths) - 1:
                resample = Downsample3d(last) if i in config.down_sampling_layer else Downsample2d(last)
            self.down.append(Level(blocks, "downsample" if resample else "", resample))
        self.mid = MiddleBlock(last)
        self.norm_out = GroupNorm(last)
        self.conv_patchify = PatchConv(last, self.z32 // 8)
        self.conv_out = CausalConv3d(self.z32, self.moments)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, GroupNorm)):
                module.round_once = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = F.silu(self.norm_out(self.mid(x)))
        x = space_time_to_channels(self.conv_patchify(x)) + average_channels(space_time_to_channels(x), self.z32)
        return self.conv_out(x) + average_channels(x, self.moments)


class Decoder(nn.Module):
    """``[B, z, T, h, w]`` -> ``[B, 3, T', 16 h, 16 w]``; 3 latent frames -> 17, 1 -> 1."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.decoder_ch * m for m in config.decoder_ch_mult]
        last = widths[-1]
        self.conv_in = CausalConv3d(config.z_channels, 32 * config.z_channels)
        self.conv_unpatchify = PatchConv(32 * config.z_channels, 8 * last)
        self.mid = MiddleBlock(last)
        levels = []
        for i in reversed(range(len(widths))):
            blocks: list[nn.Module] = []
            for _ in range(config.num_res_blocks + 1):
                blocks.append(ResnetBlock(last, widths[i]))
                last = widths[i]
            resample = None
            if i > 0:
                resample = Upsample3d(last) if i in config.temporal_up_layers else Upsample2d(last)
            levels.insert(0, Level(blocks, "upsample" if resample else "", resample))
        self.up = nn.ModuleList(levels)
        self.norm_out = GroupNorm(last)
        self.conv_out = CausalConv3d(last, config.out_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(z)
        for level in reversed(self.up):
            x = level(x)
        return self.finish(x)[:, :, FOREIGN_FRAMES:]

    def middle(self, z: Tensor) -> Tensor:
        """All of a chunk at the lowest resolution, where its frames see each other: ``[B, c, 2 T - 1, 2 h, 2 w]``."""
        x = self.conv_in(z)
        x = x + z.repeat_interleave(x.shape[1] // z.shape[1], dim=1)
        h = self.conv_unpatchify(x)
        x = channels_to_space_time(h + x.repeat_interleave(h.shape[1] // x.shape[1], dim=1))
        del h
        return self.mid(x)

    def finish(self, x: Tensor, past: Past | None = None) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(x), inplace=_may_write(x)), past)

    def slices(self, z: Tensor, frames: int) -> Iterator[Tensor]:
        """The same frames as of a call, in pieces ``[B, 3, t, H, W]`` as they get ready, in far less memory.

        Each level works on ``frames`` frames at a time and hands each result on before it takes the next ones; of the
        others only what later ones depend on is kept: two input frames of each convolution (4.3 GB in bf16 at 544x992,
        in place of 20 GB for a whole chunk's largest tensors).
        """
        foreign = FOREIGN_FRAMES
        for piece in self._climb(self.middle(z), len(self.up) - 1, {}, frames):
            if foreign < piece.shape[2]:
                yield piece[:, :, foreign:]
            foreign = max(0, foreign - piece.shape[2])

    def _climb(self, x: Tensor, level: int, past: Past, frames: int) -> Iterator[Tensor]:
        for part in x.split(frames, dim=2):
            if level < 0:
                yield self.finish(part, past)
            else:
                yield from self._climb(self.up[level](part, past), level - 1, past, frames)


class VideoAutoencoder(nn.Module):
    """The VAE on videos of any length.

    Shapes: video ``[B, F, 3, H, W]`` in [-1, 1], latents ``[B, f, z, H/16, W/16]``. No latent scaling: the factor of
    the release is 1.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm_out.weight.dtype

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, each ``[B, f, z, h, w]``."""
        return encode_video(self.encoder, video)

    def decode(self, latents: Tensor) -> Tensor:
        """``[B, f, z, h, w]`` -> the whole video ``[B, F, 3, H, W]`` (not clamped)."""
        return torch.cat(list(decode_chunks(self.decoder, latents)), dim=1)


def encode_video(encoder: nn.Module, video: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, F, 3, H, W]`` -> mean and log variance (clamped to [-30, 20]), 17 frames at a time."""
    moments = [encoder(chunk.transpose(1, 2)).transpose(1, 2) for chunk in video.split(CHUNK_FRAMES, dim=1)]
    mean, logvar = torch.cat(moments, dim=1).chunk(2, dim=2)
    return mean, logvar.clamp(-30.0, 20.0)


def decode_chunks(decoder: nn.Module, latents: Tensor, frames: int | None = None) -> Iterator[Tensor]:
    """Decodes 3 latent frames at a time and yields frames ``[B, n, 3, H, W]`` as soon as they are final.

    The last frame of each chunk is held back, because the next chunk blends into it. ``frames`` is how many go through
    the wide levels at once (see :meth:`Decoder.slices`); by default a whole chunk.
    """
    held: Tensor | None = None
    for part in latents.split(CHUNK_LATENTS, dim=1):
        z = part.transpose(1, 2)
        border = True
        for piece in [decoder(z)] if frames is None else cast(Decoder, decoder).slices(z, frames):
            piece = piece.transpose(1, 2)
            if held is not None:
                if border:
                    blend_border(held, piece[:, :1])
                yield held
            border = False
            if piece.shape[1] > 1:
                yield piece[:, :-1]
            held = piece[:, -1:].clone()
            del piece
    if held is not None:
        yield held


def blend_border(last: Tensor, first: Tensor) -> None:
    """Blends the two frames at a chunk border in place, one after the other: the second uses the new first frame."""
    first.copy_(0.6 * first + 0.4 * last)
    last.copy_(0.6 * last + 0.4 * first)


def sample_posterior(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """``mean + exp(logvar / 2) * eps``."""
    return mean + torch.exp(0.5 * logvar) * eps
