"""The VAE's forward in a layout that trains fast on a GPU: ``[T, B, H, W, C]``, one frame after the other.

The engine's modules compute convolutions over time as 3-D convolutions and hand group norms a layout that they copy
twice. Here a causal convolution is three 2-D convolutions on whole shifted runs of frames (a slice of the first axis,
so no copy and no padding), and a norm with its SiLU is two passes of a Triton kernel. Same parameters, same result up
to rounding. :func:`choose` times both on the device at hand and checks one against the other; on a CPU, or if
something fails, the engine's modules are used.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.vae import (
    GROUPS,
    CausalConv3d,
    CausalTokenAttention,
    Decoder,
    Encoder,
    GroupNorm,
    Level,
    MiddleBlock,
    ResnetBlock,
    UpsampleBlock,
    VideoAutoencoder,
    average_channels,
    causal_attention,
    channels_to_space_time,
    space_time_to_channels,
)
from .loop import Log

Network = Callable[[Tensor], Tensor]
NormSilu = Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]


def to_frames_last(x: Tensor) -> Tensor:
    """``[B, C, T, H, W]`` -> ``[T, B, H, W, C]``."""
    return x.permute(2, 0, 3, 4, 1).contiguous()


def from_frames_last(x: Tensor) -> Tensor:
    return x.permute(1, 4, 0, 2, 3)


# --- convolutions -------------------------------------------------------------------------------------------------


class _CausalTaps(torch.autograd.Function):
    """y[t] = w2 x[t] + w1 x[t-1] + w0 x[t-2], each a 2-D convolution; ``x [T B, C, H, W]`` in channels-last order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, batch: int) -> Tensor:
        taps = [weight[:, :, k].contiguous(memory_format=torch.channels_last) for k in (2, 1, 0)]
        ctx.save_for_backward(x, *taps)
        ctx.batch = batch
        y = F.conv2d(x, taps[0], bias, padding=1)
        for delay in (1, 2):
            frames = x.shape[0] - delay * batch
            if frames > 0:
                y[delay * batch :] += F.conv2d(x[:frames], taps[delay], padding=1)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *taps = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        needs_input = ctx.needs_input_grad[0]
        dx, dbias = None, None
        dtaps = [torch.zeros_like(tap) for tap in taps]
        for delay in (0, 1, 2):
            frames = x.shape[0] - delay * ctx.batch
            if frames <= 0:
                continue
            shape = [taps[0].shape[0]] if delay == 0 else None
            part, dtaps[delay], db = torch.ops.aten.convolution_backward(
                dy[delay * ctx.batch :], x[:frames], taps[delay], shape, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                [needs_input, True, delay == 0],
            )  # fmt: skip
            if delay == 0:
                dx, dbias = part, db
            elif needs_input:
                assert dx is not None
                dx[:frames] += part
        return dx, torch.stack([dtaps[2], dtaps[1], dtaps[0]], dim=2), dbias, None


def _planes(x: Tensor) -> Tensor:
    """``[T, B, H, W, C]`` -> ``[T B, C, H, W]`` in channels-last order, without a copy."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def _volume(x: Tensor, batch: int) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().unflatten(0, (-1, batch))


def _conv(x: Tensor, module: CausalConv3d) -> Tensor:
    conv, batch = module.conv, x.shape[1]
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    if weight.shape[2] == 1:
        return F.linear(x, weight[:, :, 0, 0, 0], bias)
    if module.stride == 2:
        return _strided(x, weight, bias)
    # Three channels (a picture) become eight: the fast kernels want multiples of eight.
    outputs, inputs = weight.shape[:2]
    more_out, more_in = -outputs % 8, -inputs % 8
    if more_out or more_in:
        x = F.pad(x, (0, more_in))
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, more_in, 0, more_out))
        bias = F.pad(bias, (0, more_out))
    y = _volume(_CausalTaps.apply(_planes(x), weight, bias, batch), batch)
    return y[..., :outputs] if more_out else y


def _strided(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Stride 2 on all axes: y[t] = w2 x[2t] + w1 x[2t-1] + w0 x[2t-2]."""
    batch = x.shape[1]

    def plane(frames: Tensor, k: int, b: Tensor | None = None) -> Tensor:
        tap = weight[:, :, k].contiguous(memory_format=torch.channels_last)
        return _volume(F.conv2d(_planes(frames), tap, b, stride=2, padding=1), batch)

    even, odd = x[0::2], x[1::2]
    y = plane(even, 2, bias)
    if y.shape[0] == 1:
        return y
    before = plane(odd[: y.shape[0] - 1], 1) + plane(even[: y.shape[0] - 1], 0)
    return y + F.pad(before, (0, 0, 0, 0, 0, 0, 0, 0, 1, 0))


# --- norms --------------------------------------------------------------------------------------------------------


def norm_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Group norm of each frame of ``[T, B, H, W, C]``, then SiLU if asked."""
    y = F.group_norm(_planes(x), GROUPS, weight, bias, eps)
    y = y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
    return F.silu(y) if silu else y


def triton_norm_silu() -> NormSilu:
    """The Triton form of it; raises ImportError without Triton."""
    from .fast_norm import norm_silu

    return norm_silu


# --- the networks -------------------------------------------------------------------------------------------------


class FastVAE:
    """Encoder and decoder on the engine's modules and parameters; shapes as theirs, ``[B, C, T, H, W]``."""

    def __init__(self, vae: VideoAutoencoder, norm_silu: NormSilu = norm_silu_reference) -> None:
        self.vae, self.norm_silu = vae, norm_silu

    def encode(self, video: Tensor) -> Tensor:
        net: Encoder = self.vae.encoder
        x = _conv(to_frames_last(video), net.conv_in)
        for level in cast("list[Level]", net.down):
            x = self._blocks(x, level)
            if level.resample:
                conv: Any = level.get_submodule(level.resample).conv
                if isinstance(conv, CausalConv3d):
                    x = _conv(x, conv)
                else:
                    x = _volume(F.conv2d(F.pad(_planes(x), (0, 1, 0, 1)), conv.weight, conv.bias, stride=2), x.shape[1])
        x = self._norm(self._middle(x, net.mid), net.norm_out)
        small = from_frames_last(x)
        joined = space_time_to_channels(from_frames_last(_conv(x, net.conv_patchify.conv)))
        joined = joined + average_channels(space_time_to_channels(small), net.z32)
        out = from_frames_last(_conv(to_frames_last(joined), net.conv_out))
        return out + average_channels(joined, net.moments)

    def decode(self, z: Tensor) -> Tensor:
        net: Decoder = self.vae.decoder
        x = from_frames_last(_conv(to_frames_last(z), net.conv_in))
        x = x + z.repeat_interleave(x.shape[1] // z.shape[1], dim=1)
        h = from_frames_last(_conv(to_frames_last(x), net.conv_unpatchify.conv))
        x = channels_to_space_time(h + x.repeat_interleave(h.shape[1] // x.shape[1], dim=1))
        x = self._middle(to_frames_last(x), net.mid)
        for level in cast("list[Level]", list(reversed(net.up))):
            x = self._blocks(x, level)
            if level.resample:
                x = self._upsample(x, level.get_submodule(level.resample))
        return from_frames_last(_conv(self._norm(x, net.norm_out), net.conv_out))[:, :, 3:]

    def _norm(self, x: Tensor, norm: GroupNorm, silu: bool = True) -> Tensor:
        return self.norm_silu(x, norm.weight, norm.bias, norm.eps, silu)

    def _blocks(self, x: Tensor, level: Any) -> Tensor:
        for block in level.block:
            x = self._resnet(x, block)
        return x

    def _resnet(self, x: Tensor, block: ResnetBlock) -> Tensor:
        h = _conv(self._norm(x, block.norm1), block.conv1)
        h = _conv(self._norm(h, block.norm2), block.conv2)
        return h + (_conv(x, block.nin_shortcut) if hasattr(block, "nin_shortcut") else x)

    def _middle(self, x: Tensor, middle: MiddleBlock) -> Tensor:
        return self._resnet(self._attention(self._resnet(x, middle.block_1), middle.attn_1), middle.block_2)

    def _attention(self, x: Tensor, module: CausalTokenAttention) -> Tensor:
        h = self._norm(x, module.norm, silu=False)
        q, k, v = (
            _conv(h, conv).permute(1, 0, 2, 3, 4).flatten(1, 3)[:, None] for conv in (module.q, module.k, module.v)
        )
        out = causal_attention(q, k, v)[:, 0].unflatten(1, (x.shape[0], *x.shape[2:4])).transpose(0, 1)
        return x + _conv(out.contiguous(), module.proj_out)

    def _upsample(self, x: Tensor, module: nn.Module) -> Tensor:
        if hasattr(module, "conv3d"):
            block: UpsampleBlock = module.conv3d  # type: ignore[assignment]
            x = _nearest(x, 2)
            h = self._norm(_conv(x, block.conv1), block.norm1)
            h = self._norm(_conv(h, block.conv2), block.norm2, silu=False)
            return F.silu(h + x) + x
        conv: nn.Conv2d = module.conv  # type: ignore[assignment]
        return _volume(F.conv2d(_planes(_nearest(x, 1)), conv.weight, conv.bias, padding=1), x.shape[1])


def _nearest(x: Tensor, times: int) -> Tensor:
    """Doubles height and width, and time by ``times``, by copies."""
    t, b, h, w, c = x.shape
    return x[:, None, :, :, None, :, None].expand(t, times, b, h, 2, w, 2, c).reshape(t * times, b, 2 * h, 2 * w, c)


# --- choosing -----------------------------------------------------------------------------------------------------


def choose(vae: VideoAutoencoder, size: int, batch: int, dtype: torch.dtype, log: Log) -> tuple[Network, Network]:
    """The fastest right forward of encoder and decoder on this device, by a few timed training steps of each."""
    device = next(vae.parameters()).device
    if device.type != "cuda":
        return vae.encoder, vae.decoder
    video = torch.rand(batch, 3, 17, size, size, device=device, dtype=dtype) * 2 - 1
    plain = _channels_last(vae.encoder), _channels_last(vae.decoder)
    best, fastest, tried = plain, _seconds(plain, vae, video), []
    tried.append(f"engine: {fastest * 1e3:.1f} ms")
    for name, norm in (("triton norms", triton_norm_silu), ("torch norms", lambda: norm_silu_reference)):
        try:
            made = FastVAE(vae, norm())
            check(vae, made.norm_silu, video[:2, :, :, :48, :48])
            nets = (made.encode, made.decode)
            seconds = _seconds(nets, vae, video)
        except Exception as problem:  # a variant that fails here is only slower to do without
            torch.cuda.synchronize()
            tried.append(f"frames, {name}: {type(problem).__name__} {str(problem)[:200]}")
            continue
        tried.append(f"frames, {name}: {seconds * 1e3:.1f} ms")
        if seconds < fastest:
            best, fastest = nets, seconds
        break
    log("forward", tried=tried)
    return best


def check(vae: VideoAutoencoder, norm_silu: NormSilu, video: Tensor, limit: float = 0.05) -> None:
    """Holds the frames-last forward to the engine's: gradients in fp32, the output in the type of the video.

    Raises:
        ArithmeticError: the gradients differ by more than ``limit`` (TF32 explains 0.01), or the output by 2 limits.
    """
    exact = copy.deepcopy(vae).float()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
        quick = FastVAE(exact, norm_silu)
        ours, theirs = (
            torch.cat([g.flatten() for g in gradients(nets, exact, video.float())])
            for nets in ((quick.encode, quick.decode), (exact.encoder, exact.decoder))
        )
        error = float((ours - theirs).norm() / theirs.norm())
        if not error < limit:
            raise ArithmeticError(f"gradients differ by {error:.3g}")
        with torch.no_grad():
            rounded = FastVAE(vae, norm_silu)
            a = rounded.decode(rounded.encode(video).chunk(2, dim=1)[0]).float()
            b = exact.decoder(exact.encoder(video.float()).chunk(2, dim=1)[0])
        error = float((a - b).norm() / b.norm())
        if not error < 2 * limit:
            raise ArithmeticError(f"the output differs by {error:.3g}")


def _channels_last(network: Network) -> Network:
    return lambda x: network(x.contiguous(memory_format=torch.channels_last_3d))


def gradients(nets: tuple[Network, Network], vae: VideoAutoencoder, video: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a plain squared error, the mean of the posterior decoded."""
    moments = nets[0](video)
    mean, logvar = moments.chunk(2, dim=1)
    loss = (nets[1](mean).float() - video.float()).square().mean() + logvar.float().square().mean()
    return torch.autograd.grad(loss, list(vae.parameters()))


def _seconds(nets: tuple[Network, Network], vae: VideoAutoencoder, video: Tensor) -> float:
    for _ in range(3):
        gradients(nets, vae, video)
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(5):
        gradients(nets, vae, video)
    torch.cuda.synchronize()
    return (time.monotonic() - start) / 5
