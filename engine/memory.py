"""Budgets of memory as users give them, and what a run took of them."""

from __future__ import annotations

import os
from typing import Any

from .plan import parse_size
from .request import Job

VRAM, HOST_RAM = "SOLOSTEP_VRAM", "SOLOSTEP_HOST_RAM"
"""Environment variables with default budgets."""


def read_budgets(vram: str | int | None, host_ram: str | int | None) -> tuple[int | None, int | None]:
    """Bytes of what was given, or stands in the environment.

    Raises:
        UsageError: no size.
    """
    found = []
    for given, option, variable in ((vram, "--vram", VRAM), (host_ram, "--host-ram", HOST_RAM)):
        if given is None and os.environ.get(variable):
            given, option = os.environ[variable], f"${variable}"
        found.append(None if given is None else parse_size(given, option))
    return found[0], found[1]


def report(job: Job) -> list[dict[str, Any]]:
    """What each stage took, beside what the plan said."""
    planned = {} if job.plan is None else {stage.name: stage for stage in job.plan.stages}
    lines = []
    for stage in job.stages:
        said = planned.get(stage.name)
        lines.append(stage.as_dict() | {
            "planned_gpu_bytes": None if said is None else said.device,
            "planned_seconds": None if said is None else said.seconds,
        })  # fmt: skip
    return lines
