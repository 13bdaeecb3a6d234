"""`solostep plan`: what a run takes, stage by stage, before it begins; and a table over budgets."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import SolostepError, UsageError
from .console import guarded
from .tables import size

GB = 10**9
SWEEP = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141)
"""Budgets of the table, in GB: cards that there are."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(plan)


@guarded
def plan(
    model: Annotated[str, typer.Argument(help="A model folder, or t2v, turbo, ti2v: their sizes are known.")],
    vram: Annotated[
        str | None, typer.Option(help="Memory of the card to stay in, such as 24GB. Default: what is free here.")
    ] = None,
    host_ram: Annotated[
        str | None, typer.Option("--host-ram", help="Memory of the host to stay in. Default: what the run wants.")
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
        str | None, typer.Option(help="The card whose speed counts: cuda, cuda:1. Default: the first, if there is one.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="A table over budgets, from the smallest possible.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan (JSON) in place of the table.")] = False,
) -> None:
    """Show what a video takes before it is made: memory, disk and time of each stage within a budget."""
    import torch

    from ..memory import read_budgets
    from ..plan import CONTEXT, ask
    from ..runtime import free_memory, pick_device

    budget, host = read_budgets(vram, host_ram)
    there = pick_device(device) if device is not None or torch.cuda.is_available() else None
    if there is not None and there.type != "cuda":
        raise UsageError(f"--device {device}: a plan is for a CUDA card; leave --device out to plan for any.")
    asked = ask(
        model, precision, text_precision, attention, there, num_frames=frames, height=height, width=width,
        num_inference_steps=steps, guidance_scale=guidance,
    )  # fmt: skip
    if budget is None and not sweep:
        if there is None:
            raise UsageError("There is no CUDA card here; say with --vram which memory to plan for, or give --sweep.")
        budget = free_memory(there) + CONTEXT
    out = Console(emoji=False)
    if not out.is_terminal:
        out.width = 160  # a file has no width; cut names help nobody
    if sweep:
        rows = _sweep(asked, host)
        print(json.dumps(rows, indent=1)) if as_json else sweep_table(out, rows)
        return
    assert budget is not None
    found = asked.plan(budget, host)
    if as_json:
        print(json.dumps({"vram_bytes": budget, "attention": asked.attention, **found.as_dict()}, indent=1))
    else:
        plan_table(out, found, budget, f"{asked.mode.name}, attention {asked.attention}")


def _sweep(asked: Any, host: int | None) -> list[dict[str, Any]]:
    """Plans from the smallest budget to the first that keeps everything on the card."""
    rows = []
    least = asked.smallest()
    for budget in [least, *(gb * GB for gb in SWEEP if gb * GB > least)]:
        try:
            found = asked.plan(budget, host)
        except SolostepError:
            continue  # for want of host memory
        rows.append({"vram_bytes": budget, **found.as_dict()})
        if not found.blocks.streams and found.decode == (None, 1):
            break
    return rows


# --- tables -------------------------------------------------------------------------------------------------------


def time_text(seconds: float | None) -> str:
    """Seconds in the unit that one would say."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def described(values: dict[str, Any]) -> str:
    """What a plan does, in words; from Plan.as_dict()."""
    from ..plan import how_decoded

    streamed = values["streamed_blocks"]
    parts = [f"{values['resident_blocks']} of {values['resident_blocks'] + streamed} blocks stay on the card"]
    if streamed:
        slots = "1 slot" if values["slots"] == 1 else f"{values['slots']} slots"
        tier = f", {values['blocks_from_disk']} of them from disk" if values["blocks_from_disk"] else ""
        parts.append(f"{streamed} are streamed through {slots}{tier}")
    parts += spared(values)
    if values["decode_frames"] is not None:
        parts.append(f"decoding {how_decoded(values['decode_frames'], values['decode_strips'])}")
    return "; ".join(parts)


def spared(values: dict[str, Any]) -> list[str]:
    """What a plan does to take less memory."""
    found = []
    if values["head_groups"] > 1:
        found.append(f"attention in {values['head_groups']} groups of heads")
    if not values["keep_text"]:
        found.append("text keys computed anew")
    if values["park"]:
        found.append("one guidance branch waits in host memory")
    return found


def plan_table(out: Console, plan: Any, vram: int, title: str) -> None:
    """The stages, and what is done to fit."""
    from ..plan import CONTEXT

    values = plan.as_dict()
    out.print(f"[bold]within {size(vram)}[/bold] of the card, {escape(title)}", highlight=False)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for heading in ("card", "host", "from disk", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in plan.stages:
        disk = size(stage.disk) if stage.disk else ""
        host = size(stage.host) if stage.host else ""
        table.add_row(stage.name, size(stage.device + CONTEXT), host, disk, time_text(stage.seconds))
    table.add_row(
        "whole run", size(plan.device + CONTEXT), size(plan.host) if plan.host else "", "", time_text(plan.seconds),
        style="bold",
    )  # fmt: skip
    out.print(table)
    out.print(f"{described(values)}.", soft_wrap=True, highlight=False)
    if plan.step_seconds is not None:
        out.print(f"A step takes {time_text(plan.step_seconds)}.", highlight=False)


def sweep_table(out: Console, rows: list[dict[str, Any]]) -> None:
    """One line a budget."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("--vram", "blocks that stay", "host", "a step", "whole run"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what is done", overflow="fold")
    for row in rows:
        table.add_row(
            size(row["vram_bytes"]), str(row["resident_blocks"]), size(row["host_bytes"]),
            time_text(row["step_seconds"]), time_text(row["seconds"]), "; ".join(described(row).split("; ")[1:]),
        )  # fmt: skip
    out.print(table)
