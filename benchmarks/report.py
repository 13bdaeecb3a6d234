"""Which precision mode may I use, what does it cost and what does it save: results of `solostep bench` as a page.

    solostep report results/ -o report.html  # one HTML file that needs nothing else
    solostep report results/ --markdown report/  # the same tables as Markdown, its plots as PNG beside it
    solostep report --compare results-before/ results-after/  # what changed, cell by cell

The page takes a few seconds a model and clip size, most of it drawing. It adds no error: medians and their intervals
are those of :mod:`solostep.benchmarks.statistics`, and what was not measured is a dash.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from solostep.engine.errors import OutputError, UsageError
from solostep.engine.files import replacing
from solostep.engine.interfaces.console import console, guarded, say

TITLE = "Step-Video precision modes"
PAGE, TEXT = "report.html", "report.md"
PLOTS = ("group-", "budgets-")
"""How the names of plots in a folder begin."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(report)


@guarded
def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="Result files of solostep bench, or folders of them.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"HTML file to write. Default: {PAGE}, unless --markdown is given."),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            help="Also write Markdown: a file (.md), or a folder for it and its plots as PNG.", show_default=False
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="<Path> <Path>",
            help="Compare two files or folders of results, before and after, in place of a report.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help=f"Title of the page. Default: {TITLE}.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Make a page of results: which precision mode to use, its speed, memory and drift beside the noise floor."""
    if compare is not None:
        if results:
            raise UsageError(
                f"--compare takes two places with a space between, here {compare[0]} and {compare[1]}; leave "
                f"{results[0]} out."
            )
        if title is not None:
            raise UsageError("--title is of a report; a comparison names what it compares, so leave one of them out.")
        _compare(compare, output, markdown, overwrite)
        return
    if not results:
        raise UsageError("No results were given; give result files of solostep bench, or the folder that holds them.")
    from solostep.benchmarks.results import result_files

    result_files(results)  # what is not there is said before what is in the way
    if output is None and markdown is None:
        output = Path(PAGE)
    page = None if output is None else check_place(output, "--output", overwrite)
    text = None if markdown is None else text_file(markdown, overwrite)
    files = make(results, TITLE if title is None else title, page, text, plots=text != markdown)
    write(files)
    for path in files:
        if path in (page, text):
            print(path, flush=True)


def make(results: Sequence[Path], title: str, page: Path | None, text: Path | None, plots: bool) -> dict[Path, bytes]:
    """What is to be written, by file.

    Raises:
        UsageError: there are no results, or one is not what it has to be.
    """
    from solostep.benchmarks import report_html, report_markdown
    from solostep.benchmarks.report_data import make_groups
    from solostep.benchmarks.results import failed_in, read_results

    found = read_results(results)
    failed = failed_in(results, found)
    groups = make_groups(found)
    for group in groups:
        for note in [] if report_html.only_budgets(group) else group.notes:
            say(console, "note", f"{group.title}: {note}")
    for line in failed:
        say(console, "note", line)
    files: dict[Path, bytes] = {}
    if text is not None:
        lines, drawn = report_markdown.markdown(title, found, groups, plots, failed)
        files[text] = lines.encode()
        files |= {text.parent / name: plot.png() for name, plot in drawn.items()}
    if page is not None:
        files[page] = report_html.page(title, found, groups, failed).encode()
    return files


def _compare(places: tuple[Path, Path], output: Path | None, markdown: Path | None, overwrite: bool) -> None:
    from solostep.benchmarks.compare import as_page, as_text
    from solostep.benchmarks.compare import compare as compared

    page = None if output is None else check_place(output, "--output", overwrite)
    text = None if markdown is None else text_file(markdown, overwrite)
    found = compared(*places)
    lines = as_text(found)
    files: dict[Path, bytes] = {} if page is None else {page: as_page(found).encode()}
    write(files | ({} if text is None else {text: lines.encode()}))
    print(lines, end="", flush=True)


# --- files --------------------------------------------------------------------------------------------------------


def text_file(path: Path, overwrite: bool) -> Path:
    """The Markdown file of --markdown: itself, or one in it where it is a folder. A new folder is not made yet."""
    if path.suffix.lower() in (".md", ".markdown") and not path.is_dir():
        return check_place(path, "--markdown", overwrite)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--markdown {path} is neither a folder nor a file that ends in .md; choose another name.")
    if path.suffix and not path.is_dir():
        raise UsageError(f"--markdown {path} has to end in .md, or be a folder.")
    for plot in [] if overwrite else sorted(path.glob("*.png")):
        if plot.name.startswith(PLOTS):
            raise UsageError(f"--markdown {path} holds {plot.name} already; add --overwrite or choose another folder.")
    if not path.is_dir():
        check_place(path, "--markdown", overwrite)
    return check_place(path / TEXT, "--markdown", overwrite)


def check_place(path: Path, option: str, overwrite: bool) -> Path:
    """A file that may be written.

    Raises:
        UsageError: it is there already, is a folder, or its folder is missing or cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give the name of a file.")
    if path.exists() and not overwrite:
        raise UsageError(f"{option} {path} is already there; add --overwrite or choose another place.")
    if path.parent.exists() and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UsageError(f"{option} {path}: its folder cannot be written; choose another place.")
    new_folder = option == "--markdown" and path.name == TEXT and path.parent.parent.is_dir()
    if not path.parent.exists() and not new_folder:
        raise UsageError(f"{option} {path}: its folder does not exist; make it or choose another place.")
    return path


def write(files: Mapping[Path, bytes]) -> None:
    """Writes each file to a temporary name first.

    Raises:
        OutputError: one could not be written.
    """
    for path, data in files.items():
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise OutputError(f"{path} could not be written ({error.strerror}); choose another place.") from error


def main(arguments: Sequence[str] | None = None) -> Any:
    """The command by itself: `python -m solostep.benchmarks.report`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    register(app)
    return app(args=list(arguments) if arguments is not None else None, prog_name="solostep report")


if __name__ == "__main__":
    main()
