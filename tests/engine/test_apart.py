"""Measurements in a process of their own: asked and answered by files, or left to the caller."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from solostep.engine import apart, choices
from solostep.engine.errors import SolostepError
from solostep.engine.runtime import host_peak, measured, release_memory
from solostep.kernels.cards import OUT_OF_MEMORY

CARD = torch.device("cuda", 0)
SMALL = {"mode": "int8", "tokens": 40, "heads": 1, "budget_ms": 1.0, "seed": 3}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with 9 GB left."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(apart, "free_memory", lambda device: 9 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 80 << 30))
    monkeypatch.setattr(apart, "release_memory", lambda device: None)
    monkeypatch.setattr(apart, "_INSIDE", [])


def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The other process, in this one and on the CPU; what it was asked."""
    requests: list[dict[str, Any]] = []

    def run(command: Sequence[str], **options: object) -> SimpleNamespace:
        assert command[:2] == [sys.executable, "-c"] and f"from {apart.__name__} import main" in command[2]
        file = Path(command[3])
        requests.append(json.loads(file.read_text()))
        file.write_text(json.dumps(requests[-1] | {"device": "cpu"}))
        return SimpleNamespace(returncode=apart.main(list(command[3:])), stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return requests


def test_the_other_process_answers(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = on_a_cpu(monkeypatch)
    monkeypatch.setattr(apart, "refused_on", lambda device: ["gelu int8"])
    refused: list[object] = []
    monkeypatch.setattr(apart, "refuse", lambda device, names: refused.append(names))
    found = apart.verdicts_of(apart.measured_apart("attention", CARD, **SMALL))
    assert requests == [
        {"what": "attention", "device": "cuda:0", "limit": (8 << 30) - apart.CONTEXT, "refused": ["gelu int8"],
         "arguments": SMALL}
    ]  # fmt: skip
    here = choices.examine(torch.device("cpu"), **SMALL)
    assert found is not None and [(v.backend, v.status) for v in found] == [(v.backend, v.status) for v in here]
    assert [v.errors for v in found] == [v.errors for v in here] and any(v.errors for v in here)
    assert apart._INSIDE == ["attention"] and refused == [["gelu int8"]]
    assert apart.measured_apart("attention", CARD, **SMALL) is None and len(requests) == 1  # and starts no further one


@pytest.mark.parametrize("fault", ["no program", "a status", "an answer cut short"])
def test_the_caller_measures_where_it_fails(
    card: None, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(command: Sequence[str], **options: object) -> SimpleNamespace:
        if fault == "no program":
            raise FileNotFoundError("no such program")
        if fault == "an answer cut short":
            Path(command[4]).write_text("[{")
        return SimpleNamespace(
            returncode=3 if fault == "a status" else 0, stderr="Traceback:\nRuntimeError: it broke\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(logging.getLogger("solostep"), "propagate", True)
    with caplog.at_level(logging.INFO, "solostep"):
        assert apart.measured_apart("products", CARD, kind="int8") is None
    assert "products could not be measured by a process of its own" in caplog.text
    lost = [apart.Verdict("int8", "hopper", "failed", OUT_OF_MEMORY), apart.Verdict("int8", "triton", "ok", ms=1.0)]
    assert apart.verdicts_of([v.as_dict() for v in lost]) is None  # there may be memory enough here
    assert {"no program": "no such program", "a status": "status 3: RuntimeError: it broke"}.get(
        fault, "Expecting"
    ) in caplog.text


def test_what_does_not_end_is_not_begun_again(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], **options: Any) -> SimpleNamespace:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SolostepError, match="products on cuda:0 did not end in 30 minutes"):
        apart.measured_apart("products", CARD, kind="int8")


def test_interrupted_it_says_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(*files: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(apart, "_answer", interrupted)
    assert apart.main(["asked", "answer"]) == 130 and capfd.readouterr().err == ""


def test_nothing_is_started_where_little_memory_is_left(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "free_memory", lambda device: 2 * apart.CONTEXT - 2)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("started"))
    assert apart.measured_apart("attention", CARD, **SMALL) is None


def test_on_a_cpu_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("started"))
    assert apart.measured_apart("attention", torch.device("cpu"), **SMALL) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_a_card_is_measured_apart() -> None:
    """A real process, whose memory is not this one's."""
    torch.zeros(1, device=CARD)
    release_memory(CARD)
    with measured("before", CARD, []):  # the peak begins anew
        before = host_peak()
    how = {"mode": "int8", "tokens": 5007, "heads": 4, "budget_ms": 20.0, "seed": 3}
    found = apart.verdicts_of(apart.measured_apart("attention", CARD, **how))
    assert found is not None and any(v.status == "ok" and v.ms for v in found)
    assert not [v for v in found if v.status in ("wrong", "failed")]
    operators = apart.verdicts_of(apart.measured_apart("operators", CARD, seed=0))
    assert operators is not None and {v.status for v in operators} <= {"ok", "unavailable"}
    rates = apart.measured_apart("rates", CARD, recipe=None, attention="bf16")
    assert rates is not None and all(0 < value < float("inf") for value in rates.values())
    after = host_peak()
    if before is not None and after is not None:
        assert after - before < 100 << 20
