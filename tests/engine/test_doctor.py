"""The doctor: it says what there is, keeps what it chose, and never lets a wrong kernel through."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from solostep.engine import choices, doctor, machine
from solostep.engine.errors import UsageError
from solostep.engine.interfaces import cli
from solostep.engine.interfaces.doctor import print_report
from solostep.kernels import scaled_mm_check as check
from solostep.kernels.attention import BACKENDS
from solostep.kernels.attention_check import Verdict
from solostep.kernels.refused import is_refused, refuse
from solostep.kernels.scaled_mm import PRODUCTS
from solostep.kernels.scaled_mm_check import Examined, Shape, baseline, examine_products

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
RUNNER = CliRunner()
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))
    for name in ("DISK_BYTES", "QUICK_DISK_BYTES"):
        monkeypatch.setattr(doctor, name, 16 << 20)
    return tmp_path / "cache"


# --- a machine without a card -------------------------------------------------------------------------------------


def test_report_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cards_there", list)
    found = doctor.report(CPU)
    assert found["gpu"] is None and found["operators"] == [] and found["choices_file"] is None
    assert found["host"]["ram_bytes"] > 1e9 and found["host"]["cores"] >= 1 and found["host"]["torch"]
    assert len(found["notes"]) == 1 and "nothing to measure" in found["notes"][0]
    with pytest.raises(UsageError, match="--tokens"):
        doctor.report(CPU, tokens=5)


def test_back_ends_that_are_not_there_say_why() -> None:
    found = doctor.report(CPU)
    lines = {(e["mode"], v["backend"]): v for e in found["attention"] for v in e["verdicts"]}
    assert set(lines) == {(mode, name) for name, backend in BACKENDS.items() for mode in backend.modes}
    assert lines["int8", "hopper"]["reason"] == "it needs a CUDA card" and lines["bf16", "sdpa"]["status"] == "ok"
    assert [e["chosen"] for e in found["attention"]] == ["sdpa", "torch", "torch"]
    products = {line["backend"]: line for line in found["gemm"]}
    assert set(products) == {f"{kind} {n}" for n, product in PRODUCTS.items() for kind in product.kinds}
    assert products["fp8 hopper"]["reason"] == "it needs a CUDA card" and products["fp8 torch"]["status"] == "ok"
    assert found["products"]["int8"]["chosen"] == ["torch"]


def test_a_card_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_run", lambda *command: None)
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.cards_there() == []
    (tmp_path / "version").write_text("NVRM version: ...")
    assert machine.cards_there() == ["a driver for NVIDIA cards"]
    place = tmp_path / "gpus" / "0000:01:00.0"
    place.mkdir(parents=True)
    (place / "information").write_text("Model: \t\t NVIDIA Fake 1\nIRQ:   \t\t 5\n")
    assert machine.cards_there() == ["NVIDIA Fake 1"]
    monkeypatch.setattr(machine, "_run", lambda *command: "Fake 2\nFake 3")
    assert machine.cards_there() == ["Fake 2", "Fake 3"]
    for version, visible, words in (
        (None, "0", r"there is Fake 2 and Fake 3, which this torch \(.*\) does not see: it is built for CPUs only"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES hides them"),
        ("13.0", "0", "too old for CUDA 13.0"),
    ):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        notes = doctor.report(CPU)["notes"]
        assert len(notes) == 2 and re.search(words, notes[1]), notes


def test_the_disk_is_timed_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.disk_facts(tmp_path / "not" / "there", True)
    assert found["folder"] == str(tmp_path) and list(tmp_path.iterdir()) == []
    assert found["bytes_per_second"] is None or found["bytes_per_second"] > 1e6
    monkeypatch.setattr(doctor, "cache_dir", lambda: tmp_path)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.os, "fsync", full)
    found = doctor.report(CPU)
    assert found["disk"] is None and any("the disk of the cache folder failed" in note for note in found["notes"])
    assert list(tmp_path.iterdir()) == []


def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    done = RUNNER.invoke(cli.app, ["doctor", "--device", "cpu"])
    assert done.exit_code == 0
    for words in (
        "card",
        "none that torch sees",
        "attention, int8",
        "by torch (sdpa), not examined",
        "processor",
        "memory",
        "torch",
        "disk",
        "nothing to measure",
        "it needs a CUDA card",
        "fp8 hopper",
    ):
        assert words in done.stdout
    assert "verdict" not in done.stdout  # no table of what was not examined
    file = tmp_path / "doctor.json"
    done = RUNNER.invoke(cli.app, ["doctor", "--device", "cpu", "--json", "--quick", "-o", str(file)])
    assert done.exit_code == 0
    assert json.loads(done.stdout, parse_constant=pytest.fail) == json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]
    for arguments in (["-o", str(file)], ["-o", str(tmp_path)], ["-o", str(tmp_path / "no" / "a")], ["--tokens", "3"]):
        done = RUNNER.invoke(cli.app, ["doctor", "--device", "cpu", *arguments])
        assert done.exit_code == 2 and "error:" in done.stderr, arguments
    assert RUNNER.invoke(cli.app, ["doctor", "--device", "cpu", "-o", str(file), "--overwrite"]).exit_code == 0


# --- tables -------------------------------------------------------------------------------------------------------


def fake_examination(device: torch.device, mode: str, **more: Any) -> list[Verdict]:
    assert more["tokens"] in (5007, 18_972, 75_888) and more["seed"] >= 0
    return [
        Verdict(mode, "fast", "wrong", "normal: relative error 1.0, allowed 0.004", {"normal": float("nan")}),
        Verdict(mode, "right", "ok", "", {"normal": 1e-3}, 2.0, 1.5, 700.0),
    ]


def fake_products(device: torch.device, kind: str, *, shapes: Any, rows: int, budget_ms: float, seed: int) -> Examined:
    """The real examination, of small shapes on the CPU, and a back end that is wrong."""
    assert shapes == choices.GEMMS and rows == 75_888
    found = examine_products(CPU, kind, shapes=[Shape("qkv", 48, 64)], rows=131, budget_ms=0.1, seed=seed)
    found.verdicts["off"] = Verdict(kind, "off", "wrong", "normal: relative error 1.0", {"normal": 1.0})
    found.entries.append(found.entries[0] | {"backend": f"{kind} off", "status": "wrong", "error": 1.0})
    return found


def test_the_report_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the measurements themselves."""
    found = doctor.report(CPU) | {"attention": [], "gemm": [], "products": {}}
    card = {"name": "Fake 1", "capability": "9.0", "driver": "1.2"}
    facts = {"processors": 132, "memory_bytes": 150 * 10**9, "memory_free_bytes": 10**9, "power_limit": "700 W"}
    found["gpu"] = card | facts | {"clock": None, "pcie": "gen 5 x16"}
    ways = [f"{way}_{kind}" for way in ("host_to_device", "device_to_host") for kind in ("pinned", "pageable")]
    found["rates"] = dict.fromkeys(ways, 5e10) | {"device_copy": 4.2e12}
    found["pinned"] = {"largest_bytes": 4 * 10**9, "bytes_per_second": 3e9, "stopped": "enough"}
    found["disk"] = {"folder": "/some/place", "bytes_per_second": 3.21e9}
    monkeypatch.setattr(choices, "gpu_facts", lambda device: card)
    monkeypatch.setattr(choices, "free_memory", lambda device: 10**11)
    monkeypatch.setattr(doctor, "release_memory", lambda device: None)
    monkeypatch.setattr(doctor, "MODES", ("bf16",))
    monkeypatch.setattr(doctor, "examine", fake_examination)
    monkeypatch.setattr(doctor, "examine_products", fake_products)
    monkeypatch.setattr(
        doctor, "baseline", lambda device, shape, rows, ms: baseline(CPU, Shape(shape.name, 48, 64), 9, 0.1)
    )
    wrong = [Verdict("", "gelu int8", "wrong", "rows: relative error nan", {"rows": float("nan")})]
    monkeypatch.setattr(doctor, "examine_operators", lambda device, seed: wrong)
    monkeypatch.setattr(check, "CASES", ())
    tell = lambda *step: None  # noqa: E731
    doctor._operators(CARD, tell, found)
    assert is_refused("gelu int8", CARD)  # at once: attention is examined behind it
    refuse(CARD, ())
    found["attention"] = doctor._attention(CARD, 75_888, False, tell, found)
    assert [(e["class"], e["tokens"], e["chosen"]) for e in found["attention"]] == [
        ("small", 5007, "right"), ("medium", 18_972, "right"), ("large", 75_888, "right"),
    ]  # fmt: skip
    doctor._gemms(CARD, 75_888, False, tell, found)
    assert {kind: p["chosen"] for kind, p in found["products"].items()} == {"int8": ["torch"], "fp8": ["torch"]}
    kept = choices.read_choices(CARD)
    assert set(kept) == {
        "bf16 small", "bf16 medium", "bf16 large", "product int8", "product fp8", "operators",
    }  # fmt: skip
    assert {v.backend: v.status for v in kept["product fp8"]}["off"] == "wrong"
    found = choices.plain(found)
    json.dumps(found, allow_nan=False)
    text = io.StringIO()
    print_report(Console(file=text, emoji=False), found)
    for words in (
        "Fake 1", "gen 5 x16", "4.20 TB/s", "4.0 GB at 3.0 GB/s", "WRONG", "not finite", "chosen", "75,888",
        "3.21 GB/s", "int8 off", "fp8 torch", "other kernels", "gelu int8", "bf16",
    ):  # fmt: skip
        assert words in text.getvalue(), words


def test_memory_limits_are_read() -> None:
    limit = machine.cgroup_limit()
    assert limit is None or limit > 10**6


# --- on a card ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_card
def test_the_command_on_a_card() -> None:
    done = RUNNER.invoke(cli.app, ["doctor", "--quick", "--tokens", "6000", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found["gpu"]["memory_bytes"] > 10**9 and found["pinned"]["largest_bytes"] >= 10**9
    assert found["rates"]["host_to_device_pinned"] > 1e9 and found["rates"]["device_copy"] > 1e11
    assert not [v for e in found["attention"] for v in e["verdicts"] if v["status"] in ("wrong", "failed")]
    assert not [e for e in found["gemm"] if e["status"] in ("wrong", "failed")]
    device = torch.device("cuda", 0)
    for entry in found["attention"]:
        assert choices.attention_choice(device, entry["mode"], 6000) == entry["chosen"]
    assert not [v for v in found["operators"] if v["status"] == "wrong"]
    settled = choices.settle(device, found["products"])
    assert settled.as_dict()["products"] == {kind: entry["chosen"] for kind, entry in found["products"].items()}
