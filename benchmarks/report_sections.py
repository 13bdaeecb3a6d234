"""The sections of a report, in their order: the page and the Markdown are made from this one list.

Cost: a section's tables are made when the list is; its plots are drawn by whoever shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from solostep.benchmarks.report_data import Group, row_of
from solostep.benchmarks.report_drawing import Plot
from solostep.benchmarks.report_plots import budgets as budgets_plot
from solostep.benchmarks.report_plots import levels_text
from solostep.benchmarks.report_runs import Run, budget_runs, missing_metrics, runs, trajectory
from solostep.benchmarks.report_tables import Table, blocks, budgets, operators, scores, stages, summary, verdicts
from solostep.benchmarks.results import Result


@dataclass(frozen=True)
class Section:
    """What stands under one heading.

    folded: the page shows it when it is opened (and in print). sortable: of its tables. pictures: the frames beside the
    reference's belong here, which only a page has.
    """

    title: str
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()
    folded: bool = False
    sortable: bool = False
    pictures: bool = False

    @property
    def is_empty(self) -> bool:
        return not (self.plots or self.tables or self.runs or self.pictures)


RUNS = "Plan, events and command of each"


def sections(group: Group, plots: Mapping[str, Plot]) -> list[Section]:
    """Of one model and clip size; ``plots`` are its plots by kind, or none."""

    def drawn(*kinds: str) -> tuple[Plot, ...]:
        return tuple(plots[kind] for kind in kinds if kind in plots)

    own, told = runs(group)
    found = [
        Section("All modes", tables=(summary(group),), notes=tuple(missing_metrics(group)), sortable=True),
        Section("Beside the noise floor, measure by measure", tables=_there(verdicts(group)), folded=True),
        Section("Seconds against drift", drawn("pareto teacher", "pareto blocks", "pareto free")),
        Section(
            "Drift of single steps" if group.levels else "Drift, step by step",
            drawn("teacher", "free"),
            _there(trajectory(group)),
            () if "teacher" in plots else tuple(filter(None, [levels_text(group)])),
        ),
        Section("Drift, block by block", drawn("blocks")),
        Section("The numbers of the blocks", tables=_there(blocks(group), operators(group)), folded=True),
        Section("Frames beside the reference's", pictures=True),
        Section("Prompt following, aspect by aspect", tables=_there(scores(group)), folded=True),
        Section("Seconds of each stage", tables=_there(stages(group)), folded=True),
        Section(RUNS, notes=tuple(told), runs=tuple(own), folded=True),
    ]
    return [section for section in found if not section.is_empty]


def budget_sections(results: Sequence[Result]) -> list[list[Section]]:
    """Memory budgets and clip lengths, a list of sections for each model and card."""
    rows = [(result, row_of([result])) for result in results if result.speed]
    found = []
    for i, each in enumerate(budgets(rows)):
        plot = budgets_plot(each.lines, each.unlimited)
        plots = () if plot is None else (Plot(f"budgets-{i + 1}", plot.title, plot.alt, plot.caption, plot.draw),)
        own, told = budget_runs(each.results)
        made = [
            Section(each.title, plots, (each.table,), sortable=True),
            Section(RUNS, notes=tuple(told), runs=tuple(own), folded=True),
        ]
        found.append([section for section in made if not section.is_empty])
    return found


def _there(*tables: Table | None) -> tuple[Table, ...]:
    return tuple(table for table in tables if table is not None)
