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
from ..kernels.operators_check import examine_operators
from ..kernels.scaled_mm_check import examine_products
from ..quant.recipe import Recipe
from .plan import CONTEXT
from .runtime import free_memory, release_memory

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
    """
    if _INSIDE or device.type != "cuda" or not torch.cuda.is_available():
        return None
    release_memory(device)
    free = free_memory(device)
    limit = free - CONTEXT
    if limit < free // 2:  # callers choose shapes that take at most half of what is free
        return None
    with tempfile.TemporaryDirectory(prefix="solostep-") as folder:
        asked, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        request = {"what": what, "device": str(device), "limit": limit, "arguments": arguments}
        asked.write_text(json.dumps(request), encoding="utf-8")
        begin = f"import sys; from {__name__} import main; sys.exit(main(sys.argv[1:]))"
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
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reason = str(error)
    log.info("%s could not be measured by a process of its own (%s); it is measured by this one", what, reason)
    return None


def verdicts_of(values: list[dict[str, Any]] | None) -> list[Verdict] | None:
    """Verdicts as the other process wrote them."""
    return None if values is None else [Verdict(**v) for v in values]


# ---------------------------------------------------------------- in that process


def _written(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    return [v.as_dict() for v in verdicts]


def _attention(device: torch.device, mode: str, **more: Any) -> list[dict[str, Any]]:
    return _written(examine(device, mode, **more))


def _operators(device: torch.device, seed: int) -> list[dict[str, Any]]:
    return _written(examine_operators(device, seed))


def _products(device: torch.device, kind: str, shapes: list[list[Any]], **more: Any) -> list[dict[str, Any]]:
    found = examine_products(device, kind, shapes=[(str(s[0]), int(s[1]), int(s[2])) for s in shapes], **more)
    return _written(list(found.verdicts.values()))


def _rates(device: torch.device, recipe: dict[str, Any] | None, attention: str) -> dict[str, float]:
    from .rates import measure

    found = measure(device, None if recipe is None else Recipe.from_dict(recipe, "the recipe asked for"), attention)
    return {**vars(found.blocks), "decode": found.decode}


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
        torch.cuda.set_device(device)
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, request["limit"] / total)), device)
    found = MEASUREMENTS[request["what"]](device, **request["arguments"])
    answer.write_text(json.dumps(found), encoding="utf-8")
