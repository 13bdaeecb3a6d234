"""The doctor: it says what there is, keeps what it chose, and never lets a wrong kernel through."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from typer.testing import CliRunner

from solostep.engine import doctor, machine
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.files import one_at_a_time
from solostep.engine.interfaces import cli
from solostep.engine.interfaces.doctor import print_report
from solostep.kernels.attention import BACKENDS, Backend
from solostep.kernels.attention_check import Verdict

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
RUNNER = CliRunner()
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, whatever the command line made of the logger before."""
    monkeypatch.setattr(logging.getLogger("solostep"), "propagate", True)
    return caplog


# --- a machine without a card -------------------------------------------------------------------------------------


def test_report_on_a_cpu() -> None:
    found = doctor.report(CPU)
    assert found["gpu"] is None and found["attention"] == found["gemm"] == [] and found["choices_file"] is None
    assert found["host"]["ram_bytes"] > 1e9 and found["host"]["cores"] >= 1 and found["host"]["torch"]
    assert len(found["notes"]) == 1 and "nothing to measure" in found["notes"][0]
    with pytest.raises(UsageError, match="--tokens"):
        doctor.report(CPU, tokens=5)


def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    done = RUNNER.invoke(cli.app, ["doctor", "--device", "cpu"])
    assert done.exit_code == 0
    for words in ("card", "none in use", "processor", "memory", "torch", "nothing to measure"):
        assert words in done.stdout
    file = tmp_path / "doctor.json"
    done = RUNNER.invoke(cli.app, ["doctor", "--device", "cpu", "--json", "--quick", "-o", str(file)])
    assert done.exit_code == 0
    assert json.loads(done.stdout, parse_constant=pytest.fail) == json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]
    for arguments in (["-o", str(file)], ["-o", str(tmp_path)], ["-o", str(tmp_path / "no" / "a")], ["--tokens", "3"]):
        done = RUNNER.invoke(cli.app, ["doctor", "--device", "cpu", *arguments])
        assert done.exit_code == 2 and "error:" in done.stderr, arguments
    assert RUNNER.invoke(cli.app, ["doctor", "--device", "cpu", "-o", str(file), "--overwrite"]).exit_code == 0


def test_a_cpu_is_not_measured(cache: Path) -> None:
    assert doctor.attention_choice(CPU, "bf16", 100) == "sdpa"
    assert doctor.attention_choice(CPU, "int8", 100) == "torch"
    assert doctor.attention_choice(CPU, "bf16", 100, "math") == "math"
    for mode, asked, words in (
        ("bf16", "cudnn", "cudnn is not to be had on cpu: it needs a CUDA card"),
        ("bf16", "nothing", "unknown for bf16; choose one of hopper, triton, sdpa"),
        ("int3", None, "mode int3 is unknown; choose one of bf16, int8"),
    ):
        with pytest.raises(UsageError, match=words):
            doctor.attention_choice(CPU, mode, 100, asked)
    assert not cache.exists()


def test_products_on_a_cpu() -> None:
    found = {e["backend"]: e for e in doctor.examine_gemm(CPU, ("small", 48, 64), 130, 1)}
    assert found["bf16"]["status"] == "ok" and 1e-4 < found["bf16"]["error"] < 4e-3 and found["bf16"]["ms"] > 0
    assert {e["status"] for name, e in found.items() if name != "bf16"} == {"unavailable"}


def test_a_wrong_product_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def gemm(name: str, a: Any, b: Any) -> Any:
        if name == "int8 torch":
            raise RuntimeError("broke")
        return lambda: (a @ b.t()) * (1.01 if name == "int8 hopper" else 1), lambda rows: a[rows] @ b.t()

    monkeypatch.setattr(doctor, "gemm", gemm)
    found = {e["backend"]: e for e in doctor.examine_gemm(CPU, ("small", 48, 64), 130, 1)}
    assert found["int8 hopper"]["status"] == "wrong" and found["int8 hopper"]["ms"] is None
    assert found["int8 portable"]["status"] == "ok" and found["int8 portable"]["error"] == 0
    assert found["int8 torch"]["status"] == "failed" and found["int8 torch"]["reason"] == "broke"


# --- choices ------------------------------------------------------------------------------------------------------


class FakeCard:
    """A card with three back ends, of which the fastest is wrong, and how often they were measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[tuple[str, int]] = []
        self.facts = {"name": "Fake 1", "capability": "9.0", "driver": "1.2"}
        self.gone = ""
        for name in ("fast", "right", "slow"):
            backend = Backend(name, ("bf16", "int8"), lambda device, mode, name=name: self.why(name), lambda *a: a[0].q)
            monkeypatch.setitem(BACKENDS, name, backend)
        monkeypatch.setattr(doctor, "gpu_facts", lambda device: self.facts)
        monkeypatch.setattr(doctor, "free_memory", lambda device: 10**11)
        monkeypatch.setattr(doctor, "examine", self.examine)

    def why(self, name: str) -> str | None:
        return "it was removed" if name == self.gone else None

    def examine(self, device: torch.device, mode: str, *, tokens: int, heads: int, budget_ms: float) -> list[Verdict]:
        self.measured.append((mode, tokens))
        verdicts = [
            Verdict(mode, "fast", "wrong", "normal: relative error 1.0, allowed 0.004", {"normal": float("nan")}),
            Verdict(mode, "right", "ok", "", {"normal": 1e-3}, 2.0, 1.5, 700.0),
            Verdict(mode, "slow", "ok", "", {"normal": 1e-3}, 3.0, 2.5, 500.0),
        ]
        return [Verdict(mode, v.backend, "unavailable", self.why(v.backend) or "") if self.why(v.backend) else v
                for v in verdicts]  # fmt: skip


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    return FakeCard(monkeypatch)


def test_a_choice_is_measured_once_and_kept(card: FakeCard, notes: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert doctor.attention_choice(CARD, "bf16", 75_888) == "right"
    assert doctor.attention_choice(CARD, "bf16", 40_000) == "right"  # of the same class
    assert card.measured == [("bf16", 75_888)]
    assert [m for m in notes.messages if "measuring attention back ends" in m] == [notes.messages[0]]
    assert any("fast is wrong on this card" in m for m in notes.messages)
    doctor.attention_choice(CARD, "bf16", 5007)
    doctor.attention_choice(CARD, "int8", 75_888)
    assert card.measured[1:] == [("bf16", 5007), ("int8", 75_888)]
    kept = doctor.read_choices(CARD)
    assert set(kept) == {"bf16 large", "bf16 small", "int8 large"} and kept["bf16 small"][0].status == "wrong"
    json.loads(doctor.choices_file(CARD).read_text(), parse_constant=pytest.fail)
    beside = {p.name for p in doctor.choices_file(CARD).parent.iterdir() if p.suffix != ".lock"}
    assert beside == {doctor.choices_file(CARD).name}


def test_of_processes_that_start_together_one_measures(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def held(path: Path) -> Iterator[None]:
        """Waits for another process, which measures meanwhile."""
        assert path == doctor.choices_file(CARD)
        doctor.write_choices(CARD, {"bf16 small": [Verdict("bf16", "slow", "ok", "", {"normal": 1e-3}, 3.0, 2.5, 1.0)]})
        yield

    monkeypatch.setattr(doctor, "one_at_a_time", held)
    assert doctor.attention_choice(CARD, "bf16", 100) == "slow" and not card.measured


def test_a_second_process_waits(tmp_path: Path) -> None:
    with one_at_a_time(tmp_path / "new" / "file"):
        lock = FileLock(tmp_path / "new" / ".file.lock")
        with pytest.raises(Timeout):
            lock.acquire(timeout=0)
    with lock.acquire(timeout=0):
        pass
    (tmp_path / "no folder").write_text("")
    with one_at_a_time(tmp_path / "no folder" / "file"):  # no lock can be made there
        pass


def test_what_is_asked_for_by_name(card: FakeCard) -> None:
    assert doctor.attention_choice(CARD, "bf16", 100, "slow") == "slow"
    with pytest.raises(UsageError, match="fast computes wrong results on this card .*relative error 1.0.*doctor"):
        doctor.attention_choice(CARD, "bf16", 100, "fast")
    card.gone = "slow"
    with pytest.raises(UsageError, match="slow is unavailable .it was removed"):
        doctor.attention_choice(CARD, "bf16", 100, "slow")
    assert len(card.measured) == 2  # the second because it was removed since


def test_a_choice_that_was_removed_is_measured_anew(card: FakeCard) -> None:
    assert doctor.attention_choice(CARD, "bf16", 100) == "right"
    card.gone = "right"
    assert doctor.attention_choice(CARD, "bf16", 100) == "slow"
    assert len(card.measured) == 2


def test_another_driver_is_measured_anew(card: FakeCard) -> None:
    doctor.attention_choice(CARD, "bf16", 100)
    card.facts = card.facts | {"driver": "1.3"}
    doctor.attention_choice(CARD, "bf16", 100)
    assert len(card.measured) == 2


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"key": 1',
        "key",
        '{"key": KEY, "choices": {"bf16 small": [{"mode": "bf16"}]}}',
        '{"key": KEY, "choices": {"bf16 small": [{"mode": "bf16", "backend": "fast", "status": "fine"}]}}',
        '{"key": KEY, "choices": {"bf16 small": [{"mode": "bf16", "backend": "fast", "status": "ok", "ms": "1"}]}}',
        '{"key": KEY, "choices": {"other": []}}',
        '{"key": {}, "choices": {}}',
    ],
)
def test_a_damaged_file_is_measured_anew(damage: str, card: FakeCard, notes: pytest.LogCaptureFixture) -> None:
    assert doctor.attention_choice(CARD, "bf16", 100) == "right"
    path = doctor.choices_file(CARD)
    path.write_text(damage.replace("KEY", json.dumps(doctor.choices_key(CARD))))
    notes.clear()
    assert doctor.attention_choice(CARD, "bf16", 100) == "right"
    assert len(card.measured) == 2 and any("cannot be read" in message for message in notes.messages)
    notes.clear()
    assert doctor.attention_choice(CARD, "bf16", 100) == "right"
    assert len(card.measured) == 2 and not notes.messages


def test_a_cache_that_cannot_be_written(card: FakeCard, cache: Path, notes: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file, where a folder has to be")
    assert doctor.attention_choice(CARD, "bf16", 100) == "right"
    assert any("cannot be kept" in message for message in notes.messages)


def test_nothing_right(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [Verdict("bf16", "fast", "wrong", "off"), Verdict("bf16", "slow", "failed", "out of memory")]
    monkeypatch.setattr(doctor, "examine", lambda *a, **k: wrong)
    with pytest.raises(SolostepError, match="No attention back end is usable: fast computes wrong .*; slow failed"):
        doctor.attention_choice(CARD, "bf16", 100)


def test_size_classes_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {n: doctor.size_class(n) for n in (1, 8191, 8192, 32_767, 32_768, 10**6)}
    assert list(sizes.values()) == ["small", "small", "medium", "medium", "large", "large"]
    for free, want in ((10**12, (48, 75_888)), (7000 * 75_888 * 5, (5, 75_888)), (7000 * 1000, (1, 1000))):
        monkeypatch.setattr(doctor, "free_memory", lambda device, free=free: free)
        assert doctor.fitting(CARD, 75_888, 48) == want


# --- tables -------------------------------------------------------------------------------------------------------


def test_the_report_of_a_card(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the measurements themselves."""
    found = doctor.report(CPU)
    facts = {"processors": 132, "memory_bytes": 150 * 10**9, "memory_free_bytes": 10**9, "power_limit": "700 W"}
    found["gpu"] = card.facts | facts | {"clock": None, "pcie": "gen 5 x16"}
    ways = [f"{way}_{kind}" for way in ("host_to_device", "device_to_host") for kind in ("pinned", "pageable")]
    found["rates"] = dict.fromkeys(ways, 5e10) | {"device_copy": 4.2e12}
    found["pinned"] = {"largest_bytes": 4 * 10**9, "bytes_per_second": 3e9, "stopped": "enough"}
    monkeypatch.setattr(doctor, "release_memory", lambda device: None)
    monkeypatch.setattr(doctor, "MODES", ("bf16",))
    found["attention"] = doctor._attention(CARD, 75_888, False, lambda *step: None, found)
    assert [(e["class"], e["tokens"], e["chosen"]) for e in found["attention"]] == [
        ("small", 5007, "right"), ("medium", 18_972, "right"), ("large", 75_888, "right"),
    ]  # fmt: skip
    assert set(doctor.read_choices(CARD)) == {"bf16 small", "bf16 medium", "bf16 large"}
    found["gemm"] = doctor.examine_gemm(CPU, ("small", 48, 64), 130, 1)
    found = doctor.plain(found)
    json.dumps(found, allow_nan=False)
    text = io.StringIO()
    print_report(Console(file=text, emoji=False), found)
    for words in ("Fake 1", "gen 5 x16", "4.20 TB/s", "4.0 GB at 3.0 GB/s", "WRONG", "not finite", "chosen", "75,888"):
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
        assert doctor.attention_choice(device, entry["mode"], 6000) == entry["chosen"]
