"""`solostep bench`: which precision mode may I use, what does it cost, and what does it save?

    solostep bench --quick
    solostep bench --model t2v --precision int8,fp8 --vram 24GB -o results/
    python -m solostep.benchmarks.bench --model t2v --dry-run

Measures speed, memory of card and host, and drift from the bf16 reference in the official numerics on the same prompts
and noise, beside the noise floor: bf16 runs that round otherwise and are no less right. Each cell of the matrix is a
process of its own and one JSON file; what is finished is not measured again.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from solostep.engine.errors import UsageError
from solostep.engine.interfaces.console import console, guarded, say
from solostep.engine.progress import duration
from solostep.engine.units import size

if TYPE_CHECKING:
    from solostep.benchmarks.matrix import Matrix, Options
    from solostep.benchmarks.results import Result
    from solostep.benchmarks.runner import Outcome

FOLDER = Path("bench-results")
QUICK: dict[str, Any] = {"steps": ["3"], "n": 2, "seeds": "1", "precision": ["int8,fp8"], "device": "cpu"}
"""What --quick fills in where nothing is given."""
COSTS = """Costs. The unit is one video: the reference takes one for each prompt and seed, and one more for each \
prompt where there is only one seed; each mode and each of the two floors takes two of them (a run left to itself, and \
one step by step along the reference) and a few steps for the single blocks. On one H200 a step of 204 frames at \
544x992 takes 38.7 s in the official bf16, 22.6 s in fp8 with int8 attention, and 31 s with weights alone quantized: \
with 50 steps and the 8 prompts of the default, about nine hours for the reference and its other seeds, and five to \
seven for each mode. Shorter (--frames 17 --steps 10) it is minutes, and so is --levels speed with few --steps. On a \
smaller card what does not fit waits in host memory or on disk: see `solostep plan`, and give it --vram to compare \
budgets. References stay in DIR/cache (--dry-run says how much disk they take) and may be deleted afterwards. On a CPU \
the demo model is what is practical: --quick, which has too few prompts for intervals, and so for a verdict."""
MOST_SEEDS = 1000
"""A single larger number after --seeds is taken for a seed, and not for so many of them."""
_T = TypeVar("_T")


def _many(text: str) -> Any:
    return typer.Option(help=f"{text} Several with commas, or the option several times.")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog=COSTS)(bench)


@guarded
def bench(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="As of `solostep generate`. Default: the small embedded demo model."),
    ] = None,
    precision: Annotated[
        list[str] | None, _many("Modes to measure: int8, fp8, nf4, torchao:int8 ... Default: bf16,int8,fp8.")
    ] = None,
    recipe: Annotated[list[str] | None, _many("Recipes (JSON files, auto:0.02) to measure likewise.")] = None,
    text_precision: Annotated[list[str] | None, _many("Of Step-LLM, each with every precision.")] = None,
    attention: Annotated[
        list[str] | None, _many("official, bf16, int8, int8-fp8. Default: the engine's choice for each precision.")
    ] = None,
    attention_backend: Annotated[
        list[str] | None, _many("What computes it. Default: the fastest that is right here.")
    ] = None,
    vram: Annotated[
        list[str] | None,
        _many(
            "Budgets of card memory, such as 12GB,24GB,none. Each mode's speed and memory are measured in each, its "
            "drift in the first: no budget changes it."
        ),
    ] = None,
    host_ram: Annotated[list[str] | None, _many("Budgets of host memory, likewise.")] = None,
    frames: Annotated[list[str] | None, _many("Frames of a clip. Default: that of the preset.")] = None,
    size: Annotated[list[str] | None, _many("Height x width, such as 544x992. Default: that of the preset.")] = None,
    steps: Annotated[list[str] | None, _many("Denoising steps. Default: those of the preset.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Default: that of the preset.")] = None,
    time_shift: Annotated[float | None, typer.Option(help="Default: that of the preset.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line. Default: -n of the model's own.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            min=1,
            help="Prompts: of the demo's held-out ones, or of the built-in ones. Intervals are over prompts, and take "
            "at least six. Default: 8.",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="How many seeds for each prompt (from 1 on), or which, with commas. Default: 1, and a second of the "
            "reference alone, for the distance of other seeds."
        ),
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            help="What is measured. speed: seconds and memory; blocks: each block on the reference's input; teacher: "
            "each step on the reference's latents; free: the latents of a run left to itself; video: its frames; "
            "score: prompt following of the demo. Default: all."
        ),
    ] = None,
    roles: Annotated[
        str | None,
        typer.Option(help="Which cells: reference, floor-order, floor-backend, other-seed, mode. Default: all."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The demo model on a CPU in about 3 minutes on 2 cores: int8 and fp8.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: the first CUDA card.")] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1, help="Cells at a time, where speed is not measured: small models leave most of a card idle."
        ),
    ] = 1,
    rates: Annotated[
        bool | None,
        typer.Option(
            "--rates/--no-rates",
            help="Whether to measure first what plans tell seconds by: up to 45 s a precision. Default: on a card.",
        ),
    ] = None,
    cell_timeout: Annotated[
        str | None,
        typer.Option(
            help="Stop a cell that takes longer, such as 90s, 10m, 2h, and go on with the next. The same command goes "
            "on with it where it was."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"Folder of results, a JSON file a cell. Default: {FOLDER}."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure anew what is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--list", "--dry-run", help="Show the cells, what is there already, and the disk needed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cells with their files (JSON), no table.")] = False,
) -> None:  # fmt: skip
    """Measure speed, memory and drift of precision modes against the bf16 reference, beside the noise floor.

    Stopped at any moment, the same command goes on where it was.
    """
    given = {k: v for k, v in locals().items() if v is not None}
    if quick:
        if model is not None:
            raise UsageError("--quick is of the demo model; leave --model or --quick out.")
        given = {k: v for k, v in QUICK.items() if k != "n" or prompts is None} | given
    options, timeout = read_options(given), _seconds("--cell-timeout", cell_timeout)
    folder = output or FOLDER
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"-o {folder} is a file; give the name of a folder.")

    from solostep.benchmarks.environment import shown
    from solostep.benchmarks.matrix import build
    from solostep.benchmarks.runner import Runner

    matrix = build(options)
    runner = Runner(
        matrix, folder, Shown(), overwrite, called=shown(_called()), jobs=jobs, rates=rates, timeout=timeout
    )
    for note in matrix.notes:
        say(console, "note", note)
    if dry_run:
        _list(matrix, runner.there(), as_json)
        for text in runner.unfinished()[1]:
            say(console, "note", text)
        return
    runner.check_disk()
    start = time.monotonic()
    with runner.show:  # type: ignore[attr-defined]
        outcomes = list(runner.run())
    finish(outcomes, folder, as_json, time.monotonic() - start, overwrite)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _called() -> list[str]:
    """The command line; `python -m solostep` has the name of the program."""
    return ["solostep", *sys.argv[1:]] if Path(sys.argv[0]).name == "__main__.py" else sys.argv


# --- options ------------------------------------------------------------------------------------------------------


def _parts(given: Iterable[str]) -> list[str]:
    return [part.strip() for text in given for part in text.split(",") if part.strip()]


def _each(given: Sequence[str], read: Callable[[str], _T]) -> tuple[_T | None, ...]:
    """Values of an option that may be given several times, each once; (None,) where it is not given."""
    return tuple(dict.fromkeys(map(read, given))) or (None,)


def _budget(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _whole(option: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal():
            raise UsageError(f"{option} has to be whole numbers, with commas between, not {text!r}.")
        return int(text)

    return read


def _seconds(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([smh]?)", text.strip())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"{option} {text} is no time; write 90s, 10m or 2h.")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX×](\d+)", text)
    if found is None:
        raise UsageError(f"--size {text} is no size; write height and width as in 544x992.")
    return int(found[1]), int(found[2])


def _seeds(text: str) -> tuple[int, ...]:
    values = tuple(_whole("--seeds")(part) for part in _parts([text]))
    if len(values) != 1 or "," in text:
        return values
    if values[0] > MOST_SEEDS:
        raise UsageError(
            f"--seeds {text} is how many for each prompt, {MOST_SEEDS} at most; for the seed itself write {text}, with "
            "a comma behind it."
        )
    return tuple(range(1, values[0] + 1))


def _prompts(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    from solostep.engine.interfaces.outputs import read_prompts

    lines = read_prompts(path)
    for line in lines:
        more = sorted(set(line) - {"prompt", "where"})
        if more:
            raise UsageError(f"{line['where']}only prompts are read here; leave {more[0]} out.")
    return tuple(line["prompt"] for line in lines)


def read_options(given: dict[str, Any]) -> Options:
    """Options by the names of :func:`bench`'s parameters, those that are given.

    Raises:
        UsageError: a value that cannot be read.
    """
    from solostep.benchmarks.matrix import Options
    from solostep.benchmarks.results import LEVELS, ROLES

    def named(name: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(_parts(given.get(name, ()))))
        if name in given and not found:
            raise UsageError(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out.")
        return found

    if given.get("prompts") is not None and given.get("n") is not None:
        raise UsageError("-n counts the model's own prompts; leave it out where --prompts gives others.")
    return Options(
        model=given.get("model"), precision=named("precision"), recipe=named("recipe"),
        text_precision=_each(named("text_precision"), str), attention=_each(named("attention"), str),
        attention_backend=_each(named("attention_backend"), str), vram=_each(named("vram"), _budget),
        host_ram=_each(named("host_ram"), _budget), frames=_each(named("frames"), _whole("--frames")),
        size=_each(named("size"), _size), steps=_each(named("steps"), _whole("--steps")),
        guidance_scale=given.get("guidance"), time_shift=given.get("time_shift"),
        prompts=_prompts(given.get("prompts")), n=given.get("n", Options.n), seeds=_seeds(given.get("seeds", "1")),
        levels=tuple(_parts([given["levels"]])) if "levels" in given else LEVELS,
        roles=tuple(_parts([given["roles"]])) if "roles" in given else ROLES, device=given.get("device"),
    )  # fmt: skip


# --- what is shown ------------------------------------------------------------------------------------------------


class Shown:
    """Lines on stderr; on a terminal the last line of the running cell below them."""

    def __init__(self) -> None:
        self.live = console.status("") if console.is_terminal else None

    def __enter__(self) -> Shown:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def note(self, text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    def status(self, text: str) -> None:
        if self.live is not None:
            from rich.text import Text

            self.live.update(Text(text, overflow="ellipsis", no_wrap=True))


def _list(matrix: Matrix, there: dict[str, Path], as_json: bool) -> None:
    if as_json:
        import json

        rows = [{"id": p.id, "label": p.label, "cell": p.cell.as_dict(), "videos": round(p.runs, 2),
                 "file": str(there[p.id]) if p.id in there else None} for p in matrix.planned]  # fmt: skip
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "mode", "clip", "pairs", "videos", "levels", "there")
    for p in matrix.planned:
        clip, found = p.cell.clip, there.get(p.id)
        table.add_row(
            p.id[:8], p.label, clip, str(len(p.cell.pairs)), f"{p.runs:.3g}", " ".join(p.cell.levels),
            found.name if found else "",
        )  # fmt: skip
    Console(emoji=False).print(table)
    videos = sum(p.runs for p in matrix.planned if p.id not in there)
    print(
        f"{len(matrix.planned)} cells on {matrix.device}, {len(there)} there already; about {videos:.3g} videos to "
        f"make; references take {size(matrix.reference_bytes)} of disk"
    )


def finish(
    outcomes: Sequence[Outcome], folder: Path, as_json: bool, seconds: float, overwrite: bool = False
) -> None:  # fmt: skip
    """The table of all cells, what failed, and where everything is; writes the report if its module is there."""
    from solostep.benchmarks.runner import as_json as rows

    done = [outcome for outcome in outcomes if outcome.status != "failed"]
    page = write_report(reported(folder, done), folder / "report.html", overwrite) if done else None
    if as_json:
        print(rows(outcomes))
        return
    from rich.console import Console

    Console(emoji=False).print(result_table(outcomes))
    for outcome in outcomes:
        if outcome.status == "failed":
            say(console, "error", f"{outcome.planned.label} failed: {outcome.error} See {outcome.path}.")
    print(f"{len(done)} of {len(outcomes)} cells in {folder}, {duration(seconds)}")
    if page is not None:
        print(page)


def reported(folder: Path, done: Sequence[Outcome]) -> list[Path]:
    """What the page of a folder is made of: the results of this run, and those of earlier ones that can be read."""
    from solostep.benchmarks.results import read_result, results_below

    own = [outcome.path for outcome in done]
    earlier = []
    for path in results_below(folder):
        if path in own:
            continue
        try:
            read_result(path)
            earlier.append(path)
        except UsageError as error:
            say(console, "note", f"Not in the report: {error}")
    return [*own, *earlier]


def write_report(results: Sequence[Path], page: Path, overwrite: bool = False) -> Path | None:
    """The report of these results, by `solostep report`; None where that is not installed, or fails, or where a page of
    somebody else's has its place, which is said."""
    if importlib.util.find_spec("solostep.benchmarks.report") is None:
        return None
    if page.exists() and not overwrite and not _is_ours(page):
        say(
            console, "note", f"{page} is no report of solostep and stays as it is: move it or add --overwrite, or make "
            f"one elsewhere with `solostep report {page.parent} -o`.",
        )  # fmt: skip
        return None
    call = [sys.executable, "-m", "solostep.benchmarks.report", *map(str, results), "-o", str(page), "--overwrite"]
    made = subprocess.run(call, capture_output=True, text=True)
    if made.returncode:
        last = (made.stderr.strip() or "it said nothing").splitlines()[-1]
        say(console, "note", f"{page} was not written: {last} The results are there; see `solostep report --help`.")
        return None
    return page


def _is_ours(page: Path) -> bool:
    """Whether a file is a report that this program wrote."""
    from solostep.benchmarks.report_style import GENERATOR

    try:
        with page.open("rb") as stream:
            return GENERATOR.encode() in stream.read(4096)
    except OSError:
        return False


def _median(values: Iterable[float]) -> float | None:
    """None of nothing."""
    found = list(values)
    return statistics.median(found) if found else None


def _measured(result: Result) -> list[str]:
    """A row of the table: medians over steps and pairs of what was measured, and nothing of what was not."""
    speed, memory, drift = result.speed or {}, result.memory or {}, result.drift or {}
    teacher, free, video = (drift.get(level) or {} for level in ("teacher", "free", "video"))
    psnr = _median(math.inf if value is None else value for value in video.get("psnr") or ())
    return [
        _number(_median(speed.get("step_seconds") or ())), _number(speed.get("video_seconds")),
        _number(memory.get("gpu_peak_bytes"), 1e-9), _number(memory.get("host_peak_bytes"), 1e-9),
        _number(_median(itertools.chain(*teacher.get("error", ()))), 100),
        _number(_median(row[-1] for row in free.get("error", ()) if row), 100),
        "equal" if psnr == math.inf else _number(psnr),
    ]  # fmt: skip


def result_table(outcomes: Sequence[Outcome]) -> Any:
    """One row a cell."""
    from rich import box
    from rich.table import Table

    from solostep.benchmarks.results import read_result

    results = {o.planned.id: read_result(o.path) for o in outcomes if o.status != "failed"}
    verdicts = _verdicts(list(results.values()))
    clips = {outcome.planned.cell.clip for outcome in outcomes}
    several = len(clips) > 1  # else it stands above the table, which has to fit 80 columns
    columns = ["verdict", "s / step", "video s", "card GB", "host GB", "velo- city %", "lat- ents %", "PSNR dB", ""]
    title = None if several else "".join(clips)
    narrow: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": 0, "pad_edge": False}
    table = Table("mode", *(["clip"] if several else []), *columns, title=title, **narrow)
    for column in table.columns[2:] if not several else ():
        column.max_width = 6  # what is left goes to the names
    for outcome in outcomes:
        cell, failed = outcome.planned.cell, outcome.status == "failed"
        there = {"failed": "failed", "skipped": "there"}.get(outcome.status, "")
        measured = [""] * 7 if failed else _measured(results[outcome.planned.id])
        verdict = verdicts.get(outcome.planned.id, "")
        table.add_row(outcome.planned.label, *([cell.clip] if several else []), verdict, *measured, there)
    table.caption = "velocity: one step from the reference's latents; latents: at the end of a free run; medians"
    if any(verdicts.values()):
        table.caption += "; verdict: not to be told from the noise floor, or times it (?: too few prompts)"
    return table


def _verdicts(results: Sequence[Result]) -> dict[str, str]:
    """What the report says of each mode beside the noise floor, in a word, by id."""
    from solostep.benchmarks.report_data import make_groups

    found = {}
    for group in make_groups(results):
        for row in group.modes:
            verdict = row.verdict
            if verdict is None or verdict.kind == "unknown":
                continue
            times = "" if verdict.ratio is None else f"{_number(verdict.ratio)}× "
            word = {"floor": "floor", "above": f"{times}floor", "open": f"{times}floor?"}[verdict.kind]
            found |= dict.fromkeys(row.ids, word)
    return found


def _number(value: float | None, times: float = 1.0) -> str:
    if value is None:
        return ""
    return f"{value * times:.3g}" if abs(value * times) < 1000 else f"{value * times:.0f}"


def main() -> None:
    """Entry point of ``python -m solostep.benchmarks.bench``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    register(app)
    app(prog_name="solostep bench")


if __name__ == "__main__":
    main()
