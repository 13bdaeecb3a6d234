"""Tables of README.md made of recorded lines (benchmarks/results/*.jsonl, a measurement each): a block of the
DiT, and decoding. Of what was measured several times, the last line counts; each row names its commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from solostep.engine.errors import UsageError

RESULTS = Path("benchmarks/results")
BLOCK, DECODING = RESULTS / "block-h200.jsonl", RESULTS / "vae-h200.jsonl"


def block_table(root: Path) -> list[str]:
    """One block, both guidance branches: seconds, against the official order in the same run, memory, error."""
    latest: dict[str, dict[str, Any]] = {}
    for line in _lines(root, BLOCK):
        latest |= {variant: line for variant in line.get("seconds", {}) if variant != "plain"}
    # From the slowest kind of attention to the fastest, as far as rows of several runs can be ordered.
    names = sorted(latest, key=lambda name: (name != "official", latest[name]["ratio"][name]))
    rows = []
    for name in names:
        line = latest[name]
        error = line.get("error", {}).get(name)
        rows.append([
            "official, both branches in one batch" if name == "official" else " / ".join(name.split("/")),
            f"{line['seconds'][name]:.3f}", f"{line['ratio'][name]:.2f}x", f"{line['peak_above_gib'][name]:.1f} GiB",
            "" if error is None else f"{100 * error:.1f} %", line["commit"],
        ])  # fmt: skip
    heads = ["linears / attention", "seconds", "against the official order, same run", "GPU memory beside its input",
             "error of the block's update", "commit"]  # fmt: skip
    return _table(heads, rows)


def decoding_table(root: Path) -> list[str]:
    """One chunk of 17 frames: seconds, memory beside the weights, error against the whole chunk."""
    latest: dict[tuple[int, int], dict[str, Any]] = {}
    for line in _lines(root, DECODING):
        latest[line.get("at_once", 0), line.get("strips", 1)] = line
    rows = []
    for (frames, strips), line in sorted(latest.items(), key=lambda entry: -entry[1]["peak_above_gib"]):
        how = f"{frames} frames at a time" if frames else "whole"
        rows.append([
            how if strips == 1 else f"{how}, {strips} strips", f"{line['seconds']:.2f}",
            f"{line['peak_above_gib']:.1f} GiB", f"{line['error']:.1e}" if "error" in line else "", line["commit"],
        ])  # fmt: skip
    heads = ["how", "seconds", "memory beside the weights", "error against the whole chunk, relative L2", "commit"]
    return _table(heads, rows)


def _lines(root: Path, name: Path) -> Iterator[dict[str, Any]]:
    """The measurements of a file, without those that failed.

    Raises:
        UsageError: there is no such file, or none in it.
    """
    path = root / name
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    if not (good := [line for line in found if "failed" not in line]):
        raise UsageError(f"{name} holds no measurement, which a table of README.md is made from.")
    yield from good


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
