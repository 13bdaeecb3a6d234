"""Attention behind one function: every mode within its limits, and no back end that is wrong is ever used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from solostep.kernels import attention_check as check
from solostep.kernels import cards
from solostep.kernels.attention import BACKENDS, MODES, Backend, Operands, attention, default_backend, self_attention
from solostep.kernels.attention_check import LIMITS, Verdict, choose, exact, examine, make_inputs, relative_error
from solostep.kernels.qk_norm_rope import qk_norm_rope_reference

CPU = torch.device("cpu")
gpu = pytest.mark.gpu
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def truth(x: check.Inputs) -> Tensor:
    """Every row in fp64, from the qkv product."""
    q, k, v = x.qkv.split(128, dim=-1)
    q = qk_norm_rope_reference(q, x.q_weight, x.cos, x.sin)
    k = qk_norm_rope_reference(k, x.k_weight, x.cos, x.sin)
    return exact(q, k, v, torch.arange(len(q), device=q.device), range(q.shape[1])).flatten(1)


def whole(x: check.Inputs, **more: object) -> Tensor:
    return self_attention(x.qkv, x.q_weight, x.k_weight, x.cos, x.sin, **more)  # type: ignore[arg-type]


# --- the modes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 77, 129, 300])
def test_every_mode_is_within_its_limit(mode: str, tokens: int) -> None:
    x = make_inputs("normal", tokens, 3, CPU, seed=tokens)
    found = whole(x, mode=mode)
    assert found.shape == (tokens, 3 * 128) and found.dtype == torch.bfloat16
    limit = {"bf16": 6e-3}.get(mode, LIMITS[mode]["normal"])  # q and k are rounded to bf16 here, not in the reference
    assert relative_error(found, truth(x)) < limit
    assert torch.equal(found, whole(x, mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["growing", "spikes"])
def test_adversarial_inputs_are_within_their_limits(mode: str, kind: str) -> None:
    """Keys that grow along the sequence, and one six times larger every 500: on them no estimate of a maximum holds."""
    x = make_inputs(kind, 1003, 1, CPU, seed=3)
    plain = x.operands("bf16")
    size = plain.k.float().norm(dim=-1)[:, 0]
    if kind == "spikes":
        others = torch.arange(1003) % 500 != 0
        assert (size[::500] / size[others].mean() - 6).abs().max() < 0.1 and size[others].std() < 0.1
    else:
        assert abs(float(size[-1] / size[0]) - 10) < 0.1
    # From the operands in bf16, as limits are: the scores are so large here that their rounding is another matter.
    true = exact(plain.q, plain.k, plain.v, torch.arange(1003), [0]).flatten(1)
    limit = LIMITS[mode][kind]
    assert relative_error(whole(x, mode=mode), true) < limit
    # What these inputs are for: a maximum of half of the keys, or of all but the large ones, is far off.
    scores = plain.q[:, 0].float() @ plain.k[:, 0].float().t() * 128**-0.5
    seen = scores[:, others] if kind == "spikes" else scores[:, :500]
    assert float((scores.amax(1) - seen.amax(1)).max()) > 16  # e^16: e4m3 ends at 448


def test_surges_leave_what_fp32_holds_and_are_hidden_again() -> None:
    plain = make_inputs("surges", 9001, 1, CPU, seed=3).operands("bf16")
    bits = plain.q[::30, 0].float() @ plain.k[:, 0].float().t() * (128**-0.5 * 1.4427)
    first, later = (bits[:, key].clone() for key in check.SURGES)
    bits[:, list(check.SURGES)] = float("-inf")
    jump = first - bits.amax(1)
    assert (jump > 64).all() and (jump > 128).any() and (jump - 127).abs().min() < 0.5  # 2^127 times V is beyond fp32
    assert (later - first > 8).all()


def test_surges_come_where_no_maximum_is_taken_and_go_where_one_is() -> None:
    hopper = pytest.importorskip("solostep.kernels.attention_hopper")
    stale = [hopper.SCHEDULES[mode] for mode in MODES]
    assert [plan.refresh > 1 for plan in stale] == [mode != "int8-fp8" for mode in MODES]
    assert all(plan.refresh != 1 == plan.exact().refresh for plan in stale)
    for plan in (p for p in stale if p.refresh):
        first, later = (key // plan.keys + 1 for key in check.SURGES)  # the last tile comes before all others
        assert first >= 8 and first % plan.refresh and later % plan.refresh == 0, vars(plan)


@pytest.mark.parametrize("mode", MODES)
def test_it_writes_where_it_is_told(mode: str) -> None:
    x = make_inputs("outliers", 60, 2, CPU)
    out = torch.full((60, 256), float("nan"), dtype=torch.bfloat16)
    assert whole(x, mode=mode, out=out) is out
    assert torch.equal(out, whole(x, mode=mode))


def test_bf16_mode_takes_fp32() -> None:
    x = make_inputs("normal", 50, 2, CPU)
    wide = check.Inputs("normal", x.qkv.float(), x.q_weight, x.k_weight, x.cos, x.sin)
    found = whole(wide)
    assert found.dtype == torch.float32 and relative_error(found, truth(wide)) < 1e-6


def test_wrong_calls_are_refused() -> None:
    x = make_inputs("normal", 20, 2, CPU)
    for words, more in (
        ("mode must be", {"mode": "fp4"}),
        ("backend for int8 must be", {"mode": "int8", "backend": "cudnn"}),
        ("backend for bf16 must be", {"backend": "nothing"}),
        ("out has to be", {"out": torch.empty(20, 128)}),
    ):
        with pytest.raises(ValueError, match=words):
            whole(x, **more)
    with pytest.raises(ValueError, match="384"):
        self_attention(x.qkv[..., :256], x.q_weight, x.k_weight, x.cos, x.sin)


# --- 16 bits, any shape -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "keys", "width"), [(1, 1, 128), (33, 7, 40), (5, 131, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_any_shape(tokens: int, keys: int, width: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, n, 3, width, dtype=dtype) for n in (tokens, keys, keys))
    found = attention(q, k, v, scale=0.2)
    assert found.shape == q.shape and found.dtype == dtype
    for b in range(2):
        true = exact(q[b], k[b], v[b], torch.arange(tokens), range(3), scale=0.2)
        assert relative_error(found[b], true) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_keys_beyond_the_count_are_not_seen() -> None:
    q, k, v = (torch.randn(3, n, 2, 64) for n in (9, 20, 20))
    counts = [20, 7, 1]
    for b, n in enumerate(counts):
        k[b, n:] = v[b, n:] = float("nan")
    found = attention(q, k, v, key_counts=counts)
    for b, n in enumerate(counts):
        want = F.scaled_dot_product_attention(*(x[b : b + 1, :m].transpose(1, 2) for x, m in ((q, 9), (k, n), (v, n))))
        torch.testing.assert_close(found[b], want[0].transpose(0, 1))
    torch.testing.assert_close(found[2], v[2, :1].expand(9, 2, 64))  # one key: its value


@pytest.mark.parametrize("counts", [[20], [20, 21], [20, 0], [20, 20, 20]])
def test_wrong_counts_are_refused(counts: list[int]) -> None:
    q, k, v = (torch.randn(2, n, 2, 64) for n in (9, 20, 20))
    with pytest.raises(ValueError, match="key_counts must be 2 numbers from 1 to 20"):
        attention(q, k, v, key_counts=counts)
    with pytest.raises(ValueError, match="q, k and v"):
        attention(q, k, v[:, :3])


def test_gradients_go_through() -> None:
    q, k, v = (torch.randn(2, 6, 2, 128, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    attention(q, k, v).float().sum().backward()
    assert all(x.grad is not None and bool(torch.isfinite(x.grad).all()) for x in (q, k, v))


@pytest.mark.parametrize("name", ["sdpa", "flash", "math"])
def test_named_back_ends_of_torch(name: str) -> None:
    q, k, v = (torch.randn(1, n, 2, 128).bfloat16() for n in (40, 50, 50))
    true = exact(q[0], k[0], v[0], torch.arange(40), range(2))
    assert relative_error(attention(q, k, v, backend=name)[0], true) < 4e-3


# --- which back ends there are ------------------------------------------------------------------------------------


def test_what_is_not_here_says_why() -> None:
    for name, backend in BACKENDS.items():
        for mode in backend.modes:
            reason = backend.available(CPU, mode)
            assert reason is None if name in ("sdpa", "flash", "math", "torch") else reason, name
    assert BACKENDS["hopper"].available(CPU, "bf16") == "it needs a CUDA card"


@pytest.mark.parametrize(
    ("name", "package", "function", "scale_name"),
    [
        ("flash-attn-3", "flash_attn_interface", "flash_attn_func", "softmax_scale"),
        ("flash-attn-2", "flash_attn", "flash_attn_func", "softmax_scale"),
        ("sage", "sageattention", "sageattn", "sm_scale"),
    ],
)
@pytest.mark.parametrize("sums", [False, True])
def test_other_packages_are_called_as_they_want(
    name: str, package: str, function: str, scale_name: str, sums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``[B, S, H, D]`` in 16 bits, in every mode; some versions return the sums of rows besides."""
    given: list[dict[str, object]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **more: object) -> Tensor | tuple[Tensor, Tensor]:
        given.append(more)
        assert q.shape == k.shape == v.shape == (1, 70, 2, 128) and q.dtype == k.dtype == v.dtype == torch.bfloat16
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, scale=more[scale_name]).transpose(1, 2)  # type: ignore
        return (out, q[..., 0]) if sums else out

    there = ModuleType(package)
    there.__spec__ = ModuleSpec(package, None)
    setattr(there, function, kernel)
    backend, (mode, card) = BACKENDS[name], (BACKENDS[name].modes[0], torch.device("cuda"))
    monkeypatch.setattr(cards, "capability", lambda device: (9, 0))
    assert backend.available(card, mode) == f"the package {package} is not installed"
    monkeypatch.setitem(sys.modules, package, there)
    cards.loads.cache_clear()
    assert backend.available(card, mode) is None
    monkeypatch.setattr(cards, "capability", lambda device: (7, 5))
    assert "this card has 7.5" in str(backend.available(card, mode))
    x = make_inputs("normal", 70, 2, CPU)
    out = torch.full((70, 256), float("nan"), dtype=torch.bfloat16)
    assert whole(x, mode=mode, backend=name, out=out) is out and relative_error(out, truth(x)) < 6e-3
    assert given == [{scale_name: None} | ({"tensor_layout": "NHD"} if name == "sage" else {})]


def test_cards_and_versions_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda")

    def on(capability: tuple[int, int], version: str) -> dict[tuple[str, str], str | None]:
        monkeypatch.setattr(cards, "capability", lambda device: capability)
        monkeypatch.setattr(cards, "triton", type("triton", (), {"__version__": version}))
        monkeypatch.setattr(cards, "loads", lambda module: None)
        return {
            (n, m): BACKENDS[n].available(card, m) for n in ("hopper", "triton", "torch") for m in BACKENDS[n].modes
        }

    hopper = on((9, 0), "3.6.0")
    assert hopper["hopper", "bf16"] is None and hopper["triton", "int8-fp8"] is None
    assert "there are kernels" in str(hopper["torch", "int8"])
    assert default_backend(card, "bf16", 100) == default_backend(card, "int8-fp8", 100) == "hopper"
    later = on((9, 0), "3.10.1")
    assert "run with Triton 3.6 and, up to 3.9, only compiled; this is 3.10.1" in str(later["hopper", "int8"])
    assert default_backend(card, "int8", 100) == "triton" and default_backend(card, "bf16", 100) == "sdpa"
    ampere = on((8, 0), "3.6.0")
    assert "9.0 only; this card has 8.0" in str(ampere["hopper", "bf16"])
    assert ampere["triton", "int8"] is None and "8.9" in str(ampere["triton", "int8-fp8"])
    turing = on((7, 5), "3.6.0")
    assert "8.0" in str(turing["triton", "int8"]) and turing["torch", "int8"] is None
    assert default_backend(card, "int8", 100) == "torch"
    assert default_backend(CPU, "bf16", 100) == "sdpa"


# --- wrong kernels ------------------------------------------------------------------------------------------------


def fake(name: str, change: Callable[[Tensor], Tensor | None]) -> Backend:
    """A fast back end: torch's, of which something is changed; or nothing, where the change raises."""

    def run(x: Operands, mode: str, scale: float | None, out: Tensor | None) -> Tensor:
        assert out is not None
        right = BACKENDS["sdpa"].run(x, mode, scale, None)
        changed = change(right)
        return out if changed is None else changed

    return Backend(name, ("bf16",), lambda device, mode: None, run)


def scale_last_tile(right: Tensor) -> Tensor:
    wrong = right.clone()
    wrong[len(right) // 64 * 64 :] *= 0.5
    return wrong


def fails(right: Tensor) -> Tensor:
    raise RuntimeError("the kernel\nbroke")


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor | None], str, str]] = {
    "tail": (scale_last_tile, "wrong", "relative error"),
    "nothing written": (lambda right: None, "wrong", "not finite"),
    "one row": (lambda right: right.index_fill(0, torch.tensor([0]), float("inf")), "wrong", "not finite"),
    "slightly off": (lambda right: right * 1.006, "wrong", "allowed"),
    "broken": (fails, "failed", "the kernel broke"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_back_end_is_never_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, status, words = FAULTS[name]
    monkeypatch.setitem(BACKENDS, name, fake(name, change))
    verdicts = examine(CPU, "bf16", tokens=200, heads=2, budget_ms=1, backends=["sdpa", name, "cudnn"])
    found = {verdict.backend: verdict for verdict in verdicts}
    assert found["sdpa"].status == "ok" and found["cudnn"].status == "unavailable"
    assert found[name].status == status and words in found[name].reason and "\n" not in found[name].reason
    assert found[name].ms is None
    assert choose(verdicts) == choose(verdicts, "sdpa") == "sdpa"
    with pytest.raises(ValueError, match=f"{name} (computes wrong results on this card|failed)"):
        choose(verdicts, name)
    with pytest.raises(ValueError, match="cudnn is unavailable .it needs a CUDA card"):
        choose(verdicts, "cudnn")


def test_the_fastest_right_one_is_chosen() -> None:
    right = [Verdict("int8", "a", "ok", ms=3.0), Verdict("int8", "b", "ok", ms=2.0)]
    assert choose([Verdict("int8", "c", "wrong", "off", ms=1.0), *right]) == "b"
    with pytest.raises(ValueError, match=r"no attention back end is usable: c computes wrong results .* \(off\)"):
        choose([Verdict("int8", "c", "wrong", "off")])
    with pytest.raises(ValueError, match="was not examined; a, b were"):
        choose(right, "z")


@pytest.mark.parametrize("mode", MODES)
def test_examination_on_a_cpu(mode: str) -> None:
    verdicts = examine(CPU, mode, tokens=333, heads=2, budget_ms=1)
    assert [v.backend for v in verdicts] == [n for n, b in BACKENDS.items() if mode in b.modes]
    for verdict in verdicts:
        assert (verdict.status == "ok") == (BACKENDS[verdict.backend].available(CPU, mode) is None), verdict
        if verdict.status == "ok":
            assert set(verdict.errors) == {
                "normal, 333 tokens",
                "normal",
                "outliers",
                "growing",
                "sharp",
                "spikes",
                "surges",
                "local means",
            }
            assert verdict.ms and verdict.kernel_ms and verdict.kernel_ms < verdict.ms and verdict.tflops
    for words, more in (("mode must", {"mode": "x"}), ("backend for", {"backends": ["torch" * (mode == "bf16")]})):
        with pytest.raises(ValueError, match=words):
            examine(CPU, **({"mode": mode, "tokens": 9} | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["int8", "int8-fp8"])
def test_what_rounding_the_operands_costs_is_no_fault(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As where a few keys decide, and the formats cost more than they mostly do.
    monkeypatch.setitem(check.LIMITS, mode, check.LIMITS[mode] | {"normal": 1e-3, "outliers": 1e-3})
    real = BACKENDS["torch"].run

    def off(x: Operands, mode: str, scale: float | None, out: Tensor | None) -> Tensor:
        return 1.1 * real(x, mode, scale, out)

    monkeypatch.setitem(BACKENDS, "off", Backend("off", (mode,), lambda device, mode: None, off))
    found = {v.backend: v for v in examine(CPU, mode, tokens=200, heads=2, budget_ms=1, backends=["torch", "off"])}
    assert found["torch"].status == "ok" and found["torch"].errors["outliers"] > 1e-3
    assert found["off"].status == "wrong" and "allowed" in found["off"].reason


def test_rows_that_are_compared() -> None:
    for tokens in (1, 64, 1003, 75_888):
        rows = check.sampled_rows(tokens, CPU).tolist()
        assert rows == sorted(set(rows)) and rows[0] == 0 and rows[-1] == tokens - 1
        assert {(tokens - 1) // n * n for n in (64, 128, 192)} <= set(rows)
    with pytest.raises(ValueError, match="kind must be"):
        make_inputs("other", 5, 1, CPU)


# --- on a card ----------------------------------------------------------------------------------------------------


@gpu
@needs_card
@pytest.mark.parametrize("mode", MODES)
def test_no_back_end_is_wrong_on_this_card(mode: str) -> None:
    card = torch.device("cuda")
    verdicts = examine(card, mode, tokens=5007, heads=4, budget_ms=20)
    assert not [v for v in verdicts if v.status in ("wrong", "failed") and v.backend in ("hopper", "triton", "sdpa")]
    assert BACKENDS[choose(verdicts)].available(card, mode) is None


@gpu
@needs_card
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["hopper", "triton", "sdpa"])
@pytest.mark.parametrize("tokens", [1, 129, 1003, 5007])
def test_self_attention_on_a_card(mode: str, name: str, tokens: int) -> None:
    card = torch.device("cuda")
    if mode not in BACKENDS[name].modes or BACKENDS[name].available(card, mode):
        pytest.skip(f"{name} is not to be had here")
    x = make_inputs("normal", tokens, 3, card, seed=tokens)
    out = torch.full((tokens, 384), float("nan"), device=card, dtype=torch.bfloat16)
    whole(x, mode=mode, backend=name, out=out)
    assert relative_error(out, truth(x)) < {"bf16": 6e-3}.get(mode, LIMITS[mode]["normal"])
    assert torch.equal(out, whole(x, mode=mode, backend=name))
