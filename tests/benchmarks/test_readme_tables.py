"""README.md's tables are what the results make them; a region that is not is found."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from solostep.benchmarks.readme_lines import (
    BLOCK,
    CHANGED,
    DECODING,
    FILES,
    KERNELS,
    REPEATED,
    WHOLE,
    attention_table,
    block_table,
    decoding_table,
    memory_table,
)
from solostep.benchmarks.readme_tables import PAGE, PAGES, ROOT, TABLES, main, page_is_stale, results_in, stale, updated
from solostep.benchmarks.report_html import table
from solostep.benchmarks.report_tables import files
from solostep.benchmarks.synthetic import marked
from solostep.engine import cards
from solostep.engine.asked import ask as once
from solostep.engine.errors import UsageError

_spec = importlib.util.spec_from_file_location("report_fixtures", Path(__file__).with_name("report_fixtures.py"))
assert _spec is not None and _spec.loader is not None
made: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)

README = "# x\n\nbefore\n\n" + "".join(
    f"<!-- table: {name} -->\nold\n<!-- /table -->\n\nbetween\n\n" for name in TABLES
)  # fmt: skip


def test_the_readme_is_up_to_date():
    """Run `python -m solostep.benchmarks.readme_tables` where this fails."""
    readme, more = ((ROOT / name).read_text(encoding="utf-8") for name in PAGES)
    assert readme.count("<!-- table: ") >= 2 and stale(readme, ROOT) == []
    assert more.count("<!-- table: ") >= 2 and stale(more, ROOT) == []
    assert (ROOT / PAGE).exists() and not page_is_stale(ROOT)
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert "<h3>Seconds against drift</h3><figure>" in page
    maps = re.findall(r'<svg class="plot wide"[^>]*aria-label="Error of each block\..*?</svg>', page, re.DOTALL)
    cells = [plot.partition("QuadMesh")[2].partition("</g>")[0].count("<path") for plot in maps]
    assert any(n and n % 48 == 0 for n in cells)  # of the real shape: a cell a block, a row a mode
    cheap = re.sub(r"<!-- table: budgets -->.*?<!-- /table -->", "", more, flags=re.DOTALL)
    assert stale(cheap.replace(" GiB |", " GB |"), ROOT) == ["decoding", "block"]
    assert stale(cheap.replace("| int8, hopper | 1", "| int8, hopper | 2"), ROOT) == ["attention"]
    assert stale(cheap.replace("| 12 GB | fp8 | 204 | 3 ", "| 12 GB | fp8 | 204 | 2 "), ROOT) == ["memory"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout's README with every region, and results for them."""
    results = tmp_path / "benchmarks" / "results"
    made.full_size_set(results / "h200")
    small = made.make_result("int8 · int8 attention", steps=2, levels=("speed",), num_frames=204, vram="16GB")
    made.write_results(results / "h200", [small])
    texts = [
        made.make_result(name, steps=1, pairs=6, levels=("teacher",), num_frames=51, height=544, width=992,
                         synthetic={"generator": "test data", "seed": 0})
        for name in ("floor-backend", "int8 · int8 attention", "fp8 · int8 attention")
    ]  # fmt: skip
    made.write_results(results / "h200", texts)
    made.demo_set(results / "demo" / "some-card", frames=False)
    for name in (BLOCK, DECODING, WHOLE, FILES, *KERNELS):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    return tmp_path


def test_regions_are_made_and_kept(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--check"], root) == 1
    assert "modes is stale" in capsys.readouterr().err
    assert (root / "README.md").read_text(encoding="utf-8") == README  # --check changes nothing
    assert main([], root) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# x\n\nbefore\n\n") and text.count("\nbetween\n") == len(TABLES) and "old" not in text
    assert main(["--check"], root) == 0 and main([], root) == 0
    assert (root / "README.md").read_text(encoding="utf-8") == text


def test_both_pages_are_made(root: Path, capsys: pytest.CaptureFixture[str]):
    page = root / PAGES[1]
    page.write_text("# more\n\n<!-- table: choice -->\n<!-- /table -->\n", encoding="utf-8")
    assert main([], root) == 0 and f"{PAGES[1]}: choice brought up to date." in capsys.readouterr().out
    assert "| 16GB |" in page.read_text(encoding="utf-8") and main(["--check"], root) == 0
    page.write_text("<!-- table: other -->\n<!-- /table -->\n", encoding="utf-8")
    assert main(["--check"], root) == 2 and f"{PAGES[1]}: there is no table other" in capsys.readouterr().err


def test_what_the_tables_say(root: Path):
    text = updated(README, root)
    modes, drift, budgets, *_ = (
        text.split(f"<!-- table: {name} -->")[1].split("<!-- /table -->")[0] for name in TABLES
    )
    times = ["seconds a step", "50 steps", "15 steps (Turbo)"]
    heads = ["mode", *times, "GPU peak (torch)", "host peak", "teacher-forced error"]
    assert f"| {' | '.join(heads)} |" in modes
    (row,) = [line for line in modes.splitlines() if line.startswith("| int8 · int8 attention |")]
    assert "†" in row and "33.0 GB" in row and " % |" in row and "[" not in row  # two prompts make no interval
    assert "synthetic, 204 frames of 544x992, synthetic weights" in modes and "Testcard 9000" in modes
    assert "51 frames" not in modes and "8GB" not in modes
    (row,) = [line for line in drift.splitlines() if line.startswith("| nf4 · bf16 attention |")]
    assert "times the floor" in row and " of 8 [" in row and " dB " in row and "× [" in row
    assert "noise floor: another order" in drift and "another seed" in drift
    (heads, _, *rows) = [line.strip("| ").split(" | ") for line in budgets.splitlines() if line.startswith("| ")]
    sizes = ("48GB", "24GB", "16GB", "12GB", "8GB")
    assert heads == ["mode", "frames", "no budget", *(f"`--vram {size}`" for size in sizes)]
    found = {(row[0], row[1]): row[2:] for row in rows}
    assert len(found) == len(rows) and [row[1] for row in rows if "int8-fp8" in row[0]] == ["204", "102", "51"]
    cells = found["int8 · int8-fp8 attention", "204"]
    assert cells[3] == "–" and cells[5].endswith(" s, 7.6 + 21.1 GB") and found["nf4 · bf16 attention", "204"][5] == "–"
    assert found["int8 · int8-fp8 attention", "51"][0] == "–"
    texts = text.split("<!-- table: texts -->")[1].split("<!-- /table -->")[0]
    rows = [line.strip("| ").split(" | ") for line in texts.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [
        "*noise floor: another back end*",
        "int8 · int8 attention",
        "fp8 · int8 attention",
    ]
    assert all(re.fullmatch(r"[\d.]+ % \[[\d.]+, [\d.]+\]", row[1]) for row in rows) and "6 prompts" in texts
    assert rows[0][2] == "–" and "× [" in rows[1][2] and "synthetic weights: " in texts
    plans = text.split("<!-- table: plans -->")[1].split("<!-- /table -->")[0]
    rows = [line.strip("| ").split(" | ") for line in plans.splitlines() if line.startswith("| ")][2:]
    planned, took, off = ([float(row[i].split()[0]) for row in rows] for i in (4, 5, 6))
    assert len(rows) > 10 and off == sorted(off, reverse=True)
    assert all(abs(100 * (b / a - 1) - c) < 0.2 for a, b, c in zip(planned, took, off, strict=True))
    choice = text.split("<!-- table: choice -->")[1].split("<!-- /table -->")[0].splitlines()
    assert [line.split(" | ")[0] for line in choice if line.startswith("| 1")] == ["| 16GB"]


def test_what_numbers_rest_on_stands_below_the_tables(root: Path):
    """One prompt at one step, one timed step, the text encoder's precision; each where it matters."""
    folder = root / "benchmarks" / "results" / "h200"
    for path in folder.iterdir():
        path.unlink()
    levels, results = ("speed", "teacher"), []
    for vram in (None, "12GB"):
        result = made.make_result("int8 · int8 attention", steps=2, pairs=1, levels=levels, num_frames=204, vram=vram,
                                  num_inference_steps=50)  # fmt: skip
        result["speed"] |= {"ran": {"text_precision": "int8"}, "step_seconds": result["speed"]["step_seconds"][:1]}
        teacher = result["drift"]["teacher"]
        teacher |= {"sigmas": [0.469], **{k: [row[:1] for row in teacher[k]] for k in ("error", "cosine")}}
        results.append(result)
    made.write_results(folder, results)
    modes, budgets = (updated(f"<!-- table: {name} -->\n<!-- /table -->\n", root) for name in ("modes", "budgets"))
    assert "so many times the one step that was timed after the first" in modes
    assert "Step-LLM in int8 in all rows" in modes and "Step-LLM in int8 in all rows" in budgets
    assert "Drift: of 1 prompt at 1 of 50 steps (sigma 0.47): no interval, so small differences" in modes
    drift = updated("<!-- table: drift -->\n<!-- /table -->\n", root)
    assert "†" not in drift and "Step-LLM" not in drift


def test_a_card_s_commits_stand_in_one_line(root: Path):
    """Of results that differ in nothing else of their environment; another driver is a line of its own."""
    folder = root / "benchmarks" / "results" / "h200"
    for path in folder.iterdir():
        path.unlink()
    results = []
    for name, letter, driver in (("int8 · int8", "a", "1"), ("fp8 · int8", "b", "1"), ("nf4 · bf16", "c", "2")):
        result = made.make_result(f"{name} attention", levels=("speed",), num_frames=204)
        result["environment"] |= {"commit": 7 * letter, "driver": driver}
        results.append(result)
    made.write_results(folder, results)
    text = updated("<!-- table: modes -->\n<!-- /table -->\n", root)
    assert text.count("Testcard 9000") == 2 and "commits aaaaaaa and bbbbbbb" in text and "commit ccccccc." in text


def test_drawn_weights_for_image_to_video_are_a_model_of_their_own(root: Path):
    """As synthetic.py marks them: in a row that says so, and in none with those for texts alone."""
    folder = root / "benchmarks" / "results" / "h200"
    for path in folder.iterdir():
        path.unlink()
    results = []
    for also in (False, True):
        result = made.make_result("int8 · int8 attention", steps=2, levels=("speed",), num_frames=204, vram="24GB")
        results.append(result | {"id": f"{also:016d}", "synthetic": marked(0, also)})
    made.write_results(folder, results)
    budgets, modes = (updated(f"<!-- table: {name} -->\n<!-- /table -->\n", root) for name in ("budgets", "modes"))
    rows = [line.split(" | ")[0] for line in budgets.splitlines() if line.startswith("| int8")]
    assert rows == ["| int8 · int8 attention", "| int8 · int8 attention, image-to-video"]
    assert "synthetic weights; synthetic weights, image-to-video: " in budgets
    assert modes.count("\n| int8 · int8 attention") == 2 and "synthetic, image-to-video, 204 frames" in modes


def test_what_was_measured_twice_in_one_budget_is_the_later(root: Path):
    """And a budget of the host is a column of its own; rows name the budgets that were measured otherwise."""
    folder = root / "benchmarks" / "results" / "h200"
    for path in folder.iterdir():
        path.unlink()
    results = []
    for day, seconds, vram, host, commit in (
        ("11", 2.0, "12GB", None, "b"), ("10", 1.0, "12GB", None, "a"), ("09", 3.0, "12GB", "4GB", "a"),
        ("08", 4.0, "24GB", None, "a"), ("07", 5.0, None, None, "b"),
    ):  # fmt: skip
        result = made.make_result("int8 · int8 attention", levels=("speed",), num_frames=204, vram=vram)
        result["cell"]["host_ram"] = host
        result["environment"] |= {"commit": 7 * commit, "date": f"2026-10-{day}T00:00:00+00:00"}
        result["speed"]["step_seconds"] = [seconds]
        results.append(result | {"id": f"{day:>016}"})
    made.write_results(folder, results)
    text = updated("<!-- table: budgets -->\n<!-- /table -->\n", root)
    (heads, _, row) = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert heads[2:] == ["no budget", "`--vram 24GB`", "`--vram 12GB`", "`--vram 12GB`, `--host-ram 4GB`"]
    assert [cell.split(" s, ")[0] for cell in row[2:]] == ["5.00", "4.00", "2.00", "3.00"]
    assert "With commit bbbbbbb: int8 · int8 attention, 204 frames (no budget; 12GB)." in text
    assert "With commit aaaaaaa: int8 · int8 attention, 204 frames (24GB; 12GB, 4GB of the host)." in text


def test_a_run_that_was_made_is_not_told_as_calculated(root: Path):
    """Fifty steps in two processes, beside modes that are calculated from few."""
    folder = root / "benchmarks" / "results" / "h200"
    whole = made.make_result("fp8 · int8-fp8 attention", steps=50, levels=("speed",), num_frames=204)
    whole["speed"] |= {"end_to_end": {"50": {"seconds": 1100.0, "extrapolated": False}}, "resumed": [20, 30]}
    for path in folder.iterdir():
        path.unlink()
    other = made.make_result("int8 · int8 attention", steps=2, levels=("speed",), num_frames=204)
    made.write_results(folder, [whole, other])
    text = updated("<!-- table: modes -->\n<!-- /table -->\n", root)
    (row,) = [line for line in text.splitlines() if line.startswith("| fp8")]
    assert "| 18.3 min ‡ (20 + 30 steps) | – |" in row and "†" not in row
    (row,) = [line for line in text.splitlines() if line.startswith("| int8")]
    assert row.count("†") == 2 and "‡" not in row
    assert "\n† calculated" in text and "\n‡ run to the end in several processes" in text


def test_a_page_of_other_results_is_stale(root: Path, capsys: pytest.CaptureFixture[str]):
    results = results_in(root / "benchmarks" / "results")
    (root / "README.md").write_text("no region\n", encoding="utf-8")
    assert main(["--check"], root) == 0  # there is none
    text = table(files(results))
    (root / PAGE).write_text(text, encoding="utf-8")
    assert main(["--check"], root) == 0
    for other in (table(files(results[1:])), text.replace("2026-01-02", "2026-01-01"), text + f"<td>{'0' * 16}</td>"):
        (root / PAGE).write_text(other, encoding="utf-8")
        assert main(["--check"], root) == 1
        assert "report.html is stale; run solostep report" in capsys.readouterr().err


def test_missing_numbers_are_dashes(root: Path):
    folder = root / "benchmarks" / "results" / "h200"
    for path in folder.iterdir():
        path.unlink()
    made.write_results(folder, [made.make_result("nf4 · bf16 attention", levels=("teacher",), num_frames=204)])
    text = updated("<!-- table: modes -->\n<!-- /table -->\n", root)
    (row,) = [line for line in text.splitlines() if line.startswith("| nf4")]
    assert row.count("–") == 5 and "%" in row


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- table: modes -->\n", "not closed"),
        ("<!-- table: modes -->\n<!-- table: drift -->\n<!-- /table -->\n", "not closed"),
        ("<!-- table: nothing -->\n<!-- /table -->\n", "no table nothing"),
    ],
)
def test_bad_regions(root: Path, text: str, words: str):
    with pytest.raises(UsageError, match=words):
        updated(text, root)


def test_results_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in TABLES:
        (tmp_path / "README.md").write_text(f"<!-- table: {name} -->\n<!-- /table -->\n", encoding="utf-8")
        assert main(["--check"], tmp_path) == 2
        assert "benchmarks/results/" in capsys.readouterr().err
    (tmp_path / "README.md").write_text("no region\n", encoding="utf-8")
    assert main(["--check"], tmp_path) == 0


def test_the_last_line_of_a_measurement_counts(tmp_path: Path):
    """A run writes a line for each variant, older ones wrote one for all; what failed is left out."""
    (tmp_path / BLOCK).parent.mkdir(parents=True)

    def line(seconds: float, commit: str, **more: float) -> dict[str, Any]:
        """Beside the official order, which takes a second."""
        of = lambda value, official: {"official": official, "int8/int8": value}  # noqa: E731
        return {
            "seconds": of(seconds, 1.0) | more, "ratio": of(1 / seconds, 1.0), "peak_above_gib": of(4.0, 17.0),
            "error": {"int8/int8": 0.03}, "commit": commit,
        }  # fmt: skip

    old, new = line(0.6, "a", plain=1.0), line(0.5, "b")
    lines = [old, new, {"variant": "fp8/int8", "failed": "it does not compile", "commit": "c"}]
    (tmp_path / BLOCK).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert block_table(tmp_path)[3:] == ["| int8 / int8 | 0.500 | 2.00x | 4.0 GiB | 3.0 % | b |"]
    with pytest.raises(UsageError, match="vae-h200.jsonl holds no measurement"):
        decoding_table(tmp_path)


def test_attention_and_memory_are_told_by_length_and_by_budget(root: Path):
    """What a run lacks leaves its columns empty; a budget of host memory is a row of its own."""
    few = [line for line in (root / KERNELS[1]).read_text().splitlines() if "int8, hopper + passes" not in line]
    (root / KERNELS[1]).write_text("\n".join(few) + "\n")
    table = attention_table(root)
    assert "75,888 tokens" in table[0] and "5,007 tokens" in table[0]
    assert "18,972 tokens" in table[0] and table[-1].startswith("Commit ")
    (row,) = [line for line in table if line.startswith("| int8, hopper |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].endswith(" ms") and cells[2].endswith("x") and cells[3:5] == ["", ""]
    assert cells[5].endswith(" ms") and len(cells[7].split(" / ")) == 3 and cells[7].endswith(" %")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in memory_table(root)[2:] if line[:1] == "|"]
    assert [row[0] for row in rows if row[0].startswith("12 GB")] == [
        "12 GB", "12 GB, 41 blocks from files at every step",
        "12 GB, 40 blocks from files at every step, which the system's cache held", "12 GB",
    ]  # fmt: skip
    assert {row[1] for row in rows} == {"fp8", "bf16"} and rows[-1][1] == "bf16"
    assert all(float(row[4].split()[0]) > 0.5 and " / " in row[7] for row in rows)


def test_a_commit_that_was_changed_is_told(root: Path):
    """Its plus stands in the row, and what it means below the table; so does a repeated step. Else there is neither."""
    runs = {file: list(map(json.loads, (root / file).read_text().splitlines())) for file in (WHOLE, FILES)}
    for commit, events, notes in (("1234567", [], []), ("1234567+", ["the step is repeated"], [REPEATED, CHANGED])):
        for file, lines in runs.items():
            made = [json.dumps(line | {"commit": commit, "events": events}) for line in lines]
            (root / file).write_text("\n".join(made))
        table = memory_table(root)
        rows = [line for line in table[2:] if line.startswith("|")]
        assert all(row.endswith("+ |") == (" s * |" in row) == bool(notes) for row in rows)
        assert [line for line in table[2 + len(rows) :] if line] == notes


def test_decoding_tells_both_distances(root: Path):
    """PSNR beside relative L2, of the same line; the whole chunk has neither, and equal numbers no decibels."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in decoding_table(root)]
    assert rows[0][3:5] == ["error against the whole chunk, relative L2", "PSNR"] and rows[2][3:5] == ["", ""]
    recorded = {line["seconds"]: line for line in map(json.loads, (root / DECODING).read_text().splitlines())}
    by_seconds = {f"{seconds:.2f}": line for seconds, line in recorded.items() if "psnr_db" in line}
    assert len(rows) > 5
    for row in rows[3:]:
        assert row[4] == f"{by_seconds[row[1]]['psnr_db']:.1f} dB"
    line = recorded[max(recorded)] | {"at_once": 4, "strips": 2, "error": 0.0, "psnr_db": "exact"}
    with (root / DECODING).open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert any(" | 0.0e+00 | exact | " in row for row in decoding_table(root))


def test_what_is_said_of_streaming_is_in_the_lines():
    readme = " ".join(" ".join((ROOT / name).read_text(encoding="utf-8").split()) for name in PAGES)
    lines = [json.loads(line) for line in (ROOT / WHOLE).read_text().splitlines()]
    runs = {
        (line["settings"]["num_frames"], line["vram"], line["host_ram"]): line
        for line in lines if line["precision"] == "fp8"
    }  # fmt: skip
    step = {run: line["step_seconds"][-1] for run, line in runs.items()}
    some, none = step[204, "24GB", None], step[204, "48GB", None]
    streamed = runs[204, "24GB", None]["plan"]["streamed_blocks"]
    assert f"{some:.2f} s with {streamed} blocks streamed (24 GB) and {none:.2f} s with none (48 GB), " in readme
    assert f"(48 GB), {100 * (some / none - 1):+.1f} %" in readme
    least, more = step[204, "6GB", None], step[204, "12GB", None]
    assert f"{least:.2f} s in 6 GB, with one slot and one branch parked, against {more:.2f} s in 12 GB, " in readme
    assert f"in 12 GB, {100 * (least / more - 1):+.1f} %" in readme
    commit = runs[51, "80GB", None]["commit"]
    of_commit = [line for line in lines if line["commit"] == commit and line["settings"]["num_frames"] == 51]
    (alike,) = [line["step_seconds"][-1] for line in of_commit if line["vram"] == "12GB"]
    assert f"it took {step[51, '80GB', None]:.2f} s in 80 GB and {alike:.2f} s in 12 GB, " in readme
    assert f"17 frames {step[17, '80GB', None]:.2f} s in 80 GB and in 8 GB" in readme
    assert f"{step[17, '8GB', None]:.2f}" == f"{step[17, '80GB', None]:.2f}"
    files = runs[204, "12GB", "4GB"]
    read = next(stage["read_bytes"] for stage in files["stages"] if stage["stage"] == "denoise") / 2e9
    count, host = files["plan"]["blocks_from_disk"], max(stage["host_peak_bytes"] for stage in files["stages"])
    assert f"With {count} blocks read from that machine's disk at every step, {read:.1f} GB as a mean of the " in readme
    assert f"a step of 204 frames took {files['step_seconds'][-1]:.2f} s in 12 GB of the card, and the run" in readme
    assert f"{host / 1e9:.1f} GB of host memory of the 4 GB" in readme and host < 4e9 and not files["events"]
    streams = [json.loads(line) for line in (ROOT / FILES).read_text().splitlines()]
    counts = [(line["plan"]["blocks_from_disk"], line["plan"]["streamed_blocks"]) for line in streams]
    assert f"with {counts[0][0]} blocks from files at every step as with {counts[1][1]} blocks from pinned" in readme
    assert counts[1][0] == 0 and len({line["latents_sha256"] for line in streams}) == 1 and len(streams) == 4
    assert streams[2]["plan"]["resident_blocks"] == 48 and f"{streams[3]['vram'][:-2]} GB, with attention in " in readme
    least = streams[3]["plan"]
    assert f"in {least['head_groups']} groups of heads and the feed-forward in chunks of {least['chunk']:,} " in readme
    assert f"; commits {' and '.join(dict.fromkeys(line['commit'] for line in streams))})" in readme
    (text,) = [json.loads(line) for line in (ROOT / WHOLE.with_name("text-h200.jsonl")).read_text().splitlines()]
    texts = text["stages"][0]
    assert text["text_precision"] == "bf16" and texts["gpu_peak_bytes"] < 1.5e9
    size = f"{texts['planned_disk_bytes'] / 1e9:.1f} GB took {texts['seconds']:.1f} s"
    assert f"(1.5 GB of it; in BF16 its {size}," in readme
    exact = [json.loads(line) for line in (ROOT / WHOLE.with_name("vae-fp32-h200.jsonl")).read_text().splitlines()]
    most = max(line["max_abs"] for line in exact)
    assert len(exact) == 4 and f"In fp32 four of these ways were within {most:.1e} of the whole" in readme
    more, small = map(json.loads, (ROOT / WHOLE.with_name("whole-small-h200.jsonl")).read_text().splitlines()[-2:])
    taken, copied = statistics.median(small["step_seconds"][1:]), small["plan"]["step_seconds"]
    assert (more["vram"], small["vram"]) == ("80GB", "8GB") and more["commit"] == small["commit"]
    assert f"for {statistics.median(more['step_seconds'][1:]):.2f} s in 80 GB" in readme
    count = small["plan"]["streamed_blocks"]
    assert f"{taken:.2f} s in 8 GB, what copying {count} blocks takes ({copied:.2f} s)" in readme
    plan = runs[51, "12GB", None]["plan"]
    blocks = 48 * (plan["host_bytes"] - plan["program_bytes"]) / plan["streamed_blocks"]
    later = blocks - 48 * once("t2v", "fp8", "int8", converted=True).sizes.network.dropped
    copies = later / cards.H200.bus
    assert f"blocks are {blocks / 1e9:.1f} GB, and {later / 1e9:.1f} GB once the text keys are there" in readme
    assert f"there: {copies:.2f} s of copies at {cards.H200.bus / 1e9} GB/s" in readme
