"""8-bit products: which back end is taken, and that one that is wrong anywhere is found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from solostep.kernels import cards, scaled_mm
from solostep.kernels import scaled_mm_check as check
from solostep.kernels.attention_check import Verdict
from solostep.kernels.quantize import quantize_rows
from solostep.kernels.scaled_mm import NOTHING, PRODUCTS, After, Operands, Product, default_products
from solostep.kernels.scaled_mm_check import Case, Shape, examine_products, make_operands, rank, row_error

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
CALLS = {"int8": scaled_mm.scaled_mm_int8, "fp8": scaled_mm.scaled_mm_fp8}
SMALL = (
    Case("normal", 67, 40, 96, outliers=False),
    Case("outliers, bias", 35, 40, 80, bias=True),
    Case("outliers, gated", 35, 40, 80, gated=True),
    Case("outliers, bias, gated", 35, 40, 80, bias=True, gated=True),
    Case("few rows", 5, 17, 50),
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(check, "CASES", SMALL)
    with torch.inference_mode():
        yield


def fake(
    name: str, run: Callable[[Operands], Tensor | None], fits: Callable[[Operands], bool] = lambda x: True
) -> Product:
    return Product(name, ("int8", "fp8"), lambda device, kind: None, fits, run)


def right(x: Operands) -> Tensor:
    found = PRODUCTS["torch"].run(x)
    assert found is not None
    return found


def tail_rows(x: Operands) -> Tensor:
    found = right(x)
    found[len(found) // 32 * 32 :] *= 0.5
    return found


def last_columns(x: Operands) -> Tensor:
    found = right(x)
    found[:, -2:] = 0
    return found


def one_small_row(x: Operands) -> Tensor:
    """A wrong row that is nothing beside the largest ones."""
    found = right(x)
    found[found.norm(dim=1).argmin()] *= 1.05
    return found


def without_gate(x: Operands) -> Tensor:
    if x.after.residual is None:
        return right(x)
    return x.after.residual.copy_(right(replace(x, after=NOTHING)) + x.after.residual)


def nothing_written(x: Operands) -> Tensor:
    return torch.full((len(x.a), len(x.b)), float("nan"), dtype=x.out_dtype)


def breaks(x: Operands) -> Tensor:
    raise RuntimeError("the kernel\nbroke")


FAULTS: dict[str, tuple[Callable[[Operands], Tensor | None], str, str]] = {
    "tail rows": (tail_rows, "wrong", "normal: relative error 5"),
    "last columns": (last_columns, "wrong", "normal: relative error"),
    "one small row": (one_small_row, "wrong", "relative error"),
    "no bias": (lambda x: right(replace(x, bias=None)), "wrong", "outliers, bias: relative"),
    "no gate": (without_gate, "wrong", "outliers, gated: relative"),
    "nothing written": (nothing_written, "wrong", "not finite"),
    "broken": (breaks, "failed", "the kernel broke"),
    "does not compile": (lambda x: None, "failed", "does not compile"),
}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_fault_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (run, _, _) in FAULTS.items():
        monkeypatch.setitem(PRODUCTS, name, fake(name, run))
    monkeypatch.setitem(PRODUCTS, "sound", fake("sound", right, lambda x: len(x.a) > 16))
    found = examine_products(CPU, kind, shapes=[Shape("small", 48, 64)], rows=131, budget_ms=0.1, seed=5)
    for name, (_, status, words) in FAULTS.items():
        verdict = found.verdicts[name]
        assert (verdict.status, verdict.ms) == (status, None) and words in verdict.reason, (name, verdict)
    assert {n for n, v in found.verdicts.items() if v.status == "ok"} == {"torch", "sound"}
    assert set(found.verdicts["torch"].errors) == {*(c.name for c in SMALL), "small, outliers", "small"}
    assert "few rows" not in found.verdicts["sound"].errors  # it does not take them
    assert all(e == 0 if kind == "int8" else 0 < e < 4e-3 for e in found.verdicts["torch"].errors.values())
    verdicts = list(found.verdicts.values())
    assert set(rank(verdicts)) == {"torch", "sound"} and all(found.verdicts[n].ms for n in rank(verdicts))
    lines = {line["backend"]: line for line in found.entries}
    assert lines[f"{kind} torch"]["shape"] == [131, 48, 64] and lines[f"{kind} torch"]["ms"] > 0
    assert lines[f"{kind} tail rows"]["status"] == "wrong" and lines[f"{kind} tail rows"]["ms"] is None


def test_one_bit_of_an_int8_product_is_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(x: Operands) -> Tensor:
        found = right(x)
        found.view(torch.int16)[0, 0] += 1
        return found

    monkeypatch.setitem(PRODUCTS, "off", fake("off", off))
    assert examine_products(CPU, "int8", shapes=[], rows=1).verdicts["off"].status == "wrong"


def test_operands_are_new_with_another_seed_and_stick_out() -> None:
    a, again, b = (make_operands(SMALL[1], "int8", torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert torch.equal(a.a, again.a) and not torch.equal(a.a, b.a)
    x = check.activation_like(200, 300, torch.Generator().manual_seed(0)).float()
    assert x.square().mean(0).sqrt().max() > 20 * x.square().mean(0).sqrt().median()
    assert x.square().mean(1).sqrt().max() > 20 * x.square().mean(1).sqrt().median()


def test_the_error_is_that_of_the_worst_row() -> None:
    true = torch.tensor([[100.0, 0.0], [1.0, 0.0]])
    assert row_error(true * torch.tensor([[1.0], [1.5]]), true) == pytest.approx(0.5)
    assert row_error(true.index_fill(0, torch.tensor([0]), float("nan")), true) != row_error(true, true) == 0


def test_the_fastest_right_ones_come_first() -> None:
    verdicts = [
        Verdict("int8", "a", "ok", ms=3.0), Verdict("int8", "b", "wrong", "off", ms=1.0), Verdict("int8", "c", "ok"),
        Verdict("int8", "d", "ok", ms=2.0), Verdict("int8", "e", "failed", "broke"),
    ]  # fmt: skip
    assert rank(verdicts) == ("d", "a", "c")
    with pytest.raises(ValueError, match=r"no matrix product is right: b wrong \(off\); e failed \(broke\)"):
        rank([verdicts[1], verdicts[4]])
    with pytest.raises(ValueError, match="kind must be one of int8, fp8"):
        examine_products(CPU, "int4", shapes=[], rows=1)


def test_times_that_are_alike_do_not_decide() -> None:
    """Else a card would compute something else after every examination."""

    def order(*ms: float | None) -> str:
        return "".join(rank([Verdict("fp8", name, "ok", ms=t) for name, t in zip("abc", ms, strict=True)]))

    assert order(1.02, 1.0, 3.0) == "abc" and order(1.04, 1.0, 3.0) == "bac"
    assert order(1.05, 1.02, 1.0) == "bca"  # a is no slower than b, but than c
    assert order(None, 1.0, 1.01) == "bca"


@pytest.mark.parametrize("gated", [False, True])
def test_a_shape_is_timed_with_what_follows(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that is the fastest until its product is added to something must not be chosen for all."""
    seen: list[bool] = []

    def noted(x: Operands) -> Tensor:
        seen.append(x.after.residual is not None)
        return right(x)

    def timed(run: Callable[[], object], device: torch.device, budget_ms: float) -> float:
        seen.clear()
        run()
        return 2.0 if seen == [True] else 1.0 if seen else 1.5

    monkeypatch.setattr(check, "CASES", ())
    monkeypatch.setattr(check, "median_ms", timed)
    monkeypatch.setitem(PRODUCTS, "plain", fake("plain", noted))
    found = examine_products(CPU, "fp8", shapes=[Shape("some", 48, 64, gated)], rows=131)
    assert found.verdicts["plain"].ms == (2.0 if gated else 1.0) and found.verdicts["torch"].ms == 1.5
    assert rank(list(found.verdicts.values())) == (("torch", "plain") if gated else ("plain", "torch"))
    assert all(0 < e < 4e-3 for v in found.verdicts.values() for e in v.errors.values())


def test_a_gate_that_is_wrong_at_the_shape_asked_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CASES", ())
    monkeypatch.setitem(PRODUCTS, "no gate", fake("no gate", without_gate))
    for gated, status in ((False, "ok"), (True, "wrong")):
        found = examine_products(CPU, "int8", shapes=[Shape("some", 48, 64, gated)], rows=131)
        assert found.verdicts["no gate"].status == status and found.verdicts["torch"].status == "ok"


@pytest.mark.parametrize("gated", [False, True])
def test_bf16_is_the_baseline(gated: bool) -> None:
    line = check.baseline(CPU, Shape("small", 48, 64, gated), 131, 0.1)
    assert line["backend"] == "bf16" and line["status"] == "ok" and 1e-4 < line["error"] < 4e-3 and line["ms"] > 0


# --- which back end is taken --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_first_that_takes_the_operands_computes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def noted(name: str, result: Callable[[Operands], Tensor | None]) -> Callable[[Operands], Tensor | None]:
        return lambda x: used.append(name) or result(x)

    monkeypatch.setitem(PRODUCTS, "many", fake("many", noted("many", right), lambda x: len(x.a) > 64))
    monkeypatch.setitem(PRODUCTS, "never", fake("never", noted("never", lambda x: None)))
    monkeypatch.setitem(PRODUCTS, "any", fake("any", noted("any", right)))
    (a, scale_a), (b, scale_b) = (quantize_rows(torch.randn(n, 32), scaled_mm.KINDS[kind]) for n in (70, 16))
    call = CALLS[kind]
    for rows, backends, want in (
        (70, ("many", "any"), ["many"]), (8, ("many", "any"), ["any"]), (8, ("never", "any"), ["never", "any"]),
        (8, ("torch", "any"), []), (8, None, []),
    ):  # fmt: skip
        used.clear()
        operands = a[:rows], b, scale_a[:rows], scale_b
        found = call(*operands, backends=backends)
        assert used == want and torch.equal(found, call(*operands))
    residual, gate = torch.randn(70, 16).bfloat16(), torch.randn(16).bfloat16()
    found = call(a, b, scale_a, scale_b, after=After(residual, gate), backends=("many",))
    assert found is residual
    with pytest.raises(ValueError, match=f"no product of {kind} takes 8 x 16 x 32 .* there are many"):
        call(a[:8], b, scale_a[:8], scale_b, backends=("many",))
    with pytest.raises(ValueError, match=f"backends for {kind} must be some of hopper, .* not 'abacus'"):
        call(a, b, scale_a, scale_b, backends=("abacus",))


@pytest.mark.parametrize("name", ["bf16", "float64"])
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_there_when_nothing_else_is_right(name: str, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU they compute what they do on a card, in parts of rows too."""
    monkeypatch.setattr(scaled_mm, "ROWS", 16)
    monkeypatch.setattr(scaled_mm, "FEW", 4)
    kind = "fp8" if name == "bf16" else "int8"
    x = make_operands(Case("", 45, 40, 96, bias=True, gated=gated), kind, torch.Generator().manual_seed(0))
    true, residual = check.exact_product(x), x.after.residual
    found = PRODUCTS[name].run(x)
    assert found is not None and (residual is None or found is residual)
    assert row_error(found, true) <= (0 if kind == "int8" else 8e-3)


def test_cards_and_versions_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(capability: tuple[int, int], version: str | None) -> dict[str, tuple[str, ...]]:
        monkeypatch.setattr(cards, "capability", lambda device: capability)
        known = None if version is None else type("triton", (), {"__version__": version})
        monkeypatch.setattr(cards, "triton", known)
        monkeypatch.setattr(cards, "loads", lambda module: None)
        return {kind: default_products(CARD, kind) for kind in ("int8", "fp8")}

    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    hopper = {"int8": ("hopper", "triton", "torch", "float64"), "fp8": ("hopper", "triton", "torch", "bf16")}
    assert on((9, 0), "3.6.0") == hopper
    # The gate that attention has: Gluon's interface changes without notice.
    assert on((9, 0), "3.10.0") == {"int8": ("triton", "torch", "float64"), "fp8": ("triton", "torch", "bf16")}
    # torch 2.11 starts this product outside the current stream on these cards.
    assert on((8, 9), "3.6.0") == {"int8": ("triton", "torch", "float64"), "fp8": ("triton", "bf16")}
    assert "torch before 2.12" in str(PRODUCTS["torch"].available(CARD, "fp8"))
    assert on((12, 0), "3.6.0")["fp8"] == ("triton", "torch", "bf16")
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
    assert on((8, 9), "3.6.0")["fp8"] == ("triton", "torch", "bf16")
    assert on((8, 0), "3.6.0") == {"int8": ("triton", "torch", "float64"), "fp8": ("bf16",)}
    assert on((12, 0), None) == {"int8": ("torch", "float64"), "fp8": ("torch", "bf16")}
    assert {kind: default_products(CPU, kind) for kind in CALLS} == {"int8": ("torch",), "fp8": ("torch",)}
    assert "this is 3.10.0" in str(on((9, 0), "3.10.0") and PRODUCTS["hopper"].available(CARD, "int8"))


# --- on a card ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_no_product_is_wrong_on_this_card(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the cases of a card
    card = torch.device("cuda")
    for seed in range(3):
        found = examine_products(
            card,
            kind,
            shapes=[Shape("square", 6144, 6144), Shape("gated", 6144, 6144, gated=True)],
            rows=4099,
            budget_ms=20,
            seed=seed,
        )
        assert {v.status for v in found.verdicts.values()} <= {"ok", "unavailable"}, found.verdicts
    assert rank(list(found.verdicts.values()))[0] != "float64"
