"""How far a mode is from the reference: one step on the reference's latents, a free run, its blocks and linears.

An error is a relative L2 distance |a - b| / |b|, b the reference, in fp64. Of equal numbers it is exactly 0, and their
cosine exactly 1.

- teacher-forced: after every step the reference's latents are put in place of the mode's, so each step is measured
  alone: the guided velocity (x_after - x_before) / (sigma_next - sigma), made of the reference's latents likewise. The
  latents are fp32: where steps are small (1.6e-3 first, at a time shift of 13 and 50 steps) that alone is 4e-5.
- free: latents after each step of a run that shares only noise and texts with the reference.
- blocks: what each block of the mode adds to its input, on the input that it has in the reference, both guidance
  branches and a few steps. The inputs are made again from the reference's latents, by the official blocks one at a time
  (the same bits, which is checked): a branch of a step costs half a step. Kept, they would take 45 GB each for
  204 frames at 544x992. Operators that differ are measured on the way, see drift_operators.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from solostep.benchmarks.drift_distances import cosine, relative
from solostep.benchmarks.drift_operators import Other, watched
from solostep.benchmarks.reference import RUN, Recording, kept_latents, run_once
from solostep.benchmarks.results import read_json, write_json
from solostep.engine.activations import Blocks, load_shell
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.latents import save_latents
from solostep.engine.models.fused import FusedBlocks
from solostep.engine.models.transformer import TransformerBlock
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.precision import OFFICIAL
from solostep.engine.probe import cast_floats
from solostep.engine.progress import Progress
from solostep.engine.request import Request, describe_device
from solostep.engine.runtime import numerics, release_memory
from solostep.engine.sampling import first_frame_condition, initial_noise
from solostep.engine.scheduler import euler_step, make_sigmas
from solostep.engine.text import encode_prompts
from solostep.engine.weights import load

DIVERGED = 0.3
"""Free latents that are so far from the reference's are on their way to another video. Videos of one prompt and
different noise are 1.0 to 1.4 apart; the error after the first step says nothing of it, since that step is short."""
BLOCK_PAIRS = {2_000_000_000: 8, math.inf: 2}
BLOCK_STEPS = 3
"""Pairs (of networks of up to so many parameters) and steps that blocks are measured on: the first pair of each prompt,
and steps spread over all. An interval takes six prompts; the inputs of all pairs lie on the device at once, 5.6 GB each
for 204 frames at 544x992, which is why large networks get few."""


def velocity_of(before: Tensor, after: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """The velocity that an Euler step was made with, fp64."""
    return (after.double() - before.double()) / (next_sigma - sigma)


# --- runs ---------------------------------------------------------------------------------------------------------


def sigmas_of(request: Request) -> list[float]:
    """Noise levels of a run, one more than its steps."""
    return make_sigmas(request.settings.num_inference_steps, request.settings.time_shift).tolist()


def teacher_forced(
    pipe: StepVideoPipeline, request: Request, reference: Recording, folder: Path, progress: Progress | None = None
) -> tuple[list[float], list[float]]:
    """Error and cosine of the guided velocity at each step, on the reference's latents.

    They are kept in ``folder`` step by step, and what is there already is not measured again.
    """
    sigmas = sigmas_of(request)
    told, run = folder / "steps.json", folder / RUN
    errors, cosines = _steps_there(told)
    if len(errors) == reference.steps:
        return errors, cosines
    saved = kept_latents(run)
    if saved is None or not errors:
        errors, cosines = [], []
        run.unlink(missing_ok=True)
    else:  # it may have been cut before the teacher's latents took the place of its own
        saved.step, saved.latents = len(errors), reference.latents(len(errors))
        save_latents(run, saved)
    before = reference.latents(len(errors))

    def callback(pipe: StepVideoPipeline, step: int, sigma: float, state: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal before
        target = reference.latents(step + 1)
        made, wanted = (
            velocity_of(before, after, sigmas[step], sigmas[step + 1]) for after in (state["latents"].cpu(), target)
        )
        errors.append(relative(made, wanted))
        cosines.append(cosine(made, wanted))
        write_json(told, {"error": errors, "cosine": cosines})
        before = target
        return {"latents": target}

    run_once(pipe, request, run, callback, None, progress, resume=True)
    return errors, cosines


def _steps_there(path: Path) -> tuple[list[float], list[float]]:
    """Errors and cosines that an interrupted run has measured."""
    try:
        there = read_json(path)
        return list(there["error"]), list(there["cosine"])
    except (UsageError, KeyError, TypeError):
        return [], []


def free_errors(made: Recording, reference: Recording) -> list[float]:
    """Errors of the latents after each step.

    Raises:
        SolostepError: the two did not begin with the same noise.
    """
    if not torch.equal(made.latents(0), reference.latents(0)):
        raise SolostepError("A run and its reference began with different noise; make the reference again.")
    steps = range(1, reference.steps + 1)
    return [relative(made.latents(n), reference.latents(n)) for n in steps]


def diverged_at(errors: Sequence[float], limit: float = DIVERGED) -> int | None:
    """The index of the first error that is above the limit; None if none is."""
    return next((i for i, error in enumerate(errors) if error > limit), None)


# --- blocks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One input of the transformer in a reference run."""

    pair: int
    step: int
    branch: str
    latents: Tensor
    sigma: float
    text: str


def block_pairs(parameters: int) -> int:
    """How many pairs the blocks of a network of this size are measured on."""
    return next(pairs for most, pairs in BLOCK_PAIRS.items() if parameters <= most)


def spread_steps(steps: int, count: int = BLOCK_STEPS) -> list[int]:
    """``count`` of the steps, the first and the last among them; of fewer than twice as many, only those two."""
    count = min(count if steps >= 2 * count else 2, steps)
    return [round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)]


def samples_of(requests: Sequence[Request], references: Sequence[Recording], pairs: Sequence[int]) -> list[Sample]:
    """What blocks are measured on: pairs x steps x guidance branches, in this order."""
    found = []
    for pair in pairs:
        request, sigmas = requests[pair], sigmas_of(requests[pair])
        for step in spread_steps(request.settings.num_inference_steps):
            latents = references[pair].latents(step)
            for branch, text in zip(("text", "unconditional"), request.texts, strict=False):
                found.append(Sample(pair, step, branch, latents, sigmas[step], text))
    return found


class ComparedBlock(nn.Module):
    """An official block that is run on the rows of a reference, and beside it that of a mode on the same rows."""

    def __init__(self, index: int, official: nn.Module, other: nn.Module, fused: FusedBlocks | None) -> None:
        super().__init__()
        self.index, self.official, self.other, self.fused = index, official, other, fused
        self.dtype = next(p.dtype for p in other.parameters() if p.dtype in (torch.bfloat16, torch.float32))
        self.errors: list[float] = []
        self.operators: dict[str, list[float]] = {}

    def forward(self, x: Tensor, context: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        other = Other(self.other, self.fused, f"block {self.index}", self.operators)
        with watched(self.official, [other], rope):
            out = self.official(x, context, modulation, rope)
        if self.fused is not None:
            stream = x.clone(memory_format=torch.contiguous_format)  # what is computed in place
            block = cast(TransformerBlock, self.other)
            made = self.fused(self.index, len(self.errors), block, stream, modulation, rope)
        else:
            made = self.other(*cast_floats((x, context, modulation, rope), self.dtype))
        added = out.double() - x.double()
        self.errors.append(relative(made.double() - x.double(), added))
        return out


class BlockDrift:
    """Measures the blocks of one mode on the inputs that they have in reference runs.

    Args:
        reference: the pipeline of the official numerics. ``mode`` is the one that is measured.
        change: what is done to a loaded block of the mode, if anything.
        backend: of the mode's attention.
    """

    def __init__(
        self, reference: StepVideoPipeline, mode: StepVideoPipeline, backend: str | None,
        change: Callable[[nn.Module], nn.Module] | None = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.reference, self.mode, self.backend, self.change = reference, mode, backend, change
        self.say: Progress = progress or (lambda stage, done, total: None)
        self.component = reference.model.components["transformer"]
        self.device, self.dtype = reference.device, reference.dtype

    def measure(self, samples: Sequence[Sample], requests: Sequence[Request]) -> dict[str, Any]:
        """Errors by block and by linear, and how far the velocities of this pass are from those of the references.

        Raises:
            SolostepError: memory ran out.
        """
        try:
            with numerics():
                return self._measured(samples, requests)
        except torch.OutOfMemoryError as error:
            raise SolostepError(
                f"{describe_device(self.device)} ran out of memory while blocks were measured; leave the level blocks "
                "out, or make a smaller or shorter clip."
            ) from error
        finally:
            release_memory(self.device)

    def _measured(self, samples: Sequence[Sample], requests: Sequence[Request]) -> dict[str, Any]:
        texts = [s.text for s in samples]
        embeddings = encode_prompts(
            self.reference.model, texts, self.device, self.dtype, self.reference.cache, None, self.reference.text_mode
        )
        condition, score = self._condition(samples, requests)
        shell: Any = load_shell(self.component, self.device, self.dtype)
        contexts = [
            shell.embed_text(
                e.llm[None].to(self.device, self.dtype), e.clip[None].to(self.device, self.dtype), [e.length]
            )[0]
            for e in map(embeddings.__getitem__, texts)
        ]
        fused = None
        if self.mode.attention != OFFICIAL:
            fused = FusedBlocks(contexts, self.mode.attention, self.backend, keep_text=False)
        latents = torch.cat([s.latents.to(self.device, self.dtype) for s in samples])
        timesteps = torch.tensor([s.sigma for s in samples], device=self.device)
        done: list[ComparedBlock] = []
        out = shell(latents, timesteps, contexts, condition, score, self._blocks(fused, done))
        errors = [block.errors for block in done]
        names = dict.fromkeys(name for block in done for name in block.operators)
        return {
            "names": [str(block.index) for block in done], "error": errors,
            "operators": {  # what a recipe left as it is in some blocks is exact there
                name: [block.operators.get(name, [0.0] * len(samples)) for block in done] for name in names
            },
            "velocities": list(out.split(1)),
        }  # fmt: skip

    def _blocks(self, fused: FusedBlocks | None, done: list[ComparedBlock]) -> Iterator[nn.Module]:
        """Each block beside that of the mode. Both are let go of when the next one comes."""
        blocks, mode = Blocks(self.component, self.device, self.dtype), self.mode.mode
        differs = mode.recipe is not None or mode.dtype != self.dtype or self.change is not None
        for i in range(blocks.count):
            self.say("blocks", i, blocks.count)
            official = other = blocks.block(i)
            if differs:
                part = f"{blocks.prefix}.{i}"
                other = load(self.component, self.device, mode.dtype, part=part, recipe=mode.on_load)
            if self.change is not None:
                other = self.change(other)
            compared = ComparedBlock(i, official, other, fused)
            yield compared
            compared.official = compared.other = nn.Identity()
            done.append(compared)
        self.say("blocks", blocks.count, blocks.count)

    def _condition(self, samples: Sequence[Sample], requests: Sequence[Request]) -> tuple[Tensor | None, float | None]:
        """The first frame's latents for every row, of an image-to-video model; as the pipeline makes them."""
        first = requests[samples[0].pair]
        if first.image is None:
            return None, None
        model = self.reference.model
        encoder = load(model.components["vae"], self.device, self.dtype, part="encoder")
        made: dict[int, Tensor] = {}
        for pair in dict.fromkeys(s.pair for s in samples):
            request = requests[pair]
            assert request.image is not None and request.seed is not None
            _, generator = initial_noise(request.settings, model.transformer_config.in_channels, request.seed)
            made[pair] = first_frame_condition(encoder, request.image, request.settings, generator)
        return torch.cat([made[s.pair] for s in samples]), first.settings.motion_score


def guided(velocities: Sequence[Tensor], scale: float) -> Tensor:
    """One velocity of those of the branches, as the pipeline makes it."""
    if len(velocities) == 1:
        return velocities[0]
    text, uncond = velocities
    return uncond + scale * (text - uncond)


def reproduction(
    samples: Sequence[Sample], velocities: Sequence[Tensor], requests: Sequence[Request],
    references: Sequence[Recording],
) -> float:  # fmt: skip
    """The largest error of the steps that a pass over official blocks makes, against the references' own steps."""
    worst = 0.0
    index = 0
    while index < len(samples):
        sample = samples[index]
        request = requests[sample.pair]
        branches = len(request.texts)
        sigmas = make_sigmas(request.settings.num_inference_steps, request.settings.time_shift)
        velocity = guided(velocities[index : index + branches], request.settings.guidance_scale).cpu()
        made = euler_step(sample.latents, velocity, sigmas[sample.step], sigmas[sample.step + 1])
        worst = max(worst, relative(made, references[sample.pair].latents(sample.step + 1)))
        index += branches
    return worst
