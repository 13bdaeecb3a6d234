"""The error table: what it measures is exact where that is known, and faults are said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from solostep.benchmarks import linear_error
from solostep.benchmarks.linear_error import KINDS, NAMESAKES, Kind, faults, markdown, relative_error, report, run
from solostep.quant.formats import FORMATS

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds at a 24th of their width, of fewer tokens and rows."""
    monkeypatch.setattr(linear_error, "KINDS", tuple(Kind(k.name, k.channels // 24, k.make) for k in KINDS))
    monkeypatch.setattr(linear_error, "TOKENS", 64)
    monkeypatch.setattr(linear_error, "OUT", 48)
    monkeypatch.setattr(linear_error, "BARS", {})  # they are for whole widths


def test_every_format_has_a_row() -> None:
    assert set(NAMESAKES) == set(FORMATS)
    assert relative_error(torch.ones(3), torch.ones(3).double()) == 0
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]).double()) == pytest.approx(0.2)


def test_data_is_of_its_kind_and_seeded() -> None:
    for kind in (Kind(k.name, 512, k.make) for k in KINDS):
        (x, w), (again, _), (other, _) = (kind.data(seed, CPU) for seed in (1, 1, 2))
        assert x.shape == (256, 512) and w.shape == (512, 512) and x.dtype == w.dtype == torch.bfloat16
        assert torch.equal(x, again) and not torch.equal(x, other)
        ratio = float(x.float().abs().amax(0).max() / x.float().abs().amax(0).median())
        assert ratio > 20 if kind.name == "outliers" else ratio < 15 or kind.name == "heavy tails"
        assert float(x.min()) > -0.2 if "gelu" in kind.name else float(x.min()) < -3


def test_a_run_is_measured_and_written(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = linear_error.make

    def make(name: str, linear: nn.Linear) -> nn.Module:
        if ":" in name:
            raise ValueError(f"{name} is not to be had.")
        return real(name, linear)

    monkeypatch.setattr(linear_error, "make", make)
    result = run(2, CPU, "the command", lambda line: None)
    assert set(result["errors"]) == {"bf16", "e4m3 cast, no scale", *FORMATS}
    assert set(result["missing"]) == {name for names in NAMESAKES.values() for name in names if ":" in name}
    for name, row in result["errors"].items():
        assert list(row) == [k.name for k in KINDS]
        for cell in row.values():
            assert len(cell["all"]) == 2 and min(cell["all"]) <= cell["mean"] <= cell["largest"] == max(cell["all"])
            assert 1e-3 < cell["mean"] < (2.5e-3 if name == "bf16" else 0.2)
    assert result["errors"]["int8"]["outliers"]["mean"] < 0.5 * result["errors"]["int8-plain"]["outliers"]["mean"]
    assert result["faults"] == []
    for text in (report(result), markdown(result)):
        assert all(name in text for name in result["errors"]) and "bnb:nf4 is not to be had." in text
    page = markdown(result)
    assert "the command" in page and page.count(r"\* |") == len(KINDS) + 1 - 1  # one cell a kind is marked
    row = next(line for line in page.splitlines() if line.startswith("| `int8` |"))
    assert [r"\*" in cell for cell in row.split("|")[2:-1]] == [True] * 5


def test_faults_are_found() -> None:
    cell = {"mean": 1e-2, "largest": 1e-2, "all": [1e-2]}
    good: dict[str, Any] = {n: {k.name: dict(cell) for k in KINDS} for n in linear_error.format_names()}
    assert faults(good) == []
    above = copy.deepcopy(good)
    above["int8"]["outliers"]["largest"] = 1.5e-2
    assert faults(above) == ["int8, outliers: 1.50e-02 is above its bar of 1.4e-02."]
    above["int8"]["outliers"]["largest"] = float("nan")
    assert len(faults(above)) == 1
    worse = copy.deepcopy(good)
    worse["nf4"]["gelu"]["mean"] = 1.1e-2
    assert faults(worse) == ["nf4, gelu: 1.10e-02 with nf4, and bnb:nf4 has 1.00e-02."]
    used = copy.deepcopy(good)
    used["int8"]["gelu"]["mean"] = 1.2e-2
    assert faults(used) == ["int8, gelu: 1.20e-02 with int8, and torchao:int8 has 1.00e-02."]
    del used["torchao:int8"]
    assert faults(used) == []


def test_the_command(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(linear_error, "format_names", lambda: ["bf16", *FORMATS])
    files = tmp_path / "a.json", tmp_path / "a.md"
    arguments = ["--seeds", "1", "--device", "cpu", "-o", str(files[0]), "--markdown", str(files[1])]
    linear_error.main(arguments)
    assert "All bars hold" in capsys.readouterr().out and all(file.stat().st_size > 500 for file in files)
    monkeypatch.setattr(linear_error, "BARS", {("fp8", "normal"): 1e-2})
    with pytest.raises(SystemExit) as ended:
        linear_error.main(arguments)
    assert ended.value.code == 1 and "is above its bar" in files[1].read_text()
    with pytest.raises(SystemExit):
        linear_error.main(["--seeds", "0"])
