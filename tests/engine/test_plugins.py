"""Commands of other folders: found in a checkout and among installed packages, loaded when asked for, and harmless to
the other commands when they are broken."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from solostep.engine.errors import SolostepError
from solostep.engine.interfaces import cli, plugins


def good(app: typer.Typer) -> None:
    @app.command()
    def extra(name: str = "world") -> None:
        """An added command."""
        print(f"hello {name}")


def other_name(app: typer.Typer) -> None:
    good(app)


def raising(app: typer.Typer) -> None:
    raise RuntimeError("no such card\nmore lines")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch):
    """Runs the command line with the plug-ins of this file."""
    monkeypatch.setitem(sys.modules, "plugins_of_a_test", sys.modules[__name__])

    def run(points: dict[str, str], *arguments: str):
        chosen = {n: EntryPoint(n, f"plugins_of_a_test:{v}", plugins.GROUP) for n, v in points.items()}
        monkeypatch.setattr(plugins, "found", lambda: chosen)
        return CliRunner().invoke(cli.app, list(arguments))

    return run


def test_a_plugin_is_listed_and_runs(made):
    assert "An added command" in made({"extra": "good"}, "--help").stdout
    assert made({"extra": "good"}, "extra", "--name", "you").stdout == "hello you\n"
    assert made({}, "extra").exit_code == 2


@pytest.mark.parametrize(
    ("value", "words"),
    [("raising", "RuntimeError: no such card."), ("not_there", "not_there"), ("other_name", "does not add it")],
)
def test_a_broken_plugin_breaks_itself_only(made, value: str, words: str):
    result = made({"broken": value, "extra": "good"}, "--help")
    assert result.exit_code == 0 and "generate" in result.stdout and "An added command" in result.stdout
    assert "broken" in result.stderr and words in result.stderr.replace("\n", " ")
    result = made({"broken": value, "extra": "good"}, "broken", "--anything")
    assert result.exit_code == 1 and words in result.stderr.replace("\n", " ") and "error:" in result.stderr
    result = made({"broken": value, "extra": "good"}, "info", "--help")
    assert result.exit_code == 0 and "broken" not in result.output


def test_own_commands_look_for_no_plugins(monkeypatch: pytest.MonkeyPatch):
    def looked() -> dict[str, EntryPoint]:
        raise AssertionError("looked for plug-ins")

    monkeypatch.setattr(plugins, "found", looked)
    assert CliRunner().invoke(cli.app, ["generate", "--help"]).exit_code == 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="below 3.11 only what was installed is read")
def test_a_checkout_declares_its_commands(tmp_path: Path):
    assert {"bench", "report"} <= set(plugins.of_checkout())
    file = tmp_path / "pyproject.toml"
    assert plugins.of_checkout(file) == {}
    file.write_text('[project]\nname = "other"\n[project.entry-points."solostep.commands"]\nx = "a:b"\n')
    assert plugins.of_checkout(file) == {}  # a file that happens to lie beside an installed copy
    file.write_text("[project")
    assert plugins.of_checkout(file) == {}


def test_each_declared_command_adds_itself():
    for name, point in plugins.of_checkout().items():
        assert plugins.load(point).name == name
    with pytest.raises(SolostepError, match="cannot be loaded"):
        plugins.load(EntryPoint("x", "solostep.benchmarks.not_there:register", plugins.GROUP))


def test_a_plugin_is_light(tmp_path: Path):
    """Every command's module is imported for its line of help, and none may take seconds for that."""
    code = (
        "import sys\nfrom solostep.engine.interfaces import plugins\n"
        "modules = [point.value.split(':')[0] for point in plugins.found().values()]\n"
        "[__import__(name) for name in modules]\nprint(len(modules), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.split() == ["2", "False", "False"], done.stderr
