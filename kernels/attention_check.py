"""Whether the back ends of attention are right on this card, and how fast they are.

Every back end gets fresh random operands, and is compared with fp64 on sampled rows: the first, the last, those around
the last tile's beginning, and random ones. Memory that it writes to holds NaN before, so that a row left out shows. The
inputs are qkv products that go through the same passes as in use:

    normal      N(0, 1), queries and keys normed and turned, at the length asked for and at 1,003 tokens
    outliers    four channels with eight times the gain, means in keys and values: as activations are; at the length
                asked for, two heads
    growing     queries and keys that grow tenfold along the sequence: what a stale running maximum has to notice
    sharp       queries and keys normed to scores of five nats' standard deviation: few keys count, and the maximum
                keeps growing along the sequence
    spikes      one key in 500 six times larger, and its query: a maximum that jumps between two refreshes
    surges      one key whose scores grow by 2^115 to 2^140, between two refreshes, and another a refresh sees that is
                above it still: sums, and their products with V, that leave fp32 and then look as if they had not
    local means values whose mean comes and goes three times along the sequence, and scores that follow it a little:
                sums with one sign for thousands of keys, of which an accumulator with few bits loses a part each time

In 16 bits the reference takes the operands as the kernel gets them, rounded to bf16; in 8 bits those same operands
before they were quantized, so that the error counts everything that the mode does. Times are medians by CUDA events, of
the kernel and with the passes before it; back ends are chosen by the latter.

Memory: at 75,888 tokens and 48 heads 8 GB.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .attention import BACKENDS, HEAD_DIM, MODES, Backend, Operands, dequantized, prepare
from .cards import reason_of

LIMITS = {
    "bf16": {"normal": 4e-3, "outliers": 4e-3, "growing": 5e-3, "sharp": 4e-3, "spikes": 4e-3, "surges": 4e-3,
             "local means": 4e-3},
    "int8": {"normal": 1.6e-2, "outliers": 1e-2, "growing": 6e-2, "sharp": 4.5e-2, "spikes": 6e-2, "surges": 6e-2,
             "local means": 1e-2},
    "int8-fp8": {"normal": 5e-2, "outliers": 2e-2, "growing": 9e-2, "sharp": 6e-2, "spikes": 7e-2, "surges": 7e-2,
                 "local means": 2e-2},
}  # fmt: skip
"""Relative L2 errors above which a result is wrong, not just rounded: about 1.5 times what the formats cost."""
HEADROOM = 1.5
"""Where the operands' rounding alone costs nearly as much as that, a result may be off by this many times the cost:
operands are new ones each time, and of some a few keys decide."""


SHARPNESS = 5.0
"""Standard deviation of the scores, in nats, where they are sharp."""
SPIKE = 6.0
"""How many times larger one key in 500 is."""
SURGES = {5000: 9.2, 8190: 10.2}
"""Keys that all queries look at, and how many times larger they are. attention_hopper.py takes no maximum in the first
one's tile; in the second one's those of its schedules do that take any."""
FOLLOWING = 4.0
"""How far queries and keys lean towards the phase of the local means, beside noise of length 11."""


@dataclass(frozen=True)
class Inputs:
    """A qkv product ``[S, H, 384]`` with what qk_norm_rope() takes besides."""

    kind: str
    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    cos: Tensor
    sin: Tensor

    def operands(self, mode: str) -> Operands:
        return prepare(self.qkv, self.q_weight, self.k_weight, self.cos, self.sin, mode)


TIE = 1.03
"""Times within this factor are alike: no further apart than those of one kernel in two examinations."""


@dataclass(frozen=True)
class Verdict:
    """One back end in one mode: ``ok``, ``wrong`` (an error above its limit, or a number that is not finite),
    ``unavailable`` or ``failed`` (it raised); ``reason`` says more. ``ms`` counts the passes before the kernel."""

    mode: str
    backend: str
    status: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    ms: float | None = None
    kernel_ms: float | None = None
    tflops: float | None = None
    """Of the kernel."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_inputs(kind: str, tokens: int, heads: int, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs of one of the kinds above, bf16."""
    generator = torch.Generator(device).manual_seed(seed)
    like: dict[str, Any] = {"device": device, "generator": generator}
    qkv = torch.randn(tokens, heads, 3 * HEAD_DIM, dtype=torch.bfloat16, **like)
    weight = torch.ones(HEAD_DIM, device=device)
    frame, row, column = torch.randn(tokens, HEAD_DIM // 2, **like).split((32, 16, 16), dim=1)
    angles = torch.cat([frame, frame, row, row, column, column], dim=1)  # one for both channels of a pair
    cos, sin = angles.cos(), angles.sin()
    if kind == "outliers":
        weight[torch.randperm(HEAD_DIM, **like)[:4]] = 8.0
        qkv[..., HEAD_DIM : 2 * HEAD_DIM] += torch.randn(heads, HEAD_DIM, **like)
        qkv[..., 2 * HEAD_DIM :] += 2 * torch.randn(heads, HEAD_DIM, **like)
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)  # a rotation would take the mean away
    elif kind == "sharp":
        weight *= SHARPNESS**0.5
    elif kind == "growing":
        growth = torch.linspace(0.3, 3.0, tokens, device=device)[:, None]
        cos, sin = cos * growth, sin * growth
    elif kind == "spikes":
        cos[::500] *= SPIKE
        sin[::500] *= SPIKE
    elif kind == "surges":
        towards = torch.randn(heads, HEAD_DIM, **like)
        qkv[..., :HEAD_DIM] += 2 * towards
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        for key, size in SURGES.items():
            at = key if tokens > max(SURGES) else tokens * key // (max(SURGES) + 1)
            qkv[at, :, HEAD_DIM : 2 * HEAD_DIM] += 20 * towards
            qkv[at, :, 2 * HEAD_DIM :] *= 4
            cos[at] = size
    elif kind == "local means":
        phase = torch.linspace(0, 6 * math.pi, tokens, device=device)
        follow = torch.randn(2, heads, HEAD_DIM, **like) * (FOLLOWING / HEAD_DIM**0.5)
        turn = torch.stack([phase.cos(), phase.sin()], dim=1)
        both = torch.einsum("sa,ahd->shd", turn, follow).to(qkv.dtype)
        qkv[..., :HEAD_DIM] += both
        qkv[..., HEAD_DIM : 2 * HEAD_DIM] += both
        shift = 2 * math.pi * torch.rand(heads, HEAD_DIM, **like)
        values = qkv[..., 2 * HEAD_DIM :]
        for h in range(heads):  # one at a time, to save memory
            values[:, h] = 0.5 * values[:, h] + (2 * (phase[:, None] + shift[h]).sin() + 1)
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)  # a rotation would take the phase away
    elif kind != "normal":
        raise ValueError(f"kind must be normal, outliers, growing, sharp, spikes, surges or local means, not {kind!r}")
    return Inputs(kind, qkv, weight, weight, cos.contiguous(), sin.contiguous())


def sampled_rows(tokens: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Rows to compare: both ends, around the multiples of 64 and 128 before the end, and 32 random ones."""
    fixed = {0, 1, 63, 64, 127, 128, tokens // 2, tokens - 1, tokens - 2}
    for tile in (64, 128, 192):
        last = (tokens - 1) // tile * tile
        fixed |= {last - 1, last, last + 1}
    random = torch.randint(0, tokens, (32,), generator=generator, device="cpu").tolist()
    return torch.tensor(sorted({r for r in [*fixed, *random] if 0 <= r < tokens}), device=device)


def exact(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, heads: Sequence[int], scale: float | None = None) -> Tensor:
    """Attention of some rows and heads in fp64: ``[R, h, D]`` of ``q [S, H, D]``, ``k`` and ``v [L, H, D]``."""
    found = []
    for h in heads:  # one at a time: a head's keys and values take 155 MB at 75,888 tokens
        scores = q[rows, h].double() @ k[:, h].double().t() * (q.shape[-1] ** -0.5 if scale is None else scale)
        found.append(scores.softmax(-1) @ v[:, h].double())
    return torch.stack(found, dim=1)


def relative_error(found: Tensor, true: Tensor) -> float:
    """Relative L2 distance."""
    return float((found.double() - true).norm() / true.norm())


def median_ms(run: Callable[[], object], device: torch.device, budget_ms: float) -> float:
    """The median time of a call, after one that is not counted; 3 to 50 calls, about as many as the budget allows."""

    def times(count: int) -> list[float]:
        if device.type != "cuda":
            marks = [time.perf_counter()]
            for _ in range(count):
                run()
                marks.append(time.perf_counter())
            return [(b - a) * 1e3 for a, b in zip(marks, marks[1:], strict=False)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]

    run()
    once = max(times(1)[0], 1e-3)
    return statistics.median(times(min(50, max(3, round(budget_ms / once)))))


def _poisoned(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An output of NaN; another of its size was there and is free again, for those that allocate their own."""
    other = torch.full(shape, float("nan"), dtype=torch.bfloat16, device=device)
    out = torch.full_like(other, float("nan"))
    del other
    return out


def _fault(
    backend: Backend, mode: str, operands: Operands, rows: Tensor, heads: Sequence[int], true: Tensor, limit: float
) -> tuple[float, str]:
    """The error of one call, and what is wrong with it, if anything."""
    out = _poisoned(tuple(operands.q.shape), operands.q.device)
    found = backend.run(operands, mode, None, out)
    low, high = torch.aminmax(found)  # NaN if there is one anywhere, with no copy of the output
    error = relative_error(found[rows][:, list(heads)], true)
    if not bool(torch.isfinite(low + high)):
        return error, "its output holds numbers that are not finite"
    if not error <= limit:
        limit = max(limit, HEADROOM * rounding_cost(operands, rows, heads, true))
    if not error <= limit:
        return error, f"relative error {error:.2e}, allowed {limit:.2e}"
    return error, ""


def rounding_cost(operands: Operands, rows: Tensor, heads: Sequence[int], true: Tensor) -> float:
    """The error of exact attention to operands as they were rounded."""
    q, k, v = dequantized(operands, list(heads))
    found = exact(q, k, v, rows, range(len(heads)))
    return relative_error(found if operands.v_mean is None else found + operands.v_mean[list(heads)], true)


class _Examination:
    """What is known of each back end so far."""

    def __init__(self, device: torch.device, mode: str, names: Iterable[str]) -> None:
        self.device, self.mode = device, mode
        self.verdicts = {name: self._first(name) for name in names}

    def _first(self, name: str) -> Verdict:
        reason = BACKENDS[name].available(self.device, self.mode)
        return Verdict(self.mode, name, "ok" if reason is None else "unavailable", reason or "")

    def usable(self) -> list[Backend]:
        return [BACKENDS[name] for name, verdict in self.verdicts.items() if verdict.status == "ok"]

    def note(self, name: str, **what: Any) -> None:
        self.verdicts[name] = replace(self.verdicts[name], **what)

    def forms(self, inputs: Inputs) -> dict[str, list[Backend]]:
        """Back ends by the operands that they take, without those that this length is too much for."""
        forms: dict[str, list[Backend]] = {}
        tokens, heads, _ = inputs.qkv.shape
        for backend in self.usable():
            scores = 10 * tokens * tokens * heads  # bf16 and fp32 copies live side by side
            if backend.quadratic and scores > _free(self.device) // 2:
                self.note(backend.name, status="unavailable", reason=f"its scores alone take {scores / 1e9:,.0f} GB")
                continue
            forms.setdefault(backend.operand_mode(self.mode), []).append(backend)
        return forms

    def guarded(self, backends: Sequence[Backend], work: Callable[[], None]) -> None:
        """A broken kernel fails alone, unless it broke the whole context; then the others say so."""
        try:
            work()
        except Exception as error:  # whatever a compiler, a driver or another package raises is the finding
            text = reason_of(error)
            for backend in backends:
                self.note(backend.name, status="failed", reason=text)

    def compare(self, inputs: Inputs, label: str, seed: int) -> None:
        """Errors of all on one kind of inputs."""
        tokens, heads, _ = inputs.qkv.shape
        rows = sampled_rows(tokens, self.device, torch.Generator().manual_seed(seed))
        some = sorted({0, heads // 2, heads - 1})
        limit = LIMITS[self.mode][inputs.kind]
        plain = inputs.operands("bf16")
        true = exact(plain.q, plain.k, plain.v, rows, some)
        del plain
        for form, backends in self.forms(inputs).items():

            def work(form: str = form, backends: Sequence[Backend] = backends) -> None:
                operands = inputs.operands(form)
                for backend in backends:
                    one = functools.partial(self._one, backend, operands, rows, some, true, limit, label)
                    self.guarded([backend], one)

            self.guarded(backends, work)

    def _one(
        self, backend: Backend, operands: Operands, rows: Tensor, heads: Sequence[int], true: Tensor, limit: float,
        label: str,
    ) -> None:  # fmt: skip
        error, fault = _fault(backend, self.mode, operands, rows, heads, true, limit)
        errors = self.verdicts[backend.name].errors | {label: error}
        self.note(backend.name, errors=errors)
        if fault:
            self.note(backend.name, status="wrong", reason=f"{label}: {fault}")

    def measure(self, inputs: Inputs, budget_ms: float) -> None:
        """Times of those that are right."""
        for form, backends in self.forms(inputs).items():

            def work(form: str = form, backends: Sequence[Backend] = backends) -> None:
                passes = median_ms(lambda: inputs.operands(form), self.device, budget_ms / 4)
                operands = inputs.operands(form)
                out = torch.empty(operands.q.shape, dtype=torch.bfloat16, device=self.device)
                for backend in backends:
                    self.guarded([backend], functools.partial(self._time, backend, operands, out, passes, budget_ms))

            self.guarded(backends, work)

    def _time(self, backend: Backend, operands: Operands, out: Tensor, passes: float, budget_ms: float) -> None:
        ms = median_ms(lambda: backend.run(operands, self.mode, None, out), self.device, budget_ms)
        tokens, heads, width = operands.q.shape
        tflops = 4 * tokens * tokens * heads * width / ms / 1e9
        self.note(backend.name, ms=ms + passes, kernel_ms=ms, tflops=tflops)


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 8 * 10**9  # a CPU is there to test this, at small lengths
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def examine(
    device: torch.device,
    mode: str,
    *,
    tokens: int,
    heads: int = 8,
    budget_ms: float = 300.0,
    backends: Iterable[str] | None = None,
    seed: int = 0,
) -> list[Verdict]:
    """Error, time and verdict of each back end of a mode on a device, in the order of BACKENDS.

    Args:
        tokens, heads: the shape that is timed; errors are also taken at lengths of their own, with few heads.
        budget_ms: about how long each back end is timed.
        backends: names; default: all of the mode.

    Raises:
        ValueError: an unknown mode or back end.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    known = [name for name, backend in BACKENDS.items() if mode in backend.modes]
    names = known if backends is None else list(backends)
    for name in names:
        if name not in known:
            raise ValueError(f"backend for {mode} must be one of {', '.join(known)}, not {name!r}")
    device = torch.device(device)
    state = _Examination(device, mode, names)
    few = min(heads, 4)
    odd = 1003 if tokens > 1003 else tokens | 1
    cases = [("normal", odd, few), ("outliers", tokens, min(few, 2)), ("growing", min(tokens, 5007), 1)]
    cases += [("sharp", min(tokens, 5007), 1), ("spikes", min(tokens, 5007), 1), ("surges", min(tokens, 9001), 1)]
    cases.append(("local means", min(tokens, 32_768), 1))
    with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for i, (kind, length, width) in enumerate([*cases, ("normal", tokens, heads)]):
            last = i == len(cases)
            inputs = make_inputs(kind, length, width, device, seed + i)
            state.compare(inputs, kind if last or kind != "normal" else f"normal, {length} tokens", seed + i)
            if last:
                state.measure(inputs, budget_ms)
            del inputs
    return list(state.verdicts.values())


def fastest_first(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """By their times, passes counted. Of those that are alike (:data:`TIE`) the order given decides, so that a card
    computes the same from one examination to the next; those that were not timed come last."""

    def ms(verdict: Verdict) -> float:
        return float("inf") if verdict.ms is None else verdict.ms

    left, ordered = list(verdicts), []
    while left:
        alike = TIE * min(map(ms, left))
        ordered.append(next(v for v in left if ms(v) <= alike))
        left.remove(ordered[-1])
    return ordered


def choose(verdicts: Sequence[Verdict], wanted: str | None = None) -> str:
    """The fastest back end that is right, see :func:`fastest_first`; or ``wanted``, if that is right.

    Raises:
        ValueError: ``wanted`` is not usable here, or nothing is; says why.
    """

    def why(verdict: Verdict) -> str:
        said = {"wrong": "computes wrong results on this card", "failed": "failed", "unavailable": "is unavailable"}
        return f"{verdict.backend} {said[verdict.status]} ({verdict.reason})"

    right = [v for v in verdicts if v.status == "ok" and v.ms is not None]
    if wanted is not None:
        for verdict in verdicts:
            if verdict.backend == wanted:
                if verdict.status != "ok":
                    raise ValueError(f"attention back end {why(verdict)}")
                return wanted
        raise ValueError(
            f"attention back end {wanted!r} was not examined; {', '.join(v.backend for v in verdicts)} were"
        )
    if not right:
        raise ValueError(f"no attention back end is usable: {'; '.join(map(why, verdicts))}")
    return fastest_first(right)[0].backend
