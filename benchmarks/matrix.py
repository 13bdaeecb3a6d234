"""From options to cells: every way to compute with every clip, with all prompts and seeds; checked before any work.

A drift needs something to be measured against: for each clip, the bf16 reference in the official numerics comes first,
then two noise floors and the distance of other seeds, then the modes. Cost: reading a model's headers and building its
networks without weights, about a second a mode; no CUDA context, which would take memory from what is measured.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from solostep.benchmarks.drift import block_pairs, spread_steps
from solostep.benchmarks.results import LEVELS, ROLES, Cell
from solostep.engine.activations import PROMPTS
from solostep.engine.checkpoint import ModelFolder, open_model
from solostep.engine.demo.captions import asked_by_captions, held_out_prompts
from solostep.engine.errors import UsageError
from solostep.engine.hub import DEMO
from solostep.engine.machine import installed
from solostep.engine.memory import read_budgets
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.precision import AUTO, OFFICIAL, check_attention, check_precision, read_recipe_option
from solostep.engine.request import check_asked, filled_in
from solostep.engine.runtime import pick_device
from solostep.kernels.attention import BACKENDS, MODES

DRIFT = ("blocks", "teacher", "free", "video")
"""Levels that need a reference."""
MEASURING = ("cell*.py", "drift*.py", "reference*.py", "floors.py", "video_metrics.py")
"""Of this folder, what a measurement depends on."""


@dataclass(frozen=True)
class Options:
    """What was asked for. Each tuple of the first group is one axis of the matrix; None is the engine's own choice."""

    model: str | None = None
    precision: tuple[str | None, ...] = ()
    recipe: tuple[str, ...] = ()
    text_precision: tuple[str | None, ...] = (None,)
    attention: tuple[str | None, ...] = (None,)
    attention_backend: tuple[str | None, ...] = (None,)
    vram: tuple[str | None, ...] = (None,)
    host_ram: tuple[str | None, ...] = (None,)
    frames: tuple[int | None, ...] = (None,)
    size: tuple[tuple[int, int] | None, ...] = (None,)
    steps: tuple[int | None, ...] = (None,)

    guidance_scale: float | None = None
    time_shift: float | None = None
    prompts: tuple[str, ...] | None = None
    n: int = 8
    """Prompts, where none are given: two more than the fewest that make an interval."""
    seeds: tuple[int, ...] = (1,)
    """Intervals are over prompts, so one will do; where there is no second, only the reference makes it, for the
    distance of other seeds."""
    levels: tuple[str, ...] = LEVELS
    roles: tuple[str, ...] = ROLES
    device: str | None = None


@dataclass(frozen=True)
class Planned:
    """A cell that is to be measured, with its identity and its name for people."""

    cell: Cell
    id: str
    label: str
    fresh: int = 0
    """References that it makes itself: those of seeds that the reference's cell does not have."""
    block_pairs: int = 2
    """Pairs that its blocks are measured on, where there are so many prompts."""

    @property
    def name(self) -> str:
        """Of its file, without what stands behind the dot."""
        words = "".join(c if c.isalnum() or c in "-." else "-" for c in self.label.lower())
        short = "-".join(filter(None, words.split("-")))
        c = self.cell
        return f"{short}-{c.num_frames}x{c.height}x{c.width}-{c.num_inference_steps}steps-{self.id[:8]}"

    @property
    def runs(self) -> float:
        """About how many whole videos it takes."""
        cell, pairs = self.cell, len(self.cell.pairs)
        if cell.role == "other-seed":
            return self.fresh + 0.1  # what the reference kept
        if cell.role == "reference":
            return float(pairs) if set(cell.levels) - {"speed"} else 1.0
        seen = {"free", "video", "score"} & set(cell.levels)
        videos = float(pairs if seen else "speed" in cell.levels) + pairs * ("teacher" in cell.levels)
        # A block's sample is one guidance branch, half a step, once as the reference and once as the mode.
        samples = 2 * min(self.block_pairs, len(cell.prompts)) * len(spread_steps(cell.num_inference_steps))
        return videos + ("blocks" in cell.levels) * samples / cell.num_inference_steps

    @property
    def work(self) -> float:
        """In the same unit for all cells of a model: the runs, by latent cells and steps. A guess for the time left."""
        c = self.cell
        return self.runs * (c.num_inference_steps + 2) * c.num_frames * c.height * c.width


@dataclass(frozen=True)
class Matrix:
    """What is run, in this order, and what was rounded or left out on the way."""

    folder: ModelFolder
    device: torch.device
    planned: tuple[Planned, ...]
    notes: tuple[str, ...] = ()

    @property
    def reference_bytes(self) -> int:
        """Of disk that the references take, where none is there."""
        return sum(self.references(self.planned).values())

    def references(self, planned: Sequence[Planned]) -> dict[str, int]:
        """Of the references that cells need: the :func:`reference_key` of each, and its bytes: latents after every step
        in fp32, and the frames."""
        preset, channels, found = self.folder.preset, self.folder.transformer_config.in_channels, dict[str, int]()
        for cell in (p.cell for p in planned if set(p.cell.levels) - {"speed"}):
            s = filled_in(preset, cell.as_dict(), self.folder.is_image_to_video)
            latents = 4 * channels * s.latent_frames * s.latent_height * s.latent_width
            frames = 3 * s.num_frames * s.height * s.width
            for prompt, seed in cell.pairs:
                texts = [prompt + preset.positive] + [preset.negative] * s.use_guidance
                found[reference_key(texts, s.identity(), seed)] = latents * (s.num_inference_steps + 1) + frames
        return found


def reference_key(texts: Sequence[str], settings: Mapping[str, Any], seed: int) -> str:
    """What tells the references of one model apart."""
    return json.dumps([list(texts), {k: float(v) for k, v in settings.items()}, seed], sort_keys=True)


# --- identity -----------------------------------------------------------------------------------------------------


@functools.cache
def code_identity(measuring: tuple[str, ...] = MEASURING) -> str:
    """Of the code that numbers depend on (``measuring`` is that of this folder), and of the packages that compute."""
    here = Path(__file__).resolve().parent
    files = [p for name in measuring for p in here.glob(name)]
    for folder in ("kernels", "quant", "offload", "engine", "engine/models"):
        files += (here.parent / folder).glob("*.py")
    digest = hashlib.sha256(f"{torch.__version__} {installed('triton')}".encode())
    for file in sorted(files):
        digest.update(file.relative_to(here.parent).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def identity(cell: Cell, fingerprints: dict[str, str], code: str | None = None) -> str:
    """16 hexadecimal digits: what is run on which weights with which code; not where the model's folder lies."""
    values = {k: v for k, v in cell.as_dict().items() if k != "model"}
    if cell.recipe is not None and not cell.recipe.startswith(AUTO):
        values["recipe"] = Path(cell.recipe).read_text(encoding="utf-8")
    text = json.dumps([values, fingerprints, code or code_identity()], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_identity(folder: ModelFolder) -> str:
    """12 hexadecimal digits of a model's weights, all components of them; not where they lie."""
    text = json.dumps({name: c.fingerprint for name, c in folder.components.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def label(cell: Cell) -> str:
    """A mode in a few words."""
    fixed = {"reference": "reference", "floor-order": "floor: other order", "floor-backend": "floor: other back end",
             "other-seed": "other seeds"}  # fmt: skip
    name = cell.precision if cell.recipe is None else f"recipe {Path(cell.recipe).stem}"
    if cell.recipe is not None and cell.recipe.startswith(AUTO):
        name = f"recipe {cell.recipe}"
    parts = [fixed[cell.role]] if cell.role in fixed else [name]
    if cell.text_precision is not None:
        parts.append(f"text {cell.text_precision}")
    if cell.role == "mode" and cell.attention is not None:
        parts.append("official" if cell.attention == OFFICIAL else f"{cell.attention} attention")
    parts += [cell.attention_backend] if cell.attention_backend else []
    parts += [cell.vram] if cell.vram else []
    parts += [f"host {cell.host_ram}"] if cell.host_ram else []
    return " · ".join(parts)


# --- checks -------------------------------------------------------------------------------------------------------


def check_options(options: Options) -> None:
    """What can be told without a model.

    Raises:
        UsageError: an unknown precision, kind of attention, back end, level or role; a budget or recipe that is none;
            a combination that does not exist; no seed.
    """
    for precision in options.precision:
        check_precision(precision)
    for precision in options.text_precision:
        check_precision(precision, "--text-precision")
    for attention, precision in itertools.product(options.attention, options.precision or (None,)):
        check_attention(attention, precision)
    for recipe in options.recipe:
        read_recipe_option(recipe, None)
    for vram, host_ram in itertools.product(options.vram, options.host_ram):
        read_budgets(vram, host_ram)
    if len(options.vram) * len(options.host_ram) > 1 and "speed" not in options.levels:
        raise UsageError(
            "--vram, --host-ram: drift is measured in one budget, and several differ in speed and memory; give one, or "
            "add speed to --levels."
        )
    for backend in options.attention_backend:
        if backend is not None and backend not in BACKENDS:
            raise UsageError(f"--attention-backend {backend} is unknown; choose one of {', '.join(BACKENDS)}.")
    for names, known, option in ((options.levels, LEVELS, "--levels"), (options.roles, ROLES, "--roles")):
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise UsageError(f"{option} {','.join(unknown) or 'names none'}; choose from {', '.join(known)}.")
    if not options.seeds:
        raise UsageError("--seeds has to be at least 1.")
    if len(set(options.seeds)) < len(options.seeds):
        raise UsageError("--seeds: a seed is given twice; leave one out.")
    if options.prompts is not None and len(set(options.prompts)) < len(options.prompts):
        raise UsageError("--prompts: a prompt is given twice; leave one out.")
    given = {"guidance_scale": options.guidance_scale, "time_shift": options.time_shift}
    for frames, size, steps in itertools.product(options.frames, options.size, options.steps):
        height, width = size or (None, None)
        for prompt in options.prompts or ("any",):
            check_asked(
                prompt, seed=options.seeds[0], num_frames=frames, height=height, width=width,
                num_inference_steps=steps, **given,
            )  # fmt: skip


def check_backend(name: str, attention: str, device: torch.device) -> None:
    """Raises UsageError for a back end that does not compute this attention, or is not to be had here."""
    known = [n for n, backend in BACKENDS.items() if attention in backend.modes]
    if name not in known:
        raise UsageError(f"--attention-backend {name} is unknown for {attention}; choose one of {', '.join(known)}.")
    reason = BACKENDS[name].available(device, attention)
    if reason is not None:
        raise UsageError(f"--attention-backend {name} is not to be had on {device}: {reason}.")


# --- cells --------------------------------------------------------------------------------------------------------


def build(options: Options) -> Matrix:
    """All cells, in the order in which they are run.

    Raises:
        UsageError: as :func:`check_options`; a missing model; a mode that the model or the device does not have; drift
            of a model that is stored quantized; a score that cannot be had; no cell.
        CheckpointError: the model folder is incomplete or damaged.
    """
    check_options(options)
    device = pick_device(options.device)
    folder = open_model(DEMO if options.model is None else options.model)
    stored = folder.components["transformer"].quantization
    if stored is not None and options.levels != ("speed",):
        raise UsageError(
            f"{folder.source} is stored in {stored.precision}, and drift is measured against the original weights; "
            "give the original model, or --levels speed."
        )
    is_demo = folder.preset.name == "demo"
    levels = tuple(x for x in LEVELS if x in options.levels and (is_demo or x != "score"))
    if not levels:
        raise UsageError("--levels score: the score is of the demo model's prompts; choose other levels.")
    prompts = options.prompts or built_in_prompts(options.n, is_demo)
    cells: list[Cell] = []
    notes: list[str] = []
    unknown = [prompt for prompt in prompts if prompt not in asked_by_captions()] if "score" in levels else []
    if unknown:
        why = f"it knows what a caption of the demo asks for, and {unknown[0]!r} is none"
        levels = _without_score(levels, options, why, notes)
    for frames, size, steps in itertools.product(options.frames, options.size, options.steps):
        height, width = size or (None, None)
        given = {"num_frames": frames, "height": height, "width": width, "num_inference_steps": steps,
                 "guidance_scale": options.guidance_scale, "time_shift": options.time_shift}  # fmt: skip
        made = filled_in(folder.preset, given, folder.is_image_to_video)
        notes += made.notes
        own = levels
        if made.num_frames == 1 and "score" in levels:
            own = _without_score(levels, options, "one frame shows no motion", notes)
        base = Cell(
            options.model or DEMO, "bf16", made.num_frames, made.height, made.width, made.num_inference_steps,
            made.guidance_scale, made.time_shift, prompts, options.seeds, levels=own,
        )  # fmt: skip
        cells += _of_clip(base, options, folder, device, notes)
    if not cells:
        raise UsageError(
            "Nothing is left to measure with these --roles and --levels: floors and other seeds have drift alone, and "
            "bf16 in the official numerics is the reference."
        )
    _check_backends(options, cells)
    if len(options.vram) * len(options.host_ram) > 1 and set(levels) - {"speed"}:
        notes.append(
            "A budget moves weights and changes no numbers: drift is measured in the first budget of each mode, speed "
            "and memory in all."
        )
    fingerprints = {name: c.fingerprint for name, c in sorted(folder.components.items())}
    pairs = block_pairs(folder.components["transformer"].parameters)
    planned = []
    for cell in dict.fromkeys(cells):
        fresh = len(cell.prompts) * len(set(cell.seeds) - set(options.seeds))
        planned.append(Planned(cell, identity(cell, fingerprints), label(cell), fresh, pairs))
    if "score" in options.levels and not is_demo and options.levels != LEVELS:
        notes.append("The level score is of the demo model only and left out.")
    return Matrix(folder, device, tuple(planned), tuple(dict.fromkeys(notes)))


def _without_score(levels: Sequence[str], options: Options, why: str, notes: list[str]) -> tuple[str, ...]:
    """The levels that are left where videos cannot be scored, which is said.

    Raises:
        UsageError: it was asked for by name.
    """
    if options.levels != LEVELS:
        raise UsageError(f"--levels score: {why}; leave it out.")
    notes.append(f"The level score is left out: {why}.")
    return tuple(x for x in levels if x != "score")


def built_in_prompts(n: int, is_demo: bool) -> tuple[str, ...]:
    """``n`` different prompts of the demo's held-out ones, or of those for real models.

    Raises:
        UsageError: there are not so many.
    """
    known = list(PROMPTS)
    if is_demo:
        known = list(dict.fromkeys(p.text for p in held_out_prompts(n)))  # they begin again when all were drawn
    if n > len(known):
        raise UsageError(
            f"-n {n} is more than the {len(known)} prompts that are built in; give --prompts a file of your own, or "
            f"-n {len(known)} at most."
        )
    return tuple(known[:n])


def _check_backends(options: Options, cells: Sequence[Cell]) -> None:
    """Raises UsageError for a back end that no mode was given."""
    taken = {cell.attention_backend for cell in cells if cell.role == "mode"}
    unused = [b for b in options.attention_backend if b is not None and b not in taken]
    if unused:
        kinds = ", ".join(kind for kind in MODES if kind in BACKENDS[unused[0]].modes)
        raise UsageError(
            f"--attention-backend {unused[0]}: no mode has an attention that it could be chosen for (the official one "
            f"has none, a recipe that is to be measured tells it later); add --attention {kinds}, or leave it out."
        )


def _of_clip(
    base: Cell, options: Options, folder: ModelFolder, device: torch.device, notes: list[str]
) -> Iterator[Cell]:  # fmt: skip
    stored = folder.components["transformer"].quantization
    budget = {"vram": _largest(options.vram), "host_ram": _largest(options.host_ram)}
    official = replace(base, role="reference", attention=OFFICIAL, **budget)
    drift = tuple(x for x in base.levels if x in DRIFT)
    floor = tuple(x for x in base.levels if x in (*DRIFT, "score"))  # whether rounding alone loses a prompt
    if stored is None:
        others = {
            "reference": official,
            "floor-order": replace(official, role="floor-order", levels=floor),
            "floor-backend": replace(official, role="floor-backend", levels=floor),
            "other-seed": replace(
                official,
                role="other-seed",
                levels=tuple(x for x in drift if x in ("free", "video")),
                seeds=base.seeds if len(base.seeds) > 1 else (base.seeds[0], another_seed(base.seeds[0])),
            ),
        }
        for role, cell in others.items():
            if role in options.roles and cell.levels:
                yield cell
    if "mode" in options.roles:
        for cell in _modes(base, options, folder, device):
            if stored is not None or replace(cell, role="reference", levels=official.levels) != official:
                yield cell
            elif options.precision:
                notes.append(f"{label(cell)} is the reference itself, and not measured as a mode beside it.")


def another_seed(seed: int) -> int:
    return seed + 1 if seed < 2**63 - 1 else 0


def _largest(budgets: Sequence[str | None]) -> str | None:
    """What the reference may take: no mode's budget is larger."""
    if None in budgets:
        return None
    return max((b for b in budgets if b is not None), key=lambda b: read_budgets(b, None)[0] or 0)


def _modes(base: Cell, options: Options, folder: ModelFolder, device: torch.device) -> Iterator[Cell]:
    stored = folder.components["transformer"].quantization
    default: tuple[str | None, ...] = (stored.precision,) if stored else ("bf16", "int8", "fp8")
    precisions = options.precision or (() if options.recipe else default)
    for precision, recipe in [*((p, None) for p in precisions), *((None, r) for r in options.recipe)]:
        for text, attention in itertools.product(options.text_precision, options.attention):
            chosen = _chosen(folder, device, precision, recipe, text, attention)
            mode = replace(base, text_precision=text, recipe=recipe, **chosen)
            for backend in options.attention_backend:
                taken = None if mode.attention in (None, OFFICIAL) else backend
                if taken is not None:
                    check_backend(taken, mode.attention or "", device)
                for n, (vram, host_ram) in enumerate(itertools.product(options.vram, options.host_ram)):
                    levels = base.levels if n == 0 else ("speed",)
                    yield replace(mode, attention_backend=taken, vram=vram, host_ram=host_ram, levels=levels)


def _chosen(
    folder: ModelFolder, device: torch.device, precision: str | None, recipe: str | None, text: str | None,
    attention: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Names of what the pipeline makes of it. The attention of a recipe that is still to be measured is not known."""
    pipe = StepVideoPipeline(
        folder, precision, device, text_precision=text, recipe=recipe, attention=attention, cache=False
    )
    known = attention if recipe is not None and recipe.startswith(AUTO) else pipe.attention
    return {"precision": pipe.precision, "attention": known}
