"""The kernels beside attention and products: each is examined, a wrong one is named, and is done without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from solostep.kernels import (
    adaln,
    attention_causal,
    block_scaled,
    cards,
    expand,
    qk_norm_rope,
    quantize,
    refused,
    scaled_mm,
    values,
)
from solostep.kernels import attention as registry
from solostep.kernels import operators_check as check
from solostep.kernels.attention import BACKENDS, CROSS, Backend, cross_backend, cross_name
from solostep.kernels.operators_check import CHECKS, examine_operators
from solostep.kernels.refused import by_rows, is_refused, refuse

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(check, "DIM", 256)
    monkeypatch.setattr(check, "ROWS", 67)
    yield
    refuse(CARD, ())


def test_all_are_right_in_torch() -> None:
    for verdict in examine_operators(CPU, 7):
        missing = verdict.backend in (cross_name("cudnn"), cross_name("efficient"), block_scaled.NAME)
        assert verdict.status == ("unavailable" if missing else "ok"), verdict
        assert missing or all(0 < e < 6e-2 for e in verdict.errors.values())


def test_forms_for_many_tokens_are_examined_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(check._lengths(CARD)) >= max(qk_norm_rope.MANY, values.SAMPLED_FROM)
    assert max(check._lengths(CARD)) > 16 * max(values.PLAN["CHUNK"], values.RANGE)
    monkeypatch.setattr(check, "_lengths", lambda device: (check.ROWS, 131))
    real = qk_norm_rope.qk_norm_rope

    def wrong_at_length(qkv: Tensor, *args: Any, **more: Any) -> Any:
        q, k, q_scale, k_scale = real(qkv, *args, **more)
        return q, k.roll(int(len(qkv) > check.ROWS), 0), q_scale, k_scale

    qk, v = examine_operators(CPU, 3, ["qk_norm_rope int8", "quantize_v"])
    assert set(qk.errors) == {"q", "k", "q of 131 tokens", "k of 131 tokens"}
    assert set(v.errors) == {"channels", "channels of 131 tokens"} and qk.status == v.status == "ok"
    monkeypatch.setattr(qk_norm_rope, "qk_norm_rope", wrong_at_length)
    (verdict,) = examine_operators(CPU, 3, ["qk_norm_rope int8"])
    assert verdict.status == "wrong" and verdict.reason.startswith("k of 131 tokens: relative error")


def _first(result: Any, change: Callable[[Tensor], Any]) -> Any:
    """Changes the first tensor of a result."""
    change(result if isinstance(result, Tensor) else result[0])
    return result


def last_row(x: Tensor) -> None:
    x[-1] = 0


def one_scale(result: Any) -> Any:
    result[1][-1] *= 1.1
    return result


def finite_scale(result: Any) -> Any:
    return result[0], result[1].nan_to_num(1.0)


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any], str]] = {
    "quantize_rows int8": (quantize, "quantize_rows", one_scale, "rows: relative error"),
    "quantize_rows e4m3": (quantize, "quantize_rows", finite_scale, "a row with an infinity"),
    "layer_norm_modulate 16 bits": (adaln, "layer_norm_modulate", lambda y: _first(y, last_row), "relative error 1.0"),
    "layer_norm_modulate int8": (adaln, "layer_norm_modulate", one_scale, "rows: relative error"),
    "layer_norm_modulate e4m3": (adaln, "layer_norm_modulate", finite_scale, "a row with an infinity"),
    "gelu 16 bits": (adaln, "gelu", lambda y: y * 1.02, "relative error"),
    "gelu int8": (adaln, "gelu", one_scale, "relative error"),
    "gelu e4m3": (adaln, "gelu", one_scale, "relative error"),
    "gate_residual": (adaln, "gate_residual", lambda y: _first(y, last_row), "relative error 1.0"),
    "follow_sums": (scaled_mm, "follow_sums", lambda y: _first(y, last_row), "relative error 1.0"),
    expand.INT4: (expand, "expand_int4", lambda y: _first(y, last_row), "relative error 1.0"),
    expand.NF4: (expand, "expand_nf4", lambda y: _first(y, last_row), "relative error 1.0"),
    "qk_norm_rope 16 bits": (qk_norm_rope, "qk_norm_rope", lambda y: _first(y, last_row), "q: relative error 1.0"),
    "qk_norm_rope int8": (qk_norm_rope, "qk_norm_rope", lambda y: (y[0], y[1].roll(1, 0), *y[2:]), "k: relative"),
    "norm_heads": (qk_norm_rope, "norm_heads", lambda y: y * 1.02, "relative error"),
    "quantize_v": (values, "quantize_v", lambda y: (y[0], y[1], y[2] + 30), "channels: relative error"),
    attention_causal.BIASED: (attention_causal, "biased_causal_attention", lambda y: y.mul_(1.01), "relative error"),
    attention_causal.FRAMES: (attention_causal, "frame_causal_attention", lambda y: y.fill_(torch.nan), "nan, allowed"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_one_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, change, words = FAULTS[name]
    real = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args, **more: change(real(*args, **more)))
    (verdict,) = examine_operators(CPU, 1, [name])
    assert verdict.status == "wrong" and words in verdict.reason, verdict

    def breaks(*args: Any, **more: Any) -> Any:
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(module, function, breaks)
    (verdict,) = examine_operators(CPU, 1, [name])
    assert (verdict.status, verdict.reason) == ("failed", "no luck")


def test_the_block_scaled_product_is_taken_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card of 12.0 only, and not once it was found wrong there."""
    monkeypatch.setattr(cards, "triton", type("triton", (), {"__version__": "3.6.0"}))
    for capability, taken in (((8, 9), False), ((9, 0), False), ((10, 0), False), ((12, 0), True), ((12, 1), False)):
        monkeypatch.setattr(cards, "capability", lambda device, of=capability: of)
        assert block_scaled.is_taken(CARD) is taken and not block_scaled.is_taken(CPU)
    refuse(CARD, [block_scaled.NAME])
    assert not block_scaled.is_taken(CARD)
    refuse(CARD, ())
    monkeypatch.setattr(block_scaled, "missing", lambda device: None)
    right = scaled_mm.PRODUCTS["torch"].run
    for change, status in ((1.0, "ok"), (1.02, "wrong")):
        monkeypatch.setattr(scaled_mm, "by_triton", lambda x, by=change: right(x) * by)
        (verdict,) = examine_operators(CPU, 1, [block_scaled.NAME])
        assert verdict.status == status, verdict


def test_every_operator_has_a_fault() -> None:
    assert set(FAULTS) | {cross_name(name) for name in CROSS} | {block_scaled.NAME} == set(CHECKS)


def test_wrong_cross_attention_gives_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    real = BACKENDS["sdpa"]
    wrong = Backend("sdpa", ("bf16",), real.available, lambda *args: real.run(*args) * 1.02)
    monkeypatch.setitem(BACKENDS, "sdpa", wrong)
    sdpa, math = examine_operators(CPU, 0, [cross_name("sdpa"), cross_name("math")])
    assert (sdpa.status, math.status) == ("wrong", "ok") and "79 keys" in sdpa.reason
    for name in CROSS:
        there = Backend(name, ("bf16",), lambda device, mode: None, real.run)
        monkeypatch.setitem(BACKENDS, name, there)
    monkeypatch.setattr(registry, "CROSS", ("sdpa", "flash", "math"))
    assert cross_backend(CARD) == cross_backend(CPU) == "sdpa"
    refuse(CARD, [cross_name("sdpa")])
    assert (cross_backend(CARD), cross_backend(CPU)) == ("flash", "sdpa")
    refuse(CARD, map(cross_name, CROSS))
    with pytest.raises(ValueError, match="every attention of torch's to few keys is wrong on cuda:0"):
        cross_backend(CARD)


# --- doing without ------------------------------------------------------------------------------------------------


class OnCard(Tensor):
    """A tensor that says that it is on the first card."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    device = property(lambda self: CARD)  # type: ignore[assignment]


def test_refused_kernels_are_those_of_a_card() -> None:
    refuse(CARD, ["gelu int8"])
    assert is_refused("gelu int8", CARD) and is_refused("gelu int8", torch.device("cuda"))
    assert not is_refused("gelu e4m3", CARD)
    assert not is_refused("gelu int8", torch.device("cuda", 1)) and not is_refused("gelu int8", CPU)
    refuse(CARD, [])
    assert not is_refused("gelu int8", CARD)


def test_kernels_are_asked_for_by_the_names_of_their_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator asks before it starts its kernel is what its check is called."""
    asked = []
    for module in (adaln, expand, qk_norm_rope, quantize, scaled_mm, values):
        monkeypatch.setattr(module, "_has_kernel", lambda name, x: asked.append(name))
    monkeypatch.setattr(attention_causal, "is_refused", lambda name, device: asked.append(name) or True)
    examine_operators(CPU, 0, [name for name in CHECKS if "attention" not in name])
    monkeypatch.setattr(attention_causal, "triton", object())
    x = torch.zeros(1, 512, dtype=torch.bfloat16).as_subclass(OnCard)
    assert not attention_causal.has_wide_kernel(x, 512) and not attention_causal.has_biased_kernel(x, 128)
    assert set(asked) == {name for name in CHECKS if not name.startswith("cross")} - {block_scaled.NAME}


def test_a_refused_kernel_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3, 8).as_subclass(OnCard)
    monkeypatch.setattr(quantize, "triton", object())
    assert quantize._has_kernel("gelu int8", x)
    refuse(CARD, ["gelu int8"])
    assert not quantize._has_kernel("gelu int8", x) and quantize._has_kernel("gelu e4m3", x)
    monkeypatch.setattr(quantize, "triton", None)
    assert not quantize._has_kernel("gelu e4m3", x)


def test_plain_torch_takes_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refused, "ROWS", 4)
    x, seen = torch.randn(11, 6), []

    def function(rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(rows))
        return rows * 2, rows.sum(-1)

    doubled, total = by_rows(function, x.as_subclass(OnCard))
    assert torch.equal(doubled.as_subclass(Tensor), x * 2) and torch.equal(total.as_subclass(Tensor), x.sum(-1))
    assert seen == [4, 4, 3]
    by_rows(function, x)
    assert seen[3:] == [11]  # on a CPU all at once


# --- on a card ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_no_operator_is_wrong_on_this_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the widths of a card
    for seed in range(3):
        bad = [v for v in examine_operators(torch.device("cuda"), seed) if v.status == "wrong"]
        assert not bad
