"""The command that measures what number formats do to a model: tables, files and a plot."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import OutputError, UsageError
from ..files import replacing
from ..progress import ConsoleProgress
from .console import console, guarded
from .outputs import read_prompts

if TYPE_CHECKING:
    from ...quant.recipe import Recipe
    from ...quant.sensitivity import Table

Formats = Annotated[
    str | None,
    typer.Option(help="Formats to measure, with commas between: int8,int8-plain,fp8. Default: all of solostep's own."),
]
Recipes = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        help="Also measure this recipe from end to end: a precision, a JSON file, or auto:0.02, which finds the "
        "cheapest one with at most that error. Can be given several times.",
    ),
]
PLOTS = (".png", ".svg", ".pdf")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(sensitivity)


@guarded
def sensitivity(
    model: Annotated[
        str | None, typer.Argument(help="A model folder, a Hugging Face id, or t2v, turbo, ti2v. Default: the demo.")
    ] = None,
    formats: Formats = None,
    recipe: Recipes = None,
    network: Annotated[str, typer.Option(help="transformer or step_llm.")] = "transformer",
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line. Default: one English and one Chinese.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="First frame for an image-to-video model. Default: a drawn one.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Default: 17.")] = None,
    height: Annotated[int | None, typer.Option(help="Default: that of the model's preset.")] = None,
    width: Annotated[int | None, typer.Option(help="Default: that of the model's preset.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of the trajectory that samples are taken from. Default: 10.")
    ] = None,
    times: Annotated[int, typer.Option(help="Samples along each trajectory.")] = 4,
    precision: Annotated[str, typer.Option(help="What errors are measured against: bf16 or fp32.")] = "bf16",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. Default: the first CUDA card, else the CPU.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .json or .csv file, or a folder for both, the plot and auto's recipes."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Where the plot goes: .png, .svg or .pdf.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Linears to show for each format, the most sensitive first.")] = 5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are already there.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure anew what is in the cache folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results (JSON) in place of the tables.")] = False,
) -> None:
    """Measure the error of each number format, block by block and linear by linear, on real activations.

    One block is on the device at a time, so that the 30B model is measured on any card.
    """
    if network not in ("transformer", "step_llm"):
        raise UsageError(f"--network {network} is unknown; choose transformer or step_llm.")
    asked = None if prompts is None else _prompts(prompts)
    names, given = _formats(formats), [_recipe(text, network) for text in recipe or []]
    files = _files(output, plot, overwrite)
    from ..activations import conditions_for
    from ..checkpoint import open_model
    from ..demo import demo_model
    from ..image import load_image
    from ..runtime import pick_device, pick_dtype
    from ..sensitivity import CANDIDATES, report
    from ..study import Study, check_measurable

    dtype, place = pick_dtype(precision), pick_device(device)
    frame = None if image is None else load_image(image)
    opened = open_model(demo_model(image_to_video=image is not None) if model is None else model)
    check_measurable(opened, network)
    conditions = conditions_for(
        opened, asked, frame, times, num_frames=frames, height=height, width=width, num_inference_steps=steps
    )
    candidates = tuple(CANDIDATES) if formats is None else tuple(n for n in names if ":" not in n)
    with ConsoleProgress(console) as progress:
        study = Study(opened, network, conditions, place, dtype, progress, cache=not no_cache)
        for each in given:
            if not isinstance(each, float):
                study.mix_of(each)  # it fits this network
        found = report(study, names, given, candidates)
    write_files(files, found)
    if as_json:
        print(json.dumps(found, ensure_ascii=False), flush=True)
    else:
        from .sensitivity_tables import print_tables

        print_tables(Console(emoji=False), found, names, top)


# --- what was asked for -------------------------------------------------------------------------------------------


def _prompts(path: Path) -> list[str]:
    lines = read_prompts(path)
    for line in lines:
        more = sorted(set(line) - {"prompt", "where"})
        if more:
            raise UsageError(f"{line['where']}only prompts are read here; leave {more[0]} out.")
        if not line["prompt"].strip():
            raise UsageError(f"{line['where']}the prompt is empty; say what the video shows.")
    return [line["prompt"] for line in lines]


def _formats(text: str | None) -> list[str]:
    from ...quant.formats import FORMATS, UNQUANTIZED, check_format

    if text is None:
        return list(FORMATS)
    names = [n for n in dict.fromkeys(part.strip() for part in text.split(",")) if n and n != UNQUANTIZED]
    if not names:
        raise UsageError(f"--formats {text!r} names none; choose from {', '.join(FORMATS)}.")
    for name in names:
        try:
            check_format(name)
        except ValueError as error:
            raise UsageError(f"--formats: {error}") from None
    return names


def _recipe(text: str, network: str) -> Recipe | float:
    """A default recipe by its precision, a recipe from a file, or the budget of auto:BUDGET."""
    from ...quant.formats import FORMATS
    from ...quant.recipe import default_recipe
    from ..precision import read_recipe_option

    if text in FORMATS or (":" in text and not text.startswith("auto:") and not Path(text).exists()):
        try:
            return default_recipe(text, network)
        except ValueError as error:
            raise UsageError(f"--recipe: {error}") from None
    chosen = read_recipe_option(text, None)
    assert chosen is not None
    return chosen


def _files(output: Path | None, plot: Path | None, overwrite: bool) -> dict[str, Path]:
    """Where results go: json, csv, plot, recipes (a folder).

    Raises:
        UsageError: a place that cannot be written, or is taken.
    """
    files: dict[str, Path] = {}
    if output is not None and output.suffix.lower() in (".json", ".csv"):
        files[output.suffix.lower()[1:]] = output
    elif output is not None:
        if output.exists() and not output.is_dir():
            raise UsageError(f"--output {output} has to end in .json or .csv, or be a folder.")
        files = {"recipes": output, "json": output / "sensitivity.json", "csv": output / "sensitivity.csv",
                 "plot": output / "sensitivity.png"}  # fmt: skip
    if plot is not None:
        if plot.suffix.lower() not in PLOTS:
            raise UsageError(f"--plot {plot} has to end in {', '.join(PLOTS[:-1])} or {PLOTS[-1]}.")
        files["plot"] = plot
    for kind, path in files.items():
        if kind != "recipes" and path.is_dir():
            raise UsageError(f"{path} is a folder; give the name of a file.")
        if kind != "recipes" and path.exists() and not overwrite:
            raise UsageError(f"{path} is already there; add --overwrite or choose another place.")
        there = path if kind == "recipes" else path.parent
        if there == output:
            there = there if there.exists() else there.parent
        if not there.is_dir():
            raise UsageError(f"The folder {there} does not exist; make it or choose another place.")
        if not os.access(there, os.W_OK):
            raise UsageError(f"The folder {there} cannot be written; choose another place.")
    return files


# --- files --------------------------------------------------------------------------------------------------------


def write_files(files: dict[str, Path], found: dict[str, Any]) -> None:
    """Writes what was asked for, each file to a temporary name first.

    Raises:
        OutputError: a file could not be written.
    """
    from ...quant.sensitivity import Table

    table = Table.from_dict(found["table"])
    try:
        if "recipes" in files:
            files["recipes"].mkdir(exist_ok=True)
            for entry in found["end_to_end"]:
                if entry["name"].startswith("auto:"):
                    path = files["recipes"] / f"{entry['name'].replace(':', '-')}.json"
                    _replace(path, json.dumps(entry["recipe"], indent=2).encode())
        if "json" in files:
            _replace(files["json"], (json.dumps(found, ensure_ascii=False, indent=1) + "\n").encode())
        if "csv" in files:
            _replace(files["csv"], _as_csv(table, [n for n in table.formats]).encode())
        if "plot" in files:
            from .plots import sensitivity_plot

            title = f"{Path(str(found['model'])).name}, {found['network']}"
            data = sensitivity_plot(table, title, files["plot"].suffix.lower()[1:])
            _replace(files["plot"], data)
    except OSError as error:
        raise OutputError(
            f"{error.filename or 'A file'} could not be written ({error.strerror}); what was measured is kept, so the "
            "same command with another place is quick."
        ) from error


def _replace(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _as_csv(table: Table, formats: Sequence[str]) -> str:
    """A line a linear and format, the most sensitive first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["block", "linear", "format", "output_error", "update_error", "stream_error", "bytes_saved"])
    rows = [(x, name, x.errors[name]) for name in formats for x in table.linears]
    for x, name, e in sorted(rows, key=lambda row: -row[2].update):
        writer.writerow([x.block, x.kind, name, e.output, e.update, e.stream, x.saved(name)])
    return text.getvalue()
