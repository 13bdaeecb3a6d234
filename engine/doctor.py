"""`solostep doctor`: what this machine can do: facts, rates, and which kernels are right and fast here.

Everything is examined anew, at the real shapes, and what is found is kept for the runs to come (choices.py): attention
by kernels/attention_check.py, the 8-bit matrix products by kernels/scaled_mm_check.py, all others by
kernels/operators_check.py. Without a card it says which back ends there are and why each is not to be had, and whether
there is a card that this torch does not see.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..kernels.attention import BACKENDS, MODES, default_backend
from ..kernels.attention_check import choose, examine
from ..kernels.cards import one_line
from ..kernels.operators_check import examine_operators
from ..kernels.refused import refuse
from ..kernels.scaled_mm import KINDS, PRODUCTS, default_products
from ..kernels.scaled_mm_check import Examined, baseline, examine_products, rank
from .choices import (
    GEMMS,
    OPERATORS,
    OUT_OF_MEMORY,
    QUICK_GEMMS,
    QUICK_HEADS,
    QUICK_MS,
    choices_file,
    fitting,
    fitting_rows,
    fresh_seed,
    plain,
    product_entry,
    refuse_wrong,
    size_class,
    write_choices,
)
from .config import cache_dir, from_environment
from .errors import UsageError
from .machine import cards_there, gpu_facts, host_facts, pinned_memory, transfer_rates
from .progress import Progress
from .runtime import release_memory

TOKENS, HEADS = 75_888, 48
"""Of the 30B model at 544 x 992, 204 frames."""
CLASS_TOKENS = {"small": 5007, "medium": 18_972}
"""Lengths that stand for a class in the report: of short clips and small frames."""
DISK_BYTES, QUICK_DISK_BYTES = 256 << 20, 64 << 20
"""Of the file that the disk is timed with."""


def report(
    device: torch.device,
    tokens: int = TOKENS,
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything that `solostep doctor` shows, in JSON's types; what is found of kernels is written to the cache.

    ``quick`` takes 8 heads, shorter turns, and one of the four matrix products.

    Raises:
        UsageError: ``tokens`` below 128.
    """
    if tokens < 128:
        raise UsageError(f"--tokens has to be at least 128, not {tokens}.")
    found: dict[str, Any] = {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"), "device": str(device), "host": host_facts(),
        "gpu": None, "rates": None, "pinned": None, "disk": None, "operators": [], "attention": [], "gemm": [],
        "products": {}, "notes": [], "choices_file": None,
    }  # fmt: skip
    found["disk"] = _guarded(found, "the disk of the cache folder", lambda: disk_facts(cache_dir(), quick))
    if device.type != "cuda":
        _without_card(device, found)
        return plain(found)
    say = progress or (lambda stage, done, total: None)
    with torch.cuda.device(device), torch.inference_mode():
        found["gpu"] = gpu_facts(device)
        found["rates"] = _guarded(found, "transfer rates", lambda: transfer_rates(device, quick))
        found["pinned"] = _guarded(found, "pinned memory", lambda: pinned_memory(quick))
        release_memory(device)
        _operators(device, say, found)  # first: attention is examined behind the passes before it
        found["attention"] = _attention(device, tokens, quick, say, found)
        _gemms(device, tokens, quick, say, found)
    found["choices_file"] = str(choices_file(device))
    return plain(found)


def _guarded(found: dict[str, Any], what: str, work: Callable[[], Any]) -> Any:
    """None and a note where something fails: the rest of the report is of use all the same."""
    try:
        return work()
    except Exception as error:  # of a driver or a compiler: the finding
        found["notes"].append(f"{what} failed: {one_line(error)}")
        return None


def disk_facts(folder: Path, quick: bool) -> dict[str, Any]:
    """How fast the disk of a folder is read, past the page cache: of a file that is written for it and then removed."""
    from .rates import PIECE, disk_rate

    folder = next(place for place in (folder, *folder.parents) if place.is_dir())
    path = folder / f".doctor-{os.getpid()}"
    piece = os.urandom(PIECE)
    try:
        with path.open("wb") as stream:
            for _ in range((QUICK_DISK_BYTES if quick else DISK_BYTES) // PIECE):
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        return {"folder": str(folder), "bytes_per_second": disk_rate([path])}
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- without a card


def _without_card(device: torch.device, found: dict[str, Any]) -> None:
    """Which back ends there are, and why each is not to be had."""
    seen = torch.cuda.is_available()
    why = "the CPU was asked for" if seen else "torch sees no CUDA card"
    found["notes"].append(f"{why}: kernels run as plain torch, and there is nothing to measure.")
    if not seen and (names := cards_there()):
        found["notes"].append(_hidden(names))
    for mode in MODES:
        verdicts = []
        for name, backend in BACKENDS.items():
            if mode in backend.modes:
                verdicts.append(_availability(mode, name, backend.available(device, mode)))
        found["attention"].append({
            "mode": mode, "tokens": None, "heads": None, "class": None, "seed": None, "verdicts": verdicts,
            "chosen": default_backend(device, mode, TOKENS),
        })  # fmt: skip
    for kind in KINDS:
        verdicts = [
            _availability(kind, name, product.available(device, kind))
            for name, product in PRODUCTS.items()
            if kind in product.kinds
        ]
        chosen = [*default_products(device, kind)]
        found["products"][kind] = {"chosen": chosen, "seed": None, "verdicts": verdicts}
        for v in verdicts:
            line = {"linear": "", "shape": None, "backend": f"{kind} {v['backend']}", "status": v["status"]}
            found["gemm"].append(line | {"reason": v["reason"], "error": None, "ms": None, "tflops": None})


def _availability(mode: str, name: str, reason: str | None) -> dict[str, Any]:
    return {
        "mode": mode, "backend": name, "status": "ok" if reason is None else "unavailable", "reason": reason or "",
        "errors": {}, "ms": None, "kernel_ms": None, "tflops": None,
    }  # fmt: skip


def _hidden(names: list[str]) -> str:
    """That there are cards which this torch does not see, and why."""
    if torch.version.cuda is None:
        why = "it is built for CPUs only; install one for CUDA (https://pytorch.org/get-started/locally)"
    elif (from_environment("CUDA_VISIBLE_DEVICES", "0") or "").strip() in ("", "-1"):
        why = "CUDA_VISIBLE_DEVICES hides them; unset it"
    else:
        why = f"the driver may be too old for CUDA {torch.version.cuda}, or not usable from here; try nvidia-smi"
    return f"there is {' and '.join(names)}, which this torch ({torch.__version__}) does not see: {why}."


# ---------------------------------------------------------------- on a card


def _operators(device: torch.device, say: Progress, found: dict[str, Any]) -> None:
    say("kernels", 0, 1)
    refuse(device, ())
    verdicts = _guarded(found, "the examination of kernels", lambda: examine_operators(device, fresh_seed()))
    release_memory(device)
    say("kernels", 1, 1)
    if verdicts is None:
        return
    refuse_wrong(device, verdicts)
    if all(v.reason != OUT_OF_MEMORY for v in verdicts):
        write_choices(device, {OPERATORS: verdicts})
    found["operators"] = [v.as_dict() for v in verdicts]


def _attention(
    device: torch.device, tokens: int, quick: bool, say: Progress, found: dict[str, Any]
) -> list[dict[str, Any]]:
    lengths = [*(n for n in CLASS_TOKENS.values() if size_class(n) != size_class(tokens) and n < tokens), tokens]
    entries: list[dict[str, Any]] = []
    todo = [(length, mode) for length in lengths for mode in MODES]
    for i, (wanted, mode) in enumerate(todo):
        say("attention", i, len(todo))
        heads, length = fitting(device, wanted, QUICK_HEADS if quick else HEADS)
        budget, seed = QUICK_MS if quick else 500.0, fresh_seed()
        verdicts = _guarded(found, f"attention, {mode}", functools.partial(
            examine, device, mode, tokens=length, heads=heads, budget_ms=budget, seed=seed
        ))  # fmt: skip
        release_memory(device)
        if verdicts is None:
            continue
        entry = {"mode": mode, "tokens": length, "heads": heads, "class": size_class(length), "seed": seed}
        entry["chosen"] = None
        try:
            entry["chosen"] = choose(verdicts)
            write_choices(device, {f"{mode} {size_class(length)}": verdicts})
        except ValueError as error:
            found["notes"].append(f"{mode} at {length} tokens: {error}")
        entries.append(entry | {"verdicts": [v.as_dict() for v in verdicts]})
    say("attention", len(todo), len(todo))
    return entries


def _gemms(device: torch.device, tokens: int, quick: bool, say: Progress, found: dict[str, Any]) -> None:
    shapes = QUICK_GEMMS if quick else GEMMS
    rows = min(fitting_rows(device, shape, tokens) for shape in shapes)
    budget = QUICK_MS if quick else 300.0
    entries: list[dict[str, Any]] = []
    for i, kind in enumerate(KINDS):
        say("matrix products", i, len(KINDS) + 1)
        examined: Examined | None = _guarded(found, f"products of {kind}", functools.partial(
            examine_products, device, kind, shapes=shapes, rows=rows, budget_ms=budget, seed=fresh_seed()
        ))  # fmt: skip
        release_memory(device)
        if examined is None:
            continue
        verdicts = list(examined.verdicts.values())
        product = {"chosen": [], "seed": examined.seed, "verdicts": [v.as_dict() for v in verdicts]}
        try:
            product["chosen"] = [*rank(verdicts)]
            if all(v.reason != OUT_OF_MEMORY for v in verdicts):
                write_choices(device, {product_entry(kind): verdicts})
        except ValueError as error:
            found["notes"].append(f"{kind}: {error}")
        found["products"][kind] = product
        entries += examined.entries
    for shape in shapes:
        line = _guarded(found, f"bf16, {shape.name}", functools.partial(baseline, device, shape, rows, budget))
        entries += [] if line is None else [line]
        release_memory(device)
    order = [shape.name for shape in shapes]
    found["gemm"] = sorted(entries, key=lambda e: order.index(e["linear"]))
    say("matrix products", len(KINDS) + 1, len(KINDS) + 1)
