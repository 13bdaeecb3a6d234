"""The block of full_width, on a CPU and narrow, with made-up times: variant by variant, whatever becomes of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from solostep.benchmarks import full_width
from solostep.benchmarks.full_width import bench_block
from solostep.engine.config import GenerationSettings, TransformerConfig
from solostep.engine.runtime import numerics

CPU = torch.device("cpu")
CLIP = GenerationSettings(num_frames=17, height=32, width=32)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Times of 1 s, 2 s ... in the order in which functions are timed; gives the count."""
    count: list[int] = []

    def timed(run: Callable[[], object], device: torch.device, repeats: int) -> dict[str, Any]:
        run()
        count.append(len(count) + 1)
        return {"all_seconds": [float(len(count))], "peak_above_gib": 0.5}

    monkeypatch.setattr(full_width, "timed", timed)
    monkeypatch.setattr(full_width, "TransformerConfig", lambda: TransformerConfig(num_attention_heads=1))
    return count


def test_a_variant_that_fails_loses_itself_alone(narrow: list[int]) -> None:
    with numerics():
        found = list(bench_block(CLIP, CPU, 3, ("bf16/bf16", "int9/bf16", "int8/none", "int8/int8")))
    assert [r["variant"] for r in found] == ["plain", "bf16/bf16", "int9/bf16", "int8/none", "int8/int8"]
    plain, bf16, unknown, none, int8 = found
    assert plain["seconds"] == {"official": 3, "plain": 4} and "error" not in plain  # 1, 3, 5 and 2, 4, 6
    assert bf16["seconds"] == {"official": 9, "bf16/bf16": 10} and bf16["ratio"]["bf16/bf16"] == 0.9
    assert 0 < bf16["error"]["bf16/bf16"] < int8["error"]["int8/int8"] < 0.1
    assert "int9" in unknown["failed"] and "none" in none["failed"]
    assert all("seconds" not in r for r in (unknown, none)) and all("failed" not in r for r in (plain, bf16, int8))


def test_what_is_measured_is_recorded_before_the_next(
    narrow: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(block: Any, recipe: Any, config: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(full_width, "quantized_block", stopped)
    monkeypatch.setattr(full_width, "pick_device", lambda name: CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake")
    out = tmp_path / "block.jsonl"
    size = ["--frames", "17", "--height", "32", "--width", "32", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["full_width", "block", *size, "-o", str(out)])
    with pytest.raises(KeyboardInterrupt):
        full_width.main()
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["what"], line["variant"], line["clip"], line["card"]) == ("block", "plain", "32x32x17", "Fake")


def test_a_precision_that_the_vae_does_not_run_in_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["full_width", "block", "vae-encode", "--precision", "int8"])
    with pytest.raises(SystemExit) as ended:
        full_width.main()
    assert ended.value.code == 2 and "--precision int8: the VAE runs in bf16 or fp32" in capsys.readouterr().err
