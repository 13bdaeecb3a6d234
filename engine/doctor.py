"""What this machine can do: facts, rates, and which attention and matrix-product kernels are right and fast here.

Two uses: :func:`report` is all of it, for `solostep doctor`; :func:`attention_choice` is what a run asks once, and gets
from a file in the cache folder. The file is of one card with one set of versions, since either changes which kernel is
the fastest, and may change which one is right. Kernels are examined by kernels/attention_check.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import attention, quantize, scaled_mm
from ..kernels.attention import BACKENDS, MODES, default_backend, one_line
from ..kernels.attention_check import Verdict, choose, examine, median_ms, relative_error, sampled_rows
from .config import cache_dir
from .errors import SolostepError, UsageError
from .files import one_at_a_time, replacing
from .machine import gpu_facts, host_facts, installed, pinned_memory, transfer_rates
from .progress import Progress
from .request import versions
from .runtime import free_memory, release_memory

log = logging.getLogger("solostep")

TOKENS, HEADS = 75_888, 48
"""Of the 30B model at 544 x 992, 204 frames."""
CLASSES = (("small", 8192), ("medium", 32_768), ("large", None))
"""Lengths within which one choice holds, and where each ends: short ones leave a card's last wave half empty."""
CLASS_TOKENS = {"small": 5007, "medium": 18_972}
"""Lengths that stand for a class in the report: of short clips and small frames."""
QUICK_HEADS, QUICK_MS = 8, 150.0
GEMMS = (("qkv", 18_432, 6144), ("wo, q, o", 6144, 6144), ("ffn up", 24_576, 6144), ("ffn down", 6144, 24_576))
"""Linears of a block: out and in features."""
GEMM_BACKENDS = ("bf16", "fp8 torch", "fp8 hopper", "int8 hopper", "int8 portable", "int8 torch")
GEMM_LIMITS = {"bf16": 4e-3, "fp8 torch": 1e-2, "fp8 hopper": 1e-2}
"""Relative errors above which a product of these very operands is wrong; int8 has to be exact."""


# ---------------------------------------------------------------- matrix products


def gemm(name: str, a16: Tensor, b16: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """A product of bf16 ``[M, K]`` and ``[N, K]``, quantized beforehand, and its reference for some rows.

    Raises:
        ValueError: it is not to be had here; says why.
    """
    if name == "bf16":
        return lambda: F.linear(a16, b16), lambda rows: a16[rows].double() @ b16.double().t()
    kind, _, maker = name.partition(" ")
    if not a16.is_cuda or scaled_mm.triton is None:
        raise ValueError("it needs a CUDA card and Triton")
    if kind == "fp8" and torch.cuda.get_device_capability(a16.device) < (8, 9):
        raise ValueError("this card has no FP8 units")
    dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    (a, a_scale), (b, b_scale) = (quantize.quantize_rows(x, dtype) for x in (a16, b16))
    if name == "int8 torch":
        return lambda: torch._int_mm(a, b.t()), lambda rows: a[rows].double() @ b.double().t()
    references = {"int8": scaled_mm.scaled_mm_int8_reference, "fp8": scaled_mm.scaled_mm_fp8_reference}

    def reference(rows: Tensor) -> Tensor:
        return references[kind](a[rows], b, a_scale[rows], b_scale)

    if name == "fp8 torch":
        columns = a_scale[:, None], b_scale[None]
        return lambda: torch._scaled_mm(
            a, b.t(), *columns, out_dtype=torch.bfloat16, use_fast_accum=True
        ), reference  # fmt: skip
    out = torch.full((len(a), len(b)), float("nan"), dtype=torch.bfloat16, device=a.device)
    if maker == "hopper" and not scaled_mm._hopper_fits(a, b, out):
        raise ValueError("it needs compute capability 9.0 and a Triton with Gluon")
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count

    def run() -> Tensor:
        if maker == "hopper":
            scaled_mm._launch_hopper(a, b, a_scale, b_scale, None, out, processors)
        else:
            scaled_mm._launch(a, b, a_scale, b_scale, None, out)
        return out

    return run, reference


def examine_gemm(
    device: torch.device, shape: tuple[str, int, int], rows: int, budget_ms: float
) -> list[dict[str, Any]]:
    """Error, time and verdict of each product of one shape; quantizing the operands is not counted here."""
    linear, n, k = shape
    generator = torch.Generator(device).manual_seed(0)
    like: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "generator": generator}
    x, weight = torch.randn(rows, k, **like), torch.randn(n, k, **like) * k**-0.5
    some, found = sampled_rows(rows, device), []
    for name in GEMM_BACKENDS:
        entry: dict[str, Any] = {"linear": linear, "shape": [rows, n, k], "backend": name, "status": "ok", "reason": ""}
        entry |= {"error": None, "ms": None, "tflops": None}
        try:
            run, reference = gemm(name, x, weight)
            entry["error"] = error = relative_error(run()[some], reference(some).double())
            limit = GEMM_LIMITS.get(name, 0.0)
            if not error <= limit:
                entry |= {"status": "wrong", "reason": f"relative error {error:.1e}, allowed {limit:.0e}"}
            else:
                ms = median_ms(run, device, budget_ms)
                entry |= {"ms": ms, "tflops": 2 * rows * n * k / ms / 1e9}
        except ValueError as error:
            entry |= {"status": "unavailable", "reason": one_line(error)}
        except Exception as error:  # whatever a compiler or a driver raises is the finding
            entry |= {"status": "failed", "reason": one_line(error)}
        found.append(entry)
    return found


# ---------------------------------------------------------------- the cache of choices


def size_class(tokens: int) -> str:
    """small, medium or large."""
    return next(name for name, end in CLASSES if end is None or tokens < end)


@functools.cache
def _code() -> str:
    """Identity of the kernels' code: another one has to be measured anew."""
    folder = Path(str(attention.__file__)).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def choices_key(device: torch.device) -> dict[str, Any]:
    """What choices depend on."""
    card = gpu_facts(device) if device.type == "cuda" else {"name": "cpu", "capability": "", "driver": ""}
    own = {"torch": torch.__version__, "triton": installed("triton"), "solostep": versions()["solostep"]}
    return {name: card[name] for name in ("name", "capability", "driver")} | own | {"kernels": _code()}


def choices_file(device: torch.device) -> Path:
    """Where the choices for a card with these versions are kept."""
    key = json.dumps(choices_key(device), sort_keys=True)
    return cache_dir() / "doctor" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_choices(device: torch.device) -> dict[str, list[Verdict]]:
    """Verdicts by mode and size class, such as ``int8 large``; a damaged file is as good as none."""
    path = choices_file(device)
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["key"] != choices_key(device):
            raise ValueError("another card or other versions")
        found = {name: [_verdict(v) for v in entry] for name, entry in values["choices"].items()}
        for name in found:
            mode, size = name.split()
            if mode not in MODES or size not in dict(CLASSES):
                raise ValueError(f"unknown entry {name}")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("The choice of kernels in %s cannot be read (%s); they are measured anew.", path, one_line(error))
        return {}


def _verdict(values: Mapping[str, Any]) -> Verdict:
    verdict = Verdict(**values)
    numbers = [verdict.ms, verdict.kernel_ms, verdict.tflops]
    if verdict.status not in ("ok", "wrong", "unavailable", "failed") or not isinstance(verdict.errors, dict):
        raise ValueError(f"no verdict: {verdict}")
    if any(n is not None and not isinstance(n, int | float) for n in numbers):
        raise ValueError(f"no times: {verdict}")
    return verdict


def write_choices(device: torch.device, more: Mapping[str, list[Verdict]]) -> Path | None:
    """Adds verdicts to the file. Where it cannot be written, that is said, and the next call measures anew."""
    path = choices_file(device)
    known = {**read_choices(device), **more}
    choices = {name: [plain(v.as_dict()) for v in verdicts] for name, verdicts in known.items()}
    text = json.dumps({"key": choices_key(device), "choices": choices}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        log.warning("The choice of kernels cannot be kept in %s (%s); it is measured each time.", path, error.strerror)
        return None
    return path


def plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- what a run asks


def attention_choice(device: torch.device, mode: str, tokens: int, asked: str | None = None) -> str:
    """The attention back end to use on a device at a length: the kept choice, else it is measured now, and kept.

    Measuring takes a few seconds, once a card, mode and class of length; it is logged. Reading takes about a
    millisecond: ask once a run, not in every block. On a CPU nothing is measured.

    Raises:
        UsageError: ``asked`` is unknown, is not to be had here, or computes wrong results on this card.
        SolostepError: no back end of the mode is right here.
    """
    device = torch.device(device)
    known = [name for name, backend in BACKENDS.items() if mode in backend.modes]
    if mode not in MODES or asked is not None and asked not in known:
        raise UsageError(
            f"The attention back end {asked} is unknown for {mode}; choose one of {', '.join(known)}."
            if mode in MODES
            else f"The attention mode {mode} is unknown; choose one of {', '.join(MODES)}."
        )
    if device.type != "cuda":
        reason = None if asked is None else BACKENDS[asked].available(device, mode)
        if reason is not None:
            raise UsageError(f"The attention back end {asked} is not to be had on {device}: {reason}.")
        return asked or default_backend(device, mode, tokens)
    verdicts = _kept_verdicts(device, mode, tokens, asked)
    if verdicts is None:
        with one_at_a_time(choices_file(device)):  # processes that start together: one measures, the others read
            verdicts = _kept_verdicts(device, mode, tokens, asked)  # perhaps by now
            if verdicts is None:
                verdicts = _measure_quickly(device, mode, tokens)
                write_choices(device, {f"{mode} {size_class(tokens)}": verdicts})
    try:
        return choose(verdicts, asked)
    except ValueError as error:
        kind = SolostepError if asked is None else UsageError
        raise kind(f"{str(error)[0].upper()}{str(error)[1:]}; `solostep doctor` shows all and measures anew.") from None


def _kept_verdicts(device: torch.device, mode: str, tokens: int, asked: str | None) -> list[Verdict] | None:
    """What the file says of a mode at a length; None where that answers nothing."""
    verdicts = read_choices(device).get(f"{mode} {size_class(tokens)}")
    return verdicts if verdicts is not None and _holds(verdicts, device, mode, asked) else None


def _holds(verdicts: list[Verdict], device: torch.device, mode: str, asked: str | None) -> bool:
    """Whether kept verdicts answer the question: what they chose is still installed, what is asked for was examined."""
    try:
        name = choose(verdicts)
    except ValueError:
        return False  # all failed then, perhaps for want of memory
    there = {verdict.backend: verdict for verdict in verdicts}
    for each in filter(None, (name, asked)):
        if each not in BACKENDS or each not in there:
            return False
        usable = BACKENDS[each].available(device, mode) is None
        if usable == (there[each].status == "unavailable"):
            return False
    return True


def _measure_quickly(device: torch.device, mode: str, tokens: int) -> list[Verdict]:
    heads, length = fitting(device, tokens, QUICK_HEADS)
    start = time.perf_counter()
    verdicts = examine(device, mode, tokens=length, heads=heads, budget_ms=QUICK_MS)
    release_memory(device)
    seconds = time.perf_counter() - start
    log.warning("measuring attention back ends for %s at %d tokens, %.1f s, once for this card", mode, length, seconds)
    for verdict in verdicts:
        if verdict.status == "wrong":
            log.warning("attention back end %s is wrong on this card and not used: %s", verdict.backend, verdict.reason)
    return verdicts


def fitting(device: torch.device, tokens: int, heads: int) -> tuple[int, int]:
    """Heads and tokens that can be examined in the free memory; 3.5 kB a token and head, twice that for a margin."""
    most = free_memory(device) // 7000
    heads = max(1, min(heads, most // tokens))
    return heads, max(128, min(tokens, most // heads))


# ---------------------------------------------------------------- all of it


def report(
    device: torch.device,
    tokens: int = TOKENS,
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything that `solostep doctor` shows, in JSON's types; choices for attention are written to the cache.

    ``quick`` takes 8 heads, shorter turns, and one of the four matrix products.

    Raises:
        UsageError: ``tokens`` below 128.
    """
    if tokens < 128:
        raise UsageError(f"--tokens has to be at least 128, not {tokens}.")
    found: dict[str, Any] = {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"), "device": str(device), "host": host_facts(),
        "gpu": None, "rates": None, "pinned": None, "attention": [], "gemm": [], "notes": [], "choices_file": None,
    }  # fmt: skip
    if device.type != "cuda":
        why = "torch sees no CUDA card" if not torch.cuda.is_available() else "the CPU was asked for"
        found["notes"].append(f"{why}: kernels run as plain torch, and there is nothing to measure.")
        return plain(found)
    say = progress or (lambda stage, done, total: None)
    with torch.cuda.device(device), torch.inference_mode():
        found["gpu"] = gpu_facts(device)
        found["rates"] = _guarded(found, "transfer rates", lambda: transfer_rates(device, quick))
        found["pinned"] = _guarded(found, "pinned memory", lambda: pinned_memory(quick))
        release_memory(device)
        found["attention"] = _attention(device, tokens, quick, say, found)
        found["gemm"] = _gemms(device, tokens, quick, say, found)
    found["choices_file"] = str(choices_file(device))
    return plain(found)


def _guarded(found: dict[str, Any], what: str, work: Callable[[], Any]) -> Any:
    """None and a note where something fails: the rest of the report is of use all the same."""
    try:
        return work()
    except Exception as error:  # of a driver or a compiler: the finding
        found["notes"].append(f"{what} failed: {one_line(error)}")
        return None


def _attention(
    device: torch.device, tokens: int, quick: bool, say: Progress, found: dict[str, Any]
) -> list[dict[str, Any]]:
    lengths = [*(n for n in CLASS_TOKENS.values() if size_class(n) != size_class(tokens) and n < tokens), tokens]
    entries: list[dict[str, Any]] = []
    todo = [(length, mode) for length in lengths for mode in MODES]
    for i, (wanted, mode) in enumerate(todo):
        say("attention", i, len(todo))
        heads, length = fitting(device, wanted, QUICK_HEADS if quick else HEADS)
        budget = QUICK_MS if quick else 500.0
        verdicts = _guarded(found, f"attention, {mode}", functools.partial(
            examine, device, mode, tokens=length, heads=heads, budget_ms=budget
        ))  # fmt: skip
        release_memory(device)
        if verdicts is None:
            continue
        entry = {"mode": mode, "tokens": length, "heads": heads, "class": size_class(length), "chosen": None}
        try:
            entry["chosen"] = choose(verdicts)
            write_choices(device, {f"{mode} {size_class(length)}": verdicts})
        except ValueError as error:
            found["notes"].append(f"{mode} at {length} tokens: {error}")
        entries.append(entry | {"verdicts": [v.as_dict() for v in verdicts]})
    say("attention", len(todo), len(todo))
    return entries


def _gemms(
    device: torch.device, tokens: int, quick: bool, say: Progress, found: dict[str, Any]
) -> list[dict[str, Any]]:
    shapes = GEMMS[:1] if quick else GEMMS
    entries: list[dict[str, Any]] = []
    for i, shape in enumerate(shapes):
        say("matrix products", i, len(shapes))
        # Operands in 16 and 8 bits, outputs of 16 and 32 bits, and room for copies.
        rows = min(tokens, free_memory(device) // 2 // (4 * shape[2] + 8 * shape[1]))
        work = functools.partial(examine_gemm, device, shape, max(128, rows), QUICK_MS if quick else 300.0)
        entries += _guarded(found, f"products of {shape[0]}", work) or []
        release_memory(device)
    say("matrix products", len(shapes), len(shapes))
    return entries
