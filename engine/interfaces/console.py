"""What the command line says beside its results: notes and errors, on stderr."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import SolostepError

console = Console(stderr=True, emoji=False)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def say(console: Console, kind: str, text: str) -> None:
    """One message, never cut to the terminal's width where it is not a terminal."""
    style = {"error": "bold red", "note": "yellow"}.get(kind, "bold")
    console.print(f"[{style}]{kind}:[/{style}] {escape(text)}", soft_wrap=True, highlight=False)


class _Notes(logging.Handler):
    """Shows the log records of solostep as notes."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        say(self.console, "note", record.getMessage())


def set_up(console: Console) -> None:
    """Sends warnings and log records of solostep to the console."""
    log = logging.getLogger("solostep")
    log.handlers = [_Notes(console)]
    log.propagate = False
    warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub)\b.*")


def guarded(command: _Command) -> _Command:
    """Turns errors into one sentence and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        set_up(console)
        try:
            return command(*args, **kwargs)
        except SolostepError as error:
            say(console, "error", str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say(console, "note", "Stopped. Finished steps are kept: the same command goes on from them.")
            raise typer.Exit(1) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            say(console, "error", f"{where}{error.strerror or error}; check the place and its rights.")
            raise typer.Exit(1) from None

    return run  # type: ignore[return-value]
