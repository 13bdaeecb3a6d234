"""Does the demo model do what its prompts say? Accuracies on held-out prompts, read off the decoded frames.

    python -m solostep.benchmarks.demo_score                      # the embedded model through the pipeline
    python -m solostep.benchmarks.demo_score --direct --device cuda -o score.json

Prompts are of combinations that no training clip had, half English, half Chinese. Kind, colour, background and motion
are read off the pixels by plain measurement (solostep/engine/demo/rules.py), which is first checked on drawn clips and
on VAE reconstructions of them: no score here can be better than those. Intervals are 95 % (Wilson).

`--direct` makes the videos in batches straight through the networks; without it each goes through the pipeline, as a
user's would.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solostep.engine.checkpoint import ModelFolder, open_model
from solostep.engine.demo.captions import held_out_prompts
from solostep.engine.demo.data import draw_clips, motion_score, psnr
from solostep.engine.demo.evaluate import (
    SPEED_SCORES,
    Player,
    grouped,
    image_score,
    load_network,
    prompt_score,
    reconstruct,
    vae_score,
)
from solostep.engine.demo.rules import read_clips
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.runtime import pick_device, pick_dtype

Say = Callable[[str], None]


def score_text_to_video(pipe: StepVideoPipeline, n: int, seed: int, say: Say) -> dict[str, Any]:
    """Accuracies over ``n`` held-out prompts, each made by the pipeline with seed ``seed + i``."""
    prompts = held_out_prompts(n)
    videos = []
    for i, prompt in enumerate(prompts):
        videos.append(torch.from_numpy(pipe(prompt.text, seed=seed + i, output_type="np", progress=False)))
        if i % 16 == 15:
            say(f"{i + 1} of {n} videos")
    return grouped(read_clips(videos), prompts)


def score_image_to_video(pipe: StepVideoPipeline, n: int, seed: int, say: Say) -> dict[str, Any]:
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
    vae = load_network(pipe.model.root, "vae", pipe.device, pipe.dtype)
    back = reconstruct(vae, images[:, None].to(pipe.device)).cpu()[:, 0]
    made = torch.stack([v[0] for v in videos]).permute(0, 3, 1, 2).float() / 127.5 - 1
    frame, own = psnr(made, images), psnr(back, images)
    moving = [i for i, a in enumerate(attributes) if a[3] < 4][:16]
    speeds = {}
    for score in SPEED_SCORES:
        some = [_image_video(pipe, prompts[i].text, images[i], score, seed + i) for i in moving]
        found = [r.speed for r in read_clips(some)]
        speeds[str(score)] = {"pixels_per_frame": sum(found) / max(len(found), 1), "n": len(found)}
        say(f"motion score {score:g}")
    return {
        "rules": grouped(read_clips(videos), prompts),
        "frame0_psnr": float(frame.mean()),
        "frame0_psnr_vae": float(own.mean()),
        "frame0_loss_db": float((own - frame).mean()),
        "speed": speeds,
    }


def _image_video(pipe: StepVideoPipeline, text: str, image: Tensor, score: float, seed: int) -> Tensor:
    frames = pipe(text, image=image, motion_score=score, seed=seed, output_type="np", progress=False)
    return torch.from_numpy(frames)


def score_model(
    folder: ModelFolder, precision: str, device: torch.device, n: int, seed: int, direct: bool, say: Say = print
) -> dict[str, Any]:
    """Everything about one model folder: the rules' own accuracy, its VAE, and its videos."""
    preset = folder.preset
    dtype = pick_dtype(precision)
    start = time.monotonic()
    result: dict[str, Any] = {
        "model": folder.source, "precision": precision, "device": str(device), "direct": direct, "n": n, "seed": seed,
        "steps": preset.num_inference_steps, "guidance_scale": preset.guidance_scale, "time_shift": preset.time_shift,
        "weights": {name: c.fingerprint for name, c in folder.components.items()},
    }  # fmt: skip
    with torch.inference_mode():
        vae = load_network(folder.root, "vae", device, dtype)
        result["vae"] = vae_score(vae, n, 2, preset.height)
    say(f"VAE {result['vae']['psnr']:.2f} dB on held-out clips")
    common = (preset.num_inference_steps, preset.guidance_scale, preset.height)
    if direct:
        player = Player.load(folder.root, device, dtype)
        if folder.is_image_to_video:
            result["image_to_video"] = image_score(player, n, seed, *common)
        else:
            result["text_to_video"] = prompt_score(player, held_out_prompts(n), seed, *common)[0]
    else:
        pipe = StepVideoPipeline(folder, precision, device, keep_loaded=True, cache=False)
        make = score_image_to_video if folder.is_image_to_video else score_text_to_video
        result["image_to_video" if folder.is_image_to_video else "text_to_video"] = make(pipe, n, seed, say)
    result["seconds"] = time.monotonic() - start
    return result


def report(result: dict[str, Any]) -> str:
    """A table for the screen."""
    lines = [f"{result['model']}  {result['precision']}  {result['device']}  {result['n']} prompts"]
    vae = result["vae"]
    lines.append(f"VAE on held-out clips: {vae['psnr']:.2f} dB (lowest clip {vae['psnr_lowest']:.2f})")
    rows = {"drawn clips": vae["rules_on_clips"], "VAE reconstructions": vae["rules_on_reconstructions"]}
    made = result.get("text_to_video") or result["image_to_video"]["rules"]
    rows |= {f"videos, {group}": table for group, table in made.items()}
    names = list(rows["drawn clips"])
    lines.append(" " * 24 + "".join(f"{name:>20}" for name in names))
    for label, table in rows.items():
        cells = [f"{table[k]['accuracy']:.3f} [{table[k]['low']:.2f},{table[k]['high']:.2f}]" for k in names]
        lines.append(f"{label:<24}" + "".join(f"{cell:>20}" for cell in cells))
    if image := result.get("image_to_video"):
        lines.append(
            f"frame 0 against the image: {image['frame0_psnr']:.2f} dB; the VAE alone {image['frame0_psnr_vae']:.2f} dB"
        )
        for score, row in image["speed"].items():
            lines.append(f"motion score {score}: {row['pixels_per_frame']:.2f} pixels per frame (n = {row['n']})")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="demo_score", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder of the demo model (default: the embedded one)")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device")
    parser.add_argument("-n", type=int, default=128, help="prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--direct", action="store_true", help="in batches, straight through the networks")
    parser.add_argument("-o", "--output", type=Path, help="write everything as JSON")
    args = parser.parse_args(arguments)
    model = args.model
    if model is None:
        import solostep.engine.demo as demo

        model = Path(demo.__file__).parent / "t2v"
    result = score_model(open_model(model), args.precision, pick_device(args.device), args.n, args.seed, args.direct)
    print(report(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
