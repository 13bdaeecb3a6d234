"""Drift at the released size on weights that are drawn as trained ones are distributed, or of any model.

    python -m solostep.benchmarks.full_size drift --frames 204 --times 2 --mode int8/int8 --mode fp8/int8 -o DIR
    python -m solostep.benchmarks.full_size drift --model demo --mode int8/int8 -o DIR
    python -m solostep.benchmarks.full_size drift --heads 2 --layers 3 --frames 17 --height 96 --width 96 -o DIR

For each mode, and for two noise floors, DIR gets one result as `solostep bench` writes them: errors of every block and
of its operators on the reference's inputs, and of the guided velocity of one step, at some noise levels. Sigma is 0 for
noise and 1 for video; of 50 steps at a time shift of 13, half are below 0.07, and the last is at 0.79. `--times 1` is
the step nearest to 0.5 (the 47th), `--times 2` the first and the last, `--at 25,0.5` the 26th and the one nearest to
0.5.

A pass takes up to --per-pass modes through all blocks at one noise level, and is kept in DIR/passes as soon as it is
done; a mode's result is written when its last pass is. Stopped or killed, the same command goes on behind the last
pass, and a further mode is all that is computed when one is added.

Cost on one H200, both branches of one text: at 204 frames 0.8 s a block in the official order, for each pass, and 0.4
to 0.65 s a mode, both with errors of blocks and with own streams; times 48 blocks and the noise levels. As recorded,
with own streams alone, the first pass (both floors and two modes) took 342 s, one of four more modes 191 s and one of a
single mode 90 s; at 51 frames, with all errors, a pass of four modes took 66 s. --texts N takes N times as long and N
times the memory of streams; one text gives numbers, but no interval. Memory: see lockstep.py.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from solostep.benchmarks.cell_card import sampling, summary
from solostep.benchmarks.entry import exit_code
from solostep.benchmarks.environment import clocks_of, environment
from solostep.benchmarks.lockstep import FLOORS, Lockstep, Mode
from solostep.benchmarks.matrix import code_identity
from solostep.benchmarks.results import read_json, same_measurement, write_json, write_result
from solostep.benchmarks.synthetic import GENERATOR, marked, marker
from solostep.benchmarks.synthetic_samples import SyntheticSamples
from solostep.engine.activations import PROMPTS, TransformerSamples, conditions_for, nearest_step, spread_steps
from solostep.engine.checkpoint import open_model
from solostep.engine.config import GenerationSettings, TransformerConfig
from solostep.engine.demo.captions import held_out_prompts
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.hub import DEMO
from solostep.engine.request import describe_device
from solostep.engine.runtime import host_peak, numerics, pick_device, release_memory
from solostep.quant.four_bit import expanded_by_torch

MODES = (
    "bf16/bf16", "int8/int8", "int8/int8-fp8", "fp8/int8", "int8-weight/bf16", "fp8-weight/bf16", "nf4/bf16",
    "int4-weight/bf16",
)  # fmt: skip
SYNTHETIC = "synthetic"
PER_PASS = 4
MEASURING = ("lockstep.py", "drift_*.py", "floors.py", "full_size.py", "synthetic*.py")
"""Of this folder, what the numbers depend on."""
FIELDS = ("blocks", "velocity", "error", "cosine", "stream", "operators", "backend", "note")
"""Of a Drift, what is kept of a pass."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a model or a design of synthetic weights, with its samples' conditions.

    Attributes:
        name: of the model in results.
        settings: the clip.
        prompts, seeds: of each pair.
        identity: in JSON's types, everything that numbers depend on beside mode and code.
        synthetic: the marker of results.
        samples: makes the samples on the device.
    """

    name: str
    settings: GenerationSettings
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    identity: dict[str, Any]
    synthetic: dict[str, Any] | bool
    samples: Callable[[], TransformerSamples]


def steps_at(text: str, settings: GenerationSettings) -> list[int]:
    """The steps that --at names, in order: a whole number is a step, counted from 0; a number with a point is a noise
    level, 0.0 noise ... 1.0 video, and stands for the step nearest to it.

    Raises:
        UsageError: something else, or no step of this run.
    """
    steps, found = settings.num_inference_steps, set()
    for part in text.split(","):
        try:
            value = int(part) if part.strip().isdecimal() else float(part)
        except ValueError:
            value = -1.0
        if not 0 <= value <= (steps - 1 if isinstance(value, int) else 1):
            raise UsageError(
                f"--at {text}: {part!r} is neither a step from 0 to {steps - 1} nor a noise level from 0.0 to 1.0."
            )
        found.add(value if isinstance(value, int) else nearest_step(settings, value))
    return sorted(found)


def synthetic_subject(args: argparse.Namespace, device: torch.device) -> Subject:
    """The released sizes, or those given, with drawn weights."""
    given = {"num_attention_heads": args.heads, "num_layers": args.layers}
    config = TransformerConfig(**{k: v for k, v in given.items() if v is not None})
    settings = GenerationSettings(
        num_frames=args.frames or 204, height=args.height or 544, width=args.width or 992,
        num_inference_steps=args.steps or 50,
    )  # fmt: skip
    prompts = 1 if args.texts is None else args.texts
    if args.at is None and not 1 <= args.times <= settings.num_inference_steps:
        raise UsageError(f"--times has to be from 1 to the {settings.num_inference_steps} steps, not {args.times}.")
    at = spread_steps(settings, args.times) if args.at is None else steps_at(args.at, settings)
    identity = {
        "generator": GENERATOR, "seed": args.seed, "config": asdict(config), "settings": settings.identity(),
        "at": at, "prompts": prompts,
    }  # fmt: skip
    return Subject(
        SYNTHETIC, settings, tuple(f"drawn text {p + 1}" for p in range(prompts)), (args.seed,) * prompts, identity,
        marked(args.seed),
        lambda: SyntheticSamples(config, settings, args.seed, device, prompts, at=at),
    )  # fmt: skip


def model_subject(args: argparse.Namespace, device: torch.device, say: Callable[[str, int, int], None]) -> Subject:
    """A model folder, with latents of its own trajectories."""
    if args.heads or args.layers:
        raise UsageError("--heads and --layers are sizes of drawn weights; leave them out with --model.")
    model = open_model(args.model)
    if model.components["transformer"].quantization is not None:
        raise UsageError(f"{args.model} is stored quantized, and drift is measured from bf16; give the original model.")
    is_demo = model.preset.name == "demo"
    known = [p.text for p in held_out_prompts(args.texts or 1)] if is_demo else PROMPTS
    if args.texts is not None and args.texts > len(known):
        raise UsageError(f"--texts {args.texts} is more than the {len(known)} that there are for this model.")
    texts = None if args.texts is None else known[: args.texts]
    at = None if args.at is None else functools.partial(steps_at, args.at)
    conditions = conditions_for(
        model, texts, None, args.times, at, num_frames=args.frames, height=args.height, width=args.width,
        num_inference_steps=args.steps,
    )  # fmt: skip
    seeds = tuple(conditions.seed + p for p in range(len(conditions.prompts)))
    names = ("transformer", "step_llm", "hunyuan_clip")
    identity = conditions.identity() | {"model": {n: model.components[n].fingerprint for n in names}}

    def samples() -> TransformerSamples:
        made = TransformerSamples(model, conditions, device, torch.bfloat16, say)
        for label in made.labels:
            label["step"] = conditions.looked_at[label["time"]]
        return made

    name = DEMO if args.model == DEMO else model.root.name
    return Subject(name, conditions.settings, conditions.prompts, seeds, identity, marker(model.root), samples)


def as_trial(subject: Subject, args: argparse.Namespace) -> Subject:
    """A subject of less than the whole network is named so: its errors stand in no table beside those of the whole."""
    less = {name: n for name in ("heads", "layers", "blocks") if (n := getattr(args, name)) is not None}
    if not less:
        return subject
    name = ", ".join([subject.name, *(f"{name} {n}" for name, n in less.items())])
    marker = subject.synthetic | less if isinstance(subject.synthetic, dict) else subject.synthetic
    return replace(subject, name=name, synthetic=marker)


# ---------------------------------------------------------------- passes


class Told:
    """Progress on stderr: how far, and an estimate of what is left, about once in five seconds."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.before = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if stage != self.before:
            self.start, self.before = now, stage
        if now - self.last < 5 and done < total:
            return
        self.last = now
        left = (now - self.start) * (total - done) / done if done else float("nan")
        estimate = f", about {left:.0f} s left" if 0 < done < total else ""
        print(f"{stage}: {done} of {total}, {now - self.start:.0f} s{estimate}", file=sys.stderr, flush=True)


def pass_file(root: Path, key: str, mode: Mode, time_index: int) -> Path:
    name = f"{mode.role}-{mode}".replace("/", "-").replace("@", "-")
    return root / "passes" / f"{key}-{time_index}-{name}.json"


def kept(file: Path) -> dict[str, Any] | None:
    """What a pass left; None where it did not end."""
    if not file.exists():
        return None
    try:
        values = read_json(file)
    except UsageError:
        return None  # it can be made again
    return values if isinstance(values, dict) and set(FIELDS) <= set(values) else None


def run_passes(
    samples: TransformerSamples, modes: Sequence[Mode], root: Path, key: str, args: argparse.Namespace, say: Told,
    which: str,
) -> None:  # fmt: skip
    """Every noise level with the modes that are missing there; each mode's numbers are written when its level ends."""
    times = sorted({label["time"] for label in samples.labels})
    for t in times:
        missing = [m for m in modes if kept(pass_file(root, key, m, t)) is None]
        if not missing:
            continue
        rows = [i for i, label in enumerate(samples.labels) if label["time"] == t]
        start = time.perf_counter()
        made = Lockstep(
            samples, missing, rows, args.what != "own", args.what != "blocks", args.operators, args.blocks, args.parked,
            lambda stage, done, total, t=t: say(f"{which}noise level {t + 1} of {len(times)}, {stage}", done, total),
        )  # fmt: skip
        if made.parked:
            print("Residual streams wait in host memory.", file=sys.stderr, flush=True)
        with sampling(samples.device) as sampled:
            sampled.busy = True
            drifts = made.run()
        seconds = time.perf_counter() - start
        of_pass = {"seconds": seconds, "modes": len(missing), "samples": sampled.samples}
        for drift in drifts:
            values = {name: getattr(drift, name) for name in FIELDS} | of_pass
            write_json(pass_file(root, key, drift.mode, t), values)
        del made, drifts
        release_memory(samples.device)


# ---------------------------------------------------------------- results


def joined(samples: TransformerSamples, found: Sequence[dict[str, Any]], pairs: int) -> dict[str, Any]:
    """Drift of one mode in the format of results, from its passes, one for each noise level."""
    labels = samples.labels
    times = range(len(found))
    rows = [[i for i, label in enumerate(labels) if label["time"] == t] for t in times]
    drift: dict[str, Any] = {}
    for name, key in (("blocks", "blocks"), ("stream", "stream")):
        if found[0][key] is not None:
            drift[name] = {
                "names": [str(i) for i in range(len(found[0][key]))],
                "error": [[e for one in found for e in one[key][i]] for i in range(len(found[0][key]))],
                "samples": [
                    {"pair": labels[i]["prompt"], "step": labels[i]["step"], "branch": labels[i]["branch"]}
                    for t in times for i in rows[t]
                ],
            }  # fmt: skip
    if found[0]["operators"]:
        drift["operators"] = {
            name: [[e for one in found for e in one["operators"][name][i]] for i in range(len(errors))]
            for name, errors in found[0]["operators"].items()
        }  # fmt: skip
    if found[0]["backend"] is not None:
        drift["attention_backend"] = found[0]["backend"]
    if found[0]["error"] is not None:
        drift["teacher"] = {
            "sigmas": [labels[rows[t][0]]["sigma"] for t in times],
            "error": [[found[t]["error"][p] for t in times] for p in range(pairs)],
            "cosine": [[found[t]["cosine"][p] for t in times] for p in range(pairs)],
        }
        drift["branches"] = {"error": [one["velocity"] for one in found]}
    return drift


def result_of(
    subject: Subject, mode: Mode, drift: dict[str, Any], where: dict[str, Any], identity: str,
    seconds: float, device: torch.device, events: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    s = subject.settings
    names = {"floor-backend": "floor: other back end", "floor-order": "floor: other order"}
    label = names.get(mode.role, f"{mode.precision} · {mode.attention} attention")
    if mode.backend:
        label += f" · {mode.backend}"
    cell = {
        "model": subject.name, "precision": mode.precision, "text_precision": None, "attention": mode.attention,
        "attention_backend": mode.backend, "recipe": None, "vram": None, "host_ram": None,
        "num_frames": s.num_frames, "height": s.height, "width": s.width, "num_inference_steps": s.num_inference_steps,
        "guidance_scale": s.guidance_scale, "time_shift": s.time_shift, "prompts": list(dict.fromkeys(subject.prompts)),
        "seeds": sorted(set(subject.seeds)), "role": mode.role,
        "levels": [name for name in ("blocks", "teacher") if name in drift],
    }  # fmt: skip
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "solostep_bench": 1, "id": identity, "cell": cell, "label": label, "synthetic": subject.synthetic,
        "environment": where, "seconds": seconds, "speed": None,
        "memory": {"gpu_peak_bytes": peak, "driver_peak_bytes": None, "host_peak_bytes": host_peak(), "stages": []},
        "plan": None, "events": list(events), "pairs": [
            {"prompt": p, "seed": n} for p, n in zip(subject.prompts, subject.seeds, strict=True)
        ],
        "drift": drift, "score": None, "frames": None,
    }  # fmt: skip


def drift(args: argparse.Namespace) -> list[Path]:
    """Measures and writes one result for each mode and floor; returns the files."""
    device, say = pick_device(args.device), Told()
    check_numbers(args)
    whole = args.model is None and args.heads is None and args.layers is None and args.blocks is None
    if whole and device.type == "cpu" and args.device is None:
        raise UsageError(
            "There is no CUDA card here, and the released size takes days on a CPU; give --model demo, a smaller one "
            "(--heads 2 --layers 4), or --device cpu if that is meant."
        )
    modes = list(dict.fromkeys(map(Mode.parse, args.mode or MODES)))
    modes = [*([] if args.no_floors else FLOORS), *modes]
    root: Path = args.output
    if root.exists() and not root.is_dir():
        raise UsageError(f"-o {root} is a file; give a folder.")
    subject = as_trial(model_subject(args, device, say) if args.model else synthetic_subject(args, device), args)
    everything = subject.identity | {
        "blocks": args.blocks, "what": args.what, "operators": args.operators, "device": describe_device(device),
        "code": code_identity(MEASURING),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]
    where = environment(device)
    identities = {m: hashlib.sha256(f"{key} {m.role} {m}".encode()).hexdigest()[:16] for m in modes}
    todo = [m for m in modes if not same_measurement(result_file(root, m, identities[m]), identities[m], where)]
    for mode in modes:
        if mode not in todo:
            print(f"{result_file(root, mode, identities[mode])} is there already.", file=sys.stderr)
    if not todo:
        return []
    if len(subject.prompts) == 1:
        print("One text: numbers, and no interval; --texts takes more.", file=sys.stderr)
    written: list[Path] = []
    try:
        with numerics():
            samples = subject.samples()
            groups = [todo[i : i + args.per_pass] for i in range(0, len(todo), args.per_pass)]
            for n, group in enumerate(groups):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                which = f"modes {n + 1} of {len(groups)}, " if len(groups) > 1 else ""
                run_passes(samples, group, root, key, args, say, which)
                made = [write_mode(subject, samples, m, root, key, identities[m], where, device) for m in group]
                shown(made)
                written += made
    except torch.OutOfMemoryError as error:
        raise SolostepError(
            f"{describe_device(device)} ran out of memory ({str(error).splitlines()[0]}); give --parked, a smaller "
            "--per-pass, or a shorter clip. Passes that ended are kept."
        ) from error
    return written


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UsageError for counts below 1."""
    for name in ("per_pass", "texts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} has to be at least 1, not {value}.")


def result_file(root: Path, mode: Mode, identity: str) -> Path:
    role = "" if mode.role == "mode" else f"{mode.role}-"
    return root / f"{role}{str(mode).replace('/', '-').replace('@', '-')}-{identity[:8]}.json"


def write_mode(
    subject: Subject, samples: TransformerSamples, mode: Mode, root: Path, key: str, identity: str,
    where: dict[str, Any], device: torch.device,
) -> Path:  # fmt: skip
    times = sorted({label["time"] for label in samples.labels})
    found = [kept(pass_file(root, key, mode, t)) for t in times]
    whole = [one for one in found if one is not None]
    if len(whole) != len(found):
        raise SolostepError(f"{root / 'passes'} lost a file while this ran; run the command again.")
    seconds = sum(one["seconds"] / one["modes"] for one in whole)
    values = joined(samples, whole, len(subject.prompts))
    plain = expanded_by_torch([mode.precision], device)
    events = list(dict.fromkeys([one["note"] for one in whole if one["note"]] + ([plain] if plain else [])))
    running = summary([sample for one in whole for sample in one["samples"]])
    result = result_of(subject, mode, values, clocks_of(where, running), identity, seconds, device, events)
    return write_result(result_file(root, mode, identity), result)


def shown(paths: Sequence[Path]) -> None:
    """A line for each result: median over blocks, and the velocity's error at each noise level."""
    for path in paths:
        values = read_json(path)
        found = values["drift"]
        line = f"{values['label']:<34}"
        if "blocks" in found:
            errors = sorted(e for block in found["blocks"]["error"] for e in block)
            line += f" block median {errors[len(errors) // 2]:.2e}, worst {errors[-1]:.2e};"
        if "operators" in found:
            middle = {n: statistics.median(e for block in b for e in block) for n, b in found["operators"].items()}
            worst = max(middle, key=lambda name: middle[name])
            line += f" operators up to {middle[worst]:.2e} ({worst});"
        if "teacher" in found:
            line += " velocity " + ", ".join(f"{e:.2e}" for row in found["teacher"]["error"] for e in row)
        print(f"{line}  {path}", *values["events"], sep="\n    ", flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("drift", help="errors of modes against bf16 in the official order")
    sub.add_argument("--model", help="demo, or a model folder; default: weights drawn at the released size")
    sub.add_argument("--frames", type=int)
    sub.add_argument("--height", type=int)
    sub.add_argument("--width", type=int)
    sub.add_argument("--steps", type=int, help="of the whole run, among which the noise levels are")
    sub.add_argument("--times", type=int, default=2, help="noise levels, spread over the steps; 1 is the middle one")
    sub.add_argument("--at", help="the noise levels themselves, in place of --times: STEP or SIGMA (with a point), ...")
    sub.add_argument("--mode", action="append", help=f"PRECISION/ATTENTION[@BACKEND]; default: {', '.join(MODES)}")
    sub.add_argument("--no-floors", action="store_true", help="leave out the two noise floors")
    together = f"modes that go through the blocks together; each pass computes the reference; default: {PER_PASS}"
    sub.add_argument("--per-pass", type=int, default=PER_PASS, help=together)
    texts = "so many, each as long again; default: 1 drawn one, or the 2 of a model"
    sub.add_argument("--texts", "--prompts", type=int, dest="texts", help=texts)
    sub.add_argument("--seed", type=int, default=0, help="of drawn weights, texts and latents")
    sub.add_argument("--heads", type=int, help="of drawn weights: default 48, 128 channels each")
    sub.add_argument("--layers", type=int, help="of drawn weights: default 48")
    sub.add_argument("--blocks", type=int, help="only so many blocks, for trials")
    what = "errors of blocks on the reference's input, of own streams through all blocks, or both"
    sub.add_argument("--what", choices=["both", "blocks", "own"], default="both", help=what)
    single = "with blocks' errors those of single operators, too"
    sub.add_argument("--operators", action=argparse.BooleanOptionalAction, default=True, help=single)
    sub.add_argument("--parked", action=argparse.BooleanOptionalAction, help="streams wait in host memory, or never")
    sub.add_argument("--device")
    sub.add_argument("-o", "--output", type=Path, required=True, help="folder of the results")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return exit_code(lambda: drift(args))


if __name__ == "__main__":
    sys.exit(main())
