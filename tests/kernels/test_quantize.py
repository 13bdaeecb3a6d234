"""Rows to 8 bits: what the reference promises, that the kernel gives its bits (interpreted here, real on a card)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from separate import run_separately
from torch import Tensor

from solostep.kernels import quantize
from solostep.kernels.quantize import hadamard, quantize_rows, quantize_rows_reference, rotate, unrotate

E4M3 = torch.float8_e4m3fn
FORMATS = [torch.int8, E4M3]

INTERPRETED = """
import torch
from solostep.kernels import quantize

torch.manual_seed(0)
cases = [(256, 256), (3, 1), (600, 8), (512, 512), (768, 256), (1, 1)]
for case, (channels, group) in enumerate(cases):
    for turn, kind in enumerate((torch.bfloat16, torch.float32)):
        x = torch.randn(4, channels + 5).to(kind)[:, :channels]
        x[1] = 0
        x[2, 0] = 1e4
        x[3] *= 1e-33 if kind == torch.float32 else 1e-20
        formats = torch.int8, torch.float8_e4m3fn
        for dtype in formats if case < 2 else [formats[(case + turn) % 2]]:
            q, scale = torch.full((4, channels), 99).to(dtype), torch.full((4,), 7.0)
            quantize._launch(x, q, scale, group)
            want, want_scale = quantize.quantize_rows_reference(x, dtype, group)
            assert torch.equal(scale, want_scale), (channels, group, kind, dtype)
            # Triton's interpreter rounds e4m3 wrongly where a mantissa carries into the exponent, and below 2^-6.
            size = want.float().abs()
            known = (size.log2() % 1 != 0) & (size > 2**-6) | (dtype == torch.int8)
            assert torch.equal(q.float()[known], want.float()[known]), (channels, group, kind, dtype)
x = torch.randn(4, 300)
x[1, 7], x[2, 299], x[3] = float("nan"), float("inf"), 3e38
q, scale = torch.empty(4, 300, dtype=torch.int8), torch.empty(4)
quantize._launch(x, q, scale, 4)
assert scale.isnan().tolist() == [False, True, True, True]
assert quantize._plan(24_576, 256)["LOOP"]  # programs that stay, as for rows so wide on a card
plan = quantize._plan(256, 256) | {"LOOP": 1}
quantize._plan, quantize._programs = lambda channels, group: plan, lambda rows, loop, x: 2
x = torch.randn(5, 256)
q, scale = torch.full(x.shape, 99, dtype=torch.int8), torch.full((5,), 7.0)
quantize._launch(x, q, scale, 256)
assert all(map(torch.equal, (q, scale), quantize.quantize_rows_reference(x, torch.int8, 256)))
print("equal")
"""


def test_hadamard_is_sylvesters_orthonormal_and_its_own_inverse() -> None:
    h = torch.ones(1, 1)
    for _ in range(5):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    x = torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(0))
    y = hadamard(x, 32)
    assert y.dtype == torch.float32 and y.shape == x.shape
    assert torch.allclose(y, (x.unflatten(-1, (3, 32)) @ h / 32**0.5).flatten(-2), atol=1e-6)
    assert torch.allclose(hadamard(y, 32), x, atol=1e-6)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(hadamard(x, 1), x)
    for group in (0, 3, 64, -2):
        with pytest.raises(ValueError, match="group must be a power of two"):
            hadamard(x, group)


def test_neither_an_outlier_nor_a_constant_stands_out_after_the_rotation() -> None:
    single = rotate(torch.eye(512), 256).abs()
    assert torch.allclose(single.amax(-1), torch.full((512,), 1 / 16))
    assert torch.allclose(rotate(torch.ones(1, 512), 256).abs(), torch.ones(1, 512))


def test_rotating_both_operands_leaves_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(5, 512, generator=generator, dtype=torch.float32) for _ in range(2))
    for group in (1, 4, 32, 256):
        assert torch.allclose(rotate(x, group) @ rotate(w, group).t(), x @ w.t(), atol=1e-4)
        assert torch.allclose(unrotate(rotate(x, group), group), x, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", FORMATS)
def test_error_is_half_a_step(dtype: torch.dtype, kind: torch.dtype) -> None:
    x = torch.randn(9, 3, 200, generator=torch.Generator().manual_seed(0)).to(kind)
    q, scale = quantize_rows(x, dtype, 8)
    assert q.shape == x.shape and q.dtype == dtype and scale.shape == (9, 3) and scale.dtype == torch.float32
    y = rotate(x, 8)
    assert torch.allclose(scale * quantize.QMAX[dtype], y.abs().amax(-1))
    error = (q.float() * scale[..., None] - y).abs()
    step = scale[..., None] if dtype == torch.int8 else y.abs() / 8 + scale[..., None] / 512
    assert bool((error <= 0.5001 * step).all())


def test_halves_round_to_even() -> None:
    """scale is 1 / 127 x 127 here: the values are the multiples."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    q, scale = quantize_rows(x, torch.int8)
    assert scale.item() == 1 and q.tolist() == [[127, 0, 2, 2, 0, -2, 126]]


@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_of_zeros_denormals_and_outliers(dtype: torch.dtype) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2, 9], x[3] = 0, 1e-40, 1e30, 3.4e38 * torch.sign(x[3])
    q, scale = quantize_rows(x, dtype)
    q = q.float()
    assert q[0].eq(0).all() and q[1].eq(0).all() and bool(scale.isfinite().all()) and bool((scale > 0).all())
    assert q[2, 9] == quantize.QMAX[dtype] and q[2].abs().sum() == quantize.QMAX[dtype]
    assert q[3].abs().eq(quantize.QMAX[dtype]).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_not_finite_makes_its_row_nan(dtype: torch.dtype) -> None:
    x = torch.ones(6, 64)
    x[1, 5], x[2, 5], x[3, 5], x[4] = torch.nan, torch.inf, -torch.inf, 3e38
    assert quantize_rows(x, dtype, 16)[1].isnan().tolist() == [False, True, True, True, True, False]
    assert quantize_rows(x, dtype, 1)[1].isnan().tolist() == [False, True, True, True, False, False]


def test_views_and_empty_inputs() -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for view in (x[:, 3:35], x[::2, :32], x.t()[:32].contiguous().t()):
        got, want = quantize_rows(view, torch.int8, 8), quantize_rows(view.clone(), torch.int8, 8)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    q, scale = quantize_rows(x[:0], torch.int8)
    assert q.shape == (0, 40) and scale.shape == (0,)
    q, scale = quantize_rows(x[0], E4M3)
    assert q.shape == (40,) and scale.shape == ()


def test_wrong_arguments_are_named() -> None:
    x = torch.ones(2, 48)
    for words, call in {
        "x must be float32": lambda: quantize_rows(x.double(), torch.int8),
        r"x must be \[..., K\]": lambda: quantize_rows(x[:, :0], torch.int8),
        "dtype must be": lambda: quantize_rows(x, torch.uint8),
        "group must be a power of two that divides the 48": lambda: quantize_rows(x, torch.int8, 32),
        "group must be a power": lambda: quantize_rows_reference(x, torch.int8, 3),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_the_interpreted_kernel_gives_the_reference_bits(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_separately(INTERPRETED, tmp_path, TRITON_INTERPRET="1").split() == ["equal"]


# --- on a card ----------------------------------------------------------------------------------------------------

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [
    (1000, 6144, 256, BF16), (77, 24_576, 1, BF16), (77, 24_576, 256, BF16), (5, 3, 1, FP32), (1, 1, 1, BF16),
    (33, 600, 8, FP32), (9, 770, 2, BF16), (9, 1536, 512, FP16), (3, 100_352, 1024, BF16), (130, 1024, 1024, FP32),
    (64, 5120, 128, BF16), (7, 12_345, 1, BF16), (50, 6144, 2048, BF16), (50, 6144, 256, FP32), (50, 6144, 256, FP16),
]  # fmt: skip


def _same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rows, channels, group, kind", SHAPES, ids=str)
def test_card_gives_the_reference_bits(
    rows: int, channels: int, group: int, kind: torch.dtype, dtype: torch.dtype
) -> None:  # fmt: skip
    wide = torch.randn(rows, channels + 3, device="cuda").to(kind)
    wide[:, ::50] *= 30
    wide[rows // 2] = 0
    for x in (wide[:, :channels], wide[:, :channels].contiguous()):
        want, want_scale = quantize_rows_reference(x, dtype, group)
        cpu, cpu_scale = quantize_rows_reference(x[:3].cpu(), dtype, group)
        assert _same(want[:3].cpu(), cpu) and torch.equal(want_scale[:3].cpu(), cpu_scale)
        q = torch.full(x.shape, 99.0, device="cuda").to(dtype)
        scale = torch.full_like(want_scale, torch.nan)
        quantize._launch(x, q, scale, group)
        assert torch.equal(scale, want_scale) and _same(q, want)


@pytest.mark.gpu
@on_card
def test_card_marks_rows_that_are_not_finite() -> None:
    x = torch.ones(6, 6144, device="cuda")
    x[1, 5], x[2, 5], x[3, 6143], x[4] = torch.nan, torch.inf, -torch.inf, 3e38
    for dtype in FORMATS:
        assert quantize_rows(x, dtype, 256)[1].isnan().tolist() == [False, True, True, True, True, False]
        assert quantize_rows(x, dtype)[1].isnan().tolist() == [False, True, True, True, False, False]
