"""`solostep plan`: what a run takes, stage by stage, before it begins; and a table over budgets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import SolostepError, UsageError
from ..hub import DEMO
from ..units import size
from .console import console, guarded, say

if TYPE_CHECKING:
    from ..asked import Asked

GB = 10**9
SWEEP = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141)
"""Budgets of the table, in GB: cards that there are."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(plan)


@guarded
def plan(
    model: Annotated[
        str, typer.Argument(help="A model folder, or t2v, turbo, ti2v: their sizes are known; or the embedded demo.")
    ] = DEMO,
    vram: Annotated[
        str | None, typer.Option(help="Memory of the card to stay in, such as 24GB. Default: what is free here.")
    ] = None,
    host_ram: Annotated[
        str | None,
        typer.Option(
            "--host-ram", help="Memory of the host to stay in. Default: what is free; without a card here, any."
        ),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="As in generate.")] = None,
    height: Annotated[int | None, typer.Option(help="As in generate.")] = None,
    width: Annotated[int | None, typer.Option(help="As in generate.")] = None,
    steps: Annotated[int | None, typer.Option(help="As in generate.")] = None,
    guidance: Annotated[float | None, typer.Option(help="As in generate.")] = None,
    precision: Annotated[str | None, typer.Option(help="As in generate.")] = None,
    text_precision: Annotated[str | None, typer.Option(help="As in generate.")] = None,
    attention: Annotated[str | None, typer.Option(help="As in generate.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="The card whose speed counts: cuda, cuda:1. Default: the first, if there is one. Or cpu: its memory."
        ),
    ] = None,
    like: Annotated[
        str | None, typer.Option(help="Times by the stored rates of another card, measured on it: h200.")
    ] = None,
    converted: Annotated[
        bool, typer.Option("--converted", help="As if the model were stored in its precision (`solostep quantize`).")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="A table over budgets, from the smallest possible, --vram among them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan (JSON) in place of the table.")] = False,
) -> None:
    """Show what a video takes before it is made: memory, disk and time of each stage within a budget."""
    import torch

    from ..asked import ask
    from ..convert import check_format
    from ..memory import HOST_ALONE, read_budgets
    from ..plan import CONTEXT, check_host
    from ..runtime import free_memory, pick_device

    budget, host = read_budgets(vram, host_ram)
    there = pick_device(device) if device is not None or torch.cuda.is_available() else None
    on_cpu = there is not None and there.type == "cpu"
    if on_cpu and like is not None:
        raise UsageError("--like gives times of a card, and --device cpu plans for a CPU; leave one of them out.")
    if not on_cpu:
        check_host(host)
    elif host is not None and budget is None and not sweep:
        say(console, "note", HOST_ALONE)
        host = None
    if converted:
        check_format(precision, "--precision")
        check_format(text_precision, "--text-precision")
    asked = ask(
        model, precision, text_precision, attention, there, converted=converted, like=like, num_frames=frames,
        height=height, width=width, num_inference_steps=steps, guidance_scale=guidance,
    )  # fmt: skip
    for note in asked.settings.notes:
        say(console, "note", note)
    if there is None and budget is None and not sweep:
        raise UsageError(
            "There is no CUDA card here; say with --vram which memory to plan for, or give --sweep, or --device cpu."
        )
    if asked.rated is None and not on_cpu and (there is None or like is not None):
        known = "give --like h200 for those of that card" if like is None else f"none stored of {like} for this mode"
        say(console, "note", f"Times are not known here: {known}.")
    if host is None and asked.room is None:
        say(console, "note", "Host memory is planned without limit; say with --host-ram what the machine has.")
    out = Console(emoji=False)
    if not out.is_terminal:
        out.width = 160  # a file has no width; cut names help nobody
    clip = asked.settings
    title = (
        f"{clip.num_frames} frames of {clip.height}x{clip.width}, {clip.num_inference_steps} steps, {asked.mode.name}, "
        f"attention {asked.attention}"
    )
    about = {"precision": asked.mode.name, "text_precision": asked.text_mode.name, "attention": asked.attention}
    if sweep:
        rows = [about | row for row in _sweep(asked, budget, host)]
        if as_json:
            print(json.dumps(rows, indent=1))
        else:
            out.print(f"[bold]{escape(title)}[/bold]", highlight=False)
            sweep_table(out, rows, asked.on_card)
            rates = next((row["rates"] for row in rows if row.get("seconds") is not None), None)
            if rates is not None:
                out.print(f"Rates: {rates}.", highlight=False, markup=False)
        if any("convert the model" in row.get("refused", "") for row in rows):  # which the table leaves out
            say(console, "note", "A converted model (`solostep quantize`) takes less host memory: see --converted.")
        return
    if budget is None:
        assert there is not None and asked.room is not None
        budget = asked.room if on_cpu else free_memory(there) + CONTEXT
    found = asked.plan(budget, host)
    if as_json:
        print(json.dumps({**about, "vram_bytes": budget, **found.as_dict()}, indent=1))
    else:
        out.print(
            f"[bold]within {size(budget)} of {'memory' if on_cpu else 'the card'}: {escape(title)}[/bold]",
            highlight=False,
        )
        out.print(str(found), soft_wrap=True, highlight=False, markup=False)


def _sweep(asked: Asked, vram: int | None, host: int | None) -> list[dict[str, Any]]:
    """Plans from the smallest budget to the first that keeps everything on the card, ``vram`` among them."""
    from ..decoding import by_speed, first_choice

    rows = []
    best = first_choice(by_speed(asked.on_card, asked.attention))
    least = asked.smallest()
    # Where both are one memory, a budget beyond what is free is none.
    most = asked.room if host is None and not asked.on_card else None
    sizes = [gb * GB for gb in SWEEP if gb * GB > least and (most is None or gb * GB <= most)]
    wanted = {least, *sizes, *([] if vram is None else [vram])}
    for budget in sorted(wanted):
        try:
            found = asked.plan(budget, host)
        except SolostepError as error:
            rows.append({"vram_bytes": budget, "refused": str(error)})
            continue
        rows.append({"vram_bytes": budget, **found.as_dict()})
        if not found.blocks.streams and found.decode == best and budget >= (vram or 0):
            break
    return rows


def sweep_table(out: Console, rows: list[dict[str, Any]], on_card: bool = True) -> None:
    """A row for each budget, which fits 80 columns; of a card, or of a CPU's memory."""
    from ..forecast import in_short, time_text

    table = Table(show_edge=False, pad_edge=False)
    for heading in ("--vram", "blocks\nstay", "host" if on_card else "beside\nit", "a step", "whole\nrun"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what is done", overflow="fold")
    for row in rows:
        if "refused" in row:
            why = row["refused"].split("; ")[0]
            table.add_row(size(row["vram_bytes"]), "-", "-", "-", "-", f"not possible: {escape(why)}")
            continue
        table.add_row(
            size(row["vram_bytes"]), str(row["resident_blocks"]), size(row["host_bytes"]),
            time_text(row["step_seconds"]), time_text(row["seconds"]), in_short(row),
        )  # fmt: skip
    out.print(table)
