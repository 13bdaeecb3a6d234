"""A report as Markdown: the page's tables and headline, and its plots as PNG files beside it where there is a folder
for them.

The text alone takes no drawing; each plot costs a third of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from solostep.benchmarks.report_data import Group
from solostep.benchmarks.report_drawing import Plot
from solostep.benchmarks.report_headline import headline
from solostep.benchmarks.report_html import FOLDERS, LIMITS, only_budgets, settings_text
from solostep.benchmarks.report_measures import DRIFT, OTHER
from solostep.benchmarks.report_plots import group_plots
from solostep.benchmarks.report_runs import Run
from solostep.benchmarks.report_sections import Section, budget_sections, sections
from solostep.benchmarks.report_tables import (
    Cell,
    Table,
    commands,
    environment_line,
    environment_lines,
    environments,
    files,
)
from solostep.benchmarks.results import PATH, Result


def markdown(
    title: str, results: Sequence[Result], groups: Sequence[Group], plots: bool = False, failed: Sequence[str] = ()
) -> tuple[str, dict[str, Plot]]:
    """The text, and the plots that it shows by file name; none without ``plots``."""
    lines = [f"# {plain(title)}", ""]
    lines += [f"{plain(line)}  " for line in environment_lines(results)] + [""]
    lines += [f"> Not on this page: {plain(line)}\n" for line in failed]
    drawn: dict[str, Plot] = {}
    shown = [group for group in groups if not only_budgets(group)]
    for i, group in enumerate(shown):
        own = group_plots(group, f"group-{i + 1}") if plots else {}
        lines += _group(group, own)
        drawn |= {f"{plot.name}.png": plot for plot in own.values()}
    for each in budget_sections(results):
        for section in each:
            head = "## Memory budgets and clip lengths: " if section.tables else "### "
            lines += _section(section, head, plots)
            drawn |= {f"{plot.name}.png": plot for plot in section.plots if plots}
    lines += _method(results)
    return "\n".join(lines).rstrip() + "\n", drawn


def _group(group: Group, plots: Mapping[str, Plot]) -> list[str]:
    lines = [f"## {plain(group.title)}", ""]
    if group.synthetic:
        how = ", ".join(f"{k} {v}" for k, v in group.synthetic.items())
        lines += [f"**Synthetic weights: nobody trained them** ({plain(how)}).", ""]
    about = "; ".join(filter(None, [group.card, settings_text(group)]))
    lines += [plain(about) + ".", "", *(f"> {plain(note)}\n" for note in group.notes)]
    for claim in headline(group):
        lines.append(f"- {plain(claim.title)}: {f'**{plain(claim.mode)}**. ' if claim.mode else ''}{plain(claim.text)}")
    lines.append("")
    for section in sections(group, plots):
        lines += _section(section)
    return lines


def _section(section: Section, head: str = "### ", plots: bool = True) -> list[str]:
    """Under a heading; nothing of one that has pictures alone."""
    lines: list[str] = []
    for found in section.tables:
        caption = found.caption if len(section.tables) > 1 else ""
        lines += [*([f"#### {plain(caption)}", ""] if caption else []), *table(found), ""]
    for plot in section.plots if plots else ():
        lines += _picture(plot, f"{plot.name}.png")
    notes = [line for note in section.notes for line in (f"> {plain(note)}", "")]
    for run in section.runs:
        lines += _run(run)
    return [head + plain(section.title), "", *lines, *notes] if lines else []


def _run(run: Run) -> list[str]:
    """What stands behind one row."""
    lines = [f"#### {plain(run.title)}", ""]
    lines += [plain(run.plan[:1].upper() + run.plan[1:]) + ".", ""] if run.plan else []
    lines += [*table(run.stages), ""] if run.stages else []
    lines += [*(f"- {plain(event)}" for event in run.events), ""] if run.events else []
    return lines + ([*(f"    {command}" for command in run.commands), ""] if run.commands else [])


def _picture(plot: Plot, file: str) -> list[str]:
    alt = plain(f"{plot.title}. {plot.alt}").replace("[", "(").replace("]", ")")
    return [f"#### {plain(plot.title)}", "", f"![{alt}]({file})", "", f"*{plain(plot.caption)}*", ""]


def _method(results: Sequence[Result]) -> list[str]:
    lines = ["## What was measured", ""]
    lines += [f"- *{plain(m.label)}*: {plain(m.meaning)} {m.better.capitalize()} is better." for m in DRIFT.values()]
    lines += [f"- *{plain(name)}*: {plain(text)}" for name, text in OTHER.items()]
    lines += ["", *(f"- {plain(text)}" for text in LIMITS), "", "## Environment, commands, files", ""]
    for found, own in environments(results):
        lines += [f"### {plain(environment_line(own[0].environment))}: {len(own)} result{'s' * (len(own) != 1)}", ""]
        lines += [*(f"- {plain(name)}: {plain(text)}" for name, text in found), ""]
    told = commands(results)
    lines += ["### Commands", "", *([plain(FOLDERS), ""] if any(PATH in command for command in told) else [])]
    lines += [f"    {command}" for command in told]
    return [*lines, "", *table(files(results)), ""]


def plain(text: str) -> str:
    """A text that Markdown and HTML leave as it is, in one line."""
    for mark in ("\\", "`", "*", "_", "|", "<", ">"):
        text = text.replace(mark, {"<": "&lt;", ">": "&gt;"}.get(mark, f"\\{mark}"))
    return " ".join(text.replace("](", "]\\(").split())


def table(found: Table, aligned: bool = False) -> list[str]:
    """A table's lines, then its footnotes; ``aligned`` pads the cells, for a terminal. Where two headings are the same,
    their over-headings tell them apart."""
    names = [name for _, name in found.heads]
    names = [f"{over}: {name}" if over and names.count(name) > 1 else name for over, name in found.heads]
    lines = [[plain(name) for name in names]]
    marks = found.marks or [""] * len(found.rows)
    for row, mark in zip(found.rows, marks, strict=True):
        first = f"*{plain(row[0].text)}*" if mark else plain(row[0].text)
        texts = [first, *(plain(cell.text) for cell in row[1:])]
        lines.append([_with_more(text, cell) for text, cell in zip(texts, row, strict=True)])
    wide = [max(len(line[i]) for line in lines) if aligned else 0 for i in range(len(names))]
    lines = [[line[0].ljust(wide[0]), *(t.rjust(w) for t, w in zip(line[1:], wide[1:], strict=True))] for line in lines]
    rule = ["-" * max(3, wide[0]), *("-" * max(3, w - 1) + ":" for w in wide[1:])]
    made = [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]
    return [*made, *([""] if found.footnotes else []), *(f"{plain(note)}  " for note in found.footnotes)]


def _with_more(text: str, cell: Cell) -> str:
    if not cell.more:
        return text
    return f"{text} {plain(cell.more)}" if cell.more.startswith("[") else f"{text} ({plain(cell.more)})"


def write_plots(folder: Path, plots: Mapping[str, Plot]) -> dict[Path, bytes]:
    """The plots as files of a folder: their bytes by path."""
    return {folder / name: plot.png() for name, plot in plots.items()}
