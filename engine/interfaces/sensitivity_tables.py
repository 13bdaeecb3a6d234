"""What `solostep sensitivity` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from ...quant.formats import UNQUANTIZED
from ...quant.sensitivity import Table
from ..units import size


def print_tables(console: Console, found: Mapping[str, Any], formats: Sequence[str], top: int) -> None:
    """By kind of linear, the most sensitive linears of each format, and recipes from end to end."""
    table = Table.from_dict(found["table"])
    if not console.is_terminal:
        console.width = 160  # a file has no width; cut names help nobody
    sizes = ", ".join(f"{count} {name}" for name, count in found["samples"].items())
    blocks = len({x.block for x in table.linears})
    _say(console, f"{found['model']}, {found['network']}: {len(table.linears)} linears in {blocks} blocks; {sizes}")
    _say(console, "\nError of a block's output with one linear quantized, relative to what the block adds")
    _say(console, "(in brackets: of the linear's own output); root mean square over the blocks")
    console.print(_by_kind(table, formats))
    _say(
        console,
        f"\nThe {top} most sensitive linears of each format, by block: error of the linear's own output, of what",
    )
    _say(console, "the block adds (beside it in bf16), and of the residual stream; bytes that the format saves")
    console.print(_ranked(table, formats, top))
    _say(console, f"\nFrom end to end: relative error of the {'velocity' if _timed(found) else 'output'}")
    console.print(_end_to_end(table, found))
    if any("time" in entry for entry in found["end_to_end"]):
        _say(console, "time: of all products, where bf16 is 1")


def _say(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True, highlight=False)


def _new(left: Sequence[str], right: Sequence[str]) -> RichTable:
    table = RichTable(show_edge=False, pad_edge=False)
    for title in left:
        table.add_column(title, no_wrap=True)
    for title in right:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def percent(error: float) -> str:
    """Three digits of a relative error: 0.00392 -> 0.392 %."""
    return f"{100 * error:.3g} %" if error < 1 else f"{100 * error:.0f} %"


def _by_kind(table: Table, formats: Sequence[str]) -> RichTable:
    names = [*formats, UNQUANTIZED]
    made = _new(["linear"], names)
    kinds = {name: table.by_kind(name) for name in names}
    for kind in kinds[names[0]]:
        errors = [kinds[name][kind] for name in names]
        made.add_row(escape(kind), *(f"{percent(e.update)} ({100 * e.output:.2g})" for e in errors))
    return made


def _ranked(table: Table, formats: Sequence[str], top: int) -> RichTable:
    made = _new(["format", "linear"], ["output", "update", "in bf16", "stream", "saved"])
    for name in formats:
        for i, x in enumerate(table.ranked(name)[:top]):
            e = x.errors[name]
            made.add_row(
                escape(name) if i == 0 else "", f"{x.block}: {escape(x.kind)}", percent(e.output), percent(e.update),
                percent(x.errors[UNQUANTIZED].update), percent(e.stream), size(x.saved(name)),
            )  # fmt: skip
    return made


def _timed(found: Mapping[str, Any]) -> bool:
    return any(entry["by_time"] for entry in found["end_to_end"])


def _end_to_end(table: Table, found: Mapping[str, Any]) -> RichTable:
    entries = found["end_to_end"]
    levels = [sigma for sigma, _ in entries[0]["by_time"]]
    guided = any(entry["guided"] is not None for entry in entries)
    titles = ["mean", *(f"sigma {sigma:.2g}" for sigma in levels), "worst", *(["guided"] * guided)]
    made = _new(["recipe"], [*titles, "time", "weights"])
    whole = sum(x.bytes_in(UNQUANTIZED) for x in table.linears)
    for e in entries:
        values = [e["error"], *(error for _, error in e["by_time"]), e["worst"]]
        shown = [percent(value) for value in values]
        shown += ["" if e["guided"] is None else percent(e["guided"])] * guided
        shown += [f"{e['time']:.2f}", size(round(e["bytes"] * whole))] if "time" in e else ["", ""]
        made.add_row(escape(e["name"]), *shown)
    return made
