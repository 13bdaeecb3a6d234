"""Times every fused operator, attention back end and matrix product of a DiT block at full width, in one table.

    python -m solostep.benchmarks.kernels
    python -m solostep.benchmarks.kernels --tokens 18972 -o kernels.jsonl --markdown kernels.md
    python -m solostep.benchmarks.kernels --only epilogue cross -o kernels.jsonl

What stands together in the table was timed in turns, so that it shares the card's clock and heat; a time is the median
of all runs. Inputs are random normal numbers, never zeros (a GPU is faster on zeros). Rates count what an operator has
to read and write once, or its products; the ceiling is measured in the same run: a copy of a big tensor for passes, the
cuBLAS bf16 product of the qkv shape for products and attention. An error is the relative L2 distance on sampled rows to
the operator's own reference: for attention fp64 of the bf16 operands, for a quantized output the reference's own
quantized rows. The ratio is the time of the eager form in bf16 over that of the row; attention's is torch's cuDNN
kernel, *without* the passes before it, also where a row counts its own; that of products with an epilogue is torch's
FP8 product without one.

The second table has attention's errors at 8,192 keys on three kinds of data, means over eight draws, beside the bars of
the project.

Every operator's rows are written as soon as they are measured: a run that is cut keeps them, and --only makes the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solostep.benchmarks.full_width import commit
from solostep.benchmarks.kernel_cases import (
    Group,
    attention_group,
    attention_passes,
    gate_group,
    gelu_group,
    gemm_groups,
    norm_group,
    quantize_group,
)
from solostep.benchmarks.kernel_cases_rest import cross_group, epilogue_groups, norm_heads_group, text_group, vae_group
from solostep.benchmarks.linear_speed import DIM, milliseconds
from solostep.benchmarks.readme_lines import read_lines
from solostep.engine.choices import plain
from solostep.engine.files import replacing
from solostep.engine.machine import copy_rate, gpu_facts
from solostep.kernels.attention import BACKENDS, HEAD_DIM, MODES, Operands
from solostep.kernels.attention_check import exact, relative_error
from solostep.kernels.cards import one_line
from solostep.kernels.qk_norm_rope import k_mean_reference, quantize_qk_reference
from solostep.kernels.values import quantize_v

KINDS = ("normal", "qknorm", "peaky")
BARS = {"int8": (1.3e-2, 4e-3, 2.6e-2), "int8-fp8": (4.0e-2, 1.0e-2, 4.6e-2)}
"""Largest errors by kind of data."""
DATA_KEYS, DATA_QUERIES, DATA_HEADS, DATA_DRAWS = 8192, 256, 3, 8


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    operator: str
    shape: str
    variant: str
    ms: float
    rate: float
    unit: str
    fraction: float
    """Of the ceiling."""
    error: float | None
    ratio: float | None


def rows_of(
    group: Group, times: Mapping[str, float], errors: Mapping[str, float], ceilings: Mapping[str, float]
) -> list[Row]:
    """The lines of a group from its measured milliseconds."""
    found = []
    for case in group.cases:
        if case.name not in times:
            continue
        ms = times[case.name]
        rate = case.work / ms / 1e9  # units of 10^12 a second
        base = times.get(group.baseline)
        found.append(Row(
            group.name, group.shape, case.name, ms, rate, group.unit, rate / ceilings[group.unit],
            errors.get(case.name), None if base is None else base / ms,
        ))  # fmt: skip
    return found


def bench(group: Group, ceilings: Mapping[str, float], rounds: int, turn: float) -> tuple[list[Row], list[str]]:
    """Errors, then times in turns; and what did not work, one sentence each."""
    errors, runs, notes = {}, {}, []
    for case in group.cases:
        try:
            if case.error is not None:
                errors[case.name] = case.error()
            case.run()
            torch.cuda.synchronize()
        except Exception as error:  # whatever a compiler or another package raises is the finding
            notes.append(f"{group.name}, {case.name}: {one_line(error)}")
            errors.pop(case.name, None)
            continue
        runs[case.name] = case.run
    return rows_of(group, milliseconds(runs, rounds, turn), errors, ceilings), notes


# ---------------------------------------------------------------- errors on kinds of data


def attention_data(kind: str, keys: int = DATA_KEYS, queries: int = DATA_QUERIES, seed: int = 1) -> list[Tensor]:
    """q ``[queries, h, 128]``, k and v ``[keys, h, 128]``, bf16, on the CPU: the same numbers for every card.

    normal: N(0, 1). qknorm: normed, gains of 8 in four channels, means in keys and values. peaky: two channels of the
    keys at 30 and -25, sixteen clusters of keys and queries, values of very different channels.
    """
    g = torch.Generator().manual_seed(seed)
    h, d = DATA_HEADS, HEAD_DIM

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    q, k, v = normal(queries, h, d), normal(keys, h, d), normal(keys, h, d)
    if kind == "qknorm":
        gain = torch.ones(d)
        gain[torch.randperm(d, generator=g)[:4]] = 8.0
        q, k = (y * torch.rsqrt(y.square().mean(-1, keepdim=True)) * gain for y in (q, k + normal(h, d)))
        v = v + 2 * normal(h, d)
    elif kind == "peaky":
        k[..., 5], k[..., 77] = 30 + 2 * normal(keys, h), -25 + normal(keys, h)
        base = normal(16, h, d)
        k = k + 1.5 * base[torch.randint(0, 16, (keys,), generator=g)]
        q = q + 1.5 * base[torch.randint(0, 16, (queries,), generator=g)]
        v = v * (torch.rand(d, generator=g) * 4 + 0.2)
    elif kind != "normal":
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    return [x.bfloat16() for x in (q, k, v)]


def data_operands(q: Tensor, k: Tensor, v: Tensor, mode: str) -> Operands:
    """Operands of a mode from 16 bits; q and k are quantized in plain torch (the pass for it norms them, too)."""
    if mode == "bf16":
        return Operands(q, k, v)
    q8, k8, q_scale, k_scale = quantize_qk_reference(q.float(), k.float(), k_mean_reference(k.float()))
    x = Operands(q8, k8, v, q_scale, k_scale)
    if mode == "int8":
        return x
    v8, v_scale, v_mean = quantize_v(v)
    return Operands(q8, k8, v8, q_scale, k_scale, v_scale, v_mean)


def data_errors(device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """Relative L2 errors by mode, back end and kind of data, against fp64: means over draws, for a few queries on a
    peak make a tenth of the difference between two; and what did not work."""
    drawn: dict[tuple[str, str], dict[str, list[float]]] = {}
    notes: list[str] = []
    for kind, seed in itertools.product(KINDS, range(1, DATA_DRAWS + 1)):
        q, k, v = (x.to(device) for x in attention_data(kind, seed=seed))
        true = exact(q, k, v, torch.arange(len(q), device=device), range(DATA_HEADS))
        for mode in MODES:
            for name, backend in BACKENDS.items():
                if mode not in backend.modes or backend.available(device, mode) is not None:
                    continue
                try:
                    result = backend.run(data_operands(q, k, v, backend.operand_mode(mode)), mode, None, None)
                    drawn.setdefault((mode, name), {}).setdefault(kind, []).append(relative_error(result, true))
                except Exception as error:  # whatever it is, it is the finding
                    notes.append(f"attention, {mode}, {name}, {kind}: {one_line(error)}")
    found = {case: {kind: mean(errors) for kind, errors in kinds.items()} for case, kinds in drawn.items()}
    lines = [
        {"errors": mode, "backend": name, **errors, "bars": BARS.get(mode), "missed": missed(mode, errors)}
        for (mode, name), errors in found.items()
    ]
    return lines, sorted(set(notes))


def missed(mode: str, errors: Mapping[str, float]) -> list[str]:
    """Kinds of data with an error above its bar."""
    bars = dict(zip(KINDS, BARS.get(mode, ()), strict=False))
    return [kind for kind, error in errors.items() if kind in bars and not error <= bars[kind]]


# ---------------------------------------------------------------- the tables


def table(rows: Sequence[Row]) -> str:
    """Markdown; an operator's name stands in its first line only."""
    lines = [
        "| operator | variant | ms | rate | of the ceiling | error | against eager |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    before = None
    for row in rows:
        name = f"{row.operator}<br>{row.shape}" if (row.operator, row.shape) != before else ""
        before = row.operator, row.shape
        digits = 2 if row.unit == "TB/s" else 0
        error = "" if row.error is None else "exact" if row.error == 0 else f"{row.error:.1e}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells = [name, row.variant, f"{row.ms:.3f}", f"{row.rate:.{digits}f} {row.unit}", f"{row.fraction:.0%}"]
        lines.append(f"| {' | '.join([*cells, error, ratio])} |")
    return "\n".join(lines)


def error_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; an error above its bar is bold, the bar behind it."""
    found = [f"| mode | back end | {' | '.join(KINDS)} |", "|---|---|--:|--:|--:|"]
    for line in lines:
        bars, cells = line["bars"] or (None,) * len(KINDS), []
        for kind, bar in zip(KINDS, bars, strict=True):
            error = line.get(kind)
            text = "" if error is None else f"{error:.1e}"
            cells.append(f"**{text}** (bar {bar:.1e})" if kind in line["missed"] else text)
        found.append(f"| {line['errors']} | {line['backend']} | {' | '.join(cells)} |")
    return "\n".join(found)


def page(
    rows: Sequence[Row], errors: Sequence[Mapping[str, Any]], notes: Sequence[str], *about: Mapping[str, Any]
) -> str:
    """Everything, as Markdown; ``about`` each of the runs that it is of."""
    doc = (__doc__ or "").split("\n\n")
    second = [doc[3], error_table(errors)] if errors else []
    parts = ["# Kernels", doc[2], table(rows), *second, "\n".join(f"- {note}" for note in notes)]
    runs = ("<br>\n".join(", ".join(f"{key} {value}" for key, value in run.items()) for run in about),)
    return "\n\n".join(filter(None, [*parts, *runs])) + "\n"


_OF_ERRORS = ("errors", "backend", *KINDS, "bars", "missed")
"""What a line of errors says; the rest is of its run."""


def page_of(lines: Sequence[dict[str, Any]]) -> str:
    """The page of recorded lines: of what was measured several times the last one counts. The runs say of what they
    are where there are several."""
    names = [field.name for field in fields(Row)]
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    errors: dict[tuple[str, str], dict[str, Any]] = {}
    notes: dict[str, None] = {}
    for line in lines:
        if "operator" in line:
            rows[line["operator"], line["shape"], line["variant"]] = line
        elif "errors" in line:
            errors[line["errors"], line["backend"]] = line
        else:
            notes[line["note"]] = None
    runs: dict[str, dict[str, Any]] = {}
    for line in (*rows.values(), *errors.values()):
        about = {key: value for key, value in line.items() if key not in (*names, *_OF_ERRORS)}
        run = runs.setdefault(json.dumps(about), about | {"of": {}})
        run["of"][line.get("operator", "errors")] = None
    for run in runs.values():
        of = "; ".join(run.pop("of"))
        if len(runs) > 1:
            run["of"] = of
    shown = [Row(**{name: line[name] for name in names}) for line in rows.values()]
    return page(shown, list(errors.values()), list(notes), *runs.values())


def product_rate(tokens: int, rounds: int, turn: float, device: torch.device) -> float:
    """Operations a second of cuBLAS in bf16, at the shape of the qkv product."""
    x, w = (torch.randn(n, DIM, device=device, dtype=torch.bfloat16) for n in (tokens, 3 * DIM))
    ms = milliseconds({"bf16": lambda: F.linear(x, w)}, rounds, turn)["bf16"]
    return 2 * tokens * w.numel() / ms * 1e3


# ---------------------------------------------------------------- a run

Groups = Callable[[int, int, torch.device], Iterator[tuple[Group, list[str]]]]
"""For tokens, heads and a device: what is timed in turns, and what is not to be had. Made when its turn comes."""


def alone(make: Callable[[int, int, torch.device], Any]) -> Groups:
    """A part of one group, with notes or without."""

    def groups(tokens: int, heads: int, device: torch.device) -> Iterator[tuple[Group, list[str]]]:
        made = make(tokens, heads, device)
        yield made if isinstance(made, tuple) else (made, [])

    return groups


def each(make: Callable[[int, int, torch.device], Iterator[Any]]) -> Groups:
    """A part of several groups, with notes or without."""

    def groups(tokens: int, heads: int, device: torch.device) -> Iterator[tuple[Group, list[str]]]:
        for made in make(tokens, heads, device):
            yield made if isinstance(made, tuple) else (made, [])

    return groups


PARTS: dict[str, Groups] = {
    "norm": alone(lambda tokens, heads, device: norm_group(tokens, device)),
    "gate": alone(lambda tokens, heads, device: gate_group(tokens, device)),
    "gelu": alone(lambda tokens, heads, device: gelu_group(tokens, device)),
    "quantize": alone(lambda tokens, heads, device: quantize_group(tokens, device)),
    "norm-heads": alone(norm_heads_group),
    "passes": each(attention_passes),
    "attention": alone(attention_group),
    "sharp": alone(partial(attention_group, kind="sharp")),
    "cross": alone(cross_group),
    "text": alone(lambda tokens, heads, device: text_group(tokens, device)),
    "vae": alone(lambda tokens, heads, device: vae_group(tokens, device)),
    "products": each(lambda tokens, heads, device: gemm_groups(tokens, device)),
    "epilogue": each(lambda tokens, heads, device: epilogue_groups(tokens, device)),
}
"""By the names that --only takes."""
ERRORS = "errors"


class Kept:
    """What was measured so far: printed, appended to a file as JSON lines, and written as a page, each time anew."""

    def __init__(self, output: Path | None, markdown: Path | None, about: Mapping[str, Any]) -> None:
        self.output, self.markdown, self.about = output, markdown, about
        self.rows: list[Row] = []
        self.errors: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def add(self, rows: Sequence[Row] = (), notes: Sequence[str] = (), errors: Sequence[dict[str, Any]] = ()) -> None:
        self.rows += rows
        self.notes += notes
        self.errors += errors
        shown = [table(rows)] if rows else []
        print(*shown, *([error_table(errors)] if errors else []), *notes, sep="\n", flush=True)
        if self.output is not None:
            lines = [*map(asdict, rows), *errors, *({"note": note} for note in notes)]
            with self.output.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(plain(line | self.about)) + "\n" for line in lines)
        if self.markdown is not None:
            with replacing(self.markdown) as temporary:
                temporary.write_text(page(self.rows, self.errors, self.notes, self.about), encoding="utf-8")


def measure(
    names: Sequence[str], tokens: int, heads: int, rounds: int, turn: float, device: torch.device,
    ceilings: Mapping[str, float], kept: Kept,
) -> None:  # fmt: skip
    """Parts by name, one after the other. One that cannot be made, for want of memory or whatever it is, is noted."""
    for name in names:
        if name == ERRORS:
            lines, notes = data_errors(device)
            kept.add(notes=notes, errors=lines)
            continue
        groups = PARTS[name](tokens, heads, device)
        while True:
            try:
                group, missing = next(groups, (None, []))
                if group is None:
                    break
                rows, failed = bench(group, ceilings, rounds, turn)
            except Exception as error:  # a generator that raised has ended, and the next round with it
                rows, failed, missing = [], [f"{name}: {one_line(error)}"], []
            kept.add(rows, [*missing, *failed])
            group = None
            torch.cuda.empty_cache()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=75_888, help="default: 544 x 992, 204 frames")
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=300, help="milliseconds that one function is timed at a stretch")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, ERRORS], metavar="NAME",
                        help=f"these parts: {', '.join([*PARTS, ERRORS])}")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, help="append the results as JSON lines")
    parser.add_argument("--markdown", type=Path, help="write the tables as a page")
    parser.add_argument("--page", type=Path, help="measure nothing: write --markdown from the lines of this file")
    args = parser.parse_args(arguments)
    if args.page is not None and args.markdown is None:
        parser.error("--page needs --markdown, which says where the page goes")
    if args.tokens < 128 or args.heads < 1 or args.rounds < 1:
        parser.error("--tokens has to be at least 128, --heads and --rounds at least 1")
    for option, path in (("-o", args.output), ("--markdown", args.markdown)):
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            parser.error(f"{option} {path} has to be a file in a folder that is there")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.page is not None:
        text = page_of(read_lines(args.page))
        with replacing(args.markdown) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return
    if not torch.cuda.is_available():
        raise SystemExit("kernels needs a CUDA card")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    with torch.inference_mode():
        ceilings = {
            "TB/s": copy_rate(device) / 1e12,
            "TFLOP/s": product_rate(args.tokens, args.rounds, args.turn, device) / 1e12,
        }
        about = {
            "card": torch.cuda.get_device_name(), "driver": gpu_facts(device)["driver"], "torch": torch.__version__,
            "triton": version("triton"), "cuda": torch.version.cuda, "commit": commit(),
            **{f"ceiling, {unit}": round(value, 2) for unit, value in ceilings.items()},
        }  # fmt: skip
        kept = Kept(args.output, args.markdown, about)
        names = args.only or [*PARTS, ERRORS]
        measure(names, args.tokens, args.heads, args.rounds, args.turn, device, ceilings, kept)
    print(*(f"{key} {value}" for key, value in about.items()), sep="\n", flush=True)


if __name__ == "__main__":
    main()
