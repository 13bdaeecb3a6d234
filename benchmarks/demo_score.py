"""Does the demo model do what its prompts say, in each precision, and how far does each drift from bf16?

    python -m solostep.benchmarks.demo_score                      # the embedded model through the pipeline, bf16
    python -m solostep.benchmarks.demo_score --direct --precision int8 --precision fp8 -o score.json --markdown score.md

Prompts are of combinations that no training clip had, half English, half Chinese. Kind, colour, background and motion
are read off the pixels by plain measurement (solostep/engine/demo/rules.py), which is first checked on drawn clips and
on VAE reconstructions of them: no score here can be better than those. Intervals are 95 % (Wilson).

Drift is against bf16 with the same prompts, seeds and noise: the relative L2 distance of the final latents, and the
PSNR of the frames. Any precision but bf16 alone has bf16 made first.

`--direct` makes the videos in batches straight through the networks; without it each goes through the pipeline, as a
user's would.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solostep.benchmarks.full_width import commit
from solostep.engine.checkpoint import ModelFolder, open_model
from solostep.engine.demo.captions import held_out_prompts
from solostep.engine.demo.data import draw_clips, motion_score, psnr
from solostep.engine.demo.evaluate import (
    SPEED_SCORES,
    Made,
    Player,
    grouped,
    image_score,
    load_network,
    prompt_score,
    reconstruct,
    vae_score,
)
from solostep.engine.demo.rules import read_clips
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.precision import check_precision, choose_mode
from solostep.engine.request import describe_device, versions
from solostep.engine.runtime import numerics, pick_device, pick_dtype, release_memory

Say = Callable[[str], None]
BASE = "bf16"


def score_text_to_video(pipe: StepVideoPipeline, n: int, seed: int, say: Say) -> tuple[dict[str, Any], Made]:
    """Accuracies over ``n`` held-out prompts, each made by the pipeline with seed ``seed + i``; and the videos."""
    prompts = held_out_prompts(n)
    videos = []
    for i, prompt in enumerate(prompts):
        videos.append(pipe(prompt.text, seed=seed + i, progress=False))
        if i % 16 == 15:
            say(f"{i + 1} of {n} videos")
    made = _made(videos)
    return grouped(read_clips(made.videos), prompts), made


def _made(videos: Sequence[Any]) -> Made:
    frames = torch.stack([torch.from_numpy(video.frames) for video in videos])
    return Made(frames, torch.cat([video.latents.float().cpu() for video in videos]))


def score_image_to_video(pipe: StepVideoPipeline, n: int, seed: int, say: Say) -> tuple[dict[str, Any], Made]:
    """As :func:`solostep.engine.demo.evaluate.image_score`, through the pipeline."""
    prompts = held_out_prompts(n)
    size = pipe.model.preset.height
    attributes = [p.attributes for p in prompts]
    batch, u = draw_clips(attributes, 0, "cpu", size)
    images, scores = batch.video[:, 0], motion_score(u)
    videos = []
    for i, prompt in enumerate(prompts):
        videos.append(_image_video(pipe, prompt.text, images[i], float(scores[i]), seed + i))
        if i % 16 == 15:
            say(f"{i + 1} of {n} videos")
    made = _made(videos)
    vae = load_network(pipe.model.root, "vae", pipe.device, pipe.dtype)
    back = reconstruct(vae, images[:, None].to(pipe.device)).cpu()[:, 0]
    first = made.videos[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
    frame, own = psnr(first, images), psnr(back, images)
    moving = [i for i, a in enumerate(attributes) if a[3] < 4][:16]
    speeds = {}
    for score in SPEED_SCORES:
        some = [_image_video(pipe, prompts[i].text, images[i], score, seed + i) for i in moving]
        found = [r.speed for r in read_clips([torch.from_numpy(video.frames) for video in some])]
        speeds[str(score)] = {"pixels_per_frame": sum(found) / max(len(found), 1), "n": len(found)}
        say(f"motion score {score:g}")
    return {
        "rules": grouped(read_clips(made.videos), prompts),
        "frame0_psnr": float(frame.mean()),
        "frame0_psnr_vae": float(own.mean()),
        "frame0_loss_db": float((own - frame).mean()),
        "speed": speeds,
    }, made


def _image_video(pipe: StepVideoPipeline, text: str, image: Tensor, score: float, seed: int) -> Any:
    return pipe(text, image=image, motion_score=score, seed=seed, progress=False)


# --- drift --------------------------------------------------------------------------------------------------------


def frame_psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB ``[n, F]`` of the frames of uint8 videos ``[n, F, H, W, 3]``; infinite where frames are equal."""
    errors = [(x.double() - y.double()).square().flatten(1).mean(1) for x, y in zip(a, b, strict=True)]
    return 10 * torch.log10(255.0**2 / torch.stack(errors))


def drift(made: Made, base: Made) -> dict[str, float]:
    """How far videos are from those of the same prompts, seeds and noise in another precision.

    ``latents`` is the mean over the videos of |a - b| / |b|. ``psnr`` in dB is the mean over the frames that differ
    (infinite if none does), ``psnr_worst`` the lowest of a frame.
    """
    a, b = made.latents.double().flatten(1), base.latents.double().flatten(1)
    distances = (a - b).norm(dim=1) / b.norm(dim=1)
    frames = frame_psnr(made.videos, base.videos)
    finite = frames[frames.isfinite()]
    return {
        "latents": float(distances.mean()),
        "latents_largest": float(distances.max()),
        "psnr": float(finite.mean()) if len(finite) else math.inf,
        "psnr_worst": float(frames.min()),
    }


def rules(result: dict[str, Any]) -> dict[str, Any]:
    """The accuracies of a result, by group of prompts and aspect."""
    return result["image_to_video"]["rules"] if "image_to_video" in result else result["text_to_video"]


def apart(result: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Accuracies whose 95 % interval does not overlap that of another result, as "aspect (group)"."""
    ours, theirs = rules(result), rules(base)
    return [
        f"{aspect} ({group})"
        for group, table in ours.items()
        for aspect, row in table.items()
        if row["low"] > theirs[group][aspect]["high"] or row["high"] < theirs[group][aspect]["low"]
    ]


# --- all precisions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """One model on one device; every precision gets the same prompts, seeds and noise."""

    folder: ModelFolder
    device: torch.device
    n: int
    seed: int
    direct: bool
    say: Say = print

    def score(self, precision: str, text_precision: str | None = None) -> tuple[dict[str, Any], Made]:
        """The accuracies of one precision, and its videos (on the CPU).

        Raises:
            SolostepError: the precision is not to be had on this device, or the folder is stored in another.
        """
        dtype = pick_dtype("fp32" if precision == "fp32" else "bf16")
        start = time.monotonic()
        if self.direct:
            with numerics():
                player = self._player(precision, text_precision, dtype)
                scores, made = self._direct(player)
        else:
            pipe = StepVideoPipeline(
                self.folder, precision, self.device, keep_loaded=True, cache=False, text_precision=text_precision
            )
            score = score_image_to_video if self.folder.is_image_to_video else score_text_to_video
            scores, made = score(pipe, self.n, self.seed, self.say)
        kind = "image_to_video" if self.folder.is_image_to_video else "text_to_video"
        named = {"precision": precision, "text_precision": text_precision}
        seconds = time.monotonic() - start
        return {**named, kind: scores, "seconds": seconds}, Made(made.videos.cpu(), made.latents.float().cpu())

    def _player(self, precision: str, text_precision: str | None, dtype: torch.dtype) -> Player:
        transformer, llm = (self.folder.components[name] for name in ("transformer", "step_llm"))
        mode = choose_mode(transformer, precision, BASE, "--precision", dtype)
        default = "fp32" if precision == "fp32" else "bf16"
        text_mode = choose_mode(llm, text_precision, default, "--text-precision", dtype)
        return Player.load(self.folder.root, self.device, dtype, mode, text_mode)

    def _direct(self, player: Player) -> tuple[dict[str, Any], Made]:
        preset = self.folder.preset
        common = (self.seed, preset.num_inference_steps, preset.guidance_scale, preset.height)
        if self.folder.is_image_to_video:
            return image_score(player, self.n, *common)
        return prompt_score(player, held_out_prompts(self.n), *common)

    def vae(self) -> dict[str, Any]:
        """The VAE alone in bf16, and what the rules read in drawn clips and in its reconstructions of them."""
        with numerics():
            vae = load_network(self.folder.root, "vae", self.device, torch.bfloat16)
            return vae_score(vae, self.n, 2, self.folder.preset.height)


def labelled(precision: str, text_precision: str | None) -> str:
    return precision + (f", text {text_precision}" if text_precision else "")


def run(study: Study, precisions: Sequence[str | None], text_precision: str | None, command: str) -> dict[str, Any]:
    """Scores all precisions; None is what the folder is stored in. A folder that is stored quantized has no drift.

    Raises:
        UsageError: an unknown precision, before anything is made.
        SolostepError: the first precision is not to be had on this device; of the others it is noted.
    """
    folder = study.folder
    stored = folder.components["transformer"].quantization
    for precision in precisions:
        check_precision(precision)
    check_precision(text_precision, "--text-precision")
    wanted = [(p or (stored.precision if stored else BASE), text_precision) for p in precisions]
    if stored is None and wanted != [(BASE, None)]:
        wanted = [(BASE, None), *wanted]
    preset = folder.preset
    result: dict[str, Any] = {
        "model": folder.source, "device": describe_device(study.device), "direct": study.direct, "n": study.n,
        "seed": study.seed, "steps": preset.num_inference_steps, "guidance_scale": preset.guidance_scale,
        "time_shift": preset.time_shift, "weights": {name: c.fingerprint for name, c in folder.components.items()},
        "vae": study.vae(), "runs": {}, "missing": {}, "versions": versions(), "command": command, "commit": commit(),
    }  # fmt: skip
    study.say(f"VAE {result['vae']['psnr']:.2f} dB on held-out clips")
    base: Made | None = None
    for precision, text in dict.fromkeys(wanted):
        name = labelled(precision, text)
        try:
            scored, made = study.score(precision, text)
        except UsageError:
            raise
        except SolostepError as error:
            if not result["runs"]:
                raise
            result["missing"][name] = str(error)
            study.say(f"{name}: not on this device")
            continue
        if base is not None:
            scored |= {"drift": drift(made, base), "apart": apart(scored, result["runs"][BASE])}
        elif stored is None:
            base = made
        result["runs"][name] = scored
        release_memory(study.device)
        study.say(f"{name}: {scored['seconds']:.1f} s")
    return result


# --- tables -------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """Tables for the screen: the accuracies of each precision, then how far they are from bf16."""
    vae = result["vae"]
    lines = [
        f"{result['model']}  {result['device']}  {result['n']} prompts",
        f"VAE on held-out clips: {vae['psnr']:.2f} dB (lowest clip {vae['psnr_lowest']:.2f})",
    ]
    rows = {"drawn clips": vae["rules_on_clips"], "VAE reconstructions": vae["rules_on_reconstructions"]}
    for name, scored in result["runs"].items():
        rows |= {f"{name}: {group}": table for group, table in rules(scored).items()}
    names, width = list(rows["drawn clips"]), max(len(label) for label in rows) + 2
    lines.append(" " * width + "".join(f"{name:>20}" for name in names))
    for label, table in rows.items():
        cells = [f"{table[k]['accuracy']:.3f} [{table[k]['low']:.2f},{table[k]['high']:.2f}]" for k in names]
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    for name, scored in result["runs"].items():
        lines += [f"{name}: {line}" for line in _image_lines(scored)]
    for name, scored in result["runs"].items():
        if "drift" in scored:
            _, *cells = _row(name, scored, [])
            lines.append(f"{name} against {BASE}: accuracies overlap: {cells[0]}; latents {cells[1]}; PSNR {cells[2]}")
    return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in result["missing"].items())])


def _image_lines(scored: dict[str, Any]) -> list[str]:
    image = scored.get("image_to_video")
    if image is None:
        return []
    against = f"{image['frame0_psnr']:.2f} dB; the VAE alone {image['frame0_psnr_vae']:.2f} dB"
    speeds = [
        f"motion score {score}: {row['pixels_per_frame']:.2f} pixels per frame (n = {row['n']})"
        for score, row in image["speed"].items()
    ]
    return [f"frame 0 against the image: {against}", *speeds]


def _row(name: str, scored: dict[str, Any], aspects: Sequence[str]) -> list[str]:
    """Name, right answers of all prompts by aspect, whether the intervals overlap, and the drift."""
    table = rules(scored)["all"]
    cells = [name]
    for aspect in aspects:
        row = table[aspect]
        right = round(row["accuracy"] * row["n"])
        cells.append(f"{right} of {row['n']} [{row['low']:.2f}, {row['high']:.2f}]")
    if "drift" not in scored:
        return [*cells, "", "", ""]
    far = scored["drift"]
    return [
        *cells,
        "yes" if not scored["apart"] else "no: " + ", ".join(scored["apart"]),
        f"{far['latents']:.3f} ({far['latents_largest']:.3f})",
        f"{far['psnr']:.1f} ({far['psnr_worst']:.1f}) dB",
    ]


ASPECTS = ("kind", "colour", "background", "motion", "all")


def markdown(result: dict[str, Any]) -> str:
    """The table of precisions, as a page."""
    head = ["precision", *ASPECTS[:-1], "all four", "intervals overlap", "latents", "PSNR of frames"]
    rows = [_row(f"`{name}`", scored, ASPECTS) for name, scored in result["runs"].items()]
    how = "in batches straight through the networks" if result["direct"] else "through the pipeline"
    lines = [
        "# The demo model in each precision",
        "",
        f"{result['n']} held-out prompts, {result['steps']} steps, guidance {result['guidance_scale']:g}, {how};",
        "the same prompts, seeds and noise in every precision. Accuracies are read off the frames by plain",
        "measurement, with 95 % intervals (Wilson); *intervals overlap*: all of them, of all prompts and of each",
        "group, with bf16's. *latents*: relative L2 distance of the final latents to bf16's, the mean over the videos",
        "and the largest; *PSNR of frames*, to bf16's: the mean and the worst frame.",
        "",
        *(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)),
        "",
        *(f"- {name}: {line}." for name, scored in result["runs"].items() for line in _image_lines(scored)),
        *(f"- Not on this device: {name}: {reason}" for name, reason in result["missing"].items()),
        f"Made by `{result['command']}` at commit {result['commit']} on {result['device']};",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version) + ".",
    ]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """For JSON, which has no infinity: null in its place."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="demo_score", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder of the demo model (default: the embedded one)")
    parser.add_argument("--precision", action="append", help="of the transformer; may be given several times")
    parser.add_argument("--text-precision", help="of Step-LLM")
    parser.add_argument("--device")
    parser.add_argument("-n", type=int, default=128, help="prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--direct", action="store_true", help="in batches, straight through the networks")
    parser.add_argument("-o", "--output", type=Path, help="write everything as JSON (null is an infinite PSNR)")
    parser.add_argument("--markdown", type=Path, help="write the table of precisions as a page")
    args = parser.parse_args(arguments)
    if args.n < 1:
        parser.error(f"-n has to be at least 1, not {args.n}")
    model = args.model
    if model is None:
        from solostep.engine.demo import demo_model

        model = demo_model()
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = " ".join(["python -m solostep.benchmarks.demo_score", *given])
    try:
        study = Study(open_model(model), pick_device(args.device), args.n, args.seed, args.direct)
        result = run(study, args.precision or [None], args.text_precision, command)
    except SolostepError as error:
        sys.exit(str(error))
    print(report(result))
    if args.output:
        args.output.write_text(json.dumps(_plain(result), indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
