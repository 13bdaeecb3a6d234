"""Draws the picture of the README: five frames of some videos of the embedded demo model, a video a row.

python -m solostep.benchmarks.demo_picture -o demo.png "a red circle moving right on a blue background" ...
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from solostep.engine.pipeline import StepVideoPipeline

FRAMES = (0, 4, 8, 12, 16)
GAP = 4


def rows(prompts: Sequence[str], seed: int, precision: str) -> np.ndarray:
    """The picture ``[H, W, 3]``, uint8; every prompt is made at the demo's default settings."""
    pipe = StepVideoPipeline.from_pretrained(precision=precision, keep_loaded=True)
    made = []
    for prompt in prompts:
        frames = pipe(prompt, seed=seed, output_type="np", progress=False)
        line = np.full((frames.shape[1], 0, 3), 255, np.uint8)
        for index in FRAMES:
            line = np.concatenate(
                [line, np.pad(frames[index], ((0, 0), (0, GAP), (0, 0)), constant_values=255)], axis=1
            )
        made.append(np.pad(line, ((0, GAP), (0, 0), (0, 0)), constant_values=255))
    return np.concatenate(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--scale", type=int, default=2, help="how many times larger the picture is")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    from PIL import Image

    picture = rows(args.prompts, args.seed, args.precision)
    picture = picture.repeat(args.scale, axis=0).repeat(args.scale, axis=1)
    Image.fromarray(picture).save(args.output)


if __name__ == "__main__":
    main()
