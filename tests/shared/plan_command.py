"""`solostep plan` in the process of the tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import typer

from solostep.engine.interfaces import cli

Run = Callable[..., tuple[int, str, str]]


def plan_command(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command with arguments; gives its exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            typer.main.get_command(cli.app).main(["plan", *arguments], prog_name="solostep")
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call
