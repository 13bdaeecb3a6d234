"""Modules that are called with `python -m`: what they say of a wrong call, and with which code they end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from solostep.benchmarks import full_size, synthetic, synthetic_table
from solostep.benchmarks.entry import exit_code
from solostep.engine.errors import CheckpointError


def test_codes_and_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: Exception) -> None:
        raise error

    assert exit_code(lambda: 7) == 0 and capsys.readouterr().err == ""
    assert exit_code(lambda: fails(CheckpointError("a.json is damaged; get it again."))) == 1
    assert capsys.readouterr().err == "error: a.json is damaged; get it again.\n"
    with pytest.raises(KeyError):
        exit_code(lambda: fails(KeyError("ours")))


def test_wrong_calls_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong value ends with code 2 and one sentence, before anything is drawn."""
    there = str(tmp_path)
    assert full_size.main(["drift", "--device", "cpu", "--times", "99", "-o", there]) == 2
    assert capsys.readouterr().err.startswith("error: --times has to be")
    monkeypatch.setattr(full_size, "pick_device", lambda name: torch.device("cpu"))
    assert full_size.main(["drift", "-o", there]) == 2
    assert "takes days on a CPU; give --model demo" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["synthetic", there, "--device", "cpu"])
    assert synthetic.main() == 2
    assert capsys.readouterr().err == f"error: {there} is there already; give a new folder.\n"
    monkeypatch.setattr(sys, "argv", ["synthetic_table", "--device", "nowhere"])
    assert synthetic_table.main() == 2
    assert "nowhere" in capsys.readouterr().err
