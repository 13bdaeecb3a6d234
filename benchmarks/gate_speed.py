"""Speed gate: has a change to the code made a block slower? On a card, as ratios to the official order of operations.

    python -m solostep.benchmarks.gate_speed                     # times a block here, 2.5 minutes; exit code 1: slower
    python -m solostep.benchmarks.gate_speed --lines new.jsonl   # what `full_width block -o new.jsonl` measured before

Seconds of two runs differ with the card's clock and heat. So only ratios are compared, each of a variant to the
official block that was timed in turns with it, with the last such ratio that is stored for the same card and clip
(results/block-*.jsonl). The official block of one run was timed from 0.799 to 0.806 s beside seven variants: 1 %, which
is what two ratios of the same code can differ by; a variant that has lost more than :data:`MARGIN` is slower. What has
become faster passes: append its lines to the stored ones. Nothing here runs in CI, which has no card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solostep.benchmarks.readme_lines import read_lines
from solostep.engine.errors import SolostepError, UsageError

RESULTS = Path(__file__).resolve().parent / "results"
MARGIN = 0.03
Ratios = dict[tuple[str, str], dict[str, tuple[float, str]]]
"""By card and clip: each variant's ratio and its commit."""


@dataclass(frozen=True)
class Speed:
    """A variant's ratio to the official block, now and as stored; None where there is none."""

    variant: str
    now: float | None
    stored: float | None
    commit: str = ""
    failed: str = ""

    @property
    def passed(self) -> bool:
        if self.now is None:
            return False
        return self.stored is None or self.now >= self.stored * (1 - MARGIN)


def ratios(lines: Iterable[Mapping[str, Any]]) -> Ratios:
    """The last ratio of each variant."""
    found: Ratios = {}
    for line in lines:
        for variant, ratio in line.get("ratio", {}).items():
            if line.get("what") == "block" and variant not in ("official", "plain"):
                found.setdefault((line["card"], line["clip"]), {})[variant] = ratio, line["commit"]
    return found


def compare(new: Sequence[Mapping[str, Any]], stored: Sequence[Mapping[str, Any]]) -> list[Speed]:
    """Every variant that was timed, or tried, beside what is stored of it.

    Raises:
        UsageError: nothing is stored for that card and clip, or nothing was timed.
    """
    before, compared = ratios(stored), []
    for (card, clip), variants in ratios(new).items():
        if (card, clip) not in before:
            raise UsageError(
                f"No speed is stored of {card} at {clip}: append the lines of `full_width block -o` to a file "
                f"{RESULTS.name}/block-*.jsonl first."
            )
        for variant, (ratio, _) in variants.items():
            known, commit = before[card, clip].get(variant, (None, ""))
            compared.append(Speed(variant, ratio, known, commit))
    for line in new:
        if line.get("what") == "block" and "failed" in line:
            compared.append(Speed(line["variant"], None, None, failed=line["failed"]))
    if not compared:
        raise UsageError("These lines hold no block beside the official one: measure them by `full_width block -o`.")
    return compared


def table(compared: Sequence[Speed]) -> str:
    """Plain text, a line a variant."""
    lines = [f"{'linears/attention':18} {'stored':>8} {'now':>8} {'change':>8}"]
    for c in compared:
        stored = "" if c.stored is None else f"{c.stored:.3f}x"
        now = "" if c.now is None else f"{c.now:.3f}x"
        change = "" if c.now is None or c.stored is None else f"{100 * (c.now / c.stored - 1):+.1f} %"
        said = c.failed or ("" if c.passed else f"SLOWER than at {c.commit}")
        lines.append(f"{c.variant:18} {stored:>8} {now:>8} {change:>8}  {said}".rstrip())
    return "\n".join(lines)


def measured() -> list[dict[str, Any]]:
    """A block in all variants, timed on this card."""
    from solostep.benchmarks.full_width import bench_block, described
    from solostep.engine.config import GenerationSettings
    from solostep.engine.runtime import numerics, pick_device

    device, settings = pick_device("cuda"), GenerationSettings()
    clip = f"{settings.height}x{settings.width}x{settings.num_frames}"
    with numerics():
        found = bench_block(settings, device, repeats=3)
        return [described({"what": "block", "clip": clip, **result}, device) for result in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    cost = "Without --lines, blocks are timed for two and a half minutes on an H200; the official one takes 19 GB."
    parser = argparse.ArgumentParser(prog="gate_speed", description=f"{(__doc__ or '').splitlines()[0]} {cost}")
    parser.add_argument("--lines", type=Path, help="what was measured before, in place of timing a block here")
    parser.add_argument("--stored", type=Path, nargs="+", help="default: results/block-*.jsonl of the repository")
    args = parser.parse_args(arguments)
    try:
        stored = [line for path in args.stored or sorted(RESULTS.glob("block-*.jsonl")) for line in read_lines(path)]
        compared = compare(measured() if args.lines is None else read_lines(args.lines), stored)
    except SolostepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(compared))
    slower = [c for c in compared if not c.passed]
    print(f"{len(compared) - len(slower)} of {len(compared)} variants are as fast as stored, within {MARGIN:.0%}.")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
