"""What stands behind the rows of a report, that page and Markdown show the same sections, what marks and captions
claim, and the worst pair's frames."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from solostep.benchmarks import full_size, report_html, report_markdown
from solostep.benchmarks.bench import result_table
from solostep.benchmarks.cell_frames import put_together, write_frames
from solostep.benchmarks.report_data import Group, is_drawn, make_groups
from solostep.benchmarks.report_drawing import NARROW, looks
from solostep.benchmarks.report_headline import headline
from solostep.benchmarks.report_pareto import pareto
from solostep.benchmarks.report_pictures import gallery
from solostep.benchmarks.report_plots import by_step, group_plots
from solostep.benchmarks.report_runs import missing_metrics, plan_text, runs, trajectory
from solostep.benchmarks.report_sections import budget_sections, sections
from solostep.benchmarks.report_style import SCRIPT
from solostep.benchmarks.report_tables import Table, environments, summary
from solostep.benchmarks.results import Result, read_results

_spec = importlib.util.spec_from_file_location("report_fixtures", Path(__file__).with_name("report_fixtures.py"))
assert _spec is not None and _spec.loader is not None
made: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)

INT8, NF4 = "int8 · int8 attention", "nf4 · bf16 attention"
NAMES = ("reference", "floor-backend", "floor-order", INT8, NF4)


def group_of(*results: dict[str, Any]) -> Group:
    (group,) = make_groups([Result.from_dict(result) for result in results])
    return group


@pytest.fixture
def five() -> list[dict[str, Any]]:
    """The reference, both floors and two modes, all alike in what they were asked for."""
    return [made.make_result(name) for name in NAMES]


def column(table: Table, head: str, over: str = "") -> list[str]:
    place = [(o, h) for o, h in table.heads].index((over, head))
    return [row[place].text for row in table.rows]


# --- the list of sections -----------------------------------------------------------------------------------------


def test_page_and_markdown_show_the_same_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every heading, table and run of the one list stands in both; nothing is drawn for it."""
    monkeypatch.setattr(report_html, "group_plots", lambda group, prefix: {})
    monkeypatch.setattr("solostep.benchmarks.report_sections.budgets_plot", lambda lines, unlimited: None)
    made.demo_set(tmp_path / "demo", names=NAMES, frames=False)
    made.full_size_set(tmp_path / "full")
    results = read_results([tmp_path / "demo", tmp_path / "full"])
    groups = [g for g in make_groups(results) if not report_html.only_budgets(g)]
    page, (lines, _) = report_html.page("t", results, groups), report_markdown.markdown("t", results, groups)
    page = page.replace("\u00a0", " ")
    listed = [s for group in groups for s in sections(group, {})] + [
        s for each in budget_sections(results) for s in each
    ]
    assert len(groups) == 2 and len({s.title for s in listed}) >= 7
    for section in listed:
        if section.pictures:
            continue
        assert report_html.escape(section.title) in page and report_markdown.plain(section.title) in lines
        assert section.tables or section.runs
        for table in section.tables:
            last = table.rows[-1][-1].text
            assert report_html.escape(last) in page and report_markdown.plain(last) in lines
        for run in section.runs:
            assert f"<summary>{report_html.escape(run.title)}</summary>" in page
            assert f"#### {report_markdown.plain(run.title)}" in lines
    for name, text in environments(results)[0][0]:  # all that is known of it, not the first line alone
        assert f"<dt>{report_html.escape(name)}</dt><dd>{report_html.escape(text)}</dd>" in page
        assert f"- {report_markdown.plain(name)}: {report_markdown.plain(text)}" in lines


def test_folded_parts_open_for_print_and_close_again():
    before, after = SCRIPT.index("'beforeprint'"), SCRIPT.index("'afterprint'")
    assert "details:not([open])" in SCRIPT[before:after] and "d.open=true" in SCRIPT[before:after]
    assert "d.open=false" in SCRIPT[after:]


# --- runs ---------------------------------------------------------------------------------------------------------


def test_plan_beside_what_was_taken(tmp_path: Path):
    results = [made.make_result(INT8, levels=("speed",), vram=v) for v in ("8GB", "24GB")]
    results[0]["events"].append("Decoding 2 frames at a time in 8 strips, for want of memory.")
    results[0]["plan"] |= {"frame_strips": 4}
    results[0]["events"].append("The first frame is encoded in 4 strips, for want of memory.")
    results.append(made.make_result(INT8, levels=("speed",)))
    read = [Result.from_dict(r) for r in results]
    ((first, second),) = budget_sections(read)
    titles = [run.title for run in second.runs]
    assert titles == [f"{INT8}, 17 frames, GPU {v}" for v in ("8GB", "24GB")] + [f"{INT8}, 17 frames, no budget"]
    run = second.runs[0]
    assert "8.0 GB of card memory; 20 of 48 blocks stay on the card, 28 take turns in 2 slots (3 of them" in run.plan
    assert "attention in 4 groups of heads" in run.plan and "decoding 4 latent frames at a time" in run.plan
    assert "forecast: 2.60 s a step, 33.0 s in all" in run.plan
    assert run.stages is not None and column(run.stages, "stage")[0] == "text"
    assert (
        column(run.stages, "forecast", "seconds")[0] == "1.50" and column(run.stages, "taken", "seconds")[0] == "1.20"
    )
    assert column(run.stages, "forecast", "GPU peak")[0] == "2.7 GB"
    assert column(run.stages, "taken", "GPU peak")[0] == "7.6 GB"
    assert (
        column(run.stages, "forecast", "host peak")[2] == "20.0 GB" and "beside the program" in run.stages.footnotes[0]
    )
    assert "the first frame encoded in 4 strips" in run.plan
    # What the plan said before is no event; another way of decoding is.
    said = "Decoding 2 frames at a time in 8 strips, for want of memory."
    assert run.events == (said,) and second.runs[1].events == second.runs[2].events == ()
    assert column(first.tables[0], "events") == [said, "", ""]
    assert second.runs[2].plan == "" and plan_text(None) == ""  # nothing was planned, and nothing is claimed
    assert second.runs[2].stages is not None and ("seconds", "forecast") not in second.runs[2].stages.heads


def test_what_all_runs_share_is_said_once(five: list[dict[str, Any]]):
    for i, result in enumerate(five):
        result["events"] = ["The clock is slow."] + (["Its own."] if i == 3 else [])
        result["environment"] = made.environment(command=f"solostep bench -n {i // 4}")
    found, told = runs(group_of(*five))
    assert told == ["All of them said: The clock is slow."]
    assert [run.events for run in found] == [(), (), (), ("Its own.",), ()]
    assert [run.commands for run in found] == [("solostep bench -n 0",)] * 4 + [("solostep bench -n 1",)]


def test_measures_that_could_not_be_taken_are_said(five: list[dict[str, Any]]):
    reason = "ffmpeg-linux-x86_64-v7.0.2 has no filter xpsnr; update imageio-ffmpeg"
    for result in five[1:]:
        result["events"] = [f"No xpsnr: {reason}", "No memory: this is another event"]
        result["drift"]["video"]["xpsnr"] = None
    group = group_of(*five)
    assert missing_metrics(group) == [f"No XPSNR in 4 of 5 results: {reason}."]
    first = sections(group, {})[0]
    assert first.title == "All modes" and first.notes == tuple(missing_metrics(group))
    assert "XPSNR" not in [name for _, name in first.tables[0].heads]
    text = " ".join(report_markdown._section(first))
    assert "No XPSNR in 4 of 5 results" in text and "No XPSNR in 4 of 5 results" in report_html._section(first)


# --- along the trajectory -----------------------------------------------------------------------------------------


def test_cosines_and_where_runs_diverge(five: list[dict[str, Any]]):
    mode = five[3]["drift"]
    mode["teacher"]["cosine"] = [[0.9991] * 12 for _ in range(7)] + [[0.9] + [None] + [0.9993] * 10]
    mode["free"]["diverged_at"] = [None] * 5 + [4, 6, 10]
    table = trajectory(group_of(*five))
    assert table is not None and [row[0].text for row in table.rows][2] == INT8
    assert "reference: bf16, official" not in column(table, "mode")
    assert column(table, "median cosine", "single steps")[2] == "0.999100"
    assert column(table, "lowest cosine", "single steps")[2] == "0.900000"
    assert column(table, "diverged", "free runs")[2] == "3 of 8"
    assert column(table, "from step", "free runs")[2] == "7"  # counted from 1
    assert "by more than 30 % (relative L2)" in table.footnotes[0] and "of 12" in table.footnotes[0]


def test_no_trajectory_without_its_levels():
    assert trajectory(group_of(made.make_result(INT8, levels=("speed", "blocks")))) is None


# --- plots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GPU", "host", ""])
def test_what_the_size_of_a_mark_claims(kind: str, five: list[dict[str, Any]]):
    for result in five:
        if kind != "GPU":
            result["memory"] |= {"gpu_peak_bytes": None, "driver_peak_bytes": None}
        if not kind:
            result["memory"]["host_peak_bytes"] = None
    group = group_of(*five)
    plot = pareto(group, "teacher", looks(r.name for r in group.modes))
    assert plot is not None
    claim = f"the more {kind} memory" if kind else "of one size: memory was not measured"
    assert claim in plot.caption and ("GPU" in plot.caption) == (kind == "GPU")
    texts = re.findall(r">([^<>]+)</text>", plot.svg(NARROW))
    for name in ("floor: another back end", "floor: another order", INT8, NF4):
        assert name in texts
    assert any(text.startswith("reference") for text in texts)
    assert (f"peak of {kind} memory" in texts) == bool(kind)
    sizes = {"GPU": ["33.0 GB", "20.4 GB", "60 GB"], "host": ["17.9 GB", "19.4 GB", "20 GB"], "": []}[kind]
    assert all(size in texts for size in sizes)
    assert bool(kind) == any("GB" in text for text in texts)


def test_captions_promise_intervals_only_where_there_are_some():
    few = group_of(*(made.make_result(name, pairs=2) for name in NAMES))
    many = group_of(*(made.make_result(name) for name in NAMES))
    for group, promised in ((few, False), (many, True)):
        style = looks(r.name for r in group.modes)
        for plot in (by_step(group, "free", style), by_step(group, "teacher", style), pareto(group, "free", style)):
            assert plot is not None and ("95 % intervals" in plot.caption) == promised
    assert "Medians over 2 prompts, too few for intervals" in group_plots(few, "g")["teacher"].caption


def of_few_steps(name: str, sigmas: tuple[float, ...], prompts: int = 1, **more: Any) -> dict[str, Any]:
    """Teacher-forced errors at some of 50 steps, as full_size.py writes them of drawn weights."""
    drawn = {"model": "synthetic", "synthetic": {"generator": "x", "seed": 0}} | more
    result = made.make_result(
        name, pairs=prompts, steps=len(sigmas), levels=("teacher",), num_inference_steps=50, **drawn
    )
    if result["synthetic"]:
        result["pairs"] = [{"prompt": f"drawn text {i + 1}", "seed": 0} for i in range(prompts)]
    result["drift"]["teacher"]["sigmas"] = list(sigmas)
    return result


def test_a_few_steps_are_marks_by_their_noise_level():
    """No line joins them, and the caption says how many of the run's they are, and of which latents."""
    drawn, own = "drawn latents, which are no points of a trajectory", "the reference's own latents"
    for synthetic, latents in (({"generator": "x"}, drawn), (False, own)):
        group = group_of(*(of_few_steps(name, (0.0, 0.79), synthetic=synthetic) for name in NAMES[1:]))
        assert group.drawn == bool(synthetic) and group.levels == [0.0, 0.79]
        plot = group_plots(group, "g")["teacher"]
        assert "2 of 50 steps (sigma 0 and 0.79) were measured" in plot.caption and latents in plot.caption
        assert (
            "Of 1 prompt, without intervals" in plot.caption and plot.title == "Error of single steps, by noise level"
        )
        (panel,) = plot.draw(NARROW).axes
        marks = {line.get_label(): line for line in panel.lines if not str(line.get_label()).startswith("_")}
        assert set(marks) == {"noise floor", INT8, NF4}
        for line in marks.values():
            assert line.get_linestyle() == "None" and list(line.get_xdata()) == [0.0, 0.79]
        assert panel.get_xlabel().startswith("sigma") and "at 0.79" in plot.alt
        titles = [s.title for s in sections(group, {})]
        assert "Drift of single steps" in titles and "Drift, step by step" not in titles
    whole = group_of(*(made.make_result(name) for name in NAMES))
    plot = group_plots(whole, "g")["teacher"]
    assert "Each step starts from the reference's own latents" in plot.caption and whole.levels == []
    (panel,) = plot.draw(NARROW).axes
    assert panel.get_xlabel() == "step" and "None" not in [line.get_linestyle() for line in panel.lines]


def test_one_step_is_a_sentence_and_no_curve():
    group = group_of(*(of_few_steps(name, (0.469,)) for name in NAMES[1:]))
    assert "teacher" not in group_plots(group, "g")
    (section,) = [s for s in sections(group, {}) if s.title == "Drift of single steps"]
    assert section.notes[0].startswith("1 of 50 steps (sigma 0.47) was measured. By itself, from drawn latents, which")
    few = "1 of 50 steps (sigma 0.47), drawn latents"
    assert summary(group).footnotes == [
        f"Drift: of 1 prompt at {few}: no interval, so small differences between modes mean nothing. "
        "– was not measured."
    ]
    assert report_html.settings_text(group) == f"{few}, guidance 1.5, time shift 3; 1 prompt with 1 seed"
    assert not any(s.title.startswith("Beside the noise floor") for s in sections(group, {}))  # one measure: above
    claim = headline(group)[0]
    assert f"1 prompt at {few}, is too few for an interval" in claim.text and claim.title.endswith("by one prompt")
    assert "No result of the reference" not in " ".join(group.notes)  # each pass has computed it
    several = group_of(*(of_few_steps(name, (0.469,), prompts=8) for name in NAMES[1:]))
    (note,) = summary(several).footnotes
    assert note.startswith(f"Drift: medians over 8 prompts at {few}, 95 % intervals in brackets.")


def test_captions_say_at_which_steps_drift_was_measured():
    """Of seconds against drift and of blocks, which are looked at without the table's footnotes."""
    results = []
    for name in ("floor-order", INT8, NF4):
        result = of_few_steps(name, (0.469,))
        other = made.make_result(name, pairs=1, levels=("speed", "blocks"))
        result |= {"speed": other["speed"], "memory": other["memory"]}
        result["drift"] |= {"blocks": other["drift"]["blocks"]}
        results.append(result)
    plots = group_plots(group_of(*results), "g")
    few = "1 of 50 steps (sigma 0.47), drawn latents"
    assert plots["pareto teacher"].caption.endswith(f"Drift is of {few}, 1 prompt.")
    assert f"Measured at {few}." in plots["blocks"].caption
    whole = group_plots(group_of(*(made.make_result(name) for name in NAMES)), "g")
    assert "Drift is of" not in whole["pareto teacher"].caption and "Measured at" not in whole["blocks"].caption


def test_the_reference_is_missed_where_there_are_times():
    drift = [of_few_steps(name, (0.469,)) for name in NAMES[1:]]
    drawn = {"model": "a/folder", "synthetic": {"generator": "x", "seed": 0}}
    timed = made.make_result(INT8, levels=("speed",), pairs=1, steps=2, **drawn)
    assert "No result of the reference" in " ".join(group_of(*drift, timed).notes)


def test_drawn_inputs_are_known_by_their_prompts():
    """Those that full_size.py writes of drawn weights; a run of solostep bench has a trajectory of its own."""
    args = full_size.parser().parse_args(["drift", "-o", "x", "--texts", "2"])
    subject = full_size.synthetic_subject(args, torch.device("cpu"))
    pairs = [{"prompt": p, "seed": s} for p, s in zip(subject.prompts, subject.seeds, strict=True)]
    result = made.make_result(INT8, pairs=2, synthetic=subject.synthetic)
    assert not is_drawn(Result.from_dict(result))
    assert is_drawn(Result.from_dict(result | {"pairs": pairs}))


def test_only_columns_that_are_there_are_explained(five: list[dict[str, Any]]):
    table = trajectory(group_of(of_few_steps(INT8, (0.0, 0.79))))
    assert table is not None and table.footnotes[0].startswith("Cosine: ") and "iverged" not in table.footnotes[0]
    for result in five[1:]:
        result["drift"] |= {"teacher": None}
        result["drift"]["free"]["diverged_at"] = [None] * 8
    table = trajectory(group_of(*five))
    assert table is not None and table.footnotes[0].startswith("Diverged: ") and "osine" not in table.footnotes[0]
    assert "from step" not in table.footnotes[0]  # none has diverged


def test_how_many_steps_were_timed_is_said(five: list[dict[str, Any]]):
    def note() -> str:
        return summary(group_of(*five)).footnotes[0]

    assert "so many times the median of 11 steps after the first. All other" in note()
    five[3]["speed"]["step_seconds"] = five[3]["speed"]["step_seconds"][:1]
    assert f"so many times the median of the steps after the first (1 in {INT8}, 11 in all others). All other" in note()
    for result in five:
        result["speed"]["step_seconds"] = result["speed"]["step_seconds"][:1]
    assert "so many times the one step that was timed after the first. All other" in note()


def test_the_precision_of_the_text_encoder_is_said(five: list[dict[str, Any]]):
    def notes() -> list[str]:
        return [note for note in summary(group_of(*five)).footnotes if "Step-LLM" in note]

    assert notes() == []
    for result in five:
        result["speed"]["ran"]["text_precision"] = "int8"
    assert notes() == ["Step-LLM in int8 in all rows that have a time."]
    five[3]["speed"]["ran"]["text_precision"] = "bf16"
    assert notes() == [f"Step-LLM in int8: {'; '.join(r.name for r in group_of(*five).rows if r.name != INT8)}."]


# --- the worst pair -----------------------------------------------------------------------------------------------


def test_the_worst_pair_is_kept(tmp_path: Path):
    videos = [np.full((9, 4, 6, 3), value, np.uint8) for value in (10, 20)]
    files = [tmp_path / f"{i}.npz" for i in range(2)]
    for i, (file, video) in enumerate(zip(files, videos, strict=True)):
        write_frames(file, video, video + 1, clip=not i)
    told = put_together(tmp_path / "a.npz", files[0], 1, files[1])
    assert told == {"file": "a.npz", "index": [0, 3, 5, 8], "worst": 1}
    with np.load(tmp_path / "a.npz") as stored:
        assert int(stored["worst"]) == 1 and (stored["frames"] == 10).all() and stored["clip"].shape == (9, 4, 6, 3)
        assert (stored["worst_frames"] == 20).all() and (stored["worst_reference_frames"] == 21).all()
    assert put_together(tmp_path / "b.npz", files[0], 0, files[0])["worst"] == 0
    assert "worst" not in put_together(tmp_path / "c.npz", files[0], None, None)  # one alone is not the worst
    for name in ("b.npz", "c.npz"):
        with np.load(tmp_path / name) as stored:
            assert "worst_frames" not in stored.files


def test_the_worst_pair_is_shown(tmp_path: Path):
    result = made.make_result(INT8, pairs=3) | {"frames": {"file": "x.npz", "index": [0, 5], "worst": 2}}
    black = np.zeros((2, 32, 32, 3), np.uint8)
    arrays = {"index": np.array([0, 5]), "frames": black + 2, "reference_frames": black, "worst": np.array(2),
              "worst_frames": black + 90, "worst_reference_frames": black + 80}  # fmt: skip
    np.savez(tmp_path / "x.npz", **arrays)
    made.write_results(tmp_path, [result])
    (group,) = make_groups(read_results([tmp_path]))
    found = gallery(group)
    assert found is not None and [p.name for p in found.worst] == [INT8] and found.first_is_worst == []
    assert found.worst[0].about == "test prompt 2 with <b>marks</b> & signs (seed 1)"
    assert found.worst[0].still != found.modes[0].still and found.worst[0].loop is None
    page = report_html._gallery(found)
    assert page.count("<img") == 2 and "test prompt 2 with &lt;b&gt;" in page
    np.savez(tmp_path / "x.npz", **(arrays | {"worst": np.array(0)}))
    found = gallery(group)
    assert found is not None and found.first_is_worst == [INT8]
    np.savez(tmp_path / "x.npz", frames=black, reference_frames=black)  # as older results have them
    found = gallery(group)
    assert found is not None and found.worst == [] and found.first_is_worst == [] and "worst" not in page[:20]


# --- the terminal -------------------------------------------------------------------------------------------------


def test_the_terminals_table_has_the_verdict(tmp_path: Path, five: list[dict[str, Any]]):
    from rich.console import Console

    paths = made.write_results(tmp_path, five)
    outcomes = [
        SimpleNamespace(planned=SimpleNamespace(id=r.id, label=r.label, cell=r.cell), path=path, status="done")
        for path, r in zip(paths, (Result.from_dict(result) for result in five), strict=True)
    ]
    table = result_table(outcomes)
    (place,) = [i for i, c in enumerate(table.columns) if c.header == "verdict"]
    cells = list(table.columns[place].cells)
    (group,) = make_groups(read_results([tmp_path]))
    ratio = next(r.verdict.ratio for r in group.modes if r.name == NF4 and r.verdict)
    assert cells == ["", "", "", "floor", f"{ratio:.3g}× floor"]
    console = Console(width=80)
    with console.capture() as said:
        console.print(table)
    (line,) = [line for line in said.get().splitlines() if "nf4" in line]
    assert f" {ratio:.3g}× floor " in line and "…" not in line and " verdict " in said.get()
