"""Measurements of a card in a process of their own: what compilers, libraries and the examined kernels take of host
memory, more than a gigabyte, ends with it, and so does a context of the card that a kernel breaks.

The process takes the card's memory that this one has left, less its own context, and imports torch anew, once a
measurement, whose results are kept. Where it cannot be started, or fails, the caller measures in this process.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..kernels.attention_check import Verdict, examine
from ..kernels.cards import OUT_OF_MEMORY
from ..kernels.operators_check import examine_operators
from ..kernels.refused import refuse, refused_on
from ..kernels.scaled_mm_check import Shape, examine_products
from ..quant.recipe import Recipe
from .errors import SolostepError
from .plan import CONTEXT
from .runtime import free_memory, release_memory, use_growing_segments

log = logging.getLogger("solostep")
PATIENCE = 1800.0
"""Seconds after which a process is given up."""
_INSIDE: list[str] = []
"""What this process measures for another: it starts no further one."""


def measured_apart(what: str, device: torch.device, **arguments: Any) -> Any:
    """What a process of its own measured, of JSON's types; None where it did not, and the log says why.

    Args:
        what: of :data:`MEASUREMENTS`.
        arguments: its, of JSON's types.

    Raises:
        SolostepError: it did not end; it would not end here either.
    """
    if _INSIDE or device.type != "cuda" or not torch.cuda.is_available() or not sys.executable:
        return None
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    release_memory(device)
    free = free_memory(device)
    limit = min(free, torch.cuda.mem_get_info(device)[0]) - CONTEXT
    if limit < free // 2:  # callers choose shapes that take at most half of what is free
        return None
    with tempfile.TemporaryDirectory(prefix="solostep-") as folder:
        asked, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        request = {
            "what": what, "device": str(device), "limit": limit, "refused": refused_on(device), "arguments": arguments
        }  # fmt: skip
        asked.write_text(json.dumps(request), encoding="utf-8")
        # This process's modules, and not what lies in the folder where it was started.
        begin = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", begin, str(asked), str(answer)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                errors="replace", timeout=PATIENCE, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return json.loads(answer.read_text(encoding="utf-8"))
            last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
            reason = f"it ended with status {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            raise SolostepError(
                f"Measuring {what} on {device} did not end in {PATIENCE / 60:.0f} minutes: a kernel seems to hang. "
                "`solostep doctor` examines the card step by step."
            ) from None
        except (OSError, ValueError) as error:
            reason = str(error)
    log.info("%s could not be measured by a process of its own (%s); it is measured by this one", what, reason)
    return None


def verdicts_of(values: list[dict[str, Any]] | None) -> list[Verdict] | None:
    """Verdicts as the other process wrote them; None where it ran out of the memory that it was left."""
    found = [] if values is None else [Verdict(**v) for v in values]
    return found if found and all(v.reason != OUT_OF_MEMORY for v in found) else None


# ---------------------------------------------------------------- in that process


def _written(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    return [v.as_dict() for v in verdicts]


def _attention(device: torch.device, mode: str, **more: Any) -> list[dict[str, Any]]:
    return _written(examine(device, mode, **more))


def _operators(device: torch.device, seed: int) -> list[dict[str, Any]]:
    return _written(examine_operators(device, seed))


def _products(device: torch.device, kind: str, shapes: list[list[Any]], **more: Any) -> list[dict[str, Any]]:
    found = examine_products(device, kind, shapes=[Shape(*shape) for shape in shapes], **more)
    return _written(list(found.verdicts.values()))


def _rates(device: torch.device, recipe: dict[str, Any] | None, attention: str) -> dict[str, float]:
    from .rates import measure, values_of

    read = None if recipe is None else Recipe.from_dict(recipe, "the recipe asked for")
    return values_of(measure(device, read, attention))


MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "attention": _attention, "operators": _operators, "products": _products, "rates": _rates,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Reads a request from one file and writes the answer to another; its status."""
    try:
        _answer(*map(Path, argv))
    except KeyboardInterrupt:  # who waits for it says so
        return 130
    return 0


def _answer(asked: Path, answer: Path) -> None:
    request = json.loads(asked.read_text(encoding="utf-8"))
    _INSIDE.append(request["what"])
    device = torch.device(request["device"])
    if device.type == "cuda":
        use_growing_segments(device.index)
        torch.cuda.set_device(device)
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, request["limit"] / total)), device)
    refuse(device, request["refused"])
    found = MEASUREMENTS[request["what"]](device, **request["arguments"])
    answer.write_text(json.dumps(found), encoding="utf-8")
