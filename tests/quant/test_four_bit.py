"""nf4 and int4-weight beside the packages that they are measured against."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from solostep.benchmarks.linear_error import relative_error
from solostep.kernels.expand import unpack_nibbles
from solostep.quant import four_bit
from solostep.quant.four_bit import (
    NF4_BLOCK,
    NF4_VALUES,
    Int4WeightLinear,
    Nf4Linear,
    dequantize_nf4_reference,
    pack_nibbles,
    quantize_nf4_reference,
)
from solostep.quant.linear import QuantizedLinear, assign

SHAPES = [(64, 64), (3, 128), (1, 64), (5, 100), (7, 9), (1, 3), (33, 65)]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # bitsandbytes compiles what it does to a block that is not whole: half a minute.
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(before)


def weight(kind: str, n: int, k: int, seed: int = 0) -> Tensor:
    """``normal``, or ``heavy tails``: Student's t with 4 degrees of freedom."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g)
    return w if kind == "normal" else w / torch.randn(n, k, 4, generator=g).square().mean(-1).sqrt()


def dequantized(kind: type[QuantizedLinear], w: Tensor) -> Tensor:
    module = kind(w.shape[1], w.shape[0], False, torch.bfloat16)
    assign(module, kind.quantize(w))
    return module.dequantized()


def test_nibbles() -> None:
    q = torch.arange(32).view(2, 16) % 16
    packed = pack_nibbles(q)
    assert packed.shape == (2, 8) and packed.dtype == torch.uint8
    assert packed[0, :2].tolist() == [0x01, 0x23]
    assert torch.equal(unpack_nibbles(packed), q.to(torch.uint8))


# --- nf4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_bytes_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = (weight("heavy tails", *shape) * 0.03).to(dtype)
    packed, amax = quantize_nf4_reference(w)
    theirs, state = functional.quantize_4bit(w, blocksize=NF4_BLOCK, quant_type="nf4")
    assert theirs.dtype == torch.uint8 and state.absmax.shape == amax.shape
    assert torch.equal(state.absmax, amax)
    assert torch.allclose(state.code, torch.tensor(NF4_VALUES), atol=0, rtol=0)
    # They multiply by 1 / amax, we divide: a value halfway between two may go to either, and to nothing else.
    ours, others = unpack_nibbles(packed)[: w.numel()], unpack_nibbles(theirs.flatten())[: w.numel()]
    differ = (ours != others).nonzero().flatten()
    scaled = (w.flatten()[differ].float() / amax[differ // NF4_BLOCK]).double()
    values = torch.tensor(NF4_VALUES, dtype=torch.float64)
    a, b = values[ours[differ].int()], values[others[differ].int()]
    assert bool(((scaled - (a + b) / 2).abs() < 1e-6).all())
    assert len(differ) <= 0.01 * w.numel()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_values_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight("normal", *shape, seed=1).to(dtype)
    packed, state = functional.quantize_4bit(w, blocksize=NF4_BLOCK, quant_type="nf4")
    ours = dequantize_nf4_reference(packed.flatten(), state.absmax, shape, dtype)
    assert ours.dtype == dtype and ours.shape == shape
    theirs = functional.dequantize_4bit(packed, state).reshape(shape)
    assert torch.equal(ours, theirs)


def test_nf4_takes_the_nearest_value() -> None:
    w = weight("normal", 16, 64)
    packed, amax = quantize_nf4_reference(w)
    values = torch.tensor(NF4_VALUES)
    nearest = (w.view(-1, NF4_BLOCK)[..., None] / amax[:, None, None] - values).abs().argmin(-1)
    assert torch.equal(unpack_nibbles(packed), nearest.flatten().to(torch.uint8))
    # Its ends and zero are exact, and what was quantized once stays as it is.
    found = dequantized(Nf4Linear, w)
    again, same = quantize_nf4_reference(found)
    assert torch.equal(again, packed) and torch.equal(same, amax)
    assert torch.equal(found.view(-1, NF4_BLOCK).abs().amax(1), amax)


def test_nf4_on_a_card_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = four_bit.importlib.util.find_spec
    monkeypatch.setattr(four_bit.importlib.util, "find_spec", lambda n: None if n == "bitsandbytes" else real(n))
    four_bit._bitsandbytes.cache_clear()
    with caplog.at_level(logging.WARNING, logger="solostep"):
        assert four_bit._bitsandbytes() is None and four_bit._bitsandbytes() is None
    four_bit._bitsandbytes.cache_clear()
    assert [r.message for r in caplog.records] == [
        "bitsandbytes is not installed: nf4 weights are expanded by plain PyTorch, which is slower."
    ]


# --- int4 ---------------------------------------------------------------------------------------------------------


def test_int4_is_what_its_formula_says() -> None:
    w = weight("heavy tails", 5, 300)
    tensors = Int4WeightLinear.quantize(w)
    q = unpack_nibbles(tensors["weight"]).double().unflatten(1, (-1, 128))
    scale, zero = (tensors[k].double()[..., None] for k in ("weight_scale", "weight_zero"))
    want = ((q - zero) * scale).flatten(1)[:, :300]
    assert relative_error(dequantized(Int4WeightLinear, w), want) < 1e-6
    assert bool((zero >= 0).all()) and bool((zero <= 15).all()) and bool((scale > 0).all())


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_int4_is_closer_than_torchao(kind: str) -> None:
    """Than its asymmetric groups of 128, with whole zero points; and than HQQ's fit of scale and zero point."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    w = weight(kind, 96, 1024)
    ours = relative_error(dequantized(Int4WeightLinear, w), w.double())
    ends = {"target_dtype": torch.uint8, "quant_min": 0, "quant_max": 15}
    block = (1, 128)
    scale, zero = primitives.choose_qparams_affine(w, primitives.MappingType.ASYMMETRIC, block, **ends)
    q = primitives.quantize_affine(w, block, scale, zero, torch.uint8, 0, 15)
    theirs = primitives.dequantize_affine(q, block, scale, zero, torch.uint8, 0, 15)
    assert ours <= 0.97 * relative_error(theirs, w.double())
    assert ours <= hqq_error(w)


def hqq_error(w: Tensor, rounds: int = 20, p: float = 0.7) -> float:
    """Half-quadratic quantization (Badri and Shaji 2023): the zero point that fits what a sparse error leaves over."""
    x = w.double().unflatten(1, (-1, 128))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    inverse = 15 / (high - low)
    zero = (-low * inverse).round()
    beta, best = 10.0, float("inf")
    for _ in range(rounds):
        q = (x * inverse + zero).round().clamp(0, 15)
        found = (q - zero) / inverse
        best = min(best, relative_error(found, x))
        rest = x - found
        shrunk = rest.abs() - rest.abs().pow(p - 1) / beta
        sparse = rest.sign() * shrunk.clamp_min(0).nan_to_num(0)
        zero = (q - (x - sparse) * inverse).mean(-1, keepdim=True)
        beta *= 1.01
    return best


def test_int4_of_what_it_can_hold_exactly() -> None:
    """Sixteen levels with a scale and a zero point that bf16 holds, zeros, and one constant."""
    levels = (torch.arange(256) * 7 % 16).float().view(1, 256) - 5
    w = torch.cat([levels * 0.5, torch.zeros(1, 256), levels * 2.0**-20])
    assert relative_error(dequantized(Int4WeightLinear, w), w.double()) < 4e-3
    assert torch.equal(dequantized(Int4WeightLinear, w)[1], w[1])
    constant = torch.full((1, 256), 0.3)
    assert relative_error(dequantized(Int4WeightLinear, constant), constant.double()) < 4e-3


def test_plain_nf4_on_a_card_is_said_in_records(monkeypatch: pytest.MonkeyPatch) -> None:
    card, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(four_bit, "_bitsandbytes", lambda: None)
    monkeypatch.setattr(four_bit, "has_nf4", lambda device: True)
    assert four_bit.expanded_by_torch(["nf4"], card) is None
    monkeypatch.setattr(four_bit, "has_nf4", lambda device: False)
    assert "plain PyTorch" in (four_bit.expanded_by_torch(["int8", "nf4"], card) or "")
    assert four_bit.expanded_by_torch(["nf4"], cpu) is four_bit.expanded_by_torch(["int8"], card) is None
    monkeypatch.setattr(four_bit, "_bitsandbytes", lambda: object())
    assert four_bit.expanded_by_torch(["nf4"], card) is None
