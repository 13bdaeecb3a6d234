"""The gate passes what is as in the baseline, and fails with the table what is not: an error is put in on purpose."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from solostep.benchmarks import gate
from solostep.benchmarks.gate import BASELINE, FLOOR, ROWS, compare, measure, read_baseline, verdict
from solostep.benchmarks.results import write_json
from solostep.engine.errors import UsageError
from solostep.quant.linear import QuantizedLinear

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module", autouse=True)
def reference(fast: None) -> Iterator[None]:
    """Texts and the fp32 run are made once for all tests, as they are for all rows of a measurement."""
    real, made = gate.Gate.ready, dict[int, gate.Gate]()

    def ready(moved: int, alter: gate.Alter) -> gate.Gate:
        if moved not in made:
            made[moved] = real(moved)
        return replace(made[moved], alter=alter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate.Gate, "ready", ready)
        yield


@pytest.fixture(scope="module")
def baseline(fast: None) -> dict[str, Any]:
    return read_baseline(BASELINE)


@pytest.mark.slow
def test_nothing_has_changed(baseline: dict[str, Any]):
    """The gate. If it fails and the change is meant: `python -m solostep.benchmarks.gate --update`."""
    compared = compare(measure(list(ROWS)), baseline)
    assert len(compared) == 10 * len(ROWS)
    failed = [c for c in compared if not c.passed]
    assert not failed, verdict(compared) + "".join(f"\n{c}" for c in failed)


def _scaled(factor: float, only: int | None = None) -> gate.Alter:
    """Makes all scales of quantized weights wrong, or those of one block."""

    def alter(name: str, network: nn.Module) -> None:
        blocks = network.transformer_blocks if only is None else [network.transformer_blocks[only]]
        changed = 0
        for block in blocks:
            for module in block.modules():
                if isinstance(module, QuantizedLinear):
                    with torch.inference_mode():
                        module.weight_scale.mul_(factor)
                    changed += 1
        assert changed

    return alter


def test_a_scale_that_is_a_little_off_fails(baseline: dict[str, Any]):
    compared = compare(measure(["fp8"], alter=_scaled(1.03)), baseline)
    failed = {c.key for c in compared if not c.passed}
    assert {f"block {i}" for i in range(6)} <= failed


def test_one_wrong_block_is_named(baseline: dict[str, Any]):
    compared = compare(measure(["int8-weight"], alter=_scaled(1.01, only=2)), baseline)
    assert {c.key for c in compared if not c.passed and c.key.startswith("block")} == {"block 2"}
    assert "int8-weight" in verdict(compared) and "--update" in verdict(compared)


def test_a_smaller_error_is_a_change_too(baseline: dict[str, Any]):
    """As when a mode silently runs unquantized."""
    values = {key: known["value"] / 4 for key, known in baseline["fp8"].items()}
    assert not any(c.passed for c in compare({"fp8": values}, baseline))
    values = {key: known["value"] for key, known in baseline["fp8"].items()}
    assert all(c.passed for c in compare({"fp8": values}, baseline))


def test_the_stored_baseline_is_sound(baseline: dict[str, Any]):
    assert set(baseline) == set(ROWS)
    for name, values in baseline.items():
        for key, known in values.items():
            assert 0 < known["low"] <= known["value"] <= known["high"], (name, key)
            # What notices small changes must not have an interval so wide that nothing fails.
            assert not key.startswith("block") or known["high"] / known["low"] < 1.02, (name, key)
    assert baseline["int8"]["block 1"]["value"] < baseline["fp8"]["block 1"]["value"] / 2


def test_other_conditions_are_refused(tmp_path: Path):
    path = tmp_path / "baseline.json"
    with pytest.raises(UsageError, match="cannot be read"):
        read_baseline(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="no baseline of this gate"):
        read_baseline(path)
    stored = json.loads(BASELINE.read_text(encoding="utf-8"))
    other = copy.deepcopy(stored)
    other["conditions"]["weights"]["transformer"] = "0"
    write_json(path, other)
    with pytest.raises(UsageError, match="another demo model.*--update"):
        read_baseline(path)
    del stored["rows"]["nf4"]
    write_json(path, stored)
    with pytest.raises(UsageError, match="no row 'nf4'"):
        read_baseline(path)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, baseline: dict[str, Any]):
    """With the measuring replaced: exit codes, the table, and a baseline that is written and then passes."""
    monkeypatch.setenv("COLUMNS", "160")
    same = {name: {key: known["value"] for key, known in values.items()} for name, values in baseline.items()}
    monkeypatch.setattr(gate, "measure", lambda names, moved=0, say=None: copy.deepcopy(same))
    gate.main([])
    assert f"{10 * len(ROWS)} errors of {len(ROWS)} modes are as in the baseline" in capsys.readouterr().out
    gate.main(["--report"])
    assert "int4-weight" in capsys.readouterr().out
    same["int8"]["block 3"] *= 1.3
    with pytest.raises(SystemExit) as ended:
        gate.main([])
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "CHANGED" in out and "+30" in out and "1 of 100 errors changed (int8)" in out
    assert "nf4" not in out.split("errors changed")[0]  # only what changed
    gate.main(["--update", "--baseline", str(tmp_path / "new.json")])
    gate.main(["--baseline", str(tmp_path / "new.json")])
    with pytest.raises(SystemExit) as ended:
        gate.main(["--baseline", str(tmp_path / "none.json")])
    assert ended.value.code == 2


def test_rows_in_bf16_are_ratios(monkeypatch: pytest.MonkeyPatch):
    class Made:
        def measure(self, name: str) -> dict[str, float]:
            return {"latents": 2.0 if name == FLOOR else 3.0}

    monkeypatch.setattr(gate.Gate, "ready", classmethod(lambda cls, moved, alter: Made()))
    assert measure(["bf16, fused"]) == {FLOOR: {"latents": 2.0}, "bf16, fused": {"latents": 1.5}}
    assert measure(["int8"]) == {"int8": {"latents": 3.0}}
