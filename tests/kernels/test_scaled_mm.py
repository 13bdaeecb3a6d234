"""8-bit products: the references, the Triton kernels' bits (interpreted here, real on a card), refused arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cards import CARDS, is_whole
from separate import run_separately
from torch import Tensor

from solostep.kernels import scaled_mm
from solostep.kernels.quantize import quantize_rows
from solostep.kernels.scaled_mm import (
    scaled_mm_fp8,
    scaled_mm_fp8_reference,
    scaled_mm_int8,
    scaled_mm_int8_reference,
)

E4M3 = torch.float8_e4m3fn
TYPES = [torch.bfloat16, torch.float16, torch.float32]

INTERPRETED = """
import torch
from solostep.kernels import scaled_mm
from solostep.kernels.sums import launch_follow

torch.manual_seed(0)
for m, n, k, out_type, bias in (
    (3, 5, 7, torch.float32, True), (130, 40, 64, torch.float16, False), (70, 200, 130, torch.float32, True),
    (1, 1, 1, torch.float32, False), (64, 16, 192, torch.float32, True),
):
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    scales = torch.rand(m), torch.rand(n)
    bias = torch.randn(n) if bias else None
    out = torch.full((m, n), float("nan"), dtype=out_type)
    scaled_mm._launch(a, b, *scales, bias, out)
    want = scaled_mm.scaled_mm_int8_reference(a, b, *scales, bias, out_type)
    assert torch.equal(out, want), (m, n, k, out_type)
    residual, gate = torch.randn(m, n).to(out_type), torch.randn(n).to(out_type)
    got, want = (scaled_mm.After(residual.clone(), gate) for _ in range(2))
    scaled_mm._launch(a, b, *scales, bias, got.residual, got)
    scaled_mm.scaled_mm_int8_reference(a, b, *scales, bias, out_type, want)
    assert torch.equal(got.residual, want.residual) and not torch.equal(want.residual, residual)
    wide = torch.full((m, n + 3), 2**30, dtype=torch.int32)  # what follows a library's sums, whose rows lie apart
    wide[:, :n] = a.double() @ b.double().t()
    got = scaled_mm.After(residual.clone(), gate)
    launch_follow(wide[:, :n], *scales, bias, gate, got.residual)
    assert torch.equal(got.residual, want.residual)
    launch_follow(wide[:, :n], *scales, bias, None, out.fill_(torch.nan))
    assert torch.equal(out, scaled_mm.scaled_mm_int8_reference(a, b, *scales, bias, out_type))
    # e4m3: sums of integers that are exact in any order, in one sum and in one a step.
    a, b = (torch.randint(-8, 9, (rows, k)).to(torch.float8_e4m3fn) for rows in (m, n))
    want = scaled_mm.scaled_mm_fp8_reference(a, b, *scales, bias, out_type)
    for form in ((True, False), (False, False), (True, True)):  # the last: by block-scaled products
        scaled_mm._launch(a, b, *scales, bias, out.fill_(torch.nan), scaled_mm.NOTHING, *form)
        assert torch.equal(out, want), (m, n, k, out_type, form)
        got, true = (scaled_mm.After(residual.clone(), gate) for _ in range(2))
        scaled_mm._launch(a, b, *scales, bias, got.residual, got, *form)
        scaled_mm.scaled_mm_fp8_reference(a, b, *scales, bias, out_type, true)
        assert torch.equal(got.residual, true.residual)
print("equal")
"""

CARD = r"""
import contextlib
import io
import re
import sys
import torch
from compiling import Card, resources
from triton.runtime import driver
from solostep.kernels import scaled_mm, scaled_mm_hopper

made = []

class Compile:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        def start(*args, **options):
            with contextlib.redirect_stdout(io.StringIO()) as told:  # by ptxas
                kernel = self.kernel.warmup(*args, grid=grid, **options)
            made.append((kernel, told.getvalue()))
        return start

scaled_mm._scaled_mm_kernel = Compile(scaled_mm._scaled_mm_kernel)
scaled_mm_hopper._scaled_mm_hopper_kernel = Compile(scaled_mm_hopper._scaled_mm_hopper_kernel)

def operands(m, k, kind=torch.int8):
    a, b = torch.empty(m, k).to(kind), torch.empty(512, k).to(kind)
    return a, b, torch.empty(m), torch.empty(512), None, torch.empty(m, 512, dtype=torch.bfloat16)

for job in sys.argv[1].split():
    arch, m, k, gated, form = map(int, job.split(","))
    driver.set_active(Card(arch))
    a, b, scale_a, scale_b, bias, out = operands(m, k, torch.float8_e4m3fn if form else torch.int8)
    more = (out[0], out, scaled_mm.After(out, out[0])) if gated else (bias, out, scaled_mm.NOTHING)
    scaled_mm._launch(a, b, scale_a, scale_b, *more, fast=form != 2, scaled=form == 3)
    assert form != 3 or "block_scale" in made[-1][0].asm["ptx"]
driver.set_active(Card(90))
a, b, *rest = operands(192, 256)
for job in sys.argv[2:]:
    kind = torch.int8 if "int8" in job else torch.float8_e4m3fn
    after = scaled_mm.After(rest[-1], rest[-1][0]) if "gated" in job else scaled_mm.NOTHING
    scaled_mm_hopper.launch_hopper(a.to(kind), b.to(kind), *rest, 132, after)
for kernel, told in made:
    ptx, arch = kernel.asm["ptx"], kernel.metadata.target.arch
    spills = "-"
    if "wgmma" in ptx:
        found = re.findall(r"(\d+) bytes spill", told)
        assert found and "C75" not in told, told
        spills = sum(map(int, found))
    print(arch, *resources(kernel), spills)
"""


def _int8(m: int, n: int, k: int, device: str = "cpu", bias: bool = True) -> list[Tensor | None]:
    """Random operands over the whole range, -128 included."""
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    scales = [torch.rand(rows, device=device) + 0.1 for rows in (m, n)]
    return [a, b, *scales, torch.randn(n, device=device) * k if bias else None]


def _fp8(m: int, n: int, k: int, device: str = "cpu", bias: bool = True) -> list[Tensor | None]:
    a, scale_a = quantize_rows(torch.randn(m, k, device=device), E4M3)
    b, scale_b = quantize_rows(torch.randn(n, k, device=device), E4M3)
    return [a, b, scale_a, scale_b, torch.randn(n, device=device) if bias else None]


@pytest.mark.parametrize("out_type", TYPES)
def test_int8_reference_is_exact_and_rounded_once(out_type: torch.dtype) -> None:
    a, b, scale_a, scale_b, bias = _int8(5, 7, 3000)
    exact = a.double() @ b.double().t()
    steps = exact.float() * scale_a[:, None] * scale_b + bias
    assert torch.equal(scaled_mm_int8_reference(a, b, scale_a, scale_b, bias, out_type), steps.to(out_type))
    assert torch.equal(scaled_mm_int8(a, b, scale_a, scale_b, bias, out_type), steps.to(out_type))
    assert scaled_mm_int8(a, b, scale_a, scale_b).dtype == torch.bfloat16


def test_the_longest_int8_sum_fits() -> None:
    a = torch.full((1, scaled_mm.MAX_K), -128, dtype=torch.int8)
    one = torch.ones(1)
    out = scaled_mm_int8(a, a, one, one, out_dtype=torch.float32)
    assert out.item() == torch.tensor(128.0**2 * scaled_mm.MAX_K).item()


@pytest.mark.parametrize("out_type", TYPES)
def test_fp8_reference(out_type: torch.dtype) -> None:
    a, b, scale_a, scale_b, bias = _fp8(5, 7, 300)
    want = (a.double() * scale_a[:, None]) @ (b.double() * scale_b[:, None]).t() + bias
    for function in (scaled_mm_fp8_reference, scaled_mm_fp8):
        out = function(a, b, scale_a, scale_b, bias, out_type)
        assert out.dtype == out_type
        tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5}[out_type]
        assert torch.allclose(out.double(), want, rtol=tolerance, atol=1e-3)


def test_a_quantized_linear_is_close() -> None:
    """Both formats from end to end, with outliers; int8 rotated."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 1024, generator=generator), torch.randn(30, 1024, generator=generator)
    x[:, ::100] *= 50
    want = x @ w.t()
    for dtype, group, product, limit in ((torch.int8, 256, scaled_mm_int8, 0.02), (E4M3, 1, scaled_mm_fp8, 0.05)):
        (a, scale_a), (b, scale_b) = (quantize_rows(t, dtype, group) for t in (x, w))
        out = product(a, b, scale_a, scale_b, out_dtype=torch.float32)
        assert 0.003 < float((out - want).norm() / want.norm()) < limit


def test_a_row_that_was_not_finite_comes_out_nan() -> None:
    x = torch.ones(3, 32)
    x[1, 4] = torch.inf
    for dtype, product in ((torch.int8, scaled_mm_int8), (E4M3, scaled_mm_fp8)):
        a, scale_a = quantize_rows(x, dtype)
        b, scale_b = quantize_rows(torch.ones(4, 32), dtype)
        out = product(a, b, scale_a, scale_b)
        assert out[1].isnan().all() and out[[0, 2]].eq(32).all()


@pytest.mark.parametrize("make, product", [(_int8, scaled_mm_int8), (_fp8, scaled_mm_fp8)], ids=["int8", "fp8"])
def test_wrong_arguments_are_named(make, product) -> None:
    a, b, scale_a, scale_b, bias = make(4, 6, 32)

    def refused(words: str, *args: object) -> None:
        with pytest.raises(ValueError, match=words):
            product(*args)

    refused("a must be a contiguous matrix", a.float(), b, scale_a, scale_b)
    refused("a must be a contiguous matrix", a[None], b, scale_a, scale_b)
    refused("b must be a contiguous matrix", a, b.t().contiguous().t(), scale_a, scale_b)
    refused(r"b must be \[N, 32\]", a, b[:, :16].contiguous(), scale_a, scale_b)
    refused("a must have", a[:, :0].contiguous(), b[:, :0].contiguous(), scale_a, scale_b)
    refused(r"scale_a must be \[4\]", a, b, scale_b, scale_b)
    refused("scale_a must be", a, b, scale_a.double(), scale_b)
    refused(r"scale_b must be \[6\]", a, b, scale_a, scale_b[:, None])
    refused(r"bias must be \[6\]", a, b, scale_a, scale_b, bias[:5])
    refused("bias must be", a, b, scale_a, scale_b, bias.int())
    refused("out_dtype must be", a, b, scale_a, scale_b, bias, torch.int32)
    after = scaled_mm.After
    refused("belong together", a, b, scale_a, scale_b, None, torch.bfloat16, after(residual=torch.ones(4, 6)))
    wrong = after(residual=torch.ones(4, 6), gate=torch.ones(6))
    refused("residual must be", a, b, scale_a, scale_b, None, torch.bfloat16, wrong)
    wrong = after(residual=torch.ones(4, 6), gate=torch.ones(4))
    refused("gate must be", a, b, scale_a, scale_b, None, torch.float32, wrong)
    refused("b must be on cpu", a, b.to("meta"), scale_a, scale_b)
    refused("scale_a must be on cpu", a, b, scale_a.to("meta"), scale_b)


def test_int8_sums_that_could_overflow_are_refused() -> None:
    a = torch.empty(1, scaled_mm.MAX_K + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="overflow int32"):
        scaled_mm_int8(a, a, torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("make, product", [(_int8, scaled_mm_int8), (_fp8, scaled_mm_fp8)], ids=["int8", "fp8"])
def test_what_follows_the_product(make, product) -> None:
    """The gated residual, rounded once, in place of the residual."""
    operands = make(5, 32, 64)
    plain = product(*operands, torch.float32)
    residual, gate = torch.randn(5, 32), torch.randn(32)
    want = residual + gate * plain
    out = product(*operands, torch.float32, scaled_mm.After(residual=residual, gate=gate))
    assert out is residual and torch.equal(out, want)


@pytest.mark.parametrize("rows", [1, 8, 19, 21, 32])
def test_what_follows_in_torch_takes_rows_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part is never of a few rows, and the result is that of all rows at once."""
    torch.manual_seed(0)
    a, b = torch.randn(rows, 32).to(torch.float8_e4m3fn), torch.randn(48, 32).to(torch.float8_e4m3fn)
    scale_a, scale_b, gate = torch.rand(rows) + 0.5, torch.rand(48) + 0.5, torch.randn(48)
    residual = torch.randn(rows, 48)
    want = scaled_mm.scaled_mm_fp8(a, b, scale_a, scale_b, None, torch.float32, scaled_mm.After(residual.clone(), gate))
    monkeypatch.setattr(scaled_mm, "ROWS", 8)
    monkeypatch.setattr(scaled_mm, "FEW", 4)
    seen: list[int] = []
    real = scaled_mm._scaled
    monkeypatch.setattr(scaled_mm, "_scaled", lambda product, *more: seen.append(len(product)) or real(product, *more))
    found = scaled_mm.scaled_mm_fp8(a, b, scale_a, scale_b, None, torch.float32, scaled_mm.After(residual, gate))
    assert found is residual and torch.allclose(found, want, rtol=1e-6, atol=1e-6)
    assert sum(seen) == rows and max(seen) < 8 + 4 and (len(seen) == 1 or min(seen) >= 4)


@pytest.mark.parametrize("make, product", [(_int8, scaled_mm_int8), (_fp8, scaled_mm_fp8)], ids=["int8", "fp8"])
def test_no_rows(make, product) -> None:
    a, b, scale_a, scale_b, bias = make(4, 6, 32)
    assert product(a[:0], b, scale_a[:0], scale_b, bias).shape == (0, 6)


@pytest.mark.parametrize("rows, columns", [(396, 24), (25, 7), (12, 3), (1, 5), (13, 1)])
def test_every_tile_is_walked_once(rows: int, columns: int) -> None:
    walk = getattr(scaled_mm._tile, "fn", scaled_mm._tile)
    tiles = [walk(i, rows, columns, scaled_mm.GROUP) for i in range(rows * columns)]
    assert sorted(tiles) == [(row, column) for row in range(rows) for column in range(columns)]
    if columns > 11:  # a wave of 132 programs reads few rows and columns
        assert len({row for row, _ in tiles[:132]}) == 12 and len({column for _, column in tiles[:132]}) == 11


def test_the_interpreted_kernel_gives_the_reference_bits(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_separately(INTERPRETED, tmp_path, TRITON_INTERPRET="1").split() == ["equal"]


FORMS = (
    (192, 256, 0, 0), (192, 200, 1, 0), (48, 256, 1, 0), (48, 200, 0, 0), (192, 256, 1, 1), (192, 200, 0, 1),
    (192, 256, 1, 2), (192, 256, 1, 3),
)  # fmt: skip
"""Of the portable kernel: rows, K, whether bias and residual follow, and the type: int8, e4m3, e4m3 in sums of each
step, e4m3 by block-scaled products. Every run compiles some, each for one card; --all: each for each card that has the
type."""
FOR = 90, 100, 80, 0, 89, 0, 0, 120
LEAST = 80, 89, 89, 120
"""The first card of each type."""


def test_compiles_for_cards(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The portable kernel spills nothing, in the shared memory that all cards have, 99 KiB; Hopper has 227, and its own
    kernel is compiled for both types and with both ends, with --all for each of both."""
    pytest.importorskip("triton")
    whole = is_whole(request.config)
    jobs = ["fp8", "int8 gated"] + (["int8", "fp8 gated"] if whole else [])
    portable = [
        (arch, *form)
        for arch in CARDS
        for own, form in zip(FOR, FORMS, strict=True)
        if arch == own or (whole and arch >= LEAST[form[3]])
    ]
    forms = " ".join(",".join(map(str, form)) for form in portable)
    told = run_separately(CARD, tmp_path, forms, *jobs, TRITON_DUMP_PTXAS_LOG="1")
    lines = [line.split() for line in told.splitlines()]
    assert [int(line[0]) for line in lines] == [arch for arch, *_ in portable] + [90] * len(jobs)
    for form, (_, _, stack, shared, spilled) in zip(portable, lines, strict=False):
        assert int(stack) == 0 and spilled in ("-", "0") and int(shared) <= 99 * 1024, (form, stack, spilled, shared)
    assert any(line[4] == "0" for line in lines[: len(portable)])  # on Hopper it takes wgmma
    for job, (_, _, _, shared, spilled) in zip(jobs, lines[len(portable) :], strict=True):
        assert int(shared) <= 227 * 1024, (job, shared)
        # The gated end: once a tile, in all three warpgroups together, stores and loads.
        assert int(spilled) <= (1000 if "gated" in job else 0), (job, spilled)


# --- on a card ----------------------------------------------------------------------------------------------------

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
SHAPES = [
    (1000, 6144, 6144), (193, 264, 48), (65, 8, 16), (64, 256, 128), (1, 6144, 6144), (77, 512, 1000), (130, 100, 77),
    (3, 5, 7), (1, 1, 1), (5000, 18_432, 272), (20_001, 264, 400), (300, 24, 24_576), (128, 128, 64),
    (397, 12_288, 6144),
]  # fmt: skip


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_card_gives_the_int8_reference_bits(shape: tuple[int, int, int]) -> None:
    for bias, out_type in ((False, torch.bfloat16), (True, torch.float16), (True, torch.float32)):
        operands = _int8(*shape, device="cuda", bias=bias)
        want = scaled_mm_int8_reference(*operands, out_type)
        assert torch.equal(scaled_mm_int8(*operands, out_type), want)
        out = torch.full_like(want, torch.nan)
        scaled_mm._launch(*operands, out)
        assert torch.equal(out, want)
        out.fill_(torch.nan)
        whole = scaled_mm.Operands(*operands, out_type, scaled_mm.NOTHING)
        if "hopper" in scaled_mm.default_products(out.device, "int8") and scaled_mm.PRODUCTS["hopper"].fits(whole):
            from solostep.kernels.scaled_mm_hopper import launch_hopper

            for processors in (132, 3):
                launch_hopper(*operands, out, processors)
                assert torch.equal(out, want)
    _check_what_follows(scaled_mm_int8, scaled_mm_int8_reference, operands, exact=True)
    a, b, scale_a, scale_b, bias = (t.cpu() for t in operands)
    on_cpu = scaled_mm_int8_reference(a[:3], b, scale_a[:3], scale_b, bias, out_type)
    assert torch.equal(on_cpu, want[:3].cpu())


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_card_is_close_to_the_fp8_reference(shape: tuple[int, int, int]) -> None:
    """Fast accumulation adds in about 14 bits."""
    for bias in (False, True):
        operands = _fp8(*shape, device="cuda", bias=bias)
        for out_type in TYPES:
            want = scaled_mm_fp8_reference(*operands, torch.float32)
            for fast, limit in ((True, 5e-3), (False, 1e-3)):
                out = scaled_mm_fp8(*operands, out_type, use_fast_accum=fast)
                assert out.dtype == out_type and out.shape == want.shape and out.is_contiguous()
                size = max(want.norm(), operands[4].norm() if bias else 0)  # one may cancel the other
                error = float((out.float() - want).norm() / size)
                assert error < limit + (2**-8 if out_type == torch.bfloat16 else 0)  # as much is one element's rounding
                assert torch.equal(scaled_mm_fp8(*operands, out_type, use_fast_accum=fast), out)
        _check_what_follows(scaled_mm_fp8, scaled_mm_fp8_reference, operands, exact=False)


def _check_what_follows(product, reference, operands: list[Tensor | None], exact: bool) -> None:
    a, b = operands[:2]
    residual = torch.randn(len(a), len(b), device="cuda").bfloat16()
    gate = torch.randn(len(b), device="cuda").bfloat16()
    got, want = (scaled_mm.After(residual.clone(), gate) for _ in range(2))
    y, want_y = (function(*operands, torch.bfloat16, after).float()
                 for function, after in ((product, got), (reference, want)))  # fmt: skip
    assert torch.equal(y, want_y) if exact else float((y - want_y).norm() / want_y.norm()) < 8e-3
