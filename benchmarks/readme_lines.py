"""Tables of benchmarks/README.md made of recorded lines (benchmarks/results/*.jsonl, a measurement each): a block of
the DiT, attention, decoding, and whole runs within budgets of memory. Of what was measured several times, the last line
counts; each row names its commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from solostep.engine.errors import UsageError
from solostep.engine.units import parse_size

RESULTS = Path("benchmarks/results")
BLOCK, DECODING, WHOLE, FILES = (RESULTS / f"{name}-h200.jsonl" for name in ("block", "vae", "whole", "files"))
"""FILES: a run from files beside one of the same model from pinned memory."""
KERNELS = tuple(RESULTS / f"kernels-h200{tokens}.jsonl" for tokens in ("", "-18972", "-5007"))

REPEATED = "\\* Memory ran out in a step of this run, which was repeated with fewer blocks on the card."
CHANGED = "A commit with a +: there were changes on top of it that were not committed; what ran cannot be checked out."
"""Below a table that has such rows."""


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
    """One chunk of 17 frames: seconds, memory beside the weights, distance from the whole chunk."""
    latest: dict[tuple[int, int], dict[str, Any]] = {}
    for line in _lines(root, DECODING):
        latest[line.get("at_once", 0), line.get("strips", 1)] = line
    # Lines up to c16138a tell the peak beside what a first run in strips had kept, too: of all, what the whole chunk
    # had beside its peak is taken off.
    held = latest[0, 1]["peak_gib"] - latest[0, 1]["peak_above_gib"]
    above = {place: line["peak_gib"] - held for place, line in latest.items()}
    rows = []
    for (frames, strips), line in sorted(latest.items(), key=lambda entry: -above[entry[0]]):
        how = f"{frames} frame{'s' * (frames > 1)} at a time" if frames else "whole"
        rows.append([
            how if strips == 1 else f"{how}, {strips} strips", f"{line['seconds']:.2f}",
            f"{above[frames, strips]:.1f} GiB", f"{line['error']:.1e}" if "error" in line else "", _decibels(line),
            line["commit"],
        ])  # fmt: skip
    heads = ["how", "seconds", "memory beside the weights", "error against the whole chunk, relative L2", "PSNR",
             "commit"]  # fmt: skip
    return _table(heads, rows)


def _decibels(line: dict[str, Any]) -> str:
    """Of a line's output beside the whole chunk; older lines have none, and equal numbers no finite one."""
    psnr = line.get("psnr_db", "")
    return psnr if isinstance(psnr, str) else f"{psnr:.1f} dB"


def attention_table(root: Path) -> list[str]:
    """Self-attention with the passes before it, at the lengths that were measured; and errors by kind of data."""
    rows: dict[str, list[str]] = {}
    errors: dict[str, dict[str, Any]] = {}
    lengths, commits = [], []
    for n, name in enumerate(KERNELS):
        lines = list(_lines(root, name))
        found = {line["variant"]: line for line in lines if line.get("operator") == "attention"}
        # They are of the same data at each length: those beside the first are shown.
        errors = {f"{line['errors']}, {line['backend']}": line for line in lines if "errors" in line} | errors
        for variant, line in found.items():
            if not variant.endswith(" + passes"):
                continue
            cells = rows.setdefault(variant.removesuffix(" + passes"), [""] * 2 * len(KERNELS))
            cells[2 * n : 2 * n + 2] = f"{line['ms']:.2f} ms", f"{line['ratio']:.2f}x"
        lengths.append(f"{int(found['bf16, cudnn']['shape'].split(' x ')[0]):,} tokens")
        commits.append(found["bf16, cudnn"]["commit"])
    heads = ["mode, back end", *(text for length in lengths for text in (length, "against cuDNN")),
             "error: N(0,1) / outliers / clusters"]  # fmt: skip
    made = []
    for plain, cells in rows.items():
        of = errors.get(plain, {})
        shown = " / ".join(f"{100 * of[kind]:.1f}" for kind in ("normal", "qknorm", "peaky") if kind in of)
        made.append([plain, *cells, f"{shown} %" if shown else ""])
    return [*_table(heads, made), "", f"Commit {', '.join(dict.fromkeys(commits))}; cuDNN without passes is 1.00x."]


def memory_table(root: Path) -> list[str]:
    """Whole runs under a hard cap: what the plan said and what was taken."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    whole = list(_lines(root, WHOLE))
    budgets = {line["vram"] for line in whole}
    beside = [line for line in _lines(root, FILES) if line["plan"]["blocks_from_disk"] or line["vram"] not in budgets]
    for line in [*whole, *beside]:
        frames = line["settings"]["num_frames"]
        files = _where_files_were(line)
        latest[line["precision"], frames, files, line["vram"]] = line
    rows = []
    for (precision, frames, where, vram), line in sorted(
        latest.items(), key=lambda entry: (entry[0][0] != "fp8", -entry[0][1], -_gigabytes(entry[0][3]), entry[0][2])
    ):
        plan, took = line["plan"], next(stage for stage in line["stages"] if stage["stage"] == "denoise")
        files, again = plan["blocks_from_disk"], any("is repeated" in event for event in line["events"])
        rows.append([
            f"{_gigabytes(vram):g} GB" + (f", {files} blocks from files {where}" if files else ""),
            precision, str(frames), str(plan["resident_blocks"]), f"{line['step_seconds'][-1]:.2f} s" + " *" * again,
            f"{plan['step_seconds']:.2f} s", f"{line['driver_peak_bytes'] / 1e9:.1f} GB",
            f"{plan['device_bytes'] / 1e9:.1f} / {took['gpu_peak_bytes'] / 1e9:.1f} GB",
            f"{took['host_peak_bytes'] / 1e9:.1f} GB", line["commit"],
        ])  # fmt: skip
    heads = ["`--vram`", "DiT", "frames", "blocks that stay, of 48", "the second step", "planned",
             "card, driver's count", "torch, denoising: planned / taken", "host, denoising", "commit"]  # fmt: skip
    told = {REPEATED: any(row[4].endswith("*") for row in rows), CHANGED: any(row[-1].endswith("+") for row in rows)}
    notes = [note for note, stands in told.items() if stands]
    return [*_table(heads, rows), *(part for note in notes for part in ("", note))]


def _where_files_were(line: dict[str, Any]) -> str:
    """Whether a run's blocks came from the disk or from what the system keeps of files in memory, by how long the model
    took to load beside what its disk was timed at; empty where no blocks came from files."""
    if not line["plan"]["blocks_from_disk"]:
        return ""
    loading = next(stage for stage in line["stages"] if stage["stage"] == "load transformer")
    planned = loading.get("planned_seconds")
    kept = planned is not None and loading["seconds"] < planned / 4
    return "at every step, which the system's cache held" if kept else "at every step"


def _gigabytes(size: str) -> float:
    return parse_size(size, "--vram") / 1e9


def _lines(root: Path, name: Path) -> Iterator[dict[str, Any]]:
    """The measurements of a file, without those that failed.

    Raises:
        UsageError: there is no such file, or none in it.
    """
    path = root / name
    found = read_lines(path) if path.is_file() else []
    if not (good := [line for line in found if "failed" not in line]):
        raise UsageError(f"{name} holds no measurement, which a table of README.md is made from.")
    yield from good


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of measurements.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as lines of measurements, such as `-o` appends: {error}") from None


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
