"""What a cell of the benchmark is: a model, a mode, a clip, prompts x seeds, a role and levels; read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solostep.engine.errors import UsageError
from solostep.engine.precision import OFFICIAL

ROLES = ("reference", "mode", "floor-backend", "floor-order", "other-seed")
LEVELS = ("speed", "blocks", "teacher", "free", "video", "score")
OPTIONS = ("precision", "text_precision", "attention", "attention_backend", "recipe", "vram", "host_ram", "device")
SETTINGS = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "time_shift", "motion_score")
WRITING = ("mp4", "count")


@dataclass(frozen=True)
class Cell:
    """What one process measures, checked as far as can be without the model."""

    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    role: str = "mode"
    levels: tuple[str, ...] = LEVELS
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, spec: Any) -> Cell:
        """From a specification ``{"cell": {...}}``.

        Raises:
            UsageError: names the key that is missing, unknown or wrong, and what it has to be.
        """
        values = spec.get("cell") if isinstance(spec, dict) else None
        if not isinstance(values, dict):
            raise UsageError('A specification has to be a JSON object with the key "cell".')
        known = ("model", "prompts", "seeds", "role", "levels", *OPTIONS, *SETTINGS)
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UsageError(f"cell: unknown key {unknown[0]!r}; known are {', '.join(known)}.")
        model = values.get("model")
        if not isinstance(model, str) or not model:
            raise UsageError(f'cell: model has to be "demo", a folder or a hub name, not {model!r}.')
        role = values.get("role", "mode")
        if role not in ROLES:
            raise UsageError(f"cell: role has to be one of {', '.join(ROLES)}, not {role!r}.")
        cell = cls(
            model, _several(values, "prompts", str), _several(values, "seeds", int), role, _levels(values),
            {k: values[k] for k in OPTIONS if values.get(k) is not None},
            {k: values[k] for k in SETTINGS if values.get(k) is not None},
        )  # fmt: skip
        cell._check_role()
        return cell

    def _check_role(self) -> None:
        fixed: dict[str, Any] = {}
        if self.role != "mode":
            fixed = {"precision": "bf16", "text_precision": "bf16", "attention": OFFICIAL}
        if fixed and "recipe" in self.options:
            raise UsageError(f"cell: the role {self.role} has no recipe; leave it out.")
        for name, value in fixed.items():
            if self.options.get(name, value) != value:
                raise UsageError(f"cell: the role {self.role} has {name} {value}, not {self.options[name]}.")
        if self.role == "other-seed" and len(self.seeds) < 2:
            raise UsageError("cell: the role other-seed compares seeds; give at least two.")

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Prompts x seeds, the seeds of a prompt one after the other."""
        return [{"prompt": prompt, "seed": seed} for prompt in self.prompts for seed in self.seeds]

    def wants(self, *levels: str) -> bool:
        return any(level in self.levels for level in levels)


def _several(values: Mapping[str, Any], name: str, kind: type) -> tuple[Any, ...]:
    given = values.get(name)
    right = isinstance(given, list) and given and all(type(v) is kind for v in given)
    if not right or len(set(given or [])) != len(given or []):
        what = "texts" if kind is str else "whole numbers"
        raise UsageError(f"cell: {name} has to be a list of different {what}, at least one, not {given!r}.")
    return tuple(given or [])


def _levels(values: Mapping[str, Any]) -> tuple[str, ...]:
    given = values.get("levels", list(LEVELS))
    if not isinstance(given, list) or not given or not set(map(str, given)) <= set(LEVELS):
        raise UsageError(f"cell: levels has to be a list of some of {', '.join(LEVELS)}, not {given!r}.")
    return tuple(level for level in LEVELS if level in given)


def read_spec(path: Path) -> dict[str, Any]:
    """A specification from its file.

    Raises:
        UsageError: no such file, or not JSON.
    """
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check the name.") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}).") from None
    if not isinstance(spec, dict):
        raise UsageError(f"{path} has to hold a JSON object.")
    return spec
