"""Video-VAE version 2: 17 frames of H x W <-> 3 latent frames of H/16 x W/16.

Convolutions are causal in time (two zero frames in front, never replicated), group norms look at one frame at a time,
and the middle attention is causal in token order. Chunks of 17 frames (3 latents) are coded on their own and the two
frames at each border are blended afterwards. Inside, tensors are ``[B, C, T, H, W]``; outside, ``[B, T, C, H, W]``.

Official parameter names. Source: stepvideo/vae/vae.py, arXiv 2502.10248 section 4.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention_causal import frame_causal_attention, has_wide_kernel
from ...kernels.cards import ran_out
from ...offload.pinned import HostSlab, PinError, lay_out
from ..config import CHUNK_FRAMES, CHUNK_LATENTS, VAEConfig
from ..runtime import slow_in_bf16

GROUPS = 32
MAX_ELEMENTS = 2**30
"""Largest tensor handed to one convolution or norm: kernels index with 32 bits, and 20 frames of 544x992 with 256
channels are 2.8e9 elements. Larger ones go through in slices of whole frames, which changes no result."""
SCALE = 16
"""Rows and columns of a frame for one of the latents."""
FOREIGN_FRAMES = 3
"""Every doubling of time starts with copies of the first frame, which the causal chunk does not own."""
QUERY_SLICE = 2048
"""Queries of the middle attention that are computed at once; a chunk has 42,160 tokens at 544x992."""
NORM_PARTS = 4
"""In strips, a norm takes this part of a frame's groups at once: groups have nothing to do with each other."""
Scales = tuple[Tensor, Tensor]
"""What a norm does to each channel of each frame, ``[B, C, T, 1, 1]`` in fp32: times the first, plus the second."""
RING = 2
"""Buffers on the device for each direction: one is copied while the other is worked on."""
SMALLER = ((1, 1), (1, 4), (1, 16))
"""Frames at a time and strips that a chunk is decoded in when there was not enough memory for more."""
ENCODING = (1, 4, 16)
"""Strips that frames are encoded in: with the next where there was not enough memory for fewer."""


class HostFrames:
    """The input frames that convolutions keep for their next call, strip by strip, outside the device's memory.

    On CUDA they lie in pinned host memory and move on two streams beside the computation, through :data:`RING` buffers
    in each direction: the host runs ahead, so the copies of a strip start while the one before it is computed. At
    544x992 a chunk moves 21 GB each way in 8 strips, four frames at a time, 42 GB by twos and 74 GB frame by frame.
    Elsewhere the host's memory is the device's, and they are plain copies. One object serves many calls, because
    pinning is slow; :meth:`close` it at the end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.slabs: list[HostSlab] = []
        self.valid: dict[tuple[int, int], torch.cuda.Event | None] = {}
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.inward, self.outward = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self.rings: list[list[Tensor]] = [[], []]
            self.free: list[list[torch.cuda.Event | None]] = [[], []]  # when a buffer was read
            self.turn = [0, 0]

    def restart(self) -> None:
        """Forgets all frames and keeps the memory: a new chunk begins."""
        self.valid.clear()

    def exchange(self, key: tuple[int, int], lines: Tensor, front: int) -> None:
        """Puts the kept frames before those in ``lines [B, C, front + t, h, W]`` (zeros at first); keeps the last."""
        before, last = lines[:, :, :front], lines[:, :, -front:]
        known = key in self.valid
        if key not in self.kept:
            self.kept[key] = self._reserve(before)
        if not known:
            before.zero_()
        elif self.cuda:
            self._fetch(key, before)
        else:
            before.copy_(self.kept[key])
        if self.cuda:
            self._send(key, last)
        else:
            self.kept[key].copy_(last)
            self.valid[key] = None

    def close(self) -> None:
        """Waits for the copies and gives the memory back."""
        if self.cuda:
            self.inward.synchronize()
            self.outward.synchronize()
            self.rings = [[], []]
        self.kept.clear()
        self.valid.clear()
        for slab in self.slabs:
            slab.close()
        self.slabs.clear()

    def _reserve(self, like: Tensor) -> Tensor:
        if not self.cuda:
            return _host_frames(like)
        layout = lay_out({"frames": torch.empty(like.shape, dtype=like.dtype, device="meta")})
        slab = HostSlab(layout)
        with contextlib.suppress(PinError):  # slow, but right: such copies wait for one another
            slab.pin()
        self.slabs.append(slab)
        return layout.places["frames"].view(slab.memory)

    def _buffer(self, way: int, like: Tensor) -> tuple[int, Tensor]:
        """The next buffer of a direction, once the current stream (out) or the inward one may write it."""
        ring, main = self.rings[way], torch.cuda.current_stream(self.device)
        if not ring or ring[0].numel() < like.numel():
            # Freed while copies are under way: the allocator has to know of them.
            ring[:] = [torch.empty(like.numel(), dtype=like.dtype, device=self.device) for _ in range(RING)]
            for buffer in ring:
                buffer.record_stream(self.outward if way else self.inward)
            self.free[way] = [None] * RING
            if not way:
                self.inward.wait_stream(main)  # the memory may have had another use on it until now
        self.turn[way] = slot = (self.turn[way] + 1) % RING
        event = self.free[way][slot]
        if event is not None:
            (main if way else self.inward).wait_event(event)
        return slot, ring[slot][: like.numel()].view(like.shape)

    def _fetch(self, key: tuple[int, int], into: Tensor) -> None:
        main = torch.cuda.current_stream(self.device)
        slot, buffer = self._buffer(0, into)
        stored = self.valid[key]
        with torch.cuda.stream(self.inward):
            if stored is not None:
                self.inward.wait_event(stored)
            buffer.copy_(self.kept[key], non_blocking=True)
        main.wait_event(self.inward.record_event())
        into.copy_(buffer)
        self.free[0][slot] = main.record_event()

    def _send(self, key: tuple[int, int], last: Tensor) -> None:
        # What is overwritten in host memory was fetched before: `last` itself waited for that.
        main = torch.cuda.current_stream(self.device)
        slot, buffer = self._buffer(1, last)
        buffer.copy_(last)
        self.outward.wait_event(main.record_event())
        with torch.cuda.stream(self.outward):
            self.kept[key].copy_(buffer, non_blocking=True)
        self.free[1][slot] = self.valid[key] = self.outward.record_event()


def _host_frames(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


class Past:
    """What a decoding in slices of time goes on from: of each causal convolution the last input frames.

    Frames higher than ``rows`` are worked on in strips of so many rows, and their past frames are in ``host``; those of
    lower ones, which are small, stay on the device. Without ``host`` what is divided has no past: zeros are in front.
    """

    def __init__(self, rows: int | None = None, host: HostFrames | None = None) -> None:
        self.kept: dict[int, Tensor] = {}
        self.rows, self.host = rows, host

    def divides(self, height: int) -> bool:
        return self.rows is not None and self.rows < height


def strip_rows(height: int, strips: int) -> int:
    """Rows of each strip of a frame, at all levels."""
    return -(-height // strips)


def _strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """First and last row (not included) of each strip."""
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _with_halo(
    x: Tensor, top: int, bottom: int, halo: int, front: int = 0, norm: Scales | None = None
) -> Tensor:  # fmt: skip
    """Rows of ``x [B, C, T, H, W]`` with ``halo`` more on both sides, zeros beyond the border, and room for ``front``
    frames before them: ``[B, C, front + T, bottom - top + 2 halo, W]``. With ``norm`` they are silu(norm(x))."""
    b, c, t, height, width = x.shape
    lines = x.new_empty(b, c, front + t, bottom - top + 2 * halo, width)
    first, last = max(top - halo, 0), min(bottom + halo, height)
    start, stop = first - top + halo, last - top + halo
    lines[:, :, front:, :start] = 0
    inner, rows = lines[:, :, front:, start:stop], x[:, :, :, first:last]
    if norm is None:
        inner.copy_(rows)
    else:
        torch.addcmul(norm[1], rows, norm[0], out=inner)
        F.silu(inner, inplace=True)
    lines[:, :, front:, stop:] = 0
    return lines


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
        if x.is_cuda and not torch.is_grad_enabled():
            # As strips norm it: one moment that is rounded to its neighbour changes every pixel behind it a little, and
            # so does one element where the encoder takes a small difference of large numbers (1 % of its output).
            scale, shift = self.scales(x)
            return torch.addcmul(shift, x, scale, out=torch.empty_like(x))
        frames = x.transpose(1, 2)
        return super().forward(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)

    def in_place(self, x: Tensor) -> Tensor:
        """norm(x) over ``x``, with hardly any memory beside it. Not for training."""
        if x.is_cuda:
            scale, shift = self.scales(x)
            return torch.addcmul(shift, x, scale, out=x)
        for t, part, y, _, _ in self._by_groups(x):
            x[:, part, t] = y
            del y
        return x

    def scales(self, x: Tensor) -> Scales:
        """What the norm does to ``x``, to be done where rows of it are read: its result never is there as a whole."""
        moments = self._moments(x) if x.is_cuda else self._native_moments(x)
        mean, deviation = (v.float().repeat_interleave(x.shape[1] // GROUPS, 1) for v in moments)
        scale = deviation * self.weight.float()[:, None]
        shift = self.bias.float()[:, None] - scale * mean
        return scale[..., None, None], shift[..., None, None]

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each frame, the groups' means and reciprocal deviations ``[B, GROUPS, T]``, rounded as torch's own norm on
        CUDA rounds them; in fp32 for what is to be rounded once.

        That kernel runs one block of threads for each group, which leaves most of a card idle. Those of a batch norm
        take one for each channel of each frame, reading once; channels of one size add up to groups exactly.
        """
        batch, channels, frames, height, width = x.shape
        if x.is_contiguous():
            planes = x.view(1, -1, height, width).split(max(1, MAX_ELEMENTS // (height * width)), 1)
        else:  # views of some frames: each by itself, or they would be copied
            planes = tuple(x[i : i + 1, :, t] for i in range(batch) for t in range(frames))
        found = [torch.batch_norm_update_stats(p, None, None, 0.0) for p in planes]  # variances are not corrected
        mean, variance = (torch.cat(values).float() for values in zip(*found, strict=True))
        if x.is_contiguous():
            mean, variance = (v.view(batch, GROUPS, -1, frames) for v in (mean, variance))
        else:
            mean, variance = (v.view(batch, frames, GROUPS, -1).permute(0, 2, 3, 1) for v in (mean, variance))
        center = mean.mean(2)
        variance = variance.mean(2) + (mean - center[:, :, None]).square().mean(2)
        dtype = torch.float32 if _rounds_once(self, x) else x.dtype
        return center.to(dtype), torch.rsqrt(variance + self.eps).to(dtype)

    def _native_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # In fp32, as a CPU's whole norm uses them; on CUDA they are rounded already.
        mean, deviation = (x.new_empty(len(x), GROUPS, x.shape[2], dtype=torch.float32) for _ in range(2))
        groups = GROUPS // NORM_PARTS
        for t, part, _, means, deviations in self._by_groups(x):
            first = part.start * GROUPS // x.shape[1]
            mean[:, first : first + groups, t], deviation[:, first : first + groups, t] = means, deviations
        return mean, deviation

    def _by_groups(self, x: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
        """Of each frame and part of the channels: the norm, and each group's mean and reciprocal deviation."""
        batch, width, groups = len(x), x.shape[1] // NORM_PARTS, GROUPS // NORM_PARTS
        # On CUDA mean and deviation are rounded before they are used; on a CPU only those that are told, but for this.
        weight, bias = (p.float() if x.device.type == "cpu" else p for p in (self.weight, self.bias))
        for t in range(x.shape[2]):
            for first in range(0, x.shape[1], width):
                part = slice(first, first + width)
                # The kernel of a whole norm, so that mean and deviation are rounded as there.
                y, mean, deviation = torch.native_group_norm(
                    x[:, part, t].contiguous(), weight[part], bias[part], batch, width,
                    x.shape[3] * x.shape[4], groups, self.eps,
                )  # fmt: skip
                yield t, part, y, mean, deviation
                del y


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
        if past is not None and past.divides(x.shape[3]):
            return self.in_strips(x, past)
        if past is not None and front:
            before = past.kept.pop(id(self), None)
            if before is None:
                before = x.new_zeros(*x.shape[:2], front, *x.shape[3:])
            x = torch.cat([before, x], dim=2)
            del before
            past.kept[id(self)] = x[:, :, -front:].clone()  # a view would keep all of x
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

    def in_strips(
        self, x: Tensor, past: Past, onto: Tensor | None = None, norm: Scales | None = None, over: Tensor | None = None
    ) -> Tensor:
        """The same by strips of rows; of silu(norm(x)), if there is a norm. With ``onto`` the result is added to that,
        in place; with ``over`` it is written there, which may be part of ``x`` if the kernel is a single element. Not
        for training; past frames only for stride 1."""
        assert past.rows is not None
        stride = self.stride
        out = over if onto is None else onto
        if out is None:
            frames, height, width = x.shape[2:]
            # Kernels are odd and padded by half: of each stride's rows and columns, and of the last part, one is left.
            size = (frames - 1) // stride + 1, (height - 1) // stride + 1, (width - 1) // stride + 1
            out = x.new_empty(x.shape[0], self.conv.out_channels, *size)
        for i, (top, bottom) in enumerate(_strips(out.shape[3], -(-past.rows // stride))):
            lines = _with_halo(x, stride * top, stride * bottom, self.front // 2, self.front, norm)
            if self.front and past.host is not None:
                past.host.exchange((id(self), i), lines, self.front)
            elif self.front:
                lines[:, :, : self.front] = 0
            y = _convolve(self.conv, lines, (0, 0, self.front // 2))
            if onto is None:
                out[:, :, :, top:bottom] = y
            else:
                out[:, :, :, top:bottom] += y
            del lines, y
        return out


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
        if past is not None and past.divides(x.shape[3]):
            return self._in_strips(x, past)
        h = self.conv1(F.silu(self.norm1(x), inplace=_may_write(x)), past)
        h = self.conv2(F.silu(self.norm2(h), inplace=_may_write(x)), past)
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return h.add_(x) if _may_write(x) else x + h

    def _in_strips(self, x: Tensor, past: Past) -> Tensor:
        """Writes over ``x``: the shortcut takes its place where that is not wider, and the second convolution is added
        to it. There is never more than ``x`` and what the first convolution makes, beside strips."""
        h = self.conv1.in_strips(x, past, norm=self.norm1.scales(x))
        if hasattr(self, "nin_shortcut"):
            wide, width = x.shape[1], self.conv2.conv.out_channels
            x = self.nin_shortcut.in_strips(x, past, over=x[:, :width] if width <= wide else None)
        return self.conv2.in_strips(h, past, onto=x, norm=self.norm2.scales(h))


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

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if past is not None and past.divides(x.shape[3]):
            return self._in_strips(x, past)
        return _by_frames(lambda part: _frame_conv(self.conv, F.pad(part, (0, 1, 0, 1))), x, x.shape[1])

    def _in_strips(self, x: Tensor, past: Past) -> Tensor:
        assert past.rows is not None
        height, width = x.shape[3:]
        out = x.new_empty(*x.shape[:3], height // 2, width // 2)
        for top, bottom in _strips(height // 2, -(-past.rows // 2)):
            # The kernel begins at every second row: it needs none above a strip, and one below it.
            lines = F.pad(_with_halo(x, 2 * top, 2 * bottom, 1)[:, :, :, 1:], (0, 1))
            out[:, :, :, top:bottom] = _frame_conv(self.conv, lines)
            del lines
        return out


class Downsample3d(nn.Module):
    """Halves time, height and width with one strided causal convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=2)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if past is not None and past.divides(x.shape[3]):
            return self.conv.in_strips(x, past)
        return self.conv(x)


def _frame_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    frames = x.transpose(1, 2)
    return _convolve(conv, frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


def _convolve(conv: nn.Conv2d | nn.Conv3d, x: Tensor, padding: tuple[int, ...] | None = None) -> Tensor:
    """``conv`` of x; of a strip with its halo, with a ``padding`` of its own."""
    call: Callable[..., Tensor] = F.conv3d if isinstance(conv, nn.Conv3d) else F.conv2d
    how = conv.stride, conv.padding if padding is None else padding
    wide = _rounds_once(conv, x) or (x.dtype == torch.bfloat16 and x.device.type == "cpu" and slow_in_bf16())
    if not wide:
        return call(x, conv.weight, conv.bias, *how)
    # Products of bf16 numbers are exact in fp32. The copies are gone before the result is rounded.
    out = call(x.float(), conv.weight.float(), None if conv.bias is None else conv.bias.float(), *how)
    return out.to(torch.bfloat16)


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
        if past is not None and past.divides(2 * x.shape[3]):
            return self._in_strips(x, past)
        return _by_frames(lambda part: _frame_conv(self.conv, _nearest(part, time=False)), x, 4 * x.shape[1])

    def _in_strips(self, x: Tensor, past: Past) -> Tensor:
        assert past.rows is not None
        b, c, t, height, width = x.shape
        out = x.new_empty(b, c, t, 2 * height, 2 * width)
        for i in range(t):
            for top, bottom in _strips(height, -(-past.rows // 2)):
                # One row of the small frame is two; the convolution looks at one of them.
                lines = _nearest(_with_halo(x[:, :, i : i + 1], top, bottom, 1), time=False)[:, :, 0, 1:-1]
                out[:, :, i, 2 * top : 2 * bottom] = _convolve(self.conv, lines, (0, 1))
                del lines
        return out


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

    def in_strips(self, low: Tensor, past: Past) -> Tensor:
        """From what is yet to be doubled: it is doubled twice, so that it does not wait beside both convolutions."""
        h = self.conv1(_nearest(low, time=True), past)
        h = self.conv2.in_strips(h, past, norm=self.norm1.scales(h))
        h = self.norm2.in_place(h)
        x = _nearest(low, time=True)
        return F.silu(h.add_(x), inplace=True).add_(x)


class Upsample3d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3d = UpsampleBlock(channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if past is not None and past.divides(2 * x.shape[3]):
            return self.conv3d.in_strips(x, past)
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
        return self.finish(x)

    def in_strips(self, x: Tensor, strips: int) -> Tensor:
        """The same in far less memory: layers take a frame in so many strips of rows (fewer at lower levels, which are
        as high as the strips of the widest), with the statistics of whole frames; what follows the levels, an eighth as
        high and wide, stays whole. ``encode_bytes`` (vae_bytes.py) counts the peak.

        Raises:
            ValueError: ``strips`` below 1, or more while gradients are recorded.
        """
        if strips < 1:
            raise ValueError(f"strips have to be at least 1, not {strips}")
        if strips == 1:
            return self(x)
        if torch.is_grad_enabled():
            raise ValueError("strips write over intermediate results: encode under torch.no_grad() or inference_mode()")
        past = Past(strip_rows(x.shape[3], strips))
        x = self.conv_in.in_strips(x, past)
        for level in self.down:
            x = level(x, past if past.divides(x.shape[3]) else None)
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        """What follows the levels."""
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
        if past is not None and past.divides(x.shape[3]):
            return self.conv_out.in_strips(x, past, norm=self.norm_out.scales(x))
        return self.conv_out(F.silu(self.norm_out(x), inplace=_may_write(x)), past)

    def slices(self, z: Tensor, frames: int, strips: int = 1, host: HostFrames | None = None) -> Iterator[Tensor]:
        """The same frames as of a call, in pieces ``[B, 3, t, H, W]`` as they get ready, in far less memory.

        Each level hands its result on before it takes the next frames; of the others only what later ones depend on is
        kept: two input frames of each convolution, 4.3 GB in bf16 at 544x992. ``decode_bytes`` (vae_bytes.py) counts
        the peak.

        Args:
            z: latents of one chunk, ``[B, z, T, h, w]``.
            frames: how many go through the widest levels at a time.
            strips: more than 1: convolutions take a frame in so many strips (fewer at lower levels, which are as high
                as the strips of the widest), and past frames of what is divided are kept in host memory. Statistics
                are of whole frames. Not for training.
            host: serves many calls, with the same sizes; by default each pins its own memory.

        Raises:
            ValueError: ``frames`` or ``strips`` below 1, or strips while gradients are recorded.
        """
        if min(frames, strips) < 1:
            raise ValueError(f"frames and strips have to be at least 1, not {frames} and {strips}")
        if strips == 1:
            yield from self._own_frames(z, Past(), frames)
            return
        if torch.is_grad_enabled():
            raise ValueError("strips write over intermediate results: decode under torch.no_grad() or inference_mode()")
        mine = HostFrames(z.device) if host is None else host
        mine.restart()
        try:
            yield from self._own_frames(z, Past(strip_rows(SCALE * z.shape[3], strips), mine), frames)
        finally:
            if host is None:
                mine.close()

    def _own_frames(self, z: Tensor, past: Past, frames: int) -> Iterator[Tensor]:
        foreign = FOREIGN_FRAMES
        for piece in self._climb(self.middle(z), len(self.up) - 1, past, frames):
            if foreign < piece.shape[2]:
                yield piece[:, :, foreign:]
            foreign = max(0, foreign - piece.shape[2])
            del piece

    def _climb(self, x: Tensor, level: int, past: Past, frames: int) -> Iterator[Tensor]:
        # Levels that still double time take fewer, so that what they make goes on at once.
        doublings = sum(isinstance(getattr(up, "upsample", None), Upsample3d) for up in self.up[: level + 1])
        count = max(1, frames >> doublings)
        # Each part on its own: a view of x would keep all of it until the last.
        parts = [x] if count >= x.shape[2] else [part.clone() for part in x.split(count, dim=2)]
        del x
        while parts:
            if level < 0:
                yield self.finish(parts.pop(0), past)
            else:
                yield from self._climb(self.up[level](parts.pop(0), past), level - 1, past, frames)


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


def encode_video(
    encoder: nn.Module, video: Tensor, strips: int = 1, on_retry: Callable[[str], None] | None = None
) -> tuple[Tensor, Tensor]:
    """``[B, F, 3, H, W]`` -> mean and log variance (clamped to [-30, 20]), 17 frames at a time in so many ``strips``
    (see :meth:`Encoder.in_strips`).

    Where the memory is not enough, the chunk is encoded again in the next more of :data:`ENCODING`, and so are those
    after it; not while gradients are recorded. ``on_retry`` is told in words.

    Raises:
        torch.OutOfMemoryError: also the most strips take too much.
        ValueError: as of :meth:`Encoder.in_strips`.
    """
    moments = []
    for chunk in video.split(CHUNK_FRAMES, dim=1):
        found, strips = _encode_chunk(encoder, chunk.transpose(1, 2), strips, on_retry)
        moments.append(found.transpose(1, 2))
    mean, logvar = torch.cat(moments, dim=1).chunk(2, dim=2)
    return mean, logvar.clamp(-30.0, 20.0)


def _encode_chunk(
    encoder: nn.Module, x: Tensor, strips: int, on_retry: Callable[[str], None] | None
) -> tuple[Tensor, int]:
    """What the encoder makes of a chunk, and the strips that it took."""
    while True:
        # The error's traceback holds the tensors of all that was under way: nothing is freed before `except` ends.
        try:
            return (encoder(x) if strips == 1 else cast(Encoder, encoder).in_strips(x, strips)), strips
        except (RuntimeError, MemoryError) as error:
            more = [n for n in ENCODING if n > strips]
            if not more or torch.is_grad_enabled() or not ran_out(error):
                raise
        strips = more[0]
        if x.is_cuda:
            torch.cuda.empty_cache()
        if on_retry is not None:
            on_retry(f"in {strips} strips")


def decode_chunks(
    decoder: nn.Module,
    latents: Tensor,
    frames: int | None = None,
    strips: int = 1,
    on_retry: Callable[[str], None] | None = None,
    make_room: Callable[[], bool] | None = None,
) -> Iterator[Tensor]:
    """Decodes 3 latent frames at a time and yields frames ``[B, n, 3, H, W]`` as soon as they are final.

    The last frame of each chunk is held back, because the next chunk blends into it. ``frames`` is how many go through
    the wide levels at once, by default a whole chunk, and ``strips`` what they are divided into (see
    :meth:`Decoder.slices`; strips of whole chunks are those of single frames).

    Where the memory is not enough, the chunk begins again with the next of :data:`SMALLER`, from the frame on that had
    not left, and the chunks after it stay with that. ``on_retry`` is told in words. Where also the last takes too much,
    ``make_room`` is asked to free what else there is on the device, and after a True the last is tried again.

    Raises:
        torch.OutOfMemoryError: also the last of them takes too much, and there is no more room to make.
        ValueError: as of :meth:`Decoder.slices`.
    """
    if strips > 1 and frames is None:
        frames = 1
    held: Tensor | None = None
    work = _ChunkDecoder(decoder, frames, strips)
    try:
        for part in latents.split(CHUNK_LATENTS, dim=1):
            border = True
            for piece in work.decode(part.transpose(1, 2), on_retry, make_room):
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
    finally:
        work.close()
    if held is not None:
        yield held


class _ChunkDecoder:
    """Decodes one chunk after the other, and with less memory from the first that there was not enough for."""

    def __init__(self, decoder: nn.Module, frames: int | None, strips: int) -> None:
        self.decoder, self.frames, self.strips = decoder, frames, strips
        self.host: HostFrames | None = None

    def decode(
        self, z: Tensor, on_retry: Callable[[str], None] | None, make_room: Callable[[], bool] | None
    ) -> Iterator[Tensor]:
        """The frames ``[B, 3, t, H, W]`` of a chunk, each once."""
        done = 0  # frames of this chunk that have left
        while True:
            # The error's traceback holds the tensors of all that was under way: nothing is freed before `except` ends.
            try:
                skip = done
                for piece in self._pieces(z):
                    new = piece[:, :, skip:]
                    skip = max(0, skip - piece.shape[2])
                    del piece
                    if new.shape[2]:
                        done += new.shape[2]
                        yield new
                    del new
                return
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                reduced = self._reduce()
                if not reduced and (make_room is None or not make_room()):
                    raise
            self.close()
            if z.is_cuda:
                torch.cuda.empty_cache()
            if reduced and on_retry is not None:
                on_retry("frame by frame" + (f" in {self.strips} strips" if self.strips > 1 else ""))

    def close(self) -> None:
        if self.host is not None:
            self.host.close()
            self.host = None

    def _pieces(self, z: Tensor) -> Iterator[Tensor]:
        if self.frames is None:
            yield self.decoder(z)
            return
        if self.strips > 1 and self.host is None:
            self.host = HostFrames(z.device)
        yield from cast(Decoder, self.decoder).slices(z, self.frames, self.strips, self.host)

    def _reduce(self) -> bool:
        for frames, strips in SMALLER:
            if strips >= self.strips and (self.frames is None or frames < self.frames or strips > self.strips):
                self.frames, self.strips = frames, strips
                return True
        return False


def blend_border(last: Tensor, first: Tensor) -> None:
    """Blends the two frames at a chunk border in place, one after the other: the second uses the new first frame."""
    first.copy_(0.6 * first + 0.4 * last)
    last.copy_(0.6 * last + 0.4 * first)


def sample_posterior(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """``mean + exp(logvar / 2) * eps``."""
    return mean + torch.exp(0.5 * logvar) * eps
