"""Attention for all cards: the interpreted kernel against the reference, compiled for cards, and on a card fp64.

The compile test also covers the kernels of attention_causal.py, whose numbers test_attention_causal.py looks at.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cards import CARDS, MATRICES, compiled, is_whole
from separate import run_separately
from torch import Tensor

from solostep.kernels import attention_triton as portable
from solostep.kernels.attention_triton import attention_reference, attention_triton
from solostep.kernels.qk_norm_rope import quantize_qk_reference
from solostep.kernels.values import permute_keys

E4M3 = torch.float8_e4m3fn
MODES = ["bf16", "fp16", "int8", "int8-fp16", "int8-fp8"]

# The interpreter multiplies bf16 wrongly: fp16 instead. Tiles are the cards' and smaller ones, which loop more.
INTERPRETED = """
import importlib.util, sys
import torch
from solostep.kernels import attention_triton as portable

spec = importlib.util.spec_from_file_location("tests_of_attention", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
torch.manual_seed(0)
for mode in ("fp16", "int8-fp16", "int8-fp8"):
    for queries, keys in ((1, 1), (5, 17), (131, 131), (40, 200), (33, 128)):
        args, more = tests.operands(mode, queries, keys, 2)
        more = {"q_scale": None, "k_scale": None, "v_scale": None, "v_mean": None} | more
        want = portable.attention_reference(*args, scale=0.1, **more)
        for tile in (portable.Tile(64, 64, 4, 2), portable.Tile(128, 128, 8, 3)):
            out = torch.full((queries, 2, 384), torch.nan)[..., 128:256]
            portable._check(*args, *more.values(), out)
            portable.launch(*args, 0.1, *more.values(), out, tile, scaled=tile.queries == 64)
            print(mode, float((out - want).norm() / want.norm()))
    for kind in ("ramp", "spike"):  # keys that grow along the sequence; a key six times larger now and then
        q, k, v = (torch.randn(n, 1, 128) for n in (33, 200, 200))
        size = torch.linspace(0.3, 3, 200)
        if kind == "spike":
            size = 1 + 5.0 * (torch.arange(200) % 70 == 0)
        k *= size[:, None, None]
        args, more = tests.quantized(mode, q, k, v)
        more = {"q_scale": None, "k_scale": None, "v_scale": None, "v_mean": None} | more
        want = portable.attention_reference(*args, scale=128**-0.5, **more)
        out = torch.full((33, 1, 128), torch.nan)
        portable.launch(*args, 128**-0.5, *more.values(), out, portable.Tile(64, 64, 4, 2))
        print(mode, float((out - want).norm() / want.norm()))
"""

COMPILE = """
import sys
import torch
from compiling import Card
from triton.runtime import driver
from solostep.kernels import attention_causal as causal
from solostep.kernels import attention_triton as portable

class Compile:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        def compile(*args, **options):
            made = self.kernel.warmup(*args, grid=grid, **options)
            assert ("block_scale" in made.asm["ptx"]) == ((name, arch) == ("fp8", 120))
            print("made", name, arch, made.metadata.shared)
        return compile

for module, kernel in ((portable, "_attention_kernel"), (causal, "_biased_kernel"), (causal, "_wide_kernel")):
    setattr(module, kernel, Compile(getattr(module, kernel)))

qkv = torch.empty(1000, 3, 384, dtype=torch.bfloat16)
q8, k8 = torch.empty(2, 1000, 3, 128, dtype=torch.int8)
v8 = torch.empty(3, 128, 1008, dtype=portable.E4M3)
q_scale, k_scale, channel = torch.empty(3, 1000), torch.empty(3, 64), torch.empty(3, 128)
kv = torch.empty(1000, 1, 256, dtype=torch.bfloat16)
wide = torch.empty(1, 1000, 512, dtype=torch.bfloat16)

def attention(q, k, v, *scales):
    out = torch.empty(q.shape, dtype=torch.bfloat16)
    tile = portable.choose_tile(q.dtype, v.dtype, arch)
    portable.launch(q, k, v, 0.1, *scales, out, tile, scaled=arch == 120)

for job in sys.argv[1:]:
    name, arch = job.split(":")
    arch = int(arch)
    driver.set_active(Card(arch))
    if name == "16":
        attention(*qkv.chunk(3, -1), None, None, None, None)
    elif name == "int8":
        attention(q8, k8, qkv[..., 256:], q_scale, k_scale, None, None)
    elif name == "fp8":
        attention(q8, k8, v8, q_scale, k_scale, channel, channel)
    elif name == "biased":
        causal.launch_biased(qkv[..., :128], *kv.chunk(2, -1), channel[0], qkv[..., 256:])
    else:
        causal.launch_wide(wide, wide, wide, 1, 0.1, wide, portable.tile_for(causal.WIDE_TILES, arch, ""))
"""

JOBS = {"16": (90, 100), "int8": (80,), "fp8": (89, 90, 120), "biased": (80, 90), "wide": (89, 100)}
"""What every run compiles: attention for each of its cards, in modes in turn, and the causal kernels for two kinds of
matrix instruction each, in turn, of three: that of sm_80, which sm_89 and sm_120 have, too, that of sm_90 and that of
sm_100; --all: each for each card."""

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a block may have."""


def quantized(mode: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Operands of a mode from fp32 ones, whose attention they approximate."""
    if not mode.startswith("int8"):
        dtype = torch.float16 if mode == "fp16" else torch.bfloat16
        return (q.to(dtype), k.to(dtype), v.to(dtype)), {}
    q8, k8, q_scale, k_scale = quantize_qk_reference(q, k, k.mean(0))
    more = {"q_scale": q_scale, "k_scale": k_scale}
    if mode != "int8-fp8":
        return (q8, k8, v.to(torch.float16 if mode == "int8-fp16" else torch.bfloat16)), more
    mean = v.mean(0)
    scale = ((v - mean).abs().amax(0) / 448).clamp_min(1e-20)
    turned = torch.nn.functional.pad(((v - mean) / scale).permute(1, 2, 0), (0, 16 + -len(v) % 16), value=7.0)
    v8 = permute_keys(turned).contiguous().to(E4M3)  # beyond the keys anything finite
    return (q8, k8, v8), more | {"v_scale": scale.contiguous(), "v_mean": mean.contiguous()}


def operands(
    mode: str, queries: int, keys: int, heads: int, device: str = "cpu"
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Random operands; those of 16 bits lie inside a wider tensor whose rest is NaN."""
    q, k, v = (torch.randn(n, heads, 128, device=device) for n in (queries, keys, keys))
    args, more = quantized(mode, q, k, v)
    if not mode.startswith("int8"):
        wide = torch.full((max(queries, keys) + 3, heads, 384), torch.nan, device=device, dtype=args[0].dtype)
        views = wide.chunk(3, -1)
        args = tuple(view[: len(x)].copy_(x) for view, x in zip(views, args, strict=True))
        if mode == "fp16":
            more = {"v_mean": torch.randn(heads, 128, device=device)}
    return args, more


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("shd,lhd->hsl", q.double(), k.double()) * 128**-0.5
    return torch.einsum("hsl,lhd->shd", scores.softmax(-1), v.double())


def error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


# What is left is what quantizing costs: attention.md, section 1.
LIMITS = {"bf16": 3e-3, "fp16": 4e-4, "int8": 1.4e-2, "int8-fp16": 1.4e-2, "int8-fp8": 4.2e-2}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("queries", "keys"), [(131, 131), (5, 300)])
def test_the_reference_undoes_what_was_quantized(mode: str, queries: int, keys: int) -> None:
    torch.manual_seed(queries)
    q, k, v = (torch.randn(n, 2, 128) for n in (queries, keys, keys))
    args, more = quantized(mode, q, k, v)
    assert error(attention_reference(*args, **more), exact(q, k, v)) < 2 * LIMITS[mode]


def test_on_the_cpu_it_is_the_reference() -> None:
    args, more = operands("int8-fp8", 9, 20, 2)
    out = attention_triton(*args, scale=0.2, **more)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention_reference(*args, scale=0.2, **more).bfloat16())
    whole = torch.zeros(9, 3, 128)
    assert attention_triton(*args, scale=0.2, out=whole[:, 1:], **more).data_ptr() == whole[:, 1:].data_ptr()
    assert torch.equal(whole[:, 1:].bfloat16(), out) and not whole[:, 0].any()


def test_wrong_operands_are_refused() -> None:
    q, k, v = operands("bf16", 40, 40, 2)[0]

    def refused(words: str, *args: Tensor, **kwargs: object) -> None:
        with pytest.raises(ValueError, match=words):
            attention_triton(*args, **kwargs)

    eight = q.to(torch.int8)
    refused(r"\[S, H, 128\]", q[..., :64], k[..., :64], v)
    refused(r"\[S, H, 128\]", q, k[:, :1], v)
    refused(r"\[S, H, 128\]", q[:0], k, v)
    refused(r"\[S, H, 128\]", q, k[:0], v[:0])
    refused("both bf16", q.float(), k.float(), v)
    refused("both bf16", eight, k, v)
    refused("v has to be 16 bits", q, k, v[:5])
    refused("of the type of q", q, k, v.half())
    refused("q_scale", eight, eight, v)
    refused("k_scale", eight, eight, v, q_scale=torch.ones(2, 40))
    refused("8-bit v", q, k, torch.zeros(2, 128, 48, dtype=E4M3))
    refused("8-bit v", eight, eight, torch.zeros(2, 128, 40, dtype=E4M3))
    refused("v_scale", eight, eight, torch.zeros(2, 128, 48, dtype=E4M3))
    refused("v_mean", q, k, v, v_mean=torch.zeros(2, 64))
    refused("v has to be on cpu", q, k, v.to("meta"))
    refused("side by side", q.transpose(0, 2).contiguous().transpose(0, 2), k, v)
    refused("out has to be", q, k, v, out=torch.empty(40, 2, 64))
    refused("scale has to be", q, k, v, scale=-1.0)


def test_a_card_without_e4m3_is_named() -> None:
    with pytest.raises(ValueError, match=r"int8 \+ fp8 needs a card from sm_89 on; this one is sm_86"):
        portable.choose_tile(torch.int8, E4M3, 86)
    with pytest.raises(ValueError, match="16 bits needs a card from sm_80 on; this one is sm_75"):
        portable.choose_tile(torch.float16, torch.float16, 75)
    assert portable.choose_tile(torch.int8, torch.float16, 87) == portable.TILES["int8"][80]
    assert all(tile.keys in (64, 128) for mode in portable.TILES.values() for tile in mode.values())


def test_the_interpreted_kernel_is_close_to_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    lines = run_separately(INTERPRETED, tmp_path, __file__, TRITON_INTERPRET="1").splitlines()
    assert len(lines) == 36
    for line in lines:
        mode, value = line.split()
        assert float(value) < (0.12 if mode == "int8-fp8" else 4e-4), line  # the interpreter cuts e4m3 off


@pytest.mark.parametrize("cards", [CARDS[:3], CARDS[3:]], ids=["before-hopper", "from-hopper-on"])
def test_compiles_for_cards_in_registers_and_shared_memory(
    cards: tuple[int, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("triton")
    chosen, cards = JOBS, compiled(request.config, cards, MATRICES)
    if is_whole(request.config):
        chosen = {name: CARDS[2:] if name == "fp8" else CARDS for name in JOBS}  # e4m3 is from sm_89 on
    jobs = [f"{name}:{arch}" for name, archs in chosen.items() for arch in archs if arch in cards]
    attention = {arch for name, arch in (job.split(":") for job in jobs) if name not in ("biased", "wide")}
    assert attention == {str(arch) for arch in cards}
    log = run_separately(COMPILE, tmp_path, *jobs, TRITON_DUMP_PTXAS_LOG="1")
    parts = log.split("made ")
    assert len(parts) == len(jobs) + 1
    for job, report, made in zip(jobs, parts, parts[1:], strict=False):
        name, arch, shared = made.split()[:3]
        assert f"{name}:{arch}" == job
        assert int(shared) <= SHARED[int(arch)] * 1024, made
        spilled = int(report.rpartition(" bytes spill stores")[0].rpartition(" ")[2])
        # Triton 3.6 and 3.9 put up to 96 bytes of the 512-wide head aside on sm_80, and 3.9 208 bytes on sm_90, and
        # 8 of fp8 there, where Hopper has a kernel of its own.
        limit = {("wide", "80"): 256, ("wide", "90"): 256, ("fp8", "90"): 8}.get((name, arch), 0)
        assert spilled <= limit, (job, spilled)
        if arch == "90" and name in ("16", "fp8"):
            # A wgmma that waits for itself. Triton 3.6 lets that happen in int8, where Hopper has a kernel of its own.
            assert "C75" not in report, job


# --- on a card ----------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def _needs(mode: str) -> None:
    if mode == "int8-fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no e4m3")


@gpu
@on_card
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (300, 77), (1003, 1003), (5007, 5007), (70, 128), (129, 640)])
def test_card_error_at_odd_lengths(mode: str, queries: int, keys: int) -> None:
    _needs(mode)
    torch.manual_seed(queries)
    q, k, v = (torch.randn(n, 3, 128, device="cuda") for n in (queries, keys, keys))
    args, more = quantized(mode, q, k, v)
    out = torch.full((queries, 3, 128), torch.nan, device="cuda", dtype=torch.float16)
    assert attention_triton(*args, out=out, **more) is out
    assert error(out, exact(q, k, v)) < max(
        LIMITS[mode], 1.5 * error(attention_reference(*args, **more), exact(q, k, v))
    )
    again = torch.zeros_like(out)
    assert torch.equal(attention_triton(*args, out=again, **more), out)


@gpu
@on_card
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["ramp", "spike", "shrink"])
def test_card_rows_whose_maximum_moves(mode: str, kind: str) -> None:
    """Keys that grow or shrink along the sequence, and a key six times larger every 500."""
    _needs(mode)
    torch.manual_seed(1)
    q, k, v = (torch.randn(5007, 2, 128, device="cuda") for _ in range(3))
    if kind == "spike":
        k[::500] *= 6
    else:
        k *= torch.linspace(*((0.3, 3.0) if kind == "ramp" else (3.0, 0.3)), 5007, device="cuda")[:, None, None]
    args, more = quantized(mode, q, k, v)
    out = torch.full((5007, 2, 128), torch.nan, device="cuda", dtype=torch.float32)
    attention_triton(*args, out=out, **more)
    assert error(out, attention_reference(*args, **more).double()) < {"int8-fp8": 4.5e-2}.get(mode, 3e-3)


@gpu
@on_card
@pytest.mark.parametrize("mode", MODES)
def test_card_operands_with_other_strides_and_nan_around_them(mode: str) -> None:
    _needs(mode)
    torch.manual_seed(2)
    for queries, keys in ((777, 777), (40, 1), (3, 129)):
        args, more = operands(mode, queries, keys, 3, "cuda")
        if mode.startswith("int8"):
            wide = torch.full((2, max(queries, keys), 3, 200), 127, device="cuda", dtype=torch.int8)
            views = [wide[i, : len(x), :, 8:136].copy_(x) for i, x in enumerate(args[:2])]
            args = (*views, args[2])
        out = torch.full((queries, 3, 384), torch.nan, device="cuda")[..., 128:256]
        attention_triton(*args, out=out, **more)
        want = attention_reference(*args, **more).double()
        assert error(out, want) < {"int8-fp8": 5e-2}.get(mode, 3e-3)


@gpu
@on_card
def test_card_zeros_give_the_mean_of_v() -> None:
    """int8 scales of zeros are 2^-107: their product is zero, and zero times the masked infinity must not appear."""
    v = torch.randn(200, 2, 128, device="cuda").bfloat16()
    args, more = quantized("int8", *torch.zeros(2, 200, 2, 128, device="cuda"), v.float())
    out = attention_triton(*args, **more)
    assert error(out, v.double().mean(0).expand(200, 2, 128)) < 4e-3
