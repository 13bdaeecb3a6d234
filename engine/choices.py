"""Which kernels a run uses on this card: those that are right, and of them the fastest; examined once, and kept.

Attention's back ends (:func:`attention_choice`) are examined for each mode and class of length, the 8-bit matrix
products for each kind of operands, all other kernels together (both by :func:`settle`). What was found is kept in a
file in the cache folder, of one card with one set of versions and one state of the kernels' code, since each changes
which kernel is the fastest, and may change which one is right. `solostep doctor` redoes and shows it.

A kernel that is wrong is named in the log and in a run's record, and is not used. On a CPU there is one form of each,
and nothing is examined.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels import attention
from ..kernels.attention import BACKENDS, MODES, default_backend
from ..kernels.attention_check import Verdict, choose, examine
from ..kernels.cards import OUT_OF_MEMORY, one_line
from ..kernels.operators_check import CHECKS, examine_operators
from ..kernels.quantize import warn_once
from ..kernels.refused import refuse
from ..kernels.scaled_mm import KINDS, PRODUCTS
from ..kernels.scaled_mm_check import Shape, examine_products, rank
from ..quant.linear import product_kinds, use_products
from .apart import measured_apart, verdicts_of
from .config import cache_dir
from .errors import SolostepError, UsageError
from .files import one_at_a_time, replacing
from .machine import gpu_facts, installed
from .request import versions
from .runtime import free_memory, release_memory

log = logging.getLogger("solostep")

CLASSES = (("small", 8192), ("medium", 32_768), ("large", None))
"""Lengths within which one choice holds, and where each ends: short ones leave a card's last wave half empty."""
QUICK_HEADS, QUICK_MS = 8, 150.0
GEMMS = (
    Shape("qkv", 18_432, 6144), Shape("wo, o", 6144, 6144, gated=True), Shape("q", 6144, 6144),
    Shape("ffn up", 24_576, 6144), Shape("ffn down", 6144, 24_576, gated=True),
)  # fmt: skip
"""Linears of a block."""
QUICK_GEMMS = GEMMS[:2]
"""Those that are timed at first use: about as wide beside each other as all that are not gated and all that are."""
QUICK_ROWS = 16_387
"""Rows of their products."""
OPERATORS = "operators"
LONG = 5.0
"""Seconds of measuring after which it is said how many they were."""


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
    """Verdicts by what they are of: ``int8 large``, a mode of attention and a class of length; ``product fp8``;
    ``operators``. A damaged file is as good as none."""
    path = choices_file(device)
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["key"] != choices_key(device):
            raise ValueError("another card or other versions")
        found = {name: [_verdict(v) for v in entry] for name, entry in values["choices"].items()}
        if unknown := set(found) - _entries():
            raise ValueError(f"unknown entry {min(unknown)}")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn_once(f"The choice of kernels in {path} cannot be read ({one_line(error)}); they are measured anew.")
        return {}


def _entries() -> set[str]:
    """What verdicts may be of."""
    attention_entries = {f"{mode} {size}" for mode in MODES for size, _ in CLASSES}
    return attention_entries | {product_entry(kind) for kind in KINDS} | {OPERATORS}


def product_entry(kind: str) -> str:
    """How the file calls the products of a kind of operands."""
    return f"product {kind}"


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


_FOUND: dict[tuple[str, str], list[Verdict]] = {}
"""What this process found of products and other kernels, by the file's name and the entry: where it was not kept (the
folder cannot be written, a kernel ran out of memory), it need not be measured with every network that is loaded."""


def _kept_or_measured(
    device: torch.device, entry: str, holds: Callable[[list[Verdict]], bool], measure: Callable[[], list[Verdict]]
) -> list[Verdict]:
    """What the file says, if that answers the question; else it is measured now, and kept."""

    own = (choices_file(device).name, entry)

    def kept() -> list[Verdict] | None:
        verdicts = read_choices(device).get(entry, _FOUND.get(own))
        return verdicts if verdicts is not None and holds(verdicts) else None

    verdicts = kept()
    if verdicts is None:
        with one_at_a_time(choices_file(device)):  # processes that start together: one measures, the others read
            verdicts = kept()  # perhaps by now
            if verdicts is None:
                verdicts = measure()
                of_attention = entry.partition(" ")[0] in MODES
                if not of_attention:
                    _FOUND[own] = verdicts
                if of_attention or all(v.reason != OUT_OF_MEMORY for v in verdicts):
                    write_choices(device, {entry: verdicts})
    return verdicts


def _examined(what: str, device: torch.device, here: Callable[..., list[Verdict]], **how: Any) -> list[Verdict]:
    """By a process of its own, else by ``here`` in this one."""
    found = verdicts_of(measured_apart(what, device, **how))
    if found is None:
        found = here(device, **how)
    release_memory(device)
    return found


def plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- attention


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
    settle(device)  # first the passes before attention
    verdicts = _kept_or_measured(
        device, f"{mode} {size_class(tokens)}", lambda verdicts: _holds(verdicts, device, mode, asked),
        lambda: _measure_quickly(device, mode, tokens),
    )  # fmt: skip
    try:
        return choose(verdicts, asked)
    except ValueError as error:
        kind = SolostepError if asked is None else UsageError
        raise kind(f"{str(error)[0].upper()}{str(error)[1:]}; `solostep doctor` shows all and measures anew.") from None


def _holds(verdicts: list[Verdict], device: torch.device, mode: str, asked: str | None) -> bool:
    """Whether kept verdicts answer the question: what they chose is still installed, what is asked for was examined."""
    try:
        name = choose(verdicts)
    except ValueError:
        return False  # all failed then, perhaps for want of memory
    there = {verdict.backend: verdict for verdict in verdicts}
    return all(
        each in there and each in BACKENDS and _is_as_then(there[each], BACKENDS[each].available(device, mode))
        for each in filter(None, (name, asked))
    )


def _is_as_then(verdict: Verdict, missing: str | None) -> bool:
    """Whether a back end is still there, or still not."""
    return (missing is None) != (verdict.status == "unavailable")


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Says what is measured now, and afterwards how long that took, if it was long."""
    log.warning("%s, once for this card ...", what)
    start = time.perf_counter()
    yield
    if (seconds := time.perf_counter() - start) >= LONG:
        log.warning("... %s took %.0f s", what, seconds)


def _measure_quickly(device: torch.device, mode: str, tokens: int) -> list[Verdict]:
    heads, length = fitting(device, tokens, QUICK_HEADS)
    how = {"mode": mode, "tokens": length, "heads": heads, "budget_ms": QUICK_MS, "seed": fresh_seed()}
    with told(f"measuring attention back ends for {mode} at {length} tokens"):
        verdicts = _examined("attention", device, examine, **how)
    warn_of_wrong("attention back end", verdicts)
    return verdicts


def fresh_seed() -> int:
    """Of operands: new ones each time."""
    return secrets.randbelow(2**31)


def warn_of_wrong(what: str, verdicts: Iterable[Verdict], also: str = "") -> None:
    """Names what is wrong (or has the status ``also``) in the log."""
    for verdict in verdicts:
        if verdict.status in ("wrong", also):
            said = "is wrong on this card" if verdict.status == "wrong" else "fails on this card"
            log.warning("%s %s %s and not used: %s", what, verdict.backend, said, verdict.reason)


def fitting(device: torch.device, tokens: int, heads: int) -> tuple[int, int]:
    """Heads and tokens that can be examined in the free memory; 3.5 kB a token and head, twice that for a margin."""
    most = free_memory(device) // 7000
    heads = max(1, min(heads, most // tokens))
    return heads, max(128, min(tokens, most // heads))


# ---------------------------------------------------------------- matrix products and all other kernels


@dataclass(frozen=True)
class Settled:
    """What :func:`settle` decided: back ends of products by the kind of their operands, the fastest first."""

    products: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    """Kernels that are not used because they are wrong here, and why."""

    def as_dict(self) -> dict[str, Any]:
        return {"products": {kind: list(names) for kind, names in self.products.items()}, "refused": [*self.refused]}


def settle(device: torch.device, kinds: Iterable[str] = ()) -> Settled:
    """Sees to it that no kernel that is wrong on a card is used, and chooses the products for some kinds of operands
    (``int8``, ``fp8``): as kept, else examined now, which takes some seconds, once a card.

    Kernels with a form in torch are refused for this process (kernels/refused.py); the products have to be handed to
    the linears, see :func:`solostep.quant.linear.use_products`. On a CPU it does nothing.

    Raises:
        SolostepError: no product of a kind is right here.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return Settled()
    operators = _kept_or_measured(
        device, OPERATORS, lambda found: {v.backend for v in found} == set(CHECKS), lambda: _examine_operators(device)
    )
    refuse_wrong(device, operators)
    return Settled({kind: product_choice(device, kind) for kind in sorted(set(kinds))}, tuple(refusals(device)))


def use_right_products(module: nn.Module, device: torch.device) -> None:
    """Tells the linears of a network for a device which products are right there, see :func:`settle`; networks from
    files (weights.py) know."""
    use_products(module, settle(device, product_kinds(module)).products)


def refuse_wrong(device: torch.device, operators: Iterable[Verdict]) -> None:
    """From now on this process does without the kernels that are wrong; a lack of memory is no fault of theirs."""
    refuse(device, [v.backend for v in operators if _is_faulty(v)])


def _is_faulty(verdict: Verdict) -> bool:
    return verdict.status == "wrong" or verdict.status == "failed" and verdict.reason != OUT_OF_MEMORY


def refusals(device: torch.device) -> list[str]:
    """Every kernel that is known to be wrong on a card, with the reason, in words for a record."""
    name, found = choices_file(device).name, []
    known = {entry: verdicts for (file, entry), verdicts in _FOUND.items() if file == name}
    for entry, verdicts in (known | read_choices(device)).items():
        of_attention = entry.partition(" ")[0] in MODES
        what = "" if entry == OPERATORS else f"attention {entry}, " if of_attention else f"{entry}, "
        for v in verdicts:
            # Attention of another package may fail for many reasons, and nothing is lost.
            if v.status == "wrong" or not of_attention and _is_faulty(v):
                found.append(f"{what}{v.backend}: {v.reason}")
    return found


def product_choice(device: torch.device, kind: str) -> tuple[str, ...]:
    """The back ends for products of a kind of operands that are right on a card, the fastest first.

    Raises:
        SolostepError: none is.
    """

    def holds(verdicts: list[Verdict]) -> bool:
        try:
            rank(verdicts)
        except ValueError:
            return False  # all failed then, perhaps for want of memory
        there = {v.backend: v for v in verdicts}
        known = [name for name, product in PRODUCTS.items() if kind in product.kinds]
        return set(there) == set(known) and all(
            _is_as_then(there[name], PRODUCTS[name].available(device, kind)) for name in known
        )

    verdicts = _kept_or_measured(device, product_entry(kind), holds, lambda: _measure_products(device, kind))
    try:
        return rank(verdicts)
    except ValueError as error:
        raise SolostepError(
            f"{str(error)[0].upper()}{str(error)[1:]}; choose another --precision. `solostep doctor` measures anew."
        ) from None


def _measure_products(device: torch.device, kind: str) -> list[Verdict]:
    rows = min(fitting_rows(device, shape, QUICK_ROWS) for shape in QUICK_GEMMS)
    how = {"kind": kind, "shapes": QUICK_GEMMS, "rows": rows, "budget_ms": QUICK_MS, "seed": fresh_seed()}
    with told(f"measuring matrix products of {kind}"):
        verdicts = _examined(
            "products", device, lambda *of, **how: [*examine_products(*of, **how).verdicts.values()], **how
        )
    warn_of_wrong(f"matrix product {kind}", verdicts, "failed")
    return verdicts


def _examine_operators(device: torch.device) -> list[Verdict]:
    refuse(device, ())
    with told("examining the other kernels"):
        verdicts = _examined("operators", device, examine_operators, seed=fresh_seed())
    warn_of_wrong("the kernel of", verdicts, "failed")
    return verdicts


def fitting_rows(device: torch.device, shape: Shape, rows: int) -> int:
    """Rows of a product that can be examined in the free memory: operands in 16 and 8 bits, outputs of 16 and 32, what
    they are added to, and room for copies."""
    room = free_memory(device) // 2 - 12 * shape.n * shape.k
    return max(128, min(rows, room // (4 * shape.k + (12 if shape.gated else 8) * shape.n)))
