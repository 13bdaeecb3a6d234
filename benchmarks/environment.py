"""What a measurement was made on: card, driver, clocks, processor, memory, versions, commit, command, date.

Clocks are those of the moment, until the run has told its own (cell_card.py); the card's memory is all of it. Cost:
one call of nvidia-smi, 50 ms. Nothing here starts a CUDA context beyond what torch needs to name the card.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from solostep.benchmarks.full_width import commit
from solostep.benchmarks.results import PATH
from solostep.engine.machine import host_facts, installed

PACKAGES = (
    "solostep", "transformers", "safetensors", "sentencepiece", "numpy", "imageio-ffmpeg", "torchao", "bitsandbytes",
    "flash-attn", "lpips",
)  # fmt: skip
"""Beside torch and triton, what a number may depend on; those that are not installed are left out."""
VARIABLES = ("CUDA_", "TORCH_", "PYTORCH_", "SOLOSTEP_", "TRITON_", "OMP_")
"""How the names of environment variables begin that a number may depend on."""
SECRET = re.compile("TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
"""What names a variable that is recorded nowhere."""
QUERY = ("driver_version", "clocks.sm", "clocks.mem", "power.limit")


def environment(device: torch.device, command: Sequence[str] | str | None = None) -> dict[str, Any]:
    """The machine and the program, in JSON's types; what cannot be known is None.

    Args:
        command: what was called, to stand in the result; by default this process's own arguments.
    """
    host = host_facts()
    return {
        **_card(device),
        "cpu": host["processor"], "cores": host["cores"],
        "host_memory_bytes": min(host["ram_bytes"], host["cgroup_limit_bytes"] or host["ram_bytes"]),
        "os": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
        "triton": installed("triton"), "versions": {n: v for n in PACKAGES if (v := installed(n)) is not None},
        "variables": variables(os.environ), "commit": commit(), "command": shown(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def variables(given: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that computing may depend on; of a path only its last part."""
    found = {k: v for k, v in sorted(given.items()) if k.startswith(VARIABLES) and not SECRET.search(k)}
    return {k: ":".join(map(_without_folder, v.split(":"))) for k, v in found.items()}


def _without_folder(part: str) -> str:
    return PATH + Path(part).name if part.startswith(("/", "~")) else part


def clocks_of(environment: Mapping[str, Any], running: Mapping[str, Any] | None) -> dict[str, Any]:
    """An environment with the clocks of the run itself, where it told them, in the place of an idle card's; else
    without the SM clock, which is of some other moment. What the card may do (its power limit) stays."""
    clocks = environment.get("clocks")
    if running is None and not clocks:
        return dict(environment)
    kept = {name: value for name, value in (clocks or {}).items() if name != "sm_mhz"}
    return {**environment, "clocks": {**kept, **(running or {})}}


def shown(command: Sequence[str] | str | None = None) -> str:
    """A command as one would type it; programs and files without the folder they lie in, which is the machine's own. A
    module of the benchmarks is called by its name."""
    if isinstance(command, str):
        return command
    program, *rest = command or sys.argv
    path, called = Path(program), [Path(program).name]
    if path.suffix == ".py" and path.resolve().parent == Path(__file__).resolve().parent:
        called = ["python", "-m", f"solostep.benchmarks.{path.stem}"]
    return shlex.join([*called, *map(_without_folder, rest)])


def _card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"card": None, "cards_memory_bytes": None, "driver": None, "cuda": None, "clocks": None}
    properties = torch.cuda.get_device_properties(device)
    told = _nvidia_smi(str(getattr(properties, "uuid", "")))
    return {
        "card": properties.name, "cards_memory_bytes": properties.total_memory,
        "driver": told.get("driver_version"), "cuda": torch.version.cuda,
        "clocks": {
            "sm_mhz": _number(told.get("clocks.sm")), "mem_mhz": _number(told.get("clocks.mem")),
            "power_limit_w": _number(told.get("power.limit")),
        },
    }  # fmt: skip


def _nvidia_smi(uuid: str) -> dict[str, str]:
    """The answers of the driver's own program for one card; nothing without it, or where the card has another name
    in it (a container may hide the uuid: then a single card is the one)."""
    for which in ([f"--id=GPU-{uuid.removeprefix('GPU-')}"], []):
        call = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", *which]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            lines = subprocess.run(call, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
            answers = [part.strip() for part in lines[0].split(",")] if len(lines) == 1 else []
            if len(answers) == len(QUERY):
                return dict(zip(QUERY, answers, strict=True))
    return {}


def _number(answer: str | None) -> float | None:
    """None for what the driver does not tell ("[N/A]")."""
    with contextlib.suppress(TypeError, ValueError):
        value = float(answer)  # type: ignore[arg-type]
        return value if math.isfinite(value) else None
    return None
