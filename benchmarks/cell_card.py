"""What the driver tells of the card that a cell runs on: the memory taken before it, and clocks, power and temperature
while its steps are computed.

All by `nvidia-smi`, which knows every card of the machine: the one that runs is found by its UUID, or where that is not
told, by its place in CUDA_VISIBLE_DEVICES. Cost: a process of 50 ms every two seconds, beside the run.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SAMPLED = ("clocks.sm", "power.draw", "temperature.gpu")
INTERVAL = 2.0
"""Seconds between samples."""


@dataclass(frozen=True)
class Card:
    """A card as the driver lists it."""

    uuid: str
    total: int
    used: int


def cards() -> list[Card]:
    """All cards, in the driver's order.

    Raises:
        OSError, subprocess.SubprocessError, ValueError: the driver's program is not there, or tells no numbers.
    """
    lines = _ask(("uuid", "memory.total", "memory.used"))
    return [Card(uuid, int(total) << 20, int(used) << 20) for uuid, total, used in lines]


def _ask(names: Sequence[str], number: int | None = None) -> list[list[str]]:
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    query += [] if number is None else [f"--id={number}"]
    told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    lines = [[part.strip() for part in line.split(",")] for line in told if line.strip()]
    if not lines or any(len(line) != len(names) for line in lines):
        raise ValueError("nvidia-smi tells something else")
    return lines


def number_of(device: torch.device, known: Sequence[Card]) -> int | None:
    """Which of the driver's cards a CUDA device is; None if that cannot be told, or it is only a part of one."""
    properties, place = torch.cuda.get_device_properties(device), device.index or 0
    uuid = _bare(str(getattr(properties, "uuid", "")))
    found = [n for n, card in enumerate(known) if uuid and _bare(card.uuid) == uuid]
    if not found:
        visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        name = str(place) if not visible else visible[place] if place < len(visible) else ""
        if name.isdecimal():
            found = [int(name)] if int(name) < len(known) else []
        else:  # the beginning of an UUID is enough for CUDA
            found = [n for n, card in enumerate(known) if name.startswith("GPU-") and card.uuid.startswith(name)]
    if len(found) != 1:
        return None
    # An instance of MIG has the number of its card, but not its memory.
    return found[0] if math.isclose(known[found[0]].total, properties.total_memory, rel_tol=0.1) else None


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-")


def taken(device: torch.device, before: Sequence[Card] | None) -> int | None:
    """Bytes that were taken of a device's card when ``before`` was asked for; None if that is not known."""
    number = None if before is None or device.type != "cuda" else number_of(device, before)
    return None if number is None or before is None else before[number].used


Sample = tuple[float | None, float | None, float | None]
"""SM clock in MHz, power in W, temperature in degrees C; None for what the driver does not tell."""


@dataclass
class Sampling:
    """What is sampled of a card while ``busy``."""

    samples: list[Sample]
    busy: bool = False


@contextlib.contextmanager
def sampling(device: torch.device, interval: float = INTERVAL) -> Iterator[Sampling]:
    """Samples a card meanwhile, when it is said to be busy; nothing of what is none, or is not told."""
    found, done = Sampling([]), threading.Event()
    number = None
    if device.type == "cuda":
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            number = number_of(device, cards())

    def watch() -> None:
        while not done.wait(interval):
            if found.busy:
                with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
                    clock, power, temperature = map(_number, _ask(SAMPLED, number)[0])
                    if found.busy:  # still, behind it: no sample of an idle card
                        found.samples.append((clock, power, temperature))

    thread = threading.Thread(target=watch, daemon=True)
    if number is not None:
        thread.start()
    try:
        yield found
    finally:
        done.set()
        if number is not None:
            thread.join()


def _number(answer: str) -> float | None:
    """None for what the driver does not tell ("[N/A]")."""
    with contextlib.suppress(ValueError):
        value = float(answer)
        return value if math.isfinite(value) else None
    return None


def summary(samples: Sequence[Sequence[float | None]]) -> dict[str, Any] | None:
    """Median and least clock, median power, highest temperature; None of no sample."""
    if not samples:
        return None
    clocks, powers, temperatures = ([v for v in column if v is not None] for column in zip(*samples, strict=True))
    return {
        "sm_mhz": statistics.median(clocks) if clocks else None, "sm_mhz_least": min(clocks, default=None),
        "power_w": statistics.median(powers) if powers else None,
        "temperature_c": max(temperatures, default=None), "samples": len(samples),
    }  # fmt: skip
