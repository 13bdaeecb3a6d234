"""Golden cases: reading them, comparing tensors with them, and how far a tensor may be off.

Limits. fp32: the noise of fp32 arithmetic. bf16: compared with the official bf16 run, at most 1.5 times that run's
own distance from fp32 (with a floor), because two correct bf16 programs differ by about that much.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError


@dataclass(frozen=True)
class Limit:
    """What a tensor may differ by; None is not asked. ``levels`` is for uint8 video."""

    rel_l2: float | None = None
    max_abs: float | None = None
    levels: bool = False

    def __str__(self) -> str:
        if self.levels:
            return "1 level in < 1 %"
        if self.max_abs == 0:
            return "equal"
        named = (("rel", self.rel_l2), ("max", self.max_abs))
        return " ".join(f"{name} {value:.1e}" for name, value in named if value is not None)


EXACT = Limit(max_abs=0.0)


@dataclass(frozen=True)
class Result:
    """One compared tensor. ``error`` holds the message of a case that could not be run."""

    case: str
    tensor: str
    dtype: str
    max_abs: float
    rel_l2: float
    limit: str
    passed: bool
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a difference that is not a number is null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Case:
    """A golden file, opened."""

    name: str
    component: str
    config: dict[str, Any]
    metadata: Mapping[str, str]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    bf16_outputs: dict[str, Tensor]
    folder: Path

    def fill(self, module: nn.Module, dtype: torch.dtype, device: torch.device, prefix: str = "") -> Any:
        """Loads the case's weights into a module, strictly; keys may or may not carry ``prefix``."""
        weights = {k.removeprefix(prefix): v.float() for k, v in self.weights.items()}
        module.load_state_dict(weights, strict=True)
        return module.eval().requires_grad_(False).to(device, dtype)


def read_case(path: Path) -> Case:
    """Opens a golden file.

    Raises:
        CheckpointError: not a safetensors file with a component in its metadata.
    """
    from safetensors import SafetensorError, safe_open

    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            component, config = metadata["component"], json.loads(metadata.get("config", "{}"))
            for key in file.keys():
                group, _, name = key.partition(".")
                groups[group][name] = file.get_tensor(key).clone()
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a golden case ({type(error).__name__}: {error}).") from None
    bf16 = {k.removeprefix("bf16."): v for k, v in groups["outputs"].items() if k.startswith("bf16.")}
    plain = {k: v for k, v in groups["outputs"].items() if not k.startswith("bf16.")}
    return Case(
        path.stem, component, config, metadata, groups["weights"], groups["inputs"], plain, bf16, path.parent
    )  # fmt: skip


def differences(ours: Tensor, golden: Tensor) -> tuple[float, float]:
    """Largest absolute and relative L2 difference, in fp64; infinite if anything of ours is not finite."""
    a, b = ours.detach().cpu().double(), golden.double()
    if a.shape != b.shape or not bool(torch.isfinite(a).all()):
        return float("inf"), float("inf")
    delta = a - b
    if not delta.numel():
        return 0.0, 0.0
    norm = float(b.norm())
    return float(delta.abs().max()), float(delta.norm()) / norm if norm else float(delta.norm())


def compare(case: str, tensor: str, dtype: str, ours: Tensor, golden: Tensor, limit: Limit) -> Result:
    """Holds one tensor against its golden value."""
    max_abs, rel_l2 = differences(ours, golden)
    passed = limit.rel_l2 is None or rel_l2 <= limit.rel_l2
    passed &= limit.max_abs is None or max_abs <= limit.max_abs
    if limit.levels:
        changed = float((ours.cpu() != golden).double().mean()) if ours.shape == golden.shape else 1.0
        passed = max_abs <= 1 and changed < 0.01
    return Result(case, tensor, dtype, max_abs, rel_l2, str(limit), bool(passed))


FP32_LIMITS = {
    "rope3d": Limit(max_abs=2e-6),
    "rms_norm": Limit(max_abs=2e-6),
    "vae_v2_encoder": Limit(rel_l2=2e-5, max_abs=1e-4),
    "vae_v2_decoder": Limit(rel_l2=2e-5, max_abs=1e-4),
    "scheduler": Limit(max_abs=1e-6),
    "kv_mask": EXACT,
    "image_preprocess": Limit(max_abs=1e-5),
}
FP32_NETWORK = Limit(rel_l2=1e-5, max_abs=2e-5)


def component_limit(case: Case, tensor: str, dtype: str) -> Limit:
    """The limit of one output of a component case."""
    if dtype == "fp32":
        return FP32_LIMITS.get(case.component, FP32_NETWORK)
    if case.component == "kv_mask":
        return EXACT
    if case.component == "rms_norm":
        return Limit(rel_l2=2e-3)
    if case.component == "rope3d":
        return Limit(rel_l2=2e-3, max_abs=0.04) if tensor == "out" else EXACT
    if case.component.startswith("vae_v2"):
        return Limit(rel_l2=3e-2)
    spread = differences(case.bf16_outputs[tensor], case.outputs[tensor])[1]
    return Limit(rel_l2=max(5e-3, 1.5 * spread))


def e2e_limit(case: Case, tensor: str, dtype: str) -> Limit:
    """The limit of one output of an end-to-end case; these hold no bf16 run, so bf16 is compared with fp32."""
    if "ids" in tensor or "mask" in tensor:
        return EXACT
    if tensor in ("sigmas", "timesteps"):
        return Limit(max_abs=1e-6)
    if dtype == "fp32":
        if tensor == "video_uint8_fhwc":
            return Limit(levels=True)
        rel = {"video": 1e-4}.get(tensor, 5e-5 if re.match(r"latents|noise_pred", tensor) else 1e-5)
        return Limit(rel_l2=rel)
    # Twice the official spread: embeddings differ by rounding alone, the rest through guidance over the steps too.
    if tensor == "clip_embeds":
        return Limit(rel_l2=5e-3)
    if tensor == "llm_embeds":
        return Limit(rel_l2=1.5e-2)
    if tensor.startswith(("first_frame", "condition")):
        return Limit(rel_l2=3e-2)
    return Limit(rel_l2=0.16)
