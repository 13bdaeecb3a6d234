"""Plots of the command line. matplotlib is imported when one is drawn, and without its global state."""

from __future__ import annotations

import io
import math

from ...quant.formats import UNQUANTIZED
from ...quant.sensitivity import Table


def sensitivity_plot(table: Table, title: str, kind: str = "png") -> bytes:
    """Errors over the blocks: a panel a format, a line a kind of linear, and what bf16 does to the whole block.

    Returns:
        The picture as a file of ``kind`` (png, svg, pdf).
    """
    from matplotlib.figure import Figure

    formats = [name for name in table.formats if name != UNQUANTIZED] or [UNQUANTIZED]
    kinds = list(dict.fromkeys(x.kind for x in table.linears))
    columns = min(4, len(formats))
    rows = math.ceil(len(formats) / columns)
    figure = Figure(figsize=(3.3 * columns + 1.2, 2.8 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    blocks = sorted({x.block for x in table.linears})
    marker = "o" if len(blocks) <= 12 else ""
    for panel, name in zip(panels.flat, formats, strict=False):
        for linear in kinds:
            own = [x for x in table.linears if x.kind == linear]
            errors = [max(x.errors[name].update, 1e-9) for x in own]  # none at all has no place on a log scale
            panel.plot([x.block for x in own], errors, label=linear, marker=marker, markersize=3, linewidth=1.2)
        if table.floors:
            floors = [table.floors.get(i, math.nan) for i in blocks]
            panel.plot(blocks, floors, "--", color="0.5", linewidth=1, label="whole block in bf16")
        panel.set_yscale("log")
        panel.set_title(name, fontsize=10)
        panel.grid(True, which="major", alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for i in range(len(formats), rows * columns):
        panels.flat[i].set_axis_off()
        panels.flat[i - columns].xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel("block", fontsize=10)
    figure.supylabel("error of the block's output\nrelative to what the block adds", fontsize=10)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle(f"{title}: one linear quantized at a time", fontsize=11)
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=90)
    return data.getvalue()
