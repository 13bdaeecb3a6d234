"""Causal attention of Step-LLM and of the VAE: the references against what the networks compute, the kernels against
the references (interpreted here, real on a card). test_attention_triton.py compiles the kernels for cards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from separate import run_separately
from torch import Tensor

from solostep.engine.models import step_llm, vae
from solostep.kernels import attention_causal as causal
from solostep.kernels.attention_causal import (
    biased_causal_attention,
    biased_causal_attention_reference,
    frame_causal_attention,
    frame_causal_attention_reference,
)

INTERPRETED = """
import torch
from solostep.kernels import attention_causal as causal
from solostep.kernels.attention_triton import Tile

def compare(out, want):
    print(float((out - want).norm() / want.norm()))

torch.manual_seed(0)
for length, heads, groups, width in ((1, 2, 1, 128), (17, 4, 2, 128), (131, 3, 3, 64), (70, 4, 1, 16)):
    q = torch.randn(length, heads, width).half()
    k, v = torch.randn(length, groups, 2 * width).half().chunk(2, -1)
    slopes = torch.rand(heads)
    for keys in (k, k * (1 + 5 * (torch.arange(length) % 50 == 0))[:, None, None].half()):  # some six times larger
        out = torch.full((length, heads, width), torch.nan).half()
        causal.launch_biased(q, keys, v, slopes, out)
        compare(out, causal.biased_causal_attention_reference(q, keys, v, slopes))
for batch, length, frame in ((1, 1, 1), (2, 17, 1), (1, 131, 20), (2, 40, 100)):
    q, k, v = torch.randn(batch, length, 1536).half().chunk(3, -1)
    for tile in (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)):
        k = k * torch.linspace(0.3, 3, length)[:, None].half()  # growing, and the more so the second time
        out = torch.full((batch, length, 512), torch.nan).half()
        causal.launch_wide(q, k, v, frame, 0.05, out, tile)
        compare(out, causal.frame_causal_attention_reference(q, k, v, frame_tokens=frame, scale=0.05))
"""


def llm_operands(
    length: int, heads: int, groups: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of one product, as Step-LLM has them, and its slopes."""
    hidden = heads * width
    both = torch.randn(length, hidden + 2 * groups * width, device=device).to(dtype)
    q, kv = both.split([hidden, 2 * groups * width], dim=-1)
    k, v = kv.unflatten(-1, (groups, 2 * width)).chunk(2, dim=-1)
    slopes = torch.tensor(step_llm.alibi_slopes(heads), device=device)
    return q.unflatten(-1, (heads, width)), k, v, slopes


def llm_exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Step-LLM's own form, in fp64 behind the bias, which is rounded to the type of q."""
    bias = step_llm.attention_bias(q.shape[1], len(q), q.dtype, q.device).double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(0, 1)


def error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_biased_reference_is_what_step_llm_computes(dtype: torch.dtype) -> None:
    q, k, v, slopes = llm_operands(70, 6, 2, 32, dtype=dtype)
    want = llm_exact(q, k, v)
    assert error(biased_causal_attention_reference(q, k, v, slopes), want) < 1e-6
    out = biased_causal_attention(q, k, v, slopes)
    assert out.dtype == dtype and error(out, want) < 3e-3


def test_the_frame_reference_is_what_the_vae_computes() -> None:
    q, k, v = torch.randn(3, 2, 70, 512)
    want = vae.causal_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    assert error(frame_causal_attention_reference(q, k, v), want.double()) < 1e-6
    q, k, v = (x.bfloat16() for x in (q, k, v))
    want = frame_causal_attention_reference(q, k, v).double()
    assert error(frame_causal_attention(q, k, v), want) < 3e-3


def test_a_frame_sees_itself_and_the_frames_before() -> None:
    q, k, v = torch.randn(3, 1, 10, 512)
    out = frame_causal_attention_reference(q, k, v, frame_tokens=4)
    for start, end in ((0, 4), (4, 8), (8, 10)):
        want = F.scaled_dot_product_attention(q[:, start:end], k[:, :end], v[:, :end])
        assert error(out[:, start:end], want.double()) < 1e-6


def test_wrong_operands_are_refused() -> None:
    q, k, v, slopes = llm_operands(9, 4, 2, 32)

    def refused(function, words: str, *args: Tensor, **kwargs: object) -> None:
        with pytest.raises(ValueError, match=words):
            function(*args, **kwargs)

    biased, frames = biased_causal_attention, frame_causal_attention
    refused(biased, r"\[S, H, D\]", q[0], k, v, slopes)
    refused(biased, r"\[S, H, D\]", q, k, v[:5], slopes)
    refused(biased, "whole groups", q[:, :3], k, v, slopes[:3])
    refused(biased, "whole groups", q[:5], k, v, slopes)
    refused(biased, "wide", *(x[..., :24] for x in (q, k, v)), slopes)
    refused(biased, "q has to be bf16 or fp16", q.float(), k.float(), v.float(), slopes)
    refused(biased, "k has to be bf16 or fp16 as q is", q, k.half(), v, slopes)
    refused(biased, "slopes", q, k, v, slopes[:3])
    refused(biased, "slopes", q, k, v, slopes.double())
    refused(biased, "side by side", q, k.transpose(0, 2).contiguous().transpose(0, 2), v, slopes)
    refused(biased, "v has to be on cpu", q, k, v.to("meta"), slopes)
    x = torch.zeros(1, 9, 512).bfloat16()
    refused(frames, r"\[B, S, 512\]", x[..., :256], x[..., :256], x[..., :256])
    refused(frames, r"\[B, S, 512\]", x, x[:, :5], x[:, :5])
    refused(frames, "frame_tokens from 1, not 0", x, x, x, frame_tokens=0)
    refused(frames, "scale has to be", x, x, x, scale=float("nan"))


def test_the_interpreted_kernels_are_close_to_the_references(tmp_path: Path) -> None:
    """fp16: the interpreter multiplies bf16 wrongly."""
    pytest.importorskip("triton")
    told = run_separately(INTERPRETED, tmp_path, TRITON_INTERPRET="1")
    errors = [float(line) for line in told.split()]
    assert len(errors) == 16 and max(errors) < 4e-4


# --- on a card ----------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
LIMITS = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4}


@gpu
@on_card
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", [(1, 6, 2, 128), (320, 48, 8, 128), (1003, 6, 3, 128), (77, 4, 4, 64)], ids=str)
def test_card_biased_attention(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v, slopes = llm_operands(*shape, device="cuda", dtype=dtype)
    want = llm_exact(q, k, v)
    for spike in (False, True):
        if spike:
            k[::50] *= 6
            want = llm_exact(q, k, v)
        out = torch.full((shape[0], shape[1], shape[3]), torch.nan, device="cuda", dtype=dtype)
        biased_causal_attention(q, k, v, slopes, out=out)
        assert error(out, want) < LIMITS[dtype]
        assert torch.equal(biased_causal_attention(q, k, v, slopes), out)


@gpu
@on_card
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    ("batch", "tokens", "frame"), [(1, 1, 1), (2, 77, 1), (1, 1003, 1), (1, 1003, 100), (2, 300, 1000), (1, 5007, 1)]
)
def test_card_frame_attention(batch: int, tokens: int, frame: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    q, k, v = torch.randn(batch, tokens, 3 * causal.WIDE, device="cuda").to(dtype).chunk(3, -1)
    ramp = k * torch.linspace(0.3, 3.0, tokens, device="cuda")[:, None].to(dtype)
    for keys in (k, ramp):
        runs = torch.arange(tokens, device="cuda") // frame
        scores = q.double() @ keys.double().transpose(1, 2) * 512**-0.5
        want = scores.masked_fill(runs[:, None] < runs, -torch.inf).softmax(-1) @ v.double()
        out = torch.full((batch, tokens, 512), torch.nan, device="cuda", dtype=dtype)
        frame_causal_attention(q, keys, v, frame_tokens=frame, out=out)
        assert error(out, want) < LIMITS[dtype]
        assert torch.equal(frame_causal_attention(q, keys, v, frame_tokens=frame), out)
