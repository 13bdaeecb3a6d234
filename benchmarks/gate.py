"""Regression gate: has a change to the code changed the error of a precision mode? The demo model, on a CPU.

    python -m solostep.benchmarks.gate            # against the stored baseline; exit code 1 if anything changed
    python -m solostep.benchmarks.gate --report   # with the table of all values
    python -m solostep.benchmarks.gate --update   # measures the baseline anew: do this with a change that is meant

Two held-out prompts of the demo, 17 frames of 64x64, three steps, one seed. Of each mode, relative L2 errors to the
fp32 network: what each block adds to its input, on the reference's own inputs in the middle of the trajectory; the
guided velocity of each step on the reference's latents; the latents at the end of a free run.

Noise. Number formats are measured with everything else in fp32, where their error stands alone: another BLAS moves it
by what it moves fp32, and the margin can be small. Modes that compute in bf16 carry its roundings, which are another
CPU's own; they are held as ratios to plain bf16, measured in the same run. The baseline holds the interval of a value
over runs whose initial noise was moved by 1e-6, the rounding of fp32, which draws all other roundings anew; the margin
(:data:`MARGINS`) stands around that interval. A value below it fails too: a smaller error is good news, and a new
baseline.

Cost: about 40 s of CPU time on a machine that is busy otherwise, most of it int8 products; 1 GB.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solostep.benchmarks.environment import environment
from solostep.benchmarks.results import read_json, write_json
from solostep.engine.checkpoint import ModelFolder, load, open_model
from solostep.engine.config import GenerationSettings
from solostep.engine.demo import demo_model
from solostep.engine.demo.captions import held_out_prompts
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.probe import cast_floats
from solostep.engine.request import filled_in
from solostep.engine.runtime import numerics
from solostep.engine.sampling import GuidedVelocity, initial_noise
from solostep.engine.scheduler import euler_step, make_sigmas
from solostep.engine.text import PromptEmbedding, encode_prompts
from solostep.quant.recipe import default_recipe

BASELINE = Path(__file__).resolve().parent / "results" / "baseline-demo-cpu.json"
VERSION = 1
CLIP = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 3}
PROMPTS = 2
SEED = 1
MOVED = 1e-6
REPEATS = 2
"""Runs with moved noise that make a baseline's intervals, beside the plain one."""
CPU = torch.device("cpu")
Alter = Callable[[str, nn.Module], None]
"""Called with a row's name and its network, which it may change: how the tests make an error."""


@dataclass(frozen=True)
class Row:
    """A mode: format of the linears (None: as they are), kind of attention, type of everything else."""

    precision: str | None
    attention: str = "official"
    dtype: torch.dtype = torch.float32


FLOOR = "bf16"
ROWS = {
    FLOOR: Row(None, dtype=torch.bfloat16),
    **{name: Row(name) for name in ("int8", "fp8", "int8-weight", "fp8-weight", "nf4", "int4-weight")},
    "bf16, fused": Row(None, "bf16", torch.bfloat16),
    "int8, int8 attention": Row("int8", "int8", torch.bfloat16),
    "bf16, int8-fp8 attention": Row(None, "int8-fp8", torch.bfloat16),
}
MARGINS = {
    "block": {"fp32": 0.03, "bf16": 0.2, "floor": 0.5},
    "velocity": {"fp32": 0.25, "bf16": 0.35, "floor": 0.5},
    "latents": {"fp32": 1.0, "bf16": 1.0, "floor": 1.0},
}  # fmt: skip
"""Relative, on both sides of the baseline's interval: of formats alone, of ratios to plain bf16, and of bf16 itself,
whose roundings depend on the CPU and its BLAS. Moved noise changes a block's error by at most 1.1 %; but behind six
blocks the roundings of activations to 8 bits are drawn anew, which moves a velocity by up to 15 % and the end of a free
run by up to a factor of 1.9. So the blocks are what notices small changes, and the others what no block shows:
guidance, scheduler, text."""

Values = dict[str, float]
"""Of one row: "block 0" ..., "velocity 0" ..., "latents"."""


def kind(name: str) -> str:
    """Which margin a row has."""
    if name == FLOOR:
        return "floor"
    return "bf16" if ROWS[name].dtype == torch.bfloat16 else "fp32"


# --- measuring ----------------------------------------------------------------------------------------------------


class _Recording(nn.Module):
    """A block that keeps what goes in, row by row, and what it adds."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.kept: list[tuple[Tensor, Tensor, Any, Tensor]] = []

    def forward(self, x: Tensor, context: Tensor, modulation: Tensor, rope: Any) -> Tensor:
        out = self.block(x, context, modulation, rope)
        self.kept.append((x, modulation, rope, out - x))
        return out


@dataclass
class _Reference:
    """The fp32 run of one prompt: latents before each step and at the end, velocities, and the blocks of one step."""

    latents: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)
    blocks: list[_Recording] = field(default_factory=list)


@dataclass
class Gate:
    """The conditions of all rows, and the fp32 reference."""

    model: ModelFolder
    settings: GenerationSettings
    embeddings: list[list[PromptEmbedding]]
    sigmas: Tensor
    references: list[_Reference]
    alter: Alter

    @classmethod
    def ready(cls, moved: int = 0, alter: Alter = lambda name, network: None) -> Gate:
        """Texts encoded and the reference run; ``moved`` above 0 draws by how much the initial noise is moved."""
        model = open_model(demo_model())
        settings = filled_in(model.preset, CLIP, False)
        prompts = [p.text for p in held_out_prompts(PROMPTS)]
        with numerics():
            found = encode_prompts(
                model, [*prompts, model.preset.negative], CPU, torch.float32, None, lambda done, total: None
            )
            texts = [[found[p], found[model.preset.negative]] for p in prompts]
            sigmas = make_sigmas(settings.num_inference_steps, settings.time_shift)
            gate = cls(model, settings, texts, sigmas, [], alter)
            network = gate._network(None, torch.float32)
            for i, embeddings in enumerate(texts):
                noise, _ = initial_noise(settings, model.transformer_config.in_channels, SEED + i)
                if moved:
                    generator = torch.Generator().manual_seed(1000 * moved + i)
                    noise = noise * (1 + MOVED * torch.randn(noise.shape, generator=generator))
                gate.references.append(gate._reference(network, embeddings, noise))
        return gate

    @property
    def looked_at(self) -> int:
        """The step whose blocks are compared."""
        return self.settings.num_inference_steps // 2

    def _network(self, precision: str | None, dtype: torch.dtype) -> Any:
        recipe = None if precision is None else default_recipe(precision, "transformer")
        return load(self.model.components["transformer"], CPU, dtype, recipe=recipe)

    def _reference(self, network: Any, embeddings: list[PromptEmbedding], noise: Tensor) -> _Reference:
        made = _Reference([noise])
        recorders = [_Recording(block) for block in network.transformer_blocks]
        plain = GuidedVelocity(network, embeddings, self.settings)
        recorded = GuidedVelocity(network, embeddings, self.settings, blocks=recorders)
        for step in range(self.settings.num_inference_steps):
            velocity = (recorded if step == self.looked_at else plain)(made.latents[-1], self.sigmas[step])
            made.velocities.append(velocity)
            made.latents.append(self._stepped(made.latents[-1], velocity, step))
        made.blocks = recorders
        return made

    def _stepped(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        return euler_step(latents, velocity, self.sigmas[step], self.sigmas[step + 1])

    def measure(self, name: str) -> Values:
        """The errors of one row: root mean squares over prompts and branches."""
        row = ROWS[name]
        with numerics():
            network = self._network(row.precision, row.dtype)
            self.alter(name, network)
            squares: dict[str, list[float]] = {}
            for reference, embeddings in zip(self.references, self.embeddings, strict=True):
                velocity = GuidedVelocity(network, embeddings, self.settings, attention=row.attention)
                self._compare(velocity, reference, squares)
        return {key: (sum(found) / len(found)) ** 0.5 for key, found in squares.items()}

    def _compare(self, velocity: GuidedVelocity, reference: _Reference, squares: dict[str, list[float]]) -> None:
        for index, error in enumerate(_block_errors(velocity, reference.blocks)):
            squares.setdefault(f"block {index}", []).extend(error)
        free = reference.latents[0]
        for step, wanted in enumerate(reference.velocities):
            own = velocity(free, self.sigmas[step])
            # The first step of a free run begins where the reference does.
            forced = own if step == 0 else velocity(reference.latents[step], self.sigmas[step])
            squares.setdefault(f"velocity {step}", []).append(_square(forced, wanted))
            free = self._stepped(free, own, step)
        squares.setdefault("latents", []).append(_square(free, reference.latents[-1]))


def _block_errors(velocity: GuidedVelocity, recorded: Sequence[_Recording]) -> list[list[float]]:
    """Squares of each block's error on the reference's inputs, for each row of the batch."""
    errors: list[list[float]] = []
    for index, (block, known) in enumerate(zip(velocity.transformer.transformer_blocks, recorded, strict=True)):
        errors.append([])
        for row, (x, modulation, rope, added) in enumerate(known.kept):
            given, modulation, rope = cast_floats((x, modulation, rope), velocity.dtype)
            if velocity.fused is None:
                out = block(given, velocity.context[row], modulation, rope)
            else:
                out = velocity.fused(index, row, block, given.clone(), modulation, rope)
            errors[-1].append(_square(out.float() - x, added))
    return errors


def _square(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()).square().sum()) / b.double().square().sum())


def measure(
    names: Sequence[str], moved: int = 0, alter: Alter = lambda name, network: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Values]:  # fmt: skip
    """Errors of some rows; those in bf16 as ratios to plain bf16, which is then measured too."""
    gate = Gate.ready(moved, alter)
    wanted = list(names)
    if FLOOR not in wanted and any(kind(name) == "bf16" for name in wanted):
        wanted = [FLOOR, *wanted]
    found: dict[str, Values] = {}
    for name in wanted:
        say(name)
        values = gate.measure(name)
        found[name] = {k: v / found[FLOOR][k] for k, v in values.items()} if kind(name) == "bf16" else values
    return found


# --- the baseline -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One value beside its baseline. ``low`` and ``high`` are what passes."""

    row: str
    key: str
    value: float
    baseline: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high

    @property
    def change(self) -> float:
        """Relative to the baseline."""
        return self.value / self.baseline - 1


def conditions() -> dict[str, Any]:
    """What a baseline is of; it has to be measured anew when this changes."""
    components = open_model(demo_model()).components
    return {
        "clip": CLIP, "prompts": [p.text for p in held_out_prompts(PROMPTS)], "seed": SEED,
        "weights": {name: components[name].fingerprint for name in ("transformer", "step_llm", "hunyuan_clip")},
    }  # fmt: skip


def update(path: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Measures the baseline anew, with the interval of each value over moved noise.

    Raises:
        OutputError: it could not be written.
    """
    runs = [measure(list(ROWS), moved, say=say) for moved in range(REPEATS + 1)]
    rows = {
        name: {
            key: {"value": _short(value), "low": _short(min(seen)), "high": _short(max(seen))}
            for key, value in runs[0][name].items()
            if (seen := [run[name][key] for run in runs])
        }
        for name in ROWS
    }
    about = {"solostep_gate": VERSION, "conditions": conditions(), "runs": len(runs)}
    here = environment(CPU, "python -m solostep.benchmarks.gate --update")
    write_json(path, about | {"environment": here, "rows": rows})


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def read_baseline(path: Path) -> dict[str, Any]:
    """The rows of a baseline.

    Raises:
        UsageError: no baseline, or one of other conditions.
    """
    values = read_json(path)
    again = "measure it anew with `python -m solostep.benchmarks.gate --update`"
    if not isinstance(values, dict) or values.get("solostep_gate") != VERSION:
        raise UsageError(f"{path} is no baseline of this gate; {again}.")
    if values.get("conditions") != json.loads(json.dumps(conditions())):
        raise UsageError(f"{path} is of other prompts, another clip or another demo model; {again}.")
    missing = [name for name in ROWS if name not in values.get("rows", {})]
    if missing:
        raise UsageError(f"{path} has no row {missing[0]!r}; {again}.")
    return values["rows"]


def compare(found: Mapping[str, Values], baseline: Mapping[str, Any]) -> list[Compared]:
    """Every measured value beside its baseline."""
    compared = []
    for name, values in found.items():
        for key, value in values.items():
            known, margin = baseline[name][key], 1 + MARGINS[key.split()[0]][kind(name)]
            compared.append(
                Compared(name, key, value, known["value"], known["low"] / margin, known["high"] * margin)
            )  # fmt: skip
    return compared


def table(compared: Sequence[Compared]) -> Any:
    """Values that changed, or all of them."""
    from rich.table import Table

    made = Table("mode", "what", "baseline", "passes from", "to", "now", "change", "")
    for c in compared:
        unit = "x" if kind(c.row) == "bf16" else "%"
        shown = [f"{v:.2f} x" if unit == "x" else f"{100 * v:.3f} %" for v in (c.baseline, c.low, c.high, c.value)]
        made.add_row(c.row, c.key, *shown, f"{100 * c.change:+.1f} %", "" if c.passed else "CHANGED")
    made.caption = "relative L2 errors against fp32; x: times that of plain bf16 in the same run"
    return made


def verdict(compared: Sequence[Compared]) -> str:
    """One line."""
    changed = [c for c in compared if not c.passed]
    rows = len({c.row for c in compared})
    if not changed:
        return f"{len(compared)} errors of {rows} modes are as in the baseline."
    worst = max(changed, key=lambda c: abs(c.change))
    modes = ", ".join(dict.fromkeys(c.row for c in changed))
    return (
        f"{len(changed)} of {len(compared)} errors changed ({modes}), most of all {worst.row}, {worst.key}: "
        f"{100 * worst.change:+.1f} %. If that is meant: python -m solostep.benchmarks.gate --update"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="measure the baseline anew and write it")
    parser.add_argument("--report", action="store_true", help="show all values, not only those that changed")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="default: that of the repository")
    args = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    from rich.console import Console

    try:
        if args.update:
            update(args.baseline, say)
            print(args.baseline)
            return
        baseline = read_baseline(args.baseline)
        compared = compare(measure(list(ROWS), say=say), baseline)
    except SolostepError as error:
        print(str(error), file=sys.stderr)
        sys.exit(error.exit_code)
    shown = compared if args.report else [c for c in compared if not c.passed]
    if shown:
        Console(emoji=False).print(table(shown))
    print(verdict(compared))
    if not all(c.passed for c in compared):
        sys.exit(1)


if __name__ == "__main__":
    main()
