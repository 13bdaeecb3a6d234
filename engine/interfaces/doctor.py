"""`solostep doctor`: this machine's facts and rates, and which kernels are right and fast on its card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UsageError
from ..files import replacing
from ..progress import ConsoleProgress
from ..units import size
from .console import console, guarded

STYLES = {"ok": "green", "wrong": "bold red", "failed": "bold red", "unavailable": "dim"}


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(doctor)


@guarded
def doctor(
    tokens: Annotated[
        int | None, typer.Option(help="Length to measure at. Default: 75888, 204 frames of 544 x 992.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer heads and products: about a minute.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu. Default: the first CUDA card.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write everything to a JSON file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything (JSON) in place of the tables.")] = False,
) -> None:
    """Check this machine: card, memory, transfer rates, and every attention and matrix-product kernel for error and
    speed. What is fastest and right is used from then on; a kernel that is wrong here never is."""
    if output is not None:
        _check_file(output, overwrite)
    from ..doctor import TOKENS, report
    from ..runtime import pick_device

    with ConsoleProgress(console) as progress:
        found = report(pick_device(device), TOKENS if tokens is None else tokens, quick, progress)
    text = json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False)
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text, flush=True)
    else:
        print_report(Console(emoji=False), found)


def _check_file(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder; give the name of a file.")
    if path.exists() and not overwrite:
        raise UsageError(f"--output {path} is already there; add --overwrite or choose another place.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"--output {path}: its folder is missing or cannot be written; choose another place.")


# --- tables -------------------------------------------------------------------------------------------------------


def print_report(out: Console, found: dict[str, Any]) -> None:
    """What report() found, as tables."""
    if not out.is_terminal:
        out.width = 160  # a file has no width; cut names help nobody
    _facts(out, found)
    if found["gpu"] is None:
        _runs(out, found)
    else:
        _examined(out, found)
    if found["choices_file"]:
        out.print(f"\nChoices are kept in {escape(found['choices_file'])}", soft_wrap=True, highlight=False)
    for note in found["notes"]:
        out.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True, highlight=False)


def _facts(out: Console, found: dict[str, Any]) -> None:
    table = Table(show_header=False, show_edge=False, pad_edge=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    host, gpu = found["host"], found["gpu"]
    if gpu is None:
        table.add_row("card", "none that torch sees")
    else:
        more = [f"compute capability {gpu['capability']}", f"{gpu['processors']} multiprocessors"]
        more += [str(gpu[key]) for key in ("power_limit", "clock") if gpu[key]]
        table.add_row("card", escape(f"{gpu['name']}: {', '.join(more)}"))
        table.add_row("driver", escape(str(gpu["driver"])))
        table.add_row("card memory", f"{size(gpu['memory_bytes'])}, {size(gpu['memory_free_bytes'])} free")
    table.add_row("processor", escape(f"{host['processor']}, {host['cores']} cores"))
    limit = host["cgroup_limit_bytes"]
    limited = "" if limit is None else f"; limited to {size(limit)} (cgroup)"
    table.add_row("memory", f"{size(host['ram_bytes'])}, {size(host['ram_available_bytes'])} free{limited}")
    table.add_row("system", escape(f"{host['system']}, Python {host['python']}"))
    names = [f"{name} {host[name] or 'not there'}" for name in ("solostep", "torch", "cuda", "triton")]
    table.add_row("versions", escape(", ".join(names)))
    rates = found["rates"]
    if rates is not None:
        for way, words in (("host_to_device", "host to card"), ("device_to_host", "card to host")):
            pinned, pageable = (rates[f"{way}_{kind}"] / 1e9 for kind in ("pinned", "pageable"))
            pcie = f" (PCIe {gpu['pcie']})" if gpu["pcie"] else ""
            table.add_row(words, f"{pinned:.1f} GB/s pinned, {pageable:.1f} pageable{pcie}")
        table.add_row("copy on the card", f"{rates['device_copy'] / 1e12:.2f} TB/s")
    disk = found["disk"]
    if disk is not None:
        rate = disk["bytes_per_second"]
        said = "cannot be read past the page cache" if rate is None else f"{rate / 1e9:.2f} GB/s read"
        table.add_row("disk", escape(f"{said}, at {disk['folder']}"))
    pinned = found["pinned"]
    if pinned is not None:
        speed = f" at {pinned['bytes_per_second'] / 1e9:.1f} GB/s" if pinned["bytes_per_second"] else ""
        table.add_row("pinned memory", escape(f"{size(pinned['largest_bytes'])}{speed}; {pinned['stopped']}"))
    out.print(table)


def _runs(out: Console, found: dict[str, Any]) -> None:
    """What runs without a card, where nothing is examined, and what a card would need."""
    of_attention = {f"attention, {entry['mode']}": entry["chosen"] for entry in found["attention"]}
    of_products = {f"products, {kind}": own["chosen"][0] for kind, own in found["products"].items() if own["chosen"]}
    table = Table(show_header=False, show_edge=False, pad_edge=False, box=None)
    for name, chosen in (of_attention | of_products).items():
        which = "" if chosen == "torch" else f" ({chosen})"
        table.add_row(f"[bold]{escape(name)}[/bold]", f"by torch{which}, not examined")
    out.print()
    out.print(table)
    missing = [
        (f"attention {entry['mode']} {v['backend']}", v) for entry in found["attention"] for v in entry["verdicts"]
    ]
    missing += [(f"product {entry['backend']}", entry) for entry in found["gemm"]]
    reasons: dict[str, list[str]] = {}
    for name, verdict in missing:
        if verdict["status"] == "unavailable":
            reasons.setdefault(verdict["reason"], []).append(name)
    for reason, names in reasons.items():
        out.print(f"not used, as {escape(reason)}: {escape(', '.join(names))}", soft_wrap=True, highlight=False)


def _examined(out: Console, found: dict[str, Any]) -> None:
    """What was examined on a card."""
    for entry in found["attention"]:
        out.print()
        size_of = "" if entry["tokens"] is None else f": {entry['tokens']:,} tokens, {entry['heads']} heads"
        _verdicts(out, f"attention, {entry['mode']}{size_of}", entry)
    if found["gemm"]:
        out.print()
        _gemms(out, found["gemm"], found["products"])
    if found["operators"]:
        out.print()
        _operators(out, found["operators"])


def _verdicts(out: Console, title: str, entry: dict[str, Any]) -> None:
    out.print(f"[bold]{escape(title)}[/bold]", highlight=False)
    kinds = list(dict.fromkeys(kind for v in entry["verdicts"] for kind in v["errors"]))
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("back end", no_wrap=True)
    for heading in ("ms", "with passes", "TFLOP/s", *(f"error, {kind}" for kind in kinds)):
        table.add_column(heading, justify="right")
    table.add_column("verdict", overflow="fold")
    for v in entry["verdicts"]:
        errors = [_error(v["errors"][kind]) if kind in v["errors"] else "" for kind in kinds]
        verdict = "chosen" if v["backend"] == entry["chosen"] else v["status"]
        table.add_row(
            v["backend"], _number(v["kernel_ms"], 2), _number(v["ms"], 2), _number(v["tflops"], 0), *errors,
            _styled(verdict, v["status"], v["reason"]),
        )  # fmt: skip
    out.print(table)


def _gemms(out: Console, entries: list[dict[str, Any]], products: dict[str, Any]) -> None:
    out.print("[bold]matrix products[/bold] (operands are quantized already)", highlight=False)
    chosen = {f"{kind} {name}" for kind, found in products.items() for name in found["chosen"][:1]}
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("linear", "M x N x K", "back end"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "TFLOP/s", "error"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", overflow="fold")
    for e in entries:
        error = "" if e["error"] is None and e["status"] != "wrong" else _error(e["error"])
        verdict = "chosen" if e["backend"] in chosen else e["status"]
        table.add_row(
            e["linear"], " x ".join(map(str, e["shape"] or ())), e["backend"], _number(e["ms"], 2),
            _number(e["tflops"], 0), error, _styled(verdict, e["status"], e["reason"]),
        )  # fmt: skip
    out.print(table)


def _operators(out: Console, verdicts: list[dict[str, Any]]) -> None:
    out.print("[bold]other kernels[/bold] (one that is wrong is replaced by plain torch)", highlight=False)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    table.add_column("error", justify="right")
    table.add_column("verdict", overflow="fold")
    for v in verdicts:
        errors = [e for e in v["errors"].values() if e is not None]
        missing = "" if not v["errors"] else "not finite"
        error = _error(max(errors)) if len(errors) == len(v["errors"]) and errors else missing
        table.add_row(v["backend"], error, _styled(v["status"], v["status"], v["reason"]))
    out.print(table)


def _styled(verdict: str, status: str, reason: str) -> str:
    said = verdict.upper() if status in ("wrong", "failed") else verdict
    return f"[{STYLES[status]}]{said}[/{STYLES[status]}]" + (f": {escape(reason)}" if reason else "")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _error(value: float | None) -> str:
    return "not finite" if value is None else "exact" if value == 0 else f"{value:.1e}"
