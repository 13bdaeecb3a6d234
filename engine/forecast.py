"""Plans in words: the table of `solostep plan` and of ``print(pipe.plan())``, and the line before a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .decoding import how_decoded
from .plan import LONGEST_TEXT
from .units import size

if TYPE_CHECKING:
    from .plan import Plan


TOLD = 1_000_000
"""Bytes beside a CPU's memory from which on they are told in a line."""


def time_text(seconds: float | None) -> str:
    """Seconds in the unit that one would say."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def places(plan: Plan) -> tuple[str, str]:
    """What the memory that blocks compute in is called, and the one beside it: of a card, or of a CPU."""
    return ("card", "host") if plan.on_card else ("memory", "beside it")


def described(values: dict[str, Any], stay: str = "on the card") -> str:
    """What a plan does, in words; from Plan.as_dict()."""
    streamed = values["streamed_blocks"]
    parts = [f"{values['resident_blocks']} of {values['resident_blocks'] + streamed} blocks stay {stay}"]
    if streamed:
        tier = f", {values['blocks_from_disk']} of them from disk" if values["blocks_from_disk"] else ""
        parts.append(f"{streamed} are streamed through {_slots(values)}{tier}")
    parts += spared(values)
    if values.get("frame_strips", 1) > 1:  # records of earlier versions do not say it
        parts.append(f"the first frame encoded in {values['frame_strips']} strips")
    if values["decode_frames"] is not None:
        parts.append(f"decoding {how_decoded(values['decode_frames'], values['decode_strips'])}")
    return "; ".join(parts)


def _slots(values: dict[str, Any]) -> str:
    return "1 slot" if values["slots"] == 1 else f"{values['slots']} slots"


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


def in_short(values: dict[str, Any]) -> str:
    """What a plan does beside keeping blocks, in a few words; from Plan.as_dict()."""
    parts = [_slots(values)] if values["streamed_blocks"] else []
    if values["blocks_from_disk"]:
        parts.append(f"{values['blocks_from_disk']} blocks from disk")
    if values["head_groups"] > 1:
        parts.append(f"heads in {values['head_groups']} groups")
    parts += [] if values["keep_text"] else ["text keys anew"]
    parts += ["a branch on the host"] if values["park"] else []
    if values["decode_frames"] is not None:
        strips = f" in {values['decode_strips']} strips" if values["decode_strips"] > 1 else ""
        parts.append(f"VAE by {values['decode_frames']}{strips}")
    return ", ".join(parts)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column begins, the others end, at the same place."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("   ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return lines


def plan_text(plan: Plan) -> str:
    """The stages, and what is done to fit."""
    rows = [("stage", *places(plan), "from disk", "time")]
    for stage in plan.stages:
        disk = size(stage.disk) if stage.disk else ""
        rows.append(
            (stage.name, size(stage.device + plan.context), size(stage.host), disk, time_text(stage.seconds))
        )  # fmt: skip
    disk = size(sum(stage.disk for stage in plan.stages))
    rows.append(("whole run", size(plan.device + plan.context), size(plan.host), disk, time_text(plan.seconds)))
    lines = columns(rows)
    lines.insert(1, "-" * max(map(len, lines)))
    lines += ["", f"{_what_is_done(plan)}.", *notes(plan)]
    return "\n".join(lines)


def where_blocks_stay(plan: Plan) -> str:
    """Of blocks that are not streamed, in words."""
    return "on the card" if plan.on_card else "in memory"


def _what_is_done(plan: Plan) -> str:
    return described(plan.as_dict(), where_blocks_stay(plan))


def notes(plan: Plan) -> list[str]:
    """What the figures of a plan hold, and where its times come from."""
    found = []
    if plan.step_seconds is not None:
        found.append(f"A step takes {time_text(plan.step_seconds)}.")
    if plan.program:
        found.append(
            f"Counted in: of the card {size(plan.context)} outside of torch, of the host {size(plan.program)} of the "
            "program itself."
        )
    else:
        found.append("On a CPU the program itself is not counted: a process takes so much more than the table says.")
    if plan.text_tokens >= LONGEST_TEXT:
        found.append("Counted for the longest prompt; a run counts its own, and takes less while denoising.")
    if plan.rated is not None:
        disk = f"{plan.rated.blocks.disk / 1e9:.3g} GB/s ({plan.rated.disk})"
        kept = plan.rated.kept.get("transformer", 0.0)
        there = f"; {kept:.0%} of the transformer's files is in the system's cache already" if kept else ""
        found.append(f"Rates: {plan.rated.source}; of the disk {disk}{there}.")
    return found


def plan_line(plan: Plan, given: bool) -> str:
    """What a run is going to take, in one line; ``given`` is whether a user set the budget."""
    of = f" of {size(plan.budget + plan.context)}" + ("" if given else " free")
    where, beside = places(plan)
    parts = [f"{where} {size(plan.device + plan.context)}{of}"]
    if plan.on_card or plan.host >= TOLD:
        parts.append(f"{beside} {size(plan.host)}")
    if not plan.on_card:
        parts.append("the program itself not counted")
    if plan.step_seconds is not None:
        parts.append(f"{time_text(plan.step_seconds)} a step")
    if plan.seconds is not None:
        parts.append(f"{time_text(plan.seconds)} in all")
    return f"{', '.join(parts)}; {_what_is_done(plan)}"
