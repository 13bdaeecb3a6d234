"""Commands that other folders and packages add to the command line, found and imported only when they are asked for.

A command is an entry point of the group ``solostep.commands``: its name is the command's, its value a function that is
called with a typer app and adds the command to it. In a checkout the entry points are read from its pyproject.toml, so
that one which was installed (or only put on the path) before a command was written has it too. One that cannot be
loaded leaves all other commands as they are.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import SolostepError, first_line
from .console import console, say

GROUP = "solostep.commands"
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def of_checkout(pyproject: Path = PYPROJECT) -> dict[str, EntryPoint]:
    """The commands that a checkout's pyproject.toml declares; none where solostep is installed as a wheel."""
    if sys.version_info < (3, 11) or not pyproject.is_file():
        return {}
    import tomllib

    with contextlib.suppress(OSError, ValueError):
        project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "solostep":
            declared = project.get("entry-points", {}).get(GROUP, {})
            return {name: EntryPoint(name, value, GROUP) for name, value in declared.items()}
    return {}


def found() -> dict[str, EntryPoint]:
    """Every command that is declared, by name; what a checkout declares comes before what was installed."""
    return {point.name: point for point in entry_points(group=GROUP)} | of_checkout()


def load(point: EntryPoint) -> Any:
    """The command of an entry point.

    Raises:
        SolostepError: it cannot be imported, or adds no command of its name.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    try:
        point.load()(app)
        commands = typer.main.get_group(app).commands
    except Exception as error:  # whatever a module does when it is imported
        why = f"{type(error).__name__}: {first_line(error)}"
        raise SolostepError(f"The command {point.name} ({point.value}) cannot be loaded: {why}.") from error
    if point.name not in commands:
        raise SolostepError(f"The command {point.name} cannot be loaded: {point.value} does not add it.")
    return commands[point.name]


class Commands(TyperGroup):
    """The commands of the app, then those of plug-ins."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return own + [name for name in found() if name not in own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command for the list that --help shows: one that cannot be loaded is left out, and it is said."""
        try:
            self._add(cmd_name)
        except SolostepError as error:
            say(console, "note", str(error))
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that was asked for; one that cannot be loaded ends the program."""
        try:
            self._add(args[0])
        except SolostepError as error:
            say(console, "error", str(error))
            raise typer.Exit(error.exit_code) from None
        return super().resolve_command(ctx, args)

    def _add(self, name: str) -> None:
        if name not in self.commands and name in (points := found()):
            self.commands[name] = load(points[name])
