"""The gate of speed compares ratios of one run with those stored for the same card and clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from solostep.benchmarks.gate_speed import MARGIN, RESULTS, compare, main, ratios, read_lines
from solostep.engine.errors import UsageError


def line(variant: str, ratio: float, card: str = "Testcard", commit: str = "a") -> dict[str, Any]:
    of = {"official": 1.0, variant: ratio}
    return {"what": "block", "clip": "1x2x3", "variant": variant, "ratio": of, "card": card, "commit": commit}


STORED = [line("int8/int8", 1.5, commit="old"), line("int8/int8", 1.7, commit="new"), line("bf16/bf16", 1.2),
          line("int8/int8", 9.0, card="another")]  # fmt: skip


def test_the_last_ratio_of_the_same_card_counts() -> None:
    at_the_limit = 1.7 * (1 - MARGIN)
    (one,) = compare([line("int8/int8", at_the_limit + 1e-9)], STORED)
    assert one.passed and one.stored == 1.7 and one.commit == "new"
    (one,) = compare([line("int8/int8", at_the_limit - 1e-3)], STORED)
    assert not one.passed
    # Faster passes, and so does what nobody timed before.
    assert [c.passed for c in compare([line("int8/int8", 3.0), line("fp8/int8", 0.1)], STORED)] == [True, True]


def test_what_failed_does_not_pass() -> None:
    failed = {"what": "block", "clip": "1x2x3", "variant": "fp8/int8", "failed": "it does not compile", "card": "x"}
    one, other = compare([line("int8/int8", 1.7), failed], STORED)
    assert one.passed and not other.passed and other.failed == "it does not compile"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, new = tmp_path / "stored.jsonl", tmp_path / "new.jsonl"
    stored.write_text("".join(json.dumps(one) + "\n" for one in STORED))
    new.write_text("".join(json.dumps(one) + "\n" for one in (line("int8/int8", 1.6), line("bf16/bf16", 1.21))))
    assert main(["--lines", str(new), "--stored", str(stored)]) == 1
    said = capsys.readouterr().out
    assert "-5.9 %  SLOWER than at new" in said and "1 of 2 variants are as fast" in said
    assert main(["--lines", str(stored), "--stored", str(stored)]) == 0
    new.write_text(json.dumps(line("int8/int8", 1.6, card="Newcard")))
    assert main(["--lines", str(new), "--stored", str(stored)]) == 2
    assert "No speed is stored of Newcard at 1x2x3" in capsys.readouterr().err
    new.write_text("no line")
    assert main(["--lines", str(new)]) == 2
    with pytest.raises(UsageError, match="hold no block"):
        compare([], STORED)


def test_the_stored_speeds_are_of_a_block() -> None:
    found = ratios(one for path in RESULTS.glob("block-*.jsonl") for one in read_lines(path))
    assert {"bf16/bf16", "int8/int8", "int8/int8-fp8"} <= set(found["NVIDIA H200", "544x992x204"])
