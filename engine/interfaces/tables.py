"""Tables of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..units import size

if TYPE_CHECKING:
    from ..golden import Result


def verify_table(console: Console, results: Sequence[Result]) -> None:
    """One line a tensor, and a last line with the count."""
    table = Table(show_edge=False, pad_edge=False)
    for title in ("case", "tensor", "type"):
        table.add_column(title, no_wrap=True)
    for title in ("max abs", "rel. L2"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("limit", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for r in results:
        verdict = "[green]ok[/green]" if r.passed else "[bold red]OVER[/bold red]"
        if r.error:
            verdict = "[bold red]FAILED[/bold red]"
        table.add_row(
            escape(r.case), escape(r.tensor), r.dtype, f"{r.max_abs:.1e}", f"{r.rel_l2:.1e}", r.limit, verdict
        )
    if not console.is_terminal:
        console.width = 160  # a file has no width; cut names help nobody
    console.print(table)
    for r in results:
        if r.error:
            console.print(f"{escape(r.case)} ({r.dtype}): {escape(r.error)}", soft_wrap=True, highlight=False)
    failed = sum(not r.passed for r in results)
    cases = len({r.case for r in results})
    outcome = "all within their limits" if not failed else f"{failed} NOT within their limits"
    console.print(f"{len(results)} tensors of {cases} cases: {outcome}", highlight=False)


def info_table(console: Console, found: Mapping[str, Any]) -> None:
    """What a model folder holds."""
    console.print(escape(str(found["root"])), soft_wrap=True, highlight=False)
    if found.get("preset"):
        p = found["preset"]
        console.print(
            f"preset {p['name']}: {p['num_frames']} frames {p['height']}x{p['width']}, {p['num_inference_steps']} "
            f"steps, guidance {p['guidance_scale']:g}, time shift {p['time_shift']:g}",
            highlight=False,
        )
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("network", no_wrap=True)
    for title in ("parameters", "on disk", "bf16", "files"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("stored as", no_wrap=True)
    table.add_column("state", no_wrap=True)
    quantized = []
    for c in found["components"]:
        if c["problem"]:
            table.add_row(c["name"], "", "", "", "", "", "[bold red]see below[/bold red]")
            continue
        table.add_row(
            c["name"], f"{c['parameters']:,}", size(c["stored_bytes"]), size(2 * c["parameters"]), str(c["files"]),
            " ".join(c["dtypes"]), "[green]complete[/green]",
        )  # fmt: skip
        if c.get("quantization"):
            quantized.append((c["name"], c["quantization"]))
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    for name, q in quantized:
        counts = ", ".join(f"{count} {form}" for form, count in q["linears"].items())
        recipe = "" if q["recipe"] == q["precision"] else f" (recipe {q['recipe']})"
        stored = escape(q["precision"] + recipe)
        console.print(f"{name} is stored in {stored}: linears {counts}", soft_wrap=True, highlight=False)
    for problem in found["problems"]:
        console.print(f"[bold red]problem:[/bold red] {escape(problem)}", soft_wrap=True, highlight=False)
    if found.get("note"):
        console.print(f"[yellow]note:[/yellow] {escape(found['note'])}", soft_wrap=True, highlight=False)
