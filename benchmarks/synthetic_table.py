"""Statistics of activations in one table: synthetic weights, normal random weights, and the trained demo model.

    python -m solostep.benchmarks.synthetic_table -o benchmarks/results/activation-statistics.md
    python -m solostep.benchmarks.synthetic_table --heads 4 --layers 12 --height 256 --width 256    # on a CPU

Two noise levels and both guidance branches; medians over blocks. Cost at the released size and 17 frames: 96 blocks
drawn and run with 6,324 tokens, four times each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from solostep.benchmarks.activation_statistics import record, summary
from solostep.benchmarks.entry import exit_code
from solostep.benchmarks.full_width import commit
from solostep.benchmarks.synthetic import TARGETS, Drawn, draw_block, draw_shell
from solostep.benchmarks.synthetic_samples import SyntheticSamples
from solostep.engine.activations import TransformerSamples, conditions_for
from solostep.engine.checkpoint import open_model
from solostep.engine.config import GenerationSettings, TransformerConfig
from solostep.engine.demo import demo_model
from solostep.engine.files import replacing
from solostep.engine.models.transformer import StepVideoTransformer, TransformerBlock
from solostep.engine.rates import random_weights
from solostep.engine.runtime import numerics, pick_device

COLUMNS = (
    ("stream", "outliers", "stream: outlier channels"), ("stream", "channels", "stream: worst channel / median"),
    ("stream", "kurtosis", "stream: kurtosis"), ("stream", "mean", "stream: energy in means"),
    ("stream", "added", "a block adds"), ("stream", "growth", "stream's growth"),
    ("attn1.wqkv", "channels", "into qkv: worst channel / median"), ("attn1.wqkv", "kurtosis", "into qkv: kurtosis"),
    ("attention", "key mean", "keys: energy in means"), ("attention", "entropy", "attention: entropy"),
    ("ff.net.0.proj", "channels", "into up: worst channel / median"),
    ("ff.net.2", "channels", "into down: worst channel / median"), ("ff.net.2", "kurtosis", "into down: kurtosis"),
    ("ff.net.2", "small", "into down: nearly zero"),
)  # fmt: skip


def normal_block(drawn: Drawn, i: int) -> TransformerBlock:
    """A block of normal random weights, for comparison."""
    return random_weights(lambda: TransformerBlock(drawn.dim, drawn.head_dim), drawn.device, drawn.seed + i)


def normal_shell(drawn: Drawn) -> StepVideoTransformer:
    """The rest of a DiT of normal random weights; its blocks, one of which is made and dropped, are on no device."""
    small = replace(drawn.config, num_layers=1)
    shell = random_weights(lambda: StepVideoTransformer(small), drawn.device, drawn.seed)
    shell.transformer_blocks = nn.ModuleList()
    return shell


def measured(config: TransformerConfig, settings: GenerationSettings, device: torch.device, seed: int,
             normal: bool = False) -> dict[str, dict[str, float]]:  # fmt: skip
    """Statistics of a drawn DiT's activations, or of one of normal random weights on the same inputs."""
    ways = (normal_block, normal_shell) if normal else (draw_block, draw_shell)
    with numerics():
        return summary(record(SyntheticSamples(config, settings, seed, device, 1, 2, *ways)))


def demo_measured(device: torch.device) -> dict[str, dict[str, float]]:
    """The same of the trained demo model, on its own trajectories."""
    model = open_model(demo_model())
    with numerics():
        conditions = conditions_for(model, times=2)
        samples = TransformerSamples(model, conditions, device, torch.bfloat16, lambda stage, done, total: None)
        return summary(record(samples))


def table(columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown: a row for each number, a column for each model, and the synthetic weights' target."""
    lines = ["| | " + " | ".join(columns) + " | target |", "|---" * (len(columns) + 2) + "|"]
    for place, key, name in COLUMNS:
        low_high = TARGETS.get((place, key))
        target = "" if low_high is None else f"{low_high[0]:g} to {low_high[1]:g}"
        values = " | ".join(f"{found[place][key]:.3g}" for found in columns.values())
        lines.append(f"| {name} | {values} | {target} |")
    return "\n".join(lines) + "\n"


def told(args: argparse.Namespace, device: torch.device) -> None:
    """Measures the three, and prints or writes the table."""
    config = TransformerConfig(num_attention_heads=args.heads, num_layers=args.layers)
    settings = GenerationSettings(num_frames=args.frames, height=args.height, width=args.width)
    columns = {
        "synthetic": measured(config, settings, device, args.seed),
        "normal random": measured(config, settings, device, args.seed, normal=True),
        "demo, trained": demo_measured(device),
    }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    text = table(columns) + (
        f"\nMedians over blocks, bf16, on {where}, torch {torch.__version__}, commit {commit()}. Synthetic (seed "
        f"{args.seed}) and normal: {args.heads} heads, {args.layers} blocks, {settings.num_frames} frames at "
        f"{settings.height}x{settings.width}. Demo: 2 heads, 6 blocks, its own clip.\n"
    )
    if args.output is None:
        print(text)
        return
    with replacing(args.output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=544)
    parser.add_argument("--width", type=int, default=992)
    parser.add_argument("-o", "--output", type=Path, help="a file for the table, in Markdown")
    args = parser.parse_args()
    return exit_code(lambda: told(args, pick_device(args.device)))


if __name__ == "__main__":
    sys.exit(main())
