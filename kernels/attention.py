"""Attention behind one function, and a registry of the back ends that may compute it.

Three modes of self-attention (relative L2 errors on N(0,1), 75,888 tokens):

| mode | q k^T | P V | error |
|---|---|---|---|
| bf16 | 16 bits | 16 bits | 2.4e-3 |
| int8, "careful" | int8: a scale for each query and for 16 keys | 16 bits | 1.1e-2 |
| int8-fp8, "fast" | the same | e4m3 P, e4m3 V with a scale a channel | 3.6e-2 |

Which back end is fastest depends on the card, and on the versions of its driver, torch and Triton; whether one is right
may depend on them too. attention_check.py measures both. Nothing here reads files or remembers anything: the engine
keeps what was measured, and passes the name of its choice.

Memory beside inputs and output: what the passes before the kernel write, 512 bytes a token and head in 16 bits; 260 in
int8, and 128 more with 8-bit V.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import cards
from .qk_norm_rope import qk_norm_rope, scale_of_keys
from .quantize import warn_once
from .refused import is_refused
from .values import quantize_v

MODES = ("bf16", "int8", "int8-fp8")
HEAD_DIM = 128


@dataclass(frozen=True)
class Operands:
    """What a kernel reads, of one sample.

    q ``[S, H, D]``, k and v ``[L, H, D]`` in 16 bits (or fp32, where the back end takes it); or int8 q and k, rotated
    alike, with fp32 scales ``[H, S]`` and ``[H, key_groups(L)]``. 8-bit v is e4m3 ``[H, 128, L16]`` with permuted keys,
    a scale ``[H, 128]`` and ``v_mean [H, 128]``, which is added to the output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    v_mean: Tensor | None = None


Run = Callable[[Operands, str, "float | None", "Tensor | None"], Tensor]
"""(operands, mode, scale, out or None) -> ``[S, H, D]``. A back end that cannot write to ``out`` returns its own."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    name: str
    modes: tuple[str, ...]
    available: Callable[[torch.device, str], str | None]
    """(device, mode) -> None if it can be used there, else why not."""
    run: Run
    takes_16_bits: bool = False
    """It quantizes q, k and v itself, from 16 bits, in an 8-bit mode too."""
    quadratic: bool = False
    """It stores every score."""

    def operand_mode(self, mode: str) -> str:
        """The mode whose operands it takes."""
        return "bf16" if self.takes_16_bits else mode


# ---------------------------------------------------------------- the back ends


def _hopper_available(device: torch.device, mode: str) -> str | None:
    return cards.hopper_missing(device, ".attention_hopper")


def _hopper(x: Operands, mode: str, scale: float | None, out: Tensor | None) -> Tensor:
    from .attention_hopper import attention_hopper

    return attention_hopper(
        x.q, x.k, x.v, schedule=mode, scale=scale, q_scale=x.q_scale, k_scale=x.k_scale, v_scale=x.v_scale,
        v_mean=x.v_mean, out=out,
    )  # fmt: skip


def _triton_available(device: torch.device, mode: str) -> str | None:
    least = (8, 9) if mode == "int8-fp8" else (8, 0)
    reason = cards.needs(device, least, "e4m3 V" if mode == "int8-fp8" else "it")
    return reason or cards.triton_missing(device) or cards.loads(".attention_triton")


def _triton(x: Operands, mode: str, scale: float | None, out: Tensor | None) -> Tensor:
    from .attention_triton import attention_triton

    return attention_triton(
        x.q, x.k, x.v, scale=scale, q_scale=x.q_scale, k_scale=x.k_scale, v_scale=x.v_scale, v_mean=x.v_mean, out=out
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """``[S, H, D]`` through torch, which wants heads before tokens; nothing is copied."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)


def _forced(kind: str) -> Backend:
    """A kernel of torch's own, with the others switched off, so that none stands in for it."""
    member = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    backend: Any = getattr(SDPBackend, member.get(kind, "MATH"), None)

    def available(device: torch.device, mode: str) -> str | None:
        if backend is None:
            return f"torch {torch.__version__} has no such kernel"
        if device.type != "cuda":
            return "it needs a CUDA card" if kind in ("cudnn", "efficient") else None
        if kind == "cudnn" and not torch.backends.cudnn.is_available():
            return "torch was built without cuDNN"
        if kind == "flash" and not torch.backends.cuda.is_flash_attention_available():
            return "torch was built without it"
        return cards.needs(device, (8, 0), "it") if kind in ("cudnn", "flash") else None

    def run(x: Operands, mode: str, scale: float | None, out: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(x.q, x.k, x.v, scale)

    return Backend(kind, ("bf16",), available, run, quadratic=kind == "math")


def _installed(
    name: str, package: str, function: str, scale_name: str, least: tuple[int, int], modes: tuple[str, ...],
    **more: Any,
) -> Backend:  # fmt: skip
    """A kernel of another package, imported on its first use; ``[1, S, H, D]`` in and out."""

    def available(device: torch.device, mode: str) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
        return cards.needs(device, least, "it") or cards.loads(package)

    def run(x: Operands, mode: str, scale: float | None, out: Tensor | None) -> Tensor:
        call = getattr(importlib.import_module(package), function)
        result = call(x.q[None], x.k[None], x.v[None], **{scale_name: scale}, **more)
        return (result[0] if isinstance(result, tuple) else result)[0]

    return Backend(name, modes, available, run, takes_16_bits=modes != ("bf16",))


def _emulation_available(device: torch.device, mode: str) -> str | None:
    if cards.triton_missing(device) is None and cards.capability(device) >= (8, 0):
        return "it only emulates 8 bits, in fp32; there are kernels for this card"
    return None


def _emulate(x: Operands, mode: str, scale: float | None, out: Tensor | None) -> Tensor:
    """An 8-bit mode in fp32: the operands' rounding, but not that of P."""
    if x.q.is_cuda:
        warn_once("attention: no 8-bit kernel for this card, plain torch in fp32 instead")
    q, k, v = dequantized(x)
    result = _sdpa(q, k, v, scale)
    return (result if x.v_mean is None else result + x.v_mean).bfloat16()


def dequantized(x: Operands, heads: slice | list[int] = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """What the operands of some heads stand for, in fp32, each ``[S, h, D]``; values without ``v_mean``."""
    q, k = x.q[:, heads].float(), x.k[:, heads].float()
    if x.q_scale is not None and x.k_scale is not None:
        q = q * x.q_scale[heads].t()[..., None]
        k = k * scale_of_keys(x.k_scale[heads], len(k)).t()[..., None]
    if x.v_scale is None:
        return q, k, x.v[:, heads].float()
    v = x.v[heads].float() * x.v_scale[heads][..., None]
    v = v.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)  # the keys back from where permute_keys put them
    return q, k, v[..., : len(k)].permute(2, 0, 1)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("hopper", MODES, _hopper_available, _hopper),
        Backend("triton", MODES, _triton_available, _triton),
        Backend("sdpa", ("bf16",), lambda device, mode: None, lambda x, mode, scale, out: _sdpa(x.q, x.k, x.v, scale)),
        *map(_forced, ("cudnn", "flash", "efficient", "math")),
        _installed("flash-attn-3", "flash_attn_interface", "flash_attn_func", "softmax_scale", (9, 0), ("bf16",)),
        _installed("flash-attn-2", "flash_attn", "flash_attn_func", "softmax_scale", (8, 0), ("bf16",)),
        _installed("sage", "sageattention", "sageattn", "sm_scale", (8, 0), ("int8-fp8",), tensor_layout="NHD"),
        Backend("torch", ("int8", "int8-fp8"), _emulation_available, _emulate),
    )
}
"""In the order that tables show. ``sdpa`` is torch's own choice among its kernels: every device, type and width."""


def _backend(name: str, mode: str) -> Backend:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    known = [n for n, b in BACKENDS.items() if mode in b.modes]
    if name not in known:
        raise ValueError(f"backend for {mode} must be one of {', '.join(known)}, not {name!r}")
    return BACKENDS[name]


def default_backend(device: torch.device, mode: str, tokens: int) -> str:
    """What is used where nothing was measured: ours for Hopper on a Hopper; else torch's own choice (cuDNN or flash) in
    16 bits, and the portable kernels in 8."""
    device = torch.device(device)
    order = {"bf16": ("hopper", "sdpa")}.get(mode, ("hopper", "triton", "torch"))
    for name in order:
        if _backend(name, mode).available(device, mode) is None:
            return name
    raise ValueError(f"no attention back end for {mode} on {device}")


CROSS = ("sdpa", "cudnn", "flash", "efficient", "math")
"""What computes attention to few keys, as to a text: torch's own choice, else the first of its kernels that is right.
Ours are made for as many keys as queries."""


def cross_name(backend: str) -> str:
    """How refused.py calls a back end of attention to few keys."""
    return f"cross-attention {backend}"


def cross_backend(device: torch.device) -> str:
    """The back end for attention to few keys.

    Raises:
        ValueError: all were found wrong on this card.
    """
    for name in CROSS:
        if not is_refused(cross_name(name), device) and (
            name == "sdpa" or BACKENDS[name].available(device, "bf16") is None
        ):
            return name
    raise ValueError(f"every attention of torch's to few keys is wrong on {device}; see `solostep doctor`")


def _on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---------------------------------------------------------------- what callers use


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str | None = None,
    scale: float | None = None,
    key_counts: Sequence[int] | None = None,
) -> Tensor:
    """softmax(q k^T scale) v, ``q [B, S, H, D]``, ``k`` and ``v [B, L, H, D]`` -> ``[B, S, H, D]`` in their type.

    Args:
        backend: one of :data:`BACKENDS` with the mode bf16; default: :func:`default_backend`, and torch's own choice
            where that does not fit (other types than bf16, other widths than 128, gradients).
        scale: default: D^-0.5.
        key_counts: keys that each sample sees, from the first on; default: all. The others are not read.

    Raises:
        ValueError: an unknown back end; shapes or counts that do not fit.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or k.shape[::2] != q.shape[::2] or k.shape[3] != q.shape[3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v have to be [B, S, H, D] and twice [B, L, H, D], not {shapes}")
    counts = [k.shape[1]] * len(k) if key_counts is None else [int(n) for n in key_counts]
    if len(counts) != len(k) or not all(0 < n <= k.shape[1] for n in counts):
        raise ValueError(f"key_counts must be {len(k)} numbers from 1 to {k.shape[1]}, not {counts}")
    if backend is None:
        plain = q.dtype != torch.bfloat16 or q.shape[3] != HEAD_DIM or (torch.is_grad_enabled() and q.requires_grad)
        backend = "sdpa" if plain else default_backend(q.device, "bf16", q.shape[1])
    run = _backend(backend, "bf16").run
    with _on(q):
        samples = [
            run(Operands(q[b], k[b, :n], v[b, :n]), "bf16", scale, None)
            for b, n in enumerate(counts)
        ]  # fmt: skip
    return samples[0][None] if len(samples) == 1 else torch.stack(samples)


def prepare(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, mode: str, overwrite: bool = False
) -> Operands:
    """The passes before the kernel: QK-norm and rotary embedding, and what the mode quantizes. See qk_norm_rope()."""
    q, k, q_scale, k_scale = qk_norm_rope(
        qkv, q_weight, k_weight, cos, sin, quantize=mode != "bf16", overwrite=overwrite
    )
    x = Operands(q, k, qkv[..., 2 * HEAD_DIM :], q_scale, k_scale)
    if mode != "int8-fp8":
        return x
    v, v_scale, v_mean = quantize_v(x.v)
    return replace(x, v=v, v_scale=v_scale, v_mean=v_mean)


def self_attention(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    mode: str = "bf16",
    backend: str | None = None,
    out: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Self-attention from the qkv product ``[S, H, 384]`` (per head q, k, v of 128 each) -> ``[S, H * 128]``.

    Args:
        q_weight, k_weight: gains of the norms, ``[128]``.
        cos, sin: tables of the rotary embedding, contiguous ``[S, 128]``.
        mode: one of :data:`MODES`. 8 bits give bf16 outputs.
        backend: one of :data:`BACKENDS`; default: :func:`default_backend`.
        out: contiguous ``[S, H * 128]`` in the output's type, to write to.
        overwrite: whether ``qkv`` may be used as memory for normed q and k.

    Raises:
        ValueError: an unknown mode or back end, or shapes that do not fit.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if qkv.ndim != 3 or qkv.shape[2] != 3 * HEAD_DIM:
        raise ValueError(f"qkv has to be [S, H, 384], not {list(qkv.shape)}")
    tokens, heads, _ = qkv.shape
    if out is not None and (out.shape != (tokens, heads * HEAD_DIM) or not out.is_contiguous()):
        raise ValueError(f"out has to be contiguous [{tokens}, {heads * HEAD_DIM}], not {list(out.shape)}")
    if backend is None:
        plain = mode == "bf16" and qkv.dtype != torch.bfloat16
        backend = "sdpa" if plain else default_backend(qkv.device, mode, tokens)
    chosen = _backend(backend, mode)
    with _on(qkv):
        operands = prepare(qkv, q_weight, k_weight, cos, sin, chosen.operand_mode(mode), overwrite)
        place = None if out is None else out.view(tokens, heads, HEAD_DIM)
        result = chosen.run(operands, mode, None, place)
    if out is None:
        return result.reshape(tokens, heads * HEAD_DIM)
    if result.data_ptr() != out.data_ptr():
        out.copy_(result.reshape(tokens, heads * HEAD_DIM))
    return out
