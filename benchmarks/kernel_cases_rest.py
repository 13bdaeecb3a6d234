"""More operators that kernels.py times: products with what follows them in their epilogue, cross-attention and the norm
of its queries, and the causal attentions of Step-LLM and of the VAE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from solostep.benchmarks import kernel_cases
from solostep.benchmarks.kernel_cases import FP8, INT8, Case, Group
from solostep.engine.config import LLM_TOKENS, StepLLMConfig
from solostep.engine.models.step_llm import alibi_slopes, attention_bias
from solostep.engine.models.vae import causal_attention
from solostep.engine.rates import TEXT_TOKENS
from solostep.kernels.adaln import gate_residual
from solostep.kernels.attention import BACKENDS, HEAD_DIM, Operands
from solostep.kernels.attention_causal import (
    WIDE,
    biased_causal_attention,
    biased_causal_attention_reference,
    frame_causal_attention,
)
from solostep.kernels.attention_check import exact, relative_error, sampled_rows
from solostep.kernels.qk_norm_rope import norm_heads
from solostep.kernels.quantize import quantize_rows
from solostep.kernels.scaled_mm import After, scaled_mm_fp8_reference, scaled_mm_int8, scaled_mm_int8_reference

VAE_TOKENS = 5 * 68 * 124
"""Of a chunk's middle block at 544x992."""
SCALED_MM = "fp8 _scaled_mm"
"""torch's product of FP8 rows with fast accumulation, that INT8 ones with an epilogue are held against."""


def epilogue_groups(tokens: int, device: torch.device) -> Iterator[tuple[Group, list[str]]]:
    """The four linears of a block with a bias or a gated residual in the epilogue; activations are quantized before."""
    for linear in kernel_cases.LINEARS:
        x = torch.randn(tokens, linear.in_features, device=device, dtype=torch.bfloat16)
        weight = torch.randn(linear.out_features, linear.in_features, device=device, dtype=torch.bfloat16)
        weight *= linear.in_features**-0.5
        cases, notes = _fp8_cases(x, weight)
        cases += _int8_cases(x, weight)
        del x, weight
        shape = f"{tokens} x {linear.out_features} x {linear.in_features}"
        baseline = SCALED_MM if cases[0].name == SCALED_MM else "int8"
        yield (
            Group(f"product with epilogue, {linear.name}", shape, "TFLOP/s", baseline, cases),
            [f"{linear.name}, {note}" for note in notes],
        )


def _residual(tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A residual that products are added to, and a gate so small that it may be done many times over."""
    residual = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    return residual, torch.randn(width, device=device, dtype=torch.bfloat16) * 1e-3


def _fp8_cases(x: Tensor, weight: Tensor) -> tuple[list[Case], list[str]]:
    """torch's product, alone and followed by a pass for the gated residual; or why there is none."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 9):
        return [], [f"{SCALED_MM}: it needs a card with FP8 units"]
    some, work = sampled_rows(len(x), x.device), 2.0 * len(x) * weight.numel()
    (a, s), (b, t) = quantize_rows(x, FP8), quantize_rows(weight, FP8)
    residual, gate = _residual(len(x), len(weight), x.device)

    def product() -> Tensor:
        return torch._scaled_mm(a, b.t(), s[:, None], t[None], out_dtype=torch.bfloat16, use_fast_accum=True)

    def error() -> float:
        return relative_error(product()[some], scaled_mm_fp8_reference(a[some], b, s[some], t).double())

    def followed() -> Tensor:
        return gate_residual(residual, product(), gate)

    return [Case(SCALED_MM, product, work, error), Case(f"{SCALED_MM}, then gate_residual", followed, work)], []


def _int8_cases(x: Tensor, weight: Tensor) -> list[Case]:
    some, work = sampled_rows(len(x), x.device), 2.0 * len(x) * weight.numel()
    (a, s), (b, t) = quantize_rows(x, INT8), quantize_rows(weight, INT8)
    bias = torch.randn(len(weight), device=x.device, dtype=torch.bfloat16)
    residual, gate = _residual(len(x), len(weight), x.device)

    def error(given: Tensor | None) -> Callable[[], float]:
        def found() -> float:
            want = scaled_mm_int8_reference(a[some], b, s[some], t, given)
            return relative_error(scaled_mm_int8(a, b, s, t, given)[some], want.double())

        return found

    def gated() -> Tensor:
        return scaled_mm_int8(a, b, s, t, after=After(residual, gate))

    def gated_error() -> float:
        want = scaled_mm_int8_reference(a[some], b, s[some], t, after=After(residual[some], gate))
        return relative_error(gated()[some], want.double())

    return [
        Case("int8", lambda: scaled_mm_int8(a, b, s, t), work, error(None)),
        Case("int8 + bias", lambda: scaled_mm_int8(a, b, s, t, bias), work, error(bias)),
        Case("int8 + gated residual", gated, work, gated_error),
    ]


def norm_heads_group(tokens: int, heads: int, device: torch.device) -> Group:
    """The norm of cross-attention's queries."""
    x = torch.randn(tokens, heads, HEAD_DIM, device=device, dtype=torch.bfloat16)
    weight = 1 + 0.1 * torch.randn(HEAD_DIM, device=device, dtype=torch.bfloat16)
    work, some = x.clone(), sampled_rows(tokens, device)

    def error() -> float:
        work.copy_(x)
        want = F.rms_norm(x[some].double(), (HEAD_DIM,), weight.double(), 1e-6)
        return relative_error(norm_heads(work, weight)[some], want)

    cases = [
        Case("torch eager", lambda: F.rms_norm(x, (HEAD_DIM,), weight, 1e-6), 4 * x.numel()),
        Case("in place", lambda: norm_heads(work, weight), 4 * x.numel(), error),
    ]
    return Group("norm_heads", f"{tokens} x {heads} x {HEAD_DIM}", "TB/s", "torch eager", cases)


def cross_group(tokens: int, heads: int, device: torch.device) -> tuple[Group, list[str]]:
    """Attention on the text's tokens by every back end for 16 bits; the blocks use sdpa."""
    q = torch.randn(tokens, heads, HEAD_DIM, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(TEXT_TOKENS, heads, HEAD_DIM, device=device, dtype=torch.bfloat16) for _ in range(2))
    some, sample = sampled_rows(tokens, device), sorted({0, heads // 2, heads - 1})
    true, operands = exact(q, k, v, some, sample), Operands(q, k, v)
    cases, notes = [], []
    for name, backend in BACKENDS.items():
        if "bf16" not in backend.modes or backend.quadratic:
            continue
        reason = backend.available(device, "bf16")
        if reason is not None:
            notes.append(f"cross-attention, {name}: {reason}")
            continue

        def run(backend=backend) -> Tensor:
            return backend.run(operands, "bf16", None, None)

        def error(run=run) -> float:
            return relative_error(run()[some][:, sample], true)

        cases.append(Case(name, run, 4.0 * q.numel() * TEXT_TOKENS, error))
    return Group("cross-attention", f"{tokens} x {TEXT_TOKENS} x {heads} x {HEAD_DIM}", "TFLOP/s", "sdpa", cases), notes


def text_group(tokens: int, device: torch.device) -> Group:
    """Step-LLM's causal attention with a bias by distance, at the length of a prompt; pairs that are seen count."""
    config, length = StepLLMConfig(), min(LLM_TOKENS, tokens)
    heads, groups = config.num_attention_heads, config.num_attention_groups
    q = torch.randn(length, heads, HEAD_DIM, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(length, groups, HEAD_DIM, device=device, dtype=torch.bfloat16) for _ in range(2))
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=device)
    bias = attention_bias(heads, length, torch.bfloat16, device)

    def eager() -> Tensor:
        keys, values = (x.repeat_interleave(heads // groups, dim=1).transpose(0, 1)[None] for x in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, attn_mask=bias)
        return out[0].transpose(0, 1)

    def error(run: Callable[[], Tensor]) -> float:
        return relative_error(run(), biased_causal_attention_reference(q, k, v, slopes).double())

    def ours() -> Tensor:
        return biased_causal_attention(q, k, v, slopes)

    work = 2.0 * length * (length + 1) * heads * HEAD_DIM
    cases = [Case("torch sdpa", eager, work, lambda: error(eager)), Case("ours", ours, work, lambda: error(ours))]
    return Group("Step-LLM's attention", f"{length} x {heads} x {HEAD_DIM}", "TFLOP/s", "torch sdpa", cases)


def vae_group(tokens: int, device: torch.device) -> Group:
    """The VAE's causal attention of one wide head, of a chunk; pairs that are seen count."""
    length = min(VAE_TOKENS, tokens)
    q, k, v = (torch.randn(1, length, WIDE, device=device, dtype=torch.bfloat16) for _ in range(3))
    some = sampled_rows(length, device)

    def sliced() -> Tensor:
        return causal_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    def ours() -> Tensor:
        return frame_causal_attention(q, k, v)

    def error(run: Callable[[], Tensor]) -> float:
        scores = q[0, some].double() @ k[0].double().t() * WIDE**-0.5
        hidden = torch.arange(length, device=device) > some[:, None]
        true = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[0].double()
        return relative_error(run()[0, some], true)

    work = 2.0 * length * (length + 1) * WIDE
    cases = [Case("torch sdpa", sliced, work, lambda: error(sliced)), Case("ours", ours, work, lambda: error(ours))]
    return Group("the VAE's attention", f"{length} x {WIDE}", "TFLOP/s", "torch sdpa", cases)
