"""The report: what it says of made-up results, that nothing is mixed or invented, and that its page is whole."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from solostep.benchmarks import report as command
from solostep.benchmarks.report_data import Group, make_groups, row_of
from solostep.benchmarks.report_headline import headline
from solostep.benchmarks.report_html import page
from solostep.benchmarks.report_labels import covered, free_box, spread
from solostep.benchmarks.report_markdown import markdown, plain
from solostep.benchmarks.report_measures import MISSING, Share, amount, end_to_end, gigabytes, number, seconds, share
from solostep.benchmarks.report_origins import mixed
from solostep.benchmarks.report_pictures import amplification, read_frames
from solostep.benchmarks.report_plots import budgets as budgets_plot
from solostep.benchmarks.report_tables import (
    RESUMED,
    Cell,
    budgets,
    environments,
    followed,
    gigabytes_of,
    scores,
    summary,
    whole_video,
)
from solostep.benchmarks.results import Result, read_results
from solostep.engine.errors import UsageError

_spec = importlib.util.spec_from_file_location("report_fixtures", Path(__file__).with_name("report_fixtures.py"))
assert _spec is not None and _spec.loader is not None
made: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)

NAMES = ("reference", "floor-backend", "floor-order", "other-seed", "bf16 · bf16 attention", "int8 · int8 attention",
         "int8 · int8-fp8 attention", "nf4 · bf16 attention")  # fmt: skip
VOID = {"meta", "img", "br", "hr", "link", "input", "path", "rect", "use", "stop", "line", "circle"}


def read(folder: Path) -> list[Group]:
    return make_groups(read_results([folder]))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    made.demo_set(folder, names=NAMES)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    made.full_size_set(folder)
    return folder


@pytest.fixture(scope="module")
def demo_page(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page through the command line, as a user makes it."""
    output = tmp_path_factory.mktemp("page") / "r.html"
    done = run(str(demo), "-o", str(output), "--title", "A <title> & more")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(output)
    assert [p.name for p in output.parent.iterdir()] == ["r.html"]  # no temporary file is left
    return output.read_text(encoding="utf-8")


def run(*arguments: str) -> Any:
    app = typer.Typer()
    command.register(app)
    return CliRunner().invoke(app, list(arguments))


# --- the page -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Holds a page against the rules of nesting, and collects what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open[-4:], self.getpos())
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data.replace("\u00a0", " ") + " "  # between a number and its unit


def test_page_is_valid_and_needs_nothing_else(demo_page: str):
    found = Page(demo_page)
    assert not found.open and len(found.ids) == len(set(found.ids))
    assert not re.findall(r"https?:|//[a-z]+\.", demo_page) and "@import" not in demo_page
    for tag, attributes in found.elements:
        for name in ("href", "src", "srcset", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, value)
        if tag == "img" or (tag == "svg" and "plot" in (attributes.get("class") or "")):
            assert len(attributes.get("alt") or attributes.get("aria-label") or "") > 20, tag
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', demo_page)
    assert {a or b for a, b in references} <= set(found.ids)
    assert len(demo_page) < 8_000_000
    assert all(media in demo_page for media in ("prefers-color-scheme:dark", "@media print", "width=device-width"))


def test_page_says_the_numbers(demo: Path, demo_page: str):
    group = read(demo)[0]
    text = Page(demo_page).text
    for row in group.rows:
        assert row.name in text
        for name, interval in row.drift.items():
            assert amount(name, interval.median) in text
        if row.step:
            assert number(row.step) in text
        if row.gpu:
            assert gigabytes(row.gpu) in text and gigabytes(row.driver) in text
    assert "indistinguishable from the floor" in text and "times the floor" in text and "†" in text
    assert "in windows of 8x8 pixels" in text  # ffmpeg's SSIM, as video_metrics.py takes it
    assert "A <title> & more" in text and "<title> & more" not in demo_page
    assert "test prompt 0 with <b>marks</b> & signs" in text and "<b>marks" not in demo_page
    assert 'solostep bench <made up> & "test data"' in text
    assert all(result.id in text for result in group.results)
    assert "Testcard 9000" in text and "another seed" in text and "nobody trained" not in text


def test_plots_keep_texts_and_follow_the_scheme(demo_page: str):
    plots = re.findall(r'<svg class="plot.*?</svg>', demo_page, re.DOTALL)
    assert len(plots) == 2 * 5  # pareto of both measures, both kinds of steps, blocks: wide and narrow
    for plot in plots:
        assert "<text" in plot and "var(--ink)" in plot and "#010203" not in plot
    assert "noise floor" in plots[0] and "reference" in plots[0] and "nf4 · bf16 attention" in plots[0]
    dashes = set(re.findall(r"stroke-dasharray: ([\d., ]+)", "".join(plots[4:8])))
    assert len(dashes) >= 3  # lines are told apart by more than colour


def test_pictures_are_small_webp_with_a_loop(demo_page: str):
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"', demo_page)
    worst = demo_page.split("The worst pair of each mode")[1].split('class="loop"')[0].count("<img")
    assert 0 < worst <= 6
    assert len(pictures) == 2 * 6 + worst  # two floors, four modes; the other seed has none
    kinds = [getattr(Image.open(io.BytesIO(base64.b64decode(p))), "n_frames", 1) for p in pictures]
    assert sorted(kinds) == [1] * (6 + worst) + [17] * 6
    still = Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("RGB")
    assert still.size == (3 * 96 + 2 * 4, 3 * 96 + 2 * 4)
    reference = np.asarray(still)[:96, :96]
    assert np.array_equal(reference, made.disc(17, 96, 0.0)[0])  # small frames are kept to the bit
    assert "×" in demo_page and "difference times" in demo_page


def test_synthetic_weights_and_budgets(full: Path):
    results = read_results([full])
    groups = make_groups(results)
    lines, _ = markdown("t", results, groups)
    assert lines.count("Synthetic weights: nobody trained them") == 1
    assert "Memory budgets and clip lengths: synthetic on Testcard 9000, synthetic weights" in lines
    assert "2 prompts, 6 make an interval" in lines and "indistinguishable" not in lines.split("## What was")[0]
    assert "synthetic weights: nobody trained them" in page("t", results[:1], make_groups(results[:1]))
    (found,) = budgets([(r, row_of([r])) for r in results if r.speed])
    plot = budgets_plot(found.lines, found.unlimited)
    assert plot is not None and "in 8.00 GB" in plot.alt
    assert Image.open(io.BytesIO(plot.png())).width > 600


# --- groups and rows ----------------------------------------------------------------------------------------------


def test_sizes_models_cards_and_settings_are_not_mixed(tmp_path: Path):
    one = made.make_result("int8 · int8 attention")
    others = [
        made.make_result("int8 · int8 attention", height=64),
        made.make_result("int8 · int8 attention", model="some/folder/other"),
        made.make_result("int8 · int8 attention", env=made.environment("Another card")),
        made.make_result("int8 · int8 attention", steps=24),
        made.make_result("int8 · int8 attention", synthetic={"generator": "x", "seed": 0}) | {"id": "e" * 16},
    ]
    made.write_results(tmp_path, [one])
    for i, other in enumerate(others):
        made.write_results(tmp_path / str(i), [other])
    results = read_results([tmp_path, *(tmp_path / str(i) for i in range(len(others)))])
    groups = make_groups(results)
    assert [len(g.rows) for g in groups] == [1] * 6
    assert {g.model for g in groups} == {"demo", "other", "synthetic"}


def test_models_of_one_name_and_steps_of_one_branch_are_not_mixed(tmp_path: Path):
    """What an older result does not tell is taken to be of the one model there is."""
    mode = "int8 · int8 attention"
    plain, first = made.make_result(mode), made.make_result("floor-order") | {"weights": "a" * 12}
    second = made.make_result(mode, seed=1, model="else/where/demo") | {"weights": "b" * 12}
    halved = made.make_result(mode, levels=("speed",), steps=3, guidance_scale=1.0, step=1.0)
    made.write_results(tmp_path / "one", [plain, first, halved])
    two, one = sorted(read(tmp_path / "one"), key=lambda group: group.guided, reverse=True)
    assert len(two.rows) == 2 and two.modes[0].step == pytest.approx(1.2, rel=0.05) and "(" not in two.title
    assert (
        one.modes[0].step == pytest.approx(0.6, rel=0.05)
        and one.title == "demo, 17 frames of 96x96, one guidance branch"
    )
    made.write_results(tmp_path / "two", [second])
    groups = make_groups(read_results([tmp_path / "one", tmp_path / "two"]))
    assert {g.title.partition(",")[0] for g in groups if g.guided} == {
        f"demo (weights {name})" for name in ("not recorded", "a" * 12, "b" * 12)
    }


def test_rows_of_several_commits_are_said(tmp_path: Path):
    """On the page and in its table of budgets, with what rows took from runs at other settings; never of equal ones."""
    mode, other = "int8 · int8 attention", "fp8 · int8 attention"
    later = made.environment(commit="def5678")
    results = [made.make_result(mode, levels=("teacher",)), made.make_result(other, env=later)]
    timed = made.make_result(mode, levels=("speed",), steps=3, pairs=1)
    made.write_results(tmp_path, [*results, timed])
    (group,) = read(tmp_path)
    notes = " ".join(group.notes)
    assert f"With commit abc1234: {mode}. With commit def5678: {other}." in notes and "driver" not in notes
    assert (
        f"Seconds a step and memory from runs with other settings, on which they do not depend, of 3 steps: {mode}."
        in notes
    )
    limited = made.make_result(mode, levels=("speed",), steps=3, pairs=1, vram="8GB", env=later)
    rows = [Result.from_dict(r) for r in (timed, limited)]
    (found,) = budgets([(r, row_of([r])) for r in rows])
    assert any(f"commit def5678: {mode}, 17 frames, GPU 8GB" in note for note in found.table.footnotes)
    (found,) = budgets(
        [(r, row_of([r])) for r in (rows[0], Result.from_dict(limited | {"environment": timed["environment"]}))]
    )
    assert not any("alike" in note for note in found.table.footnotes)


def test_most_rows_are_not_named_one_by_one():
    """Where more than half are alike; a row of results of both kinds stands with each, by what it took from it."""

    def one(commit: str, *levels: str) -> Result:
        env = made.environment(commit=commit)
        return Result.from_dict(made.make_result("nf4 · bf16 attention", levels=levels or ("speed",), env=env))

    old, new = one("abc1234"), one("def5678")
    rows = [(f"mode {n}", [new]) for n in range(5)]
    rows += [("mode 5", [old]), ("mode 6", [new, old]), ("mode 7", [one("def5678", "teacher"), old])]
    said = mixed(rows)
    assert said is not None and said.endswith(
        "With commit abc1234: mode 5; mode 6 (in part); mode 7 (speed). With commit def5678: everything else."
    )
    assert mixed(rows[:5]) is None
    said = mixed([("a", [old]), rows[-1]])
    bare = Result.from_dict(made.make_result("nf4 · bf16 attention", levels=("blocks",)) | {"drift": None})
    said_ = mixed([("a", [old]), ("b", [new, bare])])
    assert said_ and said_.endswith("With commit abc1234: a; b (in part). With commit def5678: b (in part).")
    assert said and said.endswith("With commit abc1234: a; mode 7 (speed). With commit def5678: mode 7 (drift).")


def test_what_failed_is_said(tmp_path: Path):
    """A mode that was asked for and has no result is not passed over in silence."""
    result = made.make_result("int8 · int8 attention", levels=("teacher",))
    made.write_results(tmp_path, [result])
    since = {"label": "int8", "error": "of an older version", "cell": Result.from_dict(result).cell.as_dict()}
    (tmp_path / "int8.failed.json").write_text(json.dumps(since), encoding="utf-8")
    told = {"label": "nf4 · <bf16>", "error": "no room"}
    (tmp_path / "nf4.failed.json").write_text(json.dumps(told), encoding="utf-8")
    (tmp_path / "cut.failed.json").write_text('{"label"', encoding="utf-8")
    output = tmp_path / "r.html"
    done = run(str(tmp_path), "-o", str(output), "--markdown", str(tmp_path / "r.md"))
    assert done.exit_code == 0, done.output
    line = "Not on this page: nf4 · &lt;bf16&gt; failed: no room (nf4.failed.json)"
    assert line in output.read_text(encoding="utf-8") and line in (tmp_path / "r.md").read_text(encoding="utf-8")
    assert output.read_text(encoding="utf-8").count("Not on this page") == 1  # neither what is there by now


def test_clocks_are_those_of_all_runs():
    runs = [made.make_result("reference", env=made.environment(clocks={"sm_mhz": mhz})) for mhz in (1545.0, 1770.0)]
    ((facts, own),) = environments([Result.from_dict(run) for run in runs])
    assert len(own) == 2 and ("clocks sm mhz", "1545 to 1770") in facts


def test_environments_are_counted_once(tmp_path: Path):
    """Cards of one machine are one environment, another commit is another; page and list have the same number."""
    told = [("abc1234", "0", 16), ("abc1234", "1", 16), ("def5678", "0", 16), ("def5678", "0", 8)]
    names = ("reference", "int8 · int8 attention", "nf4 · bf16 attention", "fp8 · int8 attention")
    results = []
    for name, (commit, card, cores) in zip(names, told, strict=True):
        env = made.environment(commit=commit, variables={"CUDA_VISIBLE_DEVICES": card}, cores=cores)
        results.append(made.make_result(name, levels=("speed",), env=env))
    made.write_results(tmp_path, results)
    read_ones = read_results([tmp_path])
    found = environments(read_ones)
    assert sorted(len(own) for _, own in found) == [1, 1, 2]  # other cores are another one, in an equal line
    (facts,) = [dict(facts) for facts, own in found if len(own) == 2]
    assert facts["variables CUDA VISIBLE DEVICES"] == "0 or 1"
    text = page("t", read_ones, make_groups(read_ones))
    assert "These results come from 3 environments." in text and text.count("<h3>Testcard 9000") == 3
    assert ", commits def5678 and abc1234</p>" in text  # in the order of the files
    assert " more, <a" not in text
    for n, result in enumerate(results):
        result["environment"]["driver"] = f"580.{n}"
    others = [Result.from_dict(result) for result in results]
    assert "and 1 more, <a" in page("t", others, make_groups(others))


def test_a_budget_of_the_environment_is_one(tmp_path: Path):
    """A run without --host-ram stays in $SOLOSTEP_HOST_RAM, so its row does not say that it had none."""
    env = made.environment(variables={"SOLOSTEP_HOST_RAM": "60GB"})
    rows = [made.make_result("int8 · int8 attention", levels=("speed",), vram="8GB", host_ram=h, env=e)
            for h, e in ((None, env), ("4GB", env), (None, None))]  # fmt: skip
    results = [Result.from_dict(row) for row in rows]
    (found,) = budgets([(r, row_of([r])) for r in results])
    place = [name for _, name in found.table.heads].index("host budget")
    cells = [row[place] for row in found.table.rows]
    assert sorted(cells, key=str) == sorted([Cell("60GB", "by $SOLOSTEP_HOST_RAM"), Cell("4GB"), Cell("none")], key=str)


def test_folders_of_commands_are_explained(tmp_path: Path):
    for command_, said in (("solostep bench -o .../x", True), ("solostep bench -o x", False)):
        result = Result.from_dict(made.make_result("reference", env=made.environment(command=command_)))
        lines, _ = markdown("t", [result], make_groups([result]))
        for text in (page("t", [result], make_groups([result])), lines):
            assert ("stands for folders of the machine that measured" in text) == said


def test_times_join_the_drift_of_the_same_mode(tmp_path: Path):
    """Speed measured at other settings is the same mode's; a budget's is in the table of budgets alone."""
    mode = "int8 · int8 attention"
    made.write_results(tmp_path, [
        made.make_result(mode, levels=("teacher",)), made.make_result("floor-order", levels=("teacher",)),
        made.make_result(mode, levels=("speed",), steps=3, pairs=1),
        made.make_result(mode, levels=("speed",), steps=3, pairs=1, vram="8GB", step=9.0),
        made.make_result("reference", levels=("speed",), steps=3, pairs=1),
    ])  # fmt: skip
    groups = read(tmp_path)
    assert len(groups) == 1
    (row,) = groups[0].modes
    assert row.step == pytest.approx(1.2, rel=0.05) and "teacher" in row.drift and len(row.ids) == 2
    assert groups[0].ratio(row) == pytest.approx(1 / 0.6, rel=0.05)
    results = read_results([tmp_path])
    (found,) = budgets([(r, row_of([r])) for r in results if r.speed])
    assert len(found.table.rows) == 2 and [c.text for c in found.table.rows[0]][2] == "8GB"


def test_videos_of_other_settings_do_not_join(tmp_path: Path):
    """A reference has no drift, and its seconds join those of other settings; the prompts that its videos followed, and
    their frames, do not: they are of other steps."""
    made.demo_set(tmp_path / "long", names=("reference",), steps=24)
    made.demo_set(tmp_path / "short", names=("reference", "floor-order"), levels=("teacher",), frames=False)
    (group,) = (g for g in make_groups(read_results([tmp_path])) if g.settings)
    row = group.reference
    assert row and row.step and row.score == {} and row.frames is None and row.followed == {}
    made.demo_set(tmp_path / "seen", names=("reference",), steps=24, levels=("score",), pairs=7)
    (group,) = (g for g in make_groups(read_results([tmp_path])) if g.settings)
    assert len(group.reference.ids) == 2 and not any("alike" in note for note in group.notes)


def test_drawn_weights_are_known_by_their_generator(tmp_path: Path):
    """Drift measured block by block, and times of a folder with the same weights; memory is the latter's alone."""
    drawn = {"synthetic": {"generator": "x", "seed": 0}}
    drift = made.make_result("nf4 · bf16 attention", levels=("teacher",), model="synthetic", **drawn)
    drift["memory"] = {"gpu_peak_bytes": 77_000_000_000, "host_peak_bytes": 88_000_000_000, "stages": []}
    made.write_results(tmp_path / "alone", [drift])
    (row,) = read(tmp_path / "alone")[0].modes
    assert row.gpu is None and row.host is None
    timed = made.make_result("nf4 · bf16 attention", levels=("speed",), steps=2, model="a/folder", **drawn)
    made.write_results(tmp_path / "both", [drift, timed])
    (group,) = read(tmp_path / "both")
    (row,) = group.modes
    assert row.step and row.gpu == timed["memory"]["gpu_peak_bytes"] and "teacher" in row.drift


def test_other_seed_joins_with_its_own_seeds(tmp_path: Path):
    modes = [made.make_result("int8 · int8 attention"), made.make_result("floor-order")]
    made.write_results(tmp_path, [*modes, made.make_result("other-seed", pairs=3)])
    (group,) = read(tmp_path)
    assert group.other_seed is not None and len(group.modes) == 1


def test_verdicts(demo: Path):
    group = read(demo)[0]
    rows = {row.name: row for row in group.rows}
    kinds = {name: row.verdict.kind for name, row in rows.items() if row.verdict}
    assert kinds["int8 · int8 attention"] == "floor" and kinds["bf16 · bf16 attention"] == "floor"
    assert kinds["nf4 · bf16 attention"] == "above" and kinds["int8 · int8-fp8 attention"] == "above"
    verdict = rows["nf4 · bf16 attention"].verdict
    assert verdict and verdict.times and list(verdict.parts) == ["teacher", "free", "psnr"]
    for part in verdict.parts.values():  # errors were drawn 0.086 / 0.0125 apart; PSNR is of them too
        assert part.kind == "above" and part.ratio == pytest.approx(0.086 / 0.0125, rel=0.1)
        assert part.times and part.times.low and part.times.low < 0.086 / 0.0125 < (part.times.high or 0)
    assert verdict.steps == (12, 12)
    noise = rows["int8 · int8 attention"].verdict
    assert noise and noise.is_noise and noise.steps and noise.steps[0] <= 1
    lines, _ = markdown("t", [], [group])
    assert "times the floor" in lines and "Beside the noise floor, measure by measure" in lines
    (line,) = [x for x in lines.splitlines() if x.startswith("| nf4 · bf16 attention |") and "steps above" in x]
    assert f"| {number(verdict.ratio)}× [" in line and "12 of 12 steps above the floor" in line


def compared(tmp_path: Path, error: float, prompts: int, seed: int) -> Group:
    """A mode with so many times the floor's error, prompts of very different difficulty, little noise of each."""
    made.MODES["mode under test"] = made.MODES["int8 · int8 attention"] | {"error": 0.0125 * error}
    names, levels = ("reference", "floor-order", "mode under test"), ("speed", "teacher")
    results = [made.make_result(n, pairs=prompts, hard=0.5, seed=seed, levels=levels) for n in names]
    made.write_results(tmp_path / f"{error}-{prompts}-{seed}", results)
    return read(tmp_path / f"{error}-{prompts}-{seed}")[0]


def test_few_prompts_do_not_hide_a_larger_error(tmp_path: Path):
    """Half as much error again: the intervals of both overlap, and the ratio tells them apart all the same."""
    for seed in range(5):
        group = compared(tmp_path, 1.5, 8, seed)
        verdict, claim = group.modes[0].verdict, headline(group)[0]
        assert verdict and verdict.kind == "floor" and verdict.text.startswith("indistinguishable from the floor; ")
        assert verdict.times and verdict.times.low and 1.3 < verdict.times.low <= 1.5 * 1.05 and not verdict.is_noise
        assert verdict.text.endswith(", intervals overlap")
        assert "rounding noise" not in claim.text and "intervals overlap" in claim.text and claim.title != "Use"
        assert f"{number(verdict.ratio)} times the floor [" in claim.text


def test_the_floor_itself_is_noise(tmp_path: Path):
    found = [compared(tmp_path, 1.0, 16, seed) for seed in range(8)]
    verdicts = [group.modes[0].verdict for group in found]
    assert all(v and v.kind == "floor" for v in verdicts)
    assert sum(bool(v and v.is_noise) for v in verdicts) >= 6  # 95 % of them, but for those below
    claims = [headline(g)[0] for g in found if g.modes[0].verdict and g.modes[0].verdict.is_noise]
    assert all(c.title == "Use" and "cannot be told from rounding noise" in c.text for c in claims)
    steps = [v.steps[0] for v in verdicts if v and v.steps]
    assert sum(steps) <= 10  # of 96, one in forty by chance


def test_a_mode_that_one_measure_tells_apart_is_not_noise(tmp_path: Path):
    """Its steps are the floor's, its videos are not."""
    results = [made.make_result(n) for n in ("reference", "floor-order", "int8 · int8 attention")]
    video = results[2]["drift"]["video"]
    video["psnr"] = [p - 6.02 for p in video["psnr"]]
    made.write_results(tmp_path, results)
    verdict = read(tmp_path)[0].modes[0].verdict
    assert verdict and verdict.kind == "above" and verdict.parts["teacher"].kind == "floor"
    assert verdict.text == f"PSNR: {number(verdict.parts['psnr'].ratio)} times the floor"
    video["psnr"] = [p + 6.02 for p in video["psnr"]]
    made.write_results(tmp_path / "as before", results)
    before = read(tmp_path / "as before")[0].modes[0].verdict
    assert before and before.is_noise  # 6 dB are a factor of two
    assert verdict.parts["psnr"].ratio == pytest.approx(2 * (before.parts["psnr"].ratio or 0), rel=1e-3)


def test_equal_runs_are_noise(tmp_path: Path):
    """Errors of 0 and infinite PSNR, of the mode and then of the floor too."""
    results = [made.make_result(n) for n in ("reference", "floor-order", "int8 · int8 attention")]
    for i, result in enumerate(reversed(results[1:])):
        drift = result["drift"]
        for level in ("teacher", "free"):
            drift[level]["error"] = [[0.0] * 12] * 8
        drift["video"]["psnr"] = [None] * 8
        made.write_results(tmp_path / str(i), results)
        verdict = read(tmp_path / str(i))[0].modes[0].verdict
        assert verdict and verdict.is_noise and {part.ratio for part in verdict.parts.values()} == {float(i)}
    results[2]["drift"]["free"]["error"] = [[0.1] * 12] * 8
    made.write_results(tmp_path / "above", results)
    verdict = read(tmp_path / "above")[0].modes[0].verdict
    assert verdict and verdict.kind == "above" and verdict.text == "latents at the end: a floor of 0"


def test_a_floor_of_0_is_a_floor(tmp_path: Path):
    """Videos of a few steps may be the same in any order of sums. The headline is what is nearest the reference."""
    names = ("reference", "floor-order", "fp8 · int8 attention", "int8 · int8 attention")
    results = [made.make_result(name, levels=("video",)) for name in names]
    results[1]["drift"]["video"]["psnr"] = [None] * 8
    made.write_results(tmp_path, results)
    (claim,) = headline(read(tmp_path)[0])
    assert claim.title == "Nearest to the floor" and claim.mode == "int8 · int8 attention"
    assert claim.text.startswith("No mode here is within the noise floor; PSNR beside a floor of 0"), claim.text


@pytest.mark.parametrize("steps", [range(12), (3, 9)], ids=["runs", "single steps"])
def test_a_mode_that_equals_the_reference_has_a_page(steps: Sequence[int], tmp_path: Path):
    """Its errors are 0 at every step: no line, which is said, and no failure; the line of one that differs at
    the first step alone ends there."""
    names = ("reference", "floor-order", "fp8 · int8 attention", "bf16 · bf16 attention", "int8 · int8 attention")
    results = [made.make_result(name) for name in names]
    kept = {"bf16 · bf16 attention": 1, "int8 · int8 attention": 0}
    for result in results[1:]:
        differing = kept.get(result["label"], len(steps))
        result["drift"]["teacher"].pop("cosine")
        for part in (result["drift"]["teacher"], result["drift"]["free"]):
            part["sigmas"] = [part["sigmas"][i] for i in steps]
            rows = [[row[i] for i in steps] for row in part["error"]]
            part["error"] = [row[:differing] + [0.0] * (len(steps) - differing) for row in rows]
    made.write_results(tmp_path, results)
    page, text = tmp_path / "page.html", tmp_path / "text"
    done = run(str(tmp_path), "-o", str(page), "--markdown", str(text))
    assert done.exit_code == 0, done.output
    said = "Not drawn, because a logarithmic axis has no 0: int8 · int8 attention."
    assert page.read_text(encoding="utf-8").count(said) >= 2
    assert (text / "group-1-teacher-steps.png").exists()


def test_pairs_are_matched_by_name(tmp_path: Path):
    """A floor whose pairs stand in another order, and some of which are missing, is divided by the same ones."""
    mode, floor = (made.make_result(n, levels=("teacher",), hard=1.0) for n in ("int8 · int8 attention", "floor-order"))
    made.write_results(tmp_path / "a", [mode, floor])
    before = read(tmp_path / "a")[0].modes[0].verdict
    teacher = floor["drift"]["teacher"]
    for values in (floor["pairs"], teacher["error"], teacher["cosine"]):
        values.reverse()
    made.write_results(tmp_path / "b", [mode, floor])
    after = read(tmp_path / "b")[0].modes[0].verdict
    assert before and after and before.times == after.times and before.times and before.times.n == 8


def test_a_floor_loses_prompts_too_or_was_not_asked(tmp_path: Path):
    """What rounding alone loses stands beside what modes do; older floors have no score, and say nothing of it."""
    mode = "int8 · int8 attention"
    older = made.make_result("floor-order") | {"score": None}
    results = [made.make_result("reference"), made.make_result("floor-backend", lost=(2,)), older]
    made.write_results(tmp_path, [*results, made.make_result(mode, lost=(2, 3))])
    (group,) = read(tmp_path)
    backend, order = sorted(group.floors, key=lambda row: row.role)
    assert len(backend.lost or {}) == 1 and order.lost is None and len(group.modes[0].lost or {}) == 2
    assert "7 of 8" in followed(backend).text and followed(backend).more.endswith("1 prompt lost")
    assert followed(order).text == MISSING
    (found,) = [table for table in [scores(group)] if table]
    assert [row[0].text for row in found.rows] == ["reference: bf16, official", backend.name, mode]
    assert any(note.startswith(f"Lost by {backend.name}: ") for note in found.footnotes)


def test_prompts_that_are_lost(tmp_path: Path):
    """Four seeds of one prompt are one prompt, and what the reference does not follow cannot be lost."""
    mode = "int8 · int8 attention"
    own = {"pairs": 32, "seeds": 4, "levels": ("speed", "score")}
    results = [made.make_result("reference", **own, lost=(5,)), made.make_result(mode, **own, lost=(4, 5, 6, 20))]
    made.write_results(tmp_path, results)
    (group,) = read(tmp_path)
    (row,), reference = group.modes, group.reference
    assert reference and reference.score["kind"] == (128, 128, 32)
    assert share(reference.score["kind"]) == "128 of 128 [0.89, 1.00]"  # of 32 prompts, not [0.97, 1] of 128
    names = [pair["prompt"] for pair in results[0]["pairs"]]
    assert row.lost == {(names[4], 1): ["motion"], (names[6], 3): ["motion"], (names[20], 1): ["motion"]}
    text, _ = markdown("t", [], [group])
    assert f"Lost by {mode}: {plain(names[20])} (seed 1): motion." in text
    assert "2 prompts lost" in text and "2 prompts lost" in headline(group)[0].text


def test_flicker_has_no_good_sign(tmp_path: Path):
    """Flickering less than the reference is as far from it as flickering more."""
    result = made.make_result("int8 · int8 attention")
    result["drift"]["video"]["flicker"] = [-0.5] * 4 + [0.5] * 4
    made.write_results(tmp_path, [result])
    found = read(tmp_path)[0].modes[0].drift["flicker"]
    assert (found.median, found.low, found.high) == (0.5, 0.5, 0.5)


def test_verdict_needs_prompts_and_a_floor(tmp_path: Path):
    few = [made.make_result(n, pairs=5) for n in ("int8 · int8 attention", "floor-order", "reference")]
    made.write_results(tmp_path / "few", few)
    (group,) = read(tmp_path / "few")
    assert group.modes[0].verdict and group.modes[0].verdict.kind == "open"
    assert "5 prompts are too few" in headline(group)[0].text and headline(group)[0].title != "Use"
    far = [made.make_result(n, pairs=2) for n in ("nf4 · bf16 attention", "floor-order", "reference")]
    made.write_results(tmp_path / "far", far)
    claim = headline(read(tmp_path / "far")[0])[0]
    assert claim.title == "Nearest to the floor" and claim.text.startswith("Too few prompts for a verdict: 2, 6 make")
    made.write_results(tmp_path / "none", [made.make_result("int8 · int8 attention")])
    (group,) = read(tmp_path / "none")
    assert group.modes[0].verdict and group.modes[0].verdict.kind == "unknown"
    assert headline(group)[0].title == "No verdict"
    assert any("No noise floor" in note for note in group.notes)
    assert any("No result of the reference" in note for note in group.notes)


def test_headline_is_the_fastest_within_the_floor(demo: Path):
    group = read(demo)[0]
    claims = headline(group)
    assert [c.mode for c in claims] == ["int8 · int8 attention", "int8 · int8-fp8 attention", "nf4 · bf16 attention"]
    row = next(r for r in group.modes if r.name == claims[0].mode)
    assert number(row.step) in claims[0].text and gigabytes(row.gpu) in claims[0].text


def test_headline_says_beside_what_a_mode_is_fast_and_how_far_off_it_is(demo: Path):
    """Beside the official order and beside this engine in the same numbers; a small mode is not praised without its
    drift."""
    group = read(demo)[0]
    _, fastest, least = headline(group)
    rows = {row.name: row for row in group.rows}
    (bf16,) = [row for row in group.modes if row.cell.precision == "bf16"]
    steps = [rows[name].step for name in ("reference: bf16, official", bf16.name, fastest.mode)]
    assert (
        f"({steps[0] / steps[2]:.2f} times as fast as the official order in bf16, {steps[1] / steps[2]:.2f} times as "
        f"fast as {bf16.name} here)" in fastest.text
    )
    assert "far above" not in fastest.text and "as fast as the reference" not in fastest.text
    row = rows[least.mode]
    assert least.title == "Least GPU memory" and amount("teacher", row.drift["teacher"].median) in least.text
    assert row.verdict and f"{number(row.verdict.ratio)} times the floor" in least.text
    assert least.text.endswith(" That is far above the floor.")
    alone = Group(**{**vars(group), "rows": [bf16]})  # nothing to be beside
    assert "times as fast" not in headline(alone)[0].text


def test_seeds_of_one_prompt_count_once(tmp_path: Path):
    made.write_results(tmp_path, [made.make_result("int8 · int8 attention", pairs=4, seeds=2)])
    interval = read(tmp_path)[0].modes[0].drift["teacher"]
    assert interval.n == 4 and interval.low is None


def test_blocks_and_operators_have_intervals_over_prompts(tmp_path: Path):
    for prompts in (5, 8):
        result = made.make_result("int8 · int8 attention", pairs=prompts, blocks=2, levels=("blocks",))
        made.write_results(tmp_path / str(prompts), [result])
        (row,) = read(tmp_path / str(prompts))[0].modes
        errors = result["drift"]["blocks"]["error"]
        assert row.blocks == pytest.approx({str(i): np.median(errors[i]) for i in range(2)})
        spans = [*row.block_spans.values(), *row.operator_spans.values()]
        assert len(spans) == 2 + 3 and all(span.n == prompts for span in spans)
        for span in spans:
            assert span.low is None if prompts < 6 else span.low and span.low < span.median < (span.high or 0)
        text, _ = markdown("t", [], read(tmp_path / str(prompts)))
        lines = [line for line in text.splitlines() if line.startswith(("| 0 |", "| 1 |"))]
        assert len(lines) == 2 and all(("[" in line) == (prompts == 8) for line in lines)


def test_what_was_not_measured_is_a_dash(tmp_path: Path):
    made.write_results(tmp_path, [made.make_result("reference", levels=("speed",)),
                                  made.make_result("nf4 · bf16 attention", levels=("teacher",))])  # fmt: skip
    (group,) = read(tmp_path)
    table = summary(group)
    column = [name for _, name in table.heads].index("seconds a step")
    texts = {row[0].text: row[column].text for row in table.rows}
    assert texts["nf4 · bf16 attention"] == "–" and texts["reference: bf16, official"] != "–"
    assert "LPIPS" not in [name for _, name in table.heads]  # nobody measured it


def test_identical_videos_and_missing_metrics(tmp_path: Path):
    """A null PSNR is an infinite one; a null of another metric is one that could not be taken."""
    result = made.make_result("int8 · int8 attention")
    video = result["drift"]["video"]
    video["psnr"] = [None] * 7 + [40.0]
    video["xpsnr"] = [None] * 8
    video["lpips"] = [None] * 8
    made.write_results(tmp_path, [result])
    (row,) = read(tmp_path)[0].modes
    assert math.isinf(row.drift["psnr"].median) and amount("psnr", row.drift["psnr"].median) == "∞ dB"
    assert row.drift["xpsnr"].n == 7 and math.isinf(row.drift["xpsnr"].median)
    assert "lpips" not in row.drift


def test_newest_of_two_results_is_shown_and_said(tmp_path: Path):
    old, new = (
        made.make_result("int8 · int8 attention", seed=s, env=made.environment(date=f"2026-01-0{s + 1}"), step=2.0 + s)
        for s in (0, 1)
    )
    made.write_results(tmp_path, [new, old | {"id": "0" * 16}])
    (group,) = read(tmp_path)
    assert len(group.rows) == 1 and group.rows[0].step == pytest.approx(3.0 * 0.6, rel=0.05)
    assert any(new["id"] in note for note in group.notes)


def test_what_was_run_to_the_end_is_shown_so(tmp_path: Path):
    """A whole video that was made, in two processes, stays where a newer result has but a few steps."""
    old, new = (
        made.make_result("int8 · int8 attention", seed=s, env=made.environment(date=f"2026-01-0{s + 1}"))
        for s in (0, 1)
    )
    old["id"] = "0" * 16
    old["speed"] |= {"end_to_end": {"50": {"seconds": 1100.0, "extrapolated": False}}, "resumed": [20, 30]}
    made.write_results(tmp_path, [new, old])
    (group,) = read(tmp_path)
    (row,) = group.rows
    assert whole_video(row, "50") == Cell("18.3 min\u202f‡", "20 + 30 steps") and "†" in whole_video(row, "15").text
    assert row.step == pytest.approx(np.median(new["speed"]["step_seconds"]))
    assert any(f"{new['id']}, is shown, but for 50 steps, as {'0' * 16} ran them." in note for note in group.notes)
    assert RESUMED in summary(group).footnotes
    assert "18.3 min\u202f‡ for 50 steps" in " ".join(c.text for c in headline(group)).replace("\xa0", " ")


# --- numbers and places -------------------------------------------------------------------------------------------


def test_numbers():
    assert [number(v) for v in (None, 0, 1.0449, 12345.6, 0.000123, math.inf)] == [
        "–", "0", "1.04", "12,346", "0.000123", "∞"
    ]  # fmt: skip
    assert [seconds(v) for v in (3.14159, 119, 1916, 72000)] == ["3.14 s", "119 s", "31.9 min", "20.0 h"]
    assert end_to_end((50.0, True)).endswith("†") and not end_to_end((50.0, False)).endswith("†")
    assert gigabytes(33.04e9) == "33.0 GB" and gigabytes(5.2e8) == "520 MB" and gigabytes(None) == "–"
    assert amount("teacher", 0.0123) == "1.23 %" and amount("psnr", 51.53) == "51.5 dB"
    assert share(Share(192, 192, 192)) == "192 of 192 [0.98, 1.00]"
    assert gigabytes_of("24GB") == 24 and gigabytes_of("none") is None and gigabytes_of(None) is None
    assert plain("a|b <i>*x*") == "a\\|b &lt;i&gt;\\*x\\*" and "](" not in plain("[a](b)")


def test_labels_do_not_lie_on_each_other():
    places = [0.5, 0.5, 0.51, 0.1, 0.9, 0.52]
    found = spread(places, 0.05)
    ordered = sorted(found)
    assert all(b - a >= 0.05 - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
    assert found[3] == 0.1 and found[4] == 0.9 and found[0] <= found[2] <= found[5]
    taken, frame = [(40.0, 40.0, 60.0, 60.0)], (0.0, 0.0, 200.0, 200.0)
    for _ in range(6):
        box = free_box((50, 50), (40, 12), frame, taken, 12)
        assert covered(box, taken) == 0 and covered(box, [frame]) == pytest.approx(40 * 12)
        taken.append(box)


def test_amplification_fits_the_median_mode():
    black = np.zeros((1, 8, 8, 3), np.uint8)
    assert amplification([(black + 2, black)]) == 100
    assert amplification([(black + 2, black), (black + 24, black), (black + 200, black)]) == 10
    assert amplification([(black, black)]) == 100


# --- the command's files and what it refuses ----------------------------------------------------------------------


def test_markdown_folder_with_plots(tmp_path: Path):
    demo = tmp_path / "results"
    made.write_results(demo, [made.make_result(n, levels=("speed", "teacher")) for n in NAMES if n != "other-seed"])
    done = run(str(demo), "--markdown", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert len(pictures) == 2  # seconds against drift, and drift by step
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*pictures, "report.md"])
    rows = [line for line in text.splitlines() if line.startswith("| int8 · int8 attention |")]
    assert "indistinguishable from the floor" in rows[0]
    again = run(str(demo), "--markdown", str(tmp_path / "out"))
    assert again.exit_code == 2 and "--overwrite" in again.output
    none = run(str(tmp_path / "nowhere"), "--markdown", str(tmp_path / "out"))
    assert none.exit_code == 2 and "nowhere is not there" in " ".join(none.output.split())
    only = run(str(demo), "--markdown", str(tmp_path / "only.md"))
    assert only.exit_code == 0 and "![" not in (tmp_path / "only.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", ["nothing", "gone", "empty", "other", "old", "broken", "there", "folder", "frames"])
def test_refusals(case: str, tmp_path: Path):
    folder, output = tmp_path / "results", tmp_path / "r.html"
    result = made.make_result("int8 · int8 attention", levels=("teacher",))
    (path,) = made.write_results(folder, [result])
    arguments, words = [str(path), "-o", str(output)], ""
    if case == "nothing":
        arguments, words = ["-o", str(output)], "No results"
    elif case == "gone":
        arguments, words = [str(tmp_path / "gone.json"), "-o", str(output)], "gone.json"
    elif case == "empty":
        (tmp_path / "empty").mkdir()
        arguments, words = [str(tmp_path / "empty"), "-o", str(output)], "no result"
    elif case == "other":
        path.write_text('{"name": "something else"}', encoding="utf-8")
        words = path.name
    elif case == "old":
        path.write_text(json.dumps(result | {"solostep_bench": 0}), encoding="utf-8")
        words = "solostep_bench"
    elif case == "broken":
        path.write_text("{", encoding="utf-8")
        words = "JSON"
    elif case == "there":
        output.write_text("mine", encoding="utf-8")
        words = "--overwrite"
    elif case == "folder":
        arguments, words = [str(path), "-o", str(tmp_path / "no" / "r.html")], "does not exist"
    elif case == "frames":
        path.write_text(json.dumps(result | {"frames": {"file": "f.npz", "index": [0]}}), encoding="utf-8")
        (folder / "f.npz").write_bytes(b"no frames")
        words = "f.npz"
    before = sorted(p for p in tmp_path.rglob("*"))
    done = run(*arguments)
    assert done.exit_code == 2 and words in " ".join(done.output.split()), done.output
    assert sorted(p for p in tmp_path.rglob("*")) == before
    if case == "there":
        assert output.read_text(encoding="utf-8") == "mine"


def test_frames_are_checked(tmp_path: Path):
    np.savez(tmp_path / "a.npz", frames=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(UsageError, match="holds no frames"):
        read_frames(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", frames=np.zeros((2, 4, 4, 3), np.uint8), index=np.array([3, 9]))
    assert read_frames(tmp_path / "b.npz")["index"].tolist() == [3, 9]
