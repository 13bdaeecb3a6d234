"""What the command line says beside its results: notes and errors, on stderr."""

from __future__ import annotations

import logging
import warnings

from rich.console import Console
from rich.markup import escape


def say(console: Console, kind: str, text: str) -> None:
    """One message, never cut to the terminal's width where it is not a terminal."""
    style = {"error": "bold red", "note": "yellow"}.get(kind, "")
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
