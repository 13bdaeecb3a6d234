"""How far one quantized linear is from the exact product, for every format, beside those of other packages.

    python -m solostep.benchmarks.linear_error
    python -m solostep.benchmarks.linear_error --device cuda -o linear.json --markdown linear-error.md

Weights and activations are bf16 numbers, as a network has them; so is each linear's result. The error is the relative
L2 distance to the product of the same numbers in fp64. The kinds of activations, at the widths of the 30B DiT (the
last is its ff.net.2; the others' 6,144 is every other linear's, and that of published figures):

| kind | activations [256, K] | weights [512, K] | K |
|---|---|---|---|
| normal | N(0, 1) | N(0, 0.02^2) | 6144 |
| outliers | N(0, 1), 1 % of the channels x 50 | N(0, 0.02^2) | 6144 |
| heavy tails | Student's t, 3 degrees of freedom | N(0, 0.02^2), rows x abs(t), 4 degrees | 6144 |
| gelu, wide gelu | GELU (tanh) of N(0, 2^2) | N(0, 0.02^2) | 6144, 24576 |

It ends with status 1 if one of our formats is above its bar or above its namesake of another package.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solostep.benchmarks.full_width import commit
from solostep.engine.request import describe_device
from solostep.engine.runtime import numerics, pick_device
from solostep.quant.formats import quantize_linear
from solostep.quant.recipe import default_recipe

TOKENS, OUT = 256, 512
BF16, CAST = "bf16", "e4m3 cast, no scale"
NAMESAKES: dict[str, tuple[str, ...]] = {
    "int8": ("torchao:int8",),
    "int8-plain": (),
    "fp8": ("torchao:fp8", "torchao:fp8-tensor"),
    # bitsandbytes computes channels with a value above 6 in 16 bits (on a CPU all of them): of int8 it has the weights.
    "int8-weight": ("torchao:int8-weight", "bnb:int8"),
    "fp8-weight": ("torchao:fp8-weight", CAST),
    "nf4": ("bnb:nf4",),
    "int4-weight": ("torchao:int4-weight", "torchao:int4-weight-asymmetric", "torchao:int4-weight-hqq"),
}
"""What stands beside each of our formats, and must not be better."""
NORMS, GELUS = ("normal", "outliers", "heavy tails"), ("gelu", "wide gelu")
BARS = {("int8", kind): 1.4e-2 for kind in (*NORMS, *GELUS)}
BARS |= {("fp8", kind): 3.9e-2 for kind in (*NORMS, *GELUS)}
USED_AT = dict.fromkeys(NORMS, "transformer_blocks.0.attn1.wqkv")
USED_AT |= dict.fromkeys(GELUS, "transformer_blocks.0.ff.net.2")
"""A linear of the DiT that has such an input: norm and attention outputs, and the hidden layer after GELU."""
ROUNDING = 1.005
"""Two implementations of one format differ by this much and mean nothing by it."""


@dataclass(frozen=True)
class Kind:
    """A kind of activations."""

    name: str
    channels: int
    make: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]

    def data(self, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Activations ``[256, K]`` and a weight ``[512, K]``, bf16; the same numbers on every device."""
        x, w = self.make(self.channels, torch.Generator().manual_seed(seed))
        return x.bfloat16().to(device), w.bfloat16().to(device)


def _normal(channels: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(TOKENS, channels, generator=g), torch.randn(OUT, channels, generator=g) * 0.02


def _outliers(channels: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x, w = _normal(channels, g)
    x[:, torch.randperm(channels, generator=g)[: channels // 100]] *= 50
    return x, w


def _student(shape: tuple[int, ...], degrees: int, g: torch.Generator) -> Tensor:
    squares = torch.randn(*shape, degrees, generator=g).square().mean(-1)
    return torch.randn(shape, generator=g) / squares.sqrt()


def _heavy(channels: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    _, w = _normal(channels, g)
    return _student((TOKENS, channels), 3, g), w * _student((OUT, 1), 4, g).abs()


def _gelu(channels: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x, w = _normal(channels, g)
    return F.gelu(x * 2, approximate="tanh"), w


KINDS = (
    Kind("normal", 6144, _normal),
    Kind("outliers", 6144, _outliers),
    Kind("heavy tails", 6144, _heavy),
    Kind("gelu", 6144, _gelu),
    Kind("wide gelu", 24576, _gelu),
)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Relative L2 distance; 0 for equal tensors."""
    return float((found.double() - exact).norm() / exact.norm())


def as_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear.eval()


def make(name: str, linear: nn.Linear) -> nn.Module:
    """The linear in a format, ours or another's.

    Raises:
        ValueError: the format is not to be had here; says why.
    """
    if name == CAST:
        return as_linear(linear.weight.to(torch.float8_e4m3fn).to(linear.weight.dtype))
    return quantize_linear(copy.deepcopy(linear), name)  # other packages change the linear itself


def format_names() -> list[str]:
    """Every row of the table, our formats each followed by its namesakes."""
    return [BF16, *(name for ours, others in NAMESAKES.items() for name in (ours, *others))]


def measure(seeds: int, device: torch.device, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, str]]:
    """Errors by format and kind, ``{"mean", "largest", "all"}``; and the formats that are not here, with the reason."""
    errors: dict[str, dict[str, list[float]]] = {}
    missing: dict[str, str] = {}
    for kind in KINDS:
        for seed in range(seeds):
            x, weight = kind.data(seed, device)
            exact = x.double() @ weight.double().T
            for name in format_names():
                if name in missing:
                    continue
                try:
                    # A format that is refused is refused on its first use, so that no row is left half full.
                    found = make(name, as_linear(weight))(x)
                except ValueError as error:
                    missing[name] = str(error)
                    continue
                errors.setdefault(name, {}).setdefault(kind.name, []).append(relative_error(found, exact))
        say(f"{kind.name} done")
    table = {
        name: {kind: {"mean": math.fsum(v) / len(v), "largest": max(v), "all": v} for kind, v in row.items()}
        for name, row in errors.items()
    }
    return table, missing


def faults(table: dict[str, Any]) -> list[str]:
    """Bars that do not hold, and namesakes that are better than ours, one sentence each."""
    found = []
    for (name, kind), bar in BARS.items():
        largest = table[name][kind]["largest"]
        if not largest <= bar:
            found.append(f"{name}, {kind}: {largest:.2e} is above its bar of {bar:.1e}.")
    for ours, others in NAMESAKES.items():
        for other in others:
            for kind, cell in table.get(other, {}).items():
                used = default_recipe(ours, "transformer").format_of(USED_AT[kind])
                mean = table[used][kind]["mean"]
                if not mean <= cell["mean"] * ROUNDING:
                    found.append(f"{ours}, {kind}: {mean:.2e} with {used}, and {other} has {cell['mean']:.2e}.")
    return found


def is_used(name: str, kind: str) -> bool:
    """Whether ``--precision int8`` uses a format for such inputs."""
    return default_recipe("int8", "transformer").format_of(USED_AT[kind]) == name


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The cells of the table: name, then mean and largest error for each kind."""
    lines = []
    for name, row in result["errors"].items():
        cells = [f"{row[k.name]['mean']:.2e} ({row[k.name]['largest']:.2e})" for k in KINDS]
        lines.append([name, *(c + " *" if is_used(name, k.name) else c for c, k in zip(cells, KINDS, strict=True))])
    return lines


def report(result: dict[str, Any]) -> str:
    """The table for the screen."""
    head = ["", *(f"{k.name}, K = {k.channels}" for k in KINDS)]
    lines = [f"{head[0]:<32}" + "".join(f"{cell:>26}" for cell in head[1:])]
    lines += [f"{line[0]:<32}" + "".join(f"{cell:>26}" for cell in line[1:]) for line in rows(result)]
    lines += [f"not on this device: {reason}" for reason in result["missing"].values()]
    return "\n".join([*lines, *(result["faults"] or ["All bars hold, and no namesake is better than ours."])])


def markdown(result: dict[str, Any]) -> str:
    """The page of the docs."""
    head = ["format", *(f"{k.name}, K = {k.channels}" for k in KINDS)]
    cells = [[f"`{name}`", *(c.replace("*", r"\*") for c in row)] for name, *row in rows(result)]
    table = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)]
    lines = [
        "# Error of one linear",
        "",
        "Relative L2 distance of x W^T to the product of the same bf16 numbers in fp64; the mean over",
        f"{result['seeds']} seeds, the largest in brackets. x is {TOKENS} tokens, W has {OUT} rows. *normal*: N(0, 1);",
        "*outliers*: 1 % of the channels x 50; *heavy tails*: Student's t with 3 degrees of freedom, and rows of W",
        "with heavy-tailed gains; *gelu*: after GELU. The row `bf16` is what the rounding of the result alone costs.",
        "",
        *table,
        "",
        r"\* What `--precision int8` uses there.",
        "Below each of our formats stand its namesakes of other packages. `bnb:int8` is beside `int8-weight`, because",
        "it computes channels with a value above 6 in 16 bits, on a CPU all of them.",
        "",
        *(f"- Not on this device: {reason}" for reason in result["missing"].values()),
        *(f"- **{fault}**" for fault in result["faults"]),
        "",
        f"Made by `{result['command']}` at commit {result['commit']} on {result['device']};",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "torchao", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"torch": torch.__version__}


def run(seeds: int, device: torch.device, command: str, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures everything; the result is what ``-o`` writes."""
    with numerics():
        errors, missing = measure(seeds, device, say)
    return {
        "errors": {name: errors[name] for name in format_names() if name in errors},
        "missing": missing, "faults": faults(errors), "bars": [[*key, bar] for key, bar in BARS.items()],
        "seeds": seeds, "tokens": TOKENS, "out": OUT, "device": describe_device(device), "versions": versions(),
        "command": command, "commit": commit(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="linear_error", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="write everything as JSON")
    parser.add_argument("--markdown", type=Path, help="write the table as a page")
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        parser.error(f"--seeds has to be at least 1, not {args.seeds}")
    given = sys.argv[1:] if arguments is None else list(arguments)
    result = run(args.seeds, pick_device(args.device), " ".join(["python -m solostep.benchmarks.linear_error", *given]))
    print(report(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(markdown(result), encoding="utf-8")
    if result["faults"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
