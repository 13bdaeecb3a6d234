"""A report as one HTML file that needs nothing else: no network, no library, no script to be read.

Everything that comes from a result is escaped. Colours follow the reader's light or dark scheme; wide and narrow pages
have drawings of their own; in print, wide tables are set small and loops are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from solostep.benchmarks.report_data import Group
from solostep.benchmarks.report_drawing import NARROW, WIDE, Plot
from solostep.benchmarks.report_headline import Claim, headline
from solostep.benchmarks.report_measures import DRIFT, OTHER
from solostep.benchmarks.report_pictures import BUDGET, Gallery, Pictures, data_url, gallery
from solostep.benchmarks.report_plots import group_plots
from solostep.benchmarks.report_runs import Run
from solostep.benchmarks.report_sections import Section, budget_sections, sections
from solostep.benchmarks.report_style import CSS, GENERATOR, SCRIPT
from solostep.benchmarks.report_tables import (
    Cell,
    Table,
    commands,
    environment_line,
    environment_lines,
    environments,
    files,
    measured_steps,
)
from solostep.benchmarks.results import PATH, Result

FOLDERS = (
    f"{PATH} stands for folders of the machine that measured; a file of Python by its name alone is a module, run as "
    "python -m solostep.benchmarks.NAME."
)
LIMITS = (
    "All distances are to one program's numbers, the official order of operations in bf16; they say how far a mode is "
    "from it, not whether people like its videos less.",
    "Running freely, two right programs drift apart as well: read those numbers beside the noise floor and another "
    "seed's.",
    "Drift on synthetic weights compares ways to compute at the real shape; that of a trained model may be larger or "
    "smaller.",
    "Peaks of memory are those of the process that was measured; a desktop or another program takes its own besides.",
    "Times are of the card, driver and versions named here; other cards may have another order of modes.",
)


def page(title: str, results: Sequence[Result], groups: Sequence[Group], failed: Sequence[str] = ()) -> str:
    """The whole page; ``failed``: a line for each cell that has no result because it failed."""
    shown = [group for group in groups if not only_budgets(group)]
    own_budgets = budget_sections(results)
    body = [_header(title, results, shown, bool(own_budgets))]
    body += [f'<p class="warn">Not on this page: {escape(line)}</p>' for line in failed]
    share = BUDGET // max(1, sum(any(r.frames for r in g.rows) for g in shown))
    for i, group in enumerate(shown):
        body += _group(group, f"group-{i + 1}", share)
    if own_budgets:
        body.append('<section id="budgets"><h2>Memory budgets and clip lengths</h2>')
        for each in own_budgets:
            body += [_section(section) for section in each]
        body.append("</section>")
    body += [_method(), _origin(results), "</main>", f"<footer>{_footer(results)}</footer>"]
    return document(title, "\n".join(body))


def only_budgets(group: Group) -> bool:
    """Whether a group has nothing but speeds in memory budgets, which have their own section."""
    return not group.measured and all(r.cell.vram or r.cell.host_ram for r in group.rows)


def document(title: str, body: str) -> str:
    """A page around a body: style and script are in it."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n{GENERATOR}\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n<script>{SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def _header(title: str, results: Sequence[Result], groups: Sequence[Group], with_budgets: bool) -> str:
    lines, count = environment_lines(results), len(environments(results))
    made = f"<h1>{escape(title)}</h1>\n" + "".join(f'<p class="env">{escape(line)}</p>\n' for line in lines[:3])
    if len(lines) > 3:
        made += f'<p class="env">and {len(lines) - 3} more, <a href="#origin">below</a></p>\n'
    if count > 1:
        made += (
            f'<p class="warn">These results come from {count} environments. Times of different cards never stand '
            "in one table; where rows of one differ in driver, versions or commit, a note beside it says which.</p>\n"
        )
    links = [(f"group-{i + 1}", group.title) for i, group in enumerate(groups)]
    links += [("budgets", "Budgets and clip lengths")] if with_budgets else []
    links += [("method", "What was measured"), ("origin", "Environment, commands, files")]
    nav = "".join(f'<a href="#{to}">{escape(text)}</a>' for to, text in links)
    return f"<header>\n{made}<nav>{nav}</nav>\n</header>\n<main>"


# --- a group ------------------------------------------------------------------------------------------------------


def _group(group: Group, name: str, share: int) -> Iterator[str]:
    """The section of one model and clip size."""
    plots = group_plots(group, name)
    yield f'<section id="{name}"><h2>{escape(group.title)} {synthetic_tag(group)}</h2>'
    yield f'<p class="env">{escape(group.card)}</p>{_settings(group)}'
    yield "".join(f'<p class="note">{escape(note)}</p>' for note in group.notes)
    yield _claims(headline(group))
    for section in sections(group, plots):
        yield _section(section, _gallery(gallery(group, share)) if section.pictures else "")
    yield "</section>"


def _section(section: Section, pictures: str = "") -> str:
    """Under a heading, or where the page folds it, in an element that opens; ``pictures`` end it."""
    body = "".join(f'<p class="small">{_prose(note)}</p>' for note in section.notes if not section.tables)
    body += "".join(figure(plot) for plot in section.plots)
    body += "".join(table(each, section.sortable) for each in section.tables)
    body += "".join(f'<p class="small">{_prose(note)}</p>' for note in section.notes if section.tables)
    if section.runs:
        body += f'<div class="runs">{"".join(_run(run) for run in section.runs)}</div>'
    body += pictures
    if not body:
        return ""
    if section.folded:
        return f"<details><summary>{escape(section.title)}</summary>{body}</details>"
    return f"<h3>{escape(section.title)}</h3>{body}"


def _run(run: Run) -> str:
    """What stands behind one row."""
    body = f"<p>{_prose(_sentence(run.plan))}</p>" if run.plan else ""
    body += table(run.stages) if run.stages else ""
    if run.events:
        body += "<p><b>Said while it ran:</b></p><ul>" + "".join(f"<li>{_prose(e)}</li>" for e in run.events) + "</ul>"
    if run.commands:
        body += "<pre>" + "\n".join(escape(command) for command in run.commands) + "</pre>"
    ids = f'<p class="small">Results: {escape(", ".join(run.ids))}</p>' if run.ids else ""
    return f'<details class="run"><summary>{escape(run.title)}</summary>{body}{ids}</details>'


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def synthetic_tag(group: Group) -> str:
    if not group.synthetic:
        return ""
    how = ", ".join(f"{k} {v}" for k, v in group.synthetic.items())
    return f'<span class="tag" title="{escape(how)}">synthetic weights: nobody trained them</span>'


def settings_text(group: Group) -> str:
    """Steps, guidance, shift and pairs in a line; empty where no drift was measured."""
    own = group.settings
    if own is None:
        return ""
    steps = measured_steps(group) or f"{own['num_inference_steps']} steps"
    return (
        f"{steps}, guidance {own['guidance_scale']:g}, time shift {own['time_shift']:g}; "
        f"{len(own['prompts'])} prompt{'s' * (len(own['prompts']) != 1)} with {len(own['seeds'])} "
        f"seed{'s' * (len(own['seeds']) != 1)}" + " each" * (len(own["prompts"]) != 1)
    )


def _settings(group: Group) -> str:
    text = settings_text(group)
    if not text or group.settings is None:
        return ""
    prompts = "".join(f"<li>{escape(p)}</li>" for p in group.settings["prompts"])
    return f'<details class="plain"><summary>{escape(text)}</summary><ul>{prompts}</ul></details>'


def _claims(claims: Sequence[Claim]) -> str:
    if not claims:
        return ""
    made = "".join(
        f'<div class="claim"><p class="what">{escape(c.title)}</p><p class="mode">{escape(c.mode)}</p>'
        f"<p>{_prose(c.text)}</p></div>\n"
        for c in claims
    )
    return f'<div class="claims">\n{made}</div>'


def figure(plot: Plot) -> str:
    return (
        f"<figure><h4>{escape(plot.title)}</h4>{plot.svg(WIDE)}{plot.svg(NARROW)}"
        f"<figcaption>{_prose(plot.caption)}</figcaption></figure>"
    )


# --- tables -------------------------------------------------------------------------------------------------------


def table(found: Table, sortable: bool = False) -> str:
    """A table in a frame that scrolls sideways where the page is narrow."""
    over = [name for name, _ in found.heads]
    spans: list[list[object]] = []
    for name in over:
        if spans and spans[-1][0] == name:
            spans[-1][1] = int(str(spans[-1][1])) + 1
        else:
            spans.append([name, 1])
    head = ""
    if any(over):
        head += (
            '<tr class="over">' + "".join(f'<th colspan="{n}">{escape(str(name))}</th>' for name, n in spans) + "</tr>"
        )
    texts = [i == 0 or not any(_value(row[i]) for row in found.rows) for i in range(len(found.heads))]
    head += "<tr>" + "".join(
        f'<th scope="col"{_text(t)}>{escape(name)}</th>' for (_, name), t in zip(found.heads, texts, strict=True)
    )
    marks = found.marks or [""] * len(found.rows)
    body = ""
    for i, (row, mark) in enumerate(zip(found.rows, marks, strict=True)):
        last = bool(mark) and (i + 1 == len(marks) or not marks[i + 1])
        classes = f' class="{mark}{" last" if last else ""}"' if mark else ""
        cells = "".join(_cell(cell, texts[j], j == 0) for j, cell in enumerate(row))
        body += f"<tr{classes}>{cells}</tr>\n"
    notes = "".join(f'<p class="small">{_prose(note)}</p>' for note in found.footnotes)
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(found.caption)}"><table{kind}>'
        f"<caption>{escape(found.caption)}</caption><thead>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"
    )


def _text(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


_UNIT = re.compile(r"(?<=\d) (?=(?:%|dB|GB|MB|s|min|h)(?!\w))")


def _prose(text: str) -> str:
    """A text that is broken into lines, but never between a number and its unit."""
    return escape(_UNIT.sub("\u00a0", text))


def _cell(cell: Cell, is_text: bool, is_head: bool) -> str:
    inside = _prose(cell.text)
    if cell.mark:
        inside = f'<span class="mark {cell.mark}">{inside}</span>'
    more = f"<small>{escape(cell.more)}</small>" if cell.more else ""
    if is_head:
        return f'<th scope="row">{inside}{more}</th>'
    value = _value(cell)
    sort = f' data-value="{value}"' if value else ""
    return f"<td{_text(is_text)}{sort}>{inside}{more}</td>"


def _value(cell: Cell) -> str:
    """What a cell is sorted by: its first number, in the smaller of the units that it may have."""
    if cell.text.startswith("∞"):
        return "1e99"
    found = re.match(r"([0-9][0-9,]*\.?[0-9]*)( min| h| GB)?", cell.text)
    if not found or cell.mark:
        return ""
    factor = {" min": 60.0, " h": 3600.0, " GB": 1e3}.get(found.group(2) or "", 1.0)
    return f"{float(found.group(1).replace(',', '')) * factor:g}"


# --- pictures -----------------------------------------------------------------------------------------


def _gallery(found: Gallery | None) -> str:
    if found is None:
        return ""
    shown = ", ".join(str(i + 1) for i in found.indices)
    pixel = " pixel" if found.modes[0].size[0] < 500 else ""
    stills = "".join(_still(mode, found, shown) for mode in found.modes)
    made = (
        f"<p>The first pair of prompt and seed, frames {shown}, one below the other: the reference, the mode, and the "
        f"absolute difference times {found.factor}, the same factor for all modes.</p>"
        + (f'<p class="small">{escape(found.first)}</p>' if found.first else "")
        + f'<div class="pictures{pixel}">{stills}</div>'
    )
    if found.worst:
        text = "The pair of prompt and seed whose latents end furthest from the reference's, shown likewise."
        if found.first_is_worst:
            text += f" It is the first one, above, of: {'; '.join(found.first_is_worst)}."
        stills = "".join(_still(mode, found, shown) for mode in found.worst)
        made += f'<h4>The worst pair of each mode</h4><p>{escape(text)}</p><div class="pictures{pixel}">{stills}</div>'
    elif found.first_is_worst:
        made += "<p>Of every mode, this is also the pair whose latents end furthest from the reference's.</p>"
    loops = "".join(_loop(mode) for mode in found.modes if mode.loop)
    if loops:
        made += (
            '<details class="loop"><summary>The first pair as moving pictures</summary>'
            f'<div class="pictures{pixel}">{loops}</div></details>'
        )
    return made


def _still(mode: Pictures, found: Gallery, shown: str) -> str:
    alt = f"Frames {shown}: reference, {mode.name}, and their difference times {found.factor}"
    about = f'<p class="small">{escape(mode.about)}</p>' if mode.about else ""
    return (
        f'<figure><h4>{escape(mode.name)}</h4>{about}<div class="heads"><span>reference</span><span>this mode</span>'
        f"<span>difference ×{found.factor}</span></div>"
        f'<img loading="lazy" width="{mode.size[0]}" height="{mode.size[1]}" alt="{escape(alt)}" '
        f'src="{data_url(mode.still)}"></figure>'
    )


def _loop(mode: Pictures) -> str:
    alt = f"A loop of the reference's video beside that of {mode.name}"
    return (
        f'<figure><h4>{escape(mode.name)}</h4><div class="heads two"><span>reference</span>'
        f'<span>this mode</span></div><img loading="lazy" width="{mode.loop_size[0]}" '
        f'height="{mode.loop_size[1]}" alt="{escape(alt)}" src="{data_url(mode.loop or b"")}"></figure>'
    )


# --- method and origin --------------------------------------------------------------------------------------------


def _method() -> str:
    terms = "".join(
        f"<dt>{escape(m.label)}</dt><dd>{escape(m.meaning)} {m.better.capitalize()} is better.</dd>"
        for m in DRIFT.values()
    )
    more = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in OTHER.items())
    limits = "".join(f"<li>{escape(text)}</li>" for text in LIMITS)
    return (
        '<section id="method"><h2>What was measured</h2><p>Every mode makes the same videos as the reference, which '
        "is the model in bf16 in the official order of operations: the same prompts, the same noise, the same "
        "settings.</p>"
        f"<dl>{terms}{more}</dl><h3>What these numbers do not say</h3><ul>{limits}</ul></section>"
    )


def _origin(results: Sequence[Result]) -> str:
    made = '<section id="origin"><h2>Environment, commands, files</h2>'
    for facts, own in environments(results):
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
        count = f"{len(own)} result{'s' * (len(own) != 1)}"
        made += f"<h3>{escape(environment_line(own[0].environment))}: {count}</h3><dl>{rows}</dl>"
    lines = "\n".join(escape(command) for command in commands(results))
    told = f"<p>{escape(FOLDERS)}</p>" if PATH in lines else ""
    made += f"<h3>Commands</h3>{told}<pre>{lines or 'not recorded'}</pre>"
    title = f"The {len(results)} result files"
    return made + _section(Section(title, tables=(files(results),), folded=True)) + "</section>"


def _footer(results: Sequence[Result]) -> str:
    dates = sorted(str(r.environment["date"]) for r in results if r.environment.get("date"))
    when = (
        f", measured {dates[0][:10]}" + (f" to {dates[-1][:10]}" if dates[0][:10] != dates[-1][:10] else "")
        if dates
        else ""
    )
    return f"Made by <code>solostep report</code> from {len(results)} result files{escape(when)}."
