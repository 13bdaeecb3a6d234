"""`--attention`: which blocks a run computes with, what it refuses, and that runs are told apart by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from solostep import StepVideoPipeline
from solostep.engine.config import MODES
from solostep.engine.errors import UsageError
from solostep.engine.precision import ATTENTION, Mode, choose_attention
from solostep.quant.recipe import default_recipe

pytestmark = pytest.mark.usefixtures("fast")

TINY: dict[str, Any] = {"num_frames": 17, "height": 32, "width": 48, "num_inference_steps": 2, "progress": False}
PROMPT = "a red circle moving right on a blue background"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def mode(precision: str) -> Mode:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    recipe = None if precision in ("bf16", "fp32") else default_recipe(precision, "transformer")
    return Mode(precision, dtype, recipe)


@pytest.mark.parametrize("precision", MODES)
def test_defaults(precision: str) -> None:
    assert choose_attention(None, mode(precision), CPU) == "official"
    want = {"fp32": "official", "int8": "int8", "int8-plain": "int8", "fp8": "int8"}.get(precision, "bf16")
    assert choose_attention(None, mode(precision), CUDA) == want
    assert choose_attention("int8-fp8", mode(precision), CPU) == "int8-fp8"


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="--attention int4 is unknown; choose one of official, bf16, int8, int8-fp8"):
        StepVideoPipeline.from_pretrained(attention="int4")
    with pytest.raises(UsageError, match="--precision fp32 has official only"):
        StepVideoPipeline.from_pretrained(precision="fp32", attention="bf16")
    pipe = StepVideoPipeline.from_pretrained(attention="bf16", attention_backend="abacus", device="cpu")
    with pytest.raises(UsageError, match="back end abacus is unknown for bf16"):
        pipe(PROMPT, seed=1, output_type="latent", **TINY)


def test_every_mode_makes_nearly_the_same_video() -> None:
    latents, records = {}, {}
    for name in ATTENTION:
        pipe = StepVideoPipeline.from_pretrained(attention=name, device="cpu")
        video = pipe(PROMPT, seed=1, **TINY)
        latents[name], records[name] = video.latents.float(), video.record
    for name, found in latents.items():
        distance = float((found - latents["official"]).norm() / latents["official"].norm())
        assert (distance == 0) == (name == "official") and distance < 0.1, (name, distance)
        assert records[name]["attention"] == name
    assert records["official"]["attention_backend"] is None and records["int8"]["attention_backend"] == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_card() -> None:
    frames = {}
    for precision, name in (("bf16", "official"), ("bf16", "bf16"), ("int8", "int8"), ("int8", "int8-fp8")):
        pipe = StepVideoPipeline.from_pretrained(precision=precision, attention=name, device="cuda")
        video = pipe(PROMPT, seed=1, output_type="np", progress=False)
        frames[precision, name] = np.asarray(video, dtype=np.float64)
        error = float(np.square(frames[precision, name] - frames["bf16", "official"]).mean())
        assert error < 65025 / 10**3.5, (precision, name)  # 35 dB
