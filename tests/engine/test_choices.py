"""Which kernels a run uses: those that are right, the fastest; kept, and never a wrong one."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from torch import nn

from solostep.engine import choices, weights
from solostep.engine.checkpoint import build_on_meta, open_component
from solostep.engine.demo import demo_model
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.files import one_at_a_time
from solostep.kernels.attention import BACKENDS, Backend
from solostep.kernels.attention_check import Verdict
from solostep.kernels.operators_check import CHECKS
from solostep.kernels.refused import is_refused, refuse
from solostep.kernels.scaled_mm import Product
from solostep.kernels.scaled_mm_check import Examined
from solostep.quant.formats import install
from solostep.quant.recipe import Recipe

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))
    choices._FOUND.clear()
    yield tmp_path / "cache"
    choices._FOUND.clear()
    refuse(CARD, ())


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, whatever the command line made of the logger before."""
    monkeypatch.setattr(logging.getLogger("solostep"), "propagate", True)
    return caplog


def test_a_cpu_is_not_measured(cache: Path) -> None:
    assert choices.attention_choice(CPU, "bf16", 100) == "sdpa"
    assert choices.attention_choice(CPU, "int8", 100) == "torch"
    assert choices.attention_choice(CPU, "bf16", 100, "math") == "math"
    for mode, asked, words in (
        ("bf16", "cudnn", "cudnn is not to be had on cpu: it needs a CUDA card"),
        ("bf16", "nothing", "unknown for bf16; choose one of hopper, triton, sdpa"),
        ("int3", None, "mode int3 is unknown; choose one of bf16, int8"),
    ):
        with pytest.raises(UsageError, match=words):
            choices.attention_choice(CPU, mode, 100, asked)
    assert not cache.exists()


# --- choices ------------------------------------------------------------------------------------------------------


class FakeCard:
    """A card with three back ends of attention and four of products, of which the fastest are wrong, one wrong kernel
    besides, and how often they were measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[tuple[str, int]] = []
        self.facts = {"name": "Fake 1", "capability": "9.0", "driver": "1.2"}
        self.gone = ""
        for name in ("fast", "right", "slow"):
            backend = Backend(name, ("bf16", "int8"), lambda device, mode, name=name: self.why(name), lambda *a: a[0].q)
            monkeypatch.setitem(BACKENDS, name, backend)
        monkeypatch.setattr(choices, "gpu_facts", lambda device: self.facts)
        monkeypatch.setattr(choices, "free_memory", lambda device: 10**11)
        monkeypatch.setattr(choices, "measured_apart", lambda *args, **more: None)
        monkeypatch.setattr(choices, "examine", self.examine)
        self.examined: list[str] = []
        self.faulty = {"gelu int8": Verdict("", "gelu int8", "wrong", "rows: relative error 1.0", {"rows": 1.0})}
        self.products = {
            "quick": Verdict("int8", "quick", "wrong", "normal: relative error 1.0, allowed 0.0", {"normal": 1.0}),
            "broken": Verdict("int8", "broken", "failed", "it does not compile"),
            "steady": Verdict("int8", "steady", "ok", "", {"normal": 0.0}, 3.0),
            "sound": Verdict("int8", "sound", "ok", "", {"normal": 0.0}, 2.0),
        }
        known = {
            name: Product(
                name, ("int8", "fp8"), lambda device, kind, n=name: self.why(n), lambda x: True, lambda x: None
            )
            for name in self.products
        }
        monkeypatch.setattr(choices, "PRODUCTS", known)
        monkeypatch.setattr(choices, "examine_operators", self.examine_operators)
        monkeypatch.setattr(choices, "examine_products", self.examine_products)

    def why(self, name: str) -> str | None:
        return "it was removed" if name == self.gone else None

    def examine_operators(self, device: torch.device, seed: int) -> list[Verdict]:
        self.examined.append("operators")
        assert not is_refused("gelu int8", device)  # it is not plain torch that is examined
        return [self.faulty.get(name, Verdict("", name, "ok", "", {"rows": 1e-3})) for name in CHECKS]

    def examine_products(
        self, device: torch.device, kind: str, *, shapes: object, rows: int, budget_ms: float, seed: int
    ) -> Examined:
        self.examined.append(kind)
        assert shapes == choices.QUICK_GEMMS and rows == choices.QUICK_ROWS
        missing = {n: Verdict(kind, n, "unavailable", self.why(n) or "") for n in self.products if self.why(n)}
        return Examined(kind, seed, self.products | missing)

    def examine(
        self, device: torch.device, mode: str, *, tokens: int, heads: int, budget_ms: float, seed: int
    ) -> list[Verdict]:
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
        assert choices.attention_choice(CARD, "bf16", 75_888) == "right"
    assert choices.attention_choice(CARD, "bf16", 40_000) == "right"  # of the same class
    assert card.measured == [("bf16", 75_888)]
    assert len([m for m in notes.messages if "measuring attention back ends" in m]) == 1
    assert any("fast is wrong on this card" in m for m in notes.messages)
    choices.attention_choice(CARD, "bf16", 5007)
    choices.attention_choice(CARD, "int8", 75_888)
    assert card.measured[1:] == [("bf16", 5007), ("int8", 75_888)]
    kept = choices.read_choices(CARD)
    assert (
        set(kept) == {"operators", "bf16 large", "bf16 small", "int8 large"} and kept["bf16 small"][0].status == "wrong"
    )
    json.loads(choices.choices_file(CARD).read_text(), parse_constant=pytest.fail)
    beside = {p.name for p in choices.choices_file(CARD).parent.iterdir() if p.suffix != ".lock"}
    assert beside == {choices.choices_file(CARD).name}


def test_of_processes_that_start_together_one_measures(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def held(path: Path) -> Iterator[None]:
        """Waits for another process, which measures meanwhile."""
        assert path == choices.choices_file(CARD)
        choices.write_choices(
            CARD, {"bf16 small": [Verdict("bf16", "slow", "ok", "", {"normal": 1e-3}, 3.0, 2.5, 1.0)]}
        )
        yield

    monkeypatch.setattr(choices, "one_at_a_time", held)
    assert choices.attention_choice(CARD, "bf16", 100) == "slow" and not card.measured


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
    assert choices.attention_choice(CARD, "bf16", 100, "slow") == "slow"
    with pytest.raises(UsageError, match="fast computes wrong results on this card .*relative error 1.0.*doctor"):
        choices.attention_choice(CARD, "bf16", 100, "fast")
    card.gone = "slow"
    with pytest.raises(UsageError, match="slow is unavailable .it was removed"):
        choices.attention_choice(CARD, "bf16", 100, "slow")
    assert len(card.measured) == 2  # the second because it was removed since


def test_a_choice_that_was_removed_is_measured_anew(card: FakeCard) -> None:
    assert choices.attention_choice(CARD, "bf16", 100) == "right"
    card.gone = "right"
    assert choices.attention_choice(CARD, "bf16", 100) == "slow"
    assert len(card.measured) == 2


def test_another_driver_is_measured_anew(card: FakeCard) -> None:
    choices.attention_choice(CARD, "bf16", 100)
    card.facts = card.facts | {"driver": "1.3"}
    choices.attention_choice(CARD, "bf16", 100)
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
        '{"key": KEY, "choices": {"product int3": []}}',
        '{"key": {}, "choices": {}}',
    ],
)
def test_a_damaged_file_is_measured_anew(damage: str, card: FakeCard, notes: pytest.LogCaptureFixture) -> None:
    assert choices.attention_choice(CARD, "bf16", 100) == "right"
    path = choices.choices_file(CARD)
    path.write_text(damage.replace("KEY", json.dumps(choices.choices_key(CARD))))
    notes.clear()
    assert choices.attention_choice(CARD, "bf16", 100) == "right"
    assert len(card.measured) == 2 and any("cannot be read" in message for message in notes.messages)
    notes.clear()
    assert choices.attention_choice(CARD, "bf16", 100) == "right"
    assert len(card.measured) == 2 and not notes.messages


def test_a_cache_that_cannot_be_written(card: FakeCard, cache: Path, notes: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file, where a folder has to be")
    assert choices.attention_choice(CARD, "bf16", 100) == "right"
    assert any("cannot be kept" in message for message in notes.messages)


def test_nothing_right(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [Verdict("bf16", "fast", "wrong", "off"), Verdict("bf16", "slow", "failed", "out of memory")]
    monkeypatch.setattr(choices, "examine", lambda *a, **k: wrong)
    with pytest.raises(SolostepError, match="No attention back end is usable: fast computes wrong .*; slow failed"):
        choices.attention_choice(CARD, "bf16", 100)


def test_size_classes_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {n: choices.size_class(n) for n in (1, 8191, 8192, 32_767, 32_768, 10**6)}
    assert list(sizes.values()) == ["small", "small", "medium", "medium", "large", "large"]
    for free, want in ((10**12, (48, 75_888)), (7000 * 75_888 * 5, (5, 75_888)), (7000 * 1000, (1, 1000))):
        monkeypatch.setattr(choices, "free_memory", lambda device, free=free: free)
        assert choices.fitting(CARD, 75_888, 48) == want


# --- products and other kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "said"), [(4.9, []), (12.3, ["... measuring it took 12 s"])])
def test_how_long_measuring_took_is_said(
    seconds: float, said: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter((100.0, 100.0 + seconds))
    monkeypatch.setattr(choices.time, "perf_counter", lambda: next(clock))
    with choices.told("measuring it"):
        assert caplog.messages == ["measuring it, once for this card ..."]
    assert caplog.messages[1:] == said


def test_products_are_measured_once_and_kept(card: FakeCard, notes: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        settled = choices.settle(CARD, {"int8"})
        assert settled.products == {"int8": ("sound", "steady")}
    assert card.examined == ["operators", "int8"] and not card.measured
    assert is_refused("gelu int8", CARD) and not is_refused("gelu e4m3", CARD)
    named = "\n".join(notes.messages)
    for words in (
        "matrix product int8 quick is wrong on this card and not used: normal: relative error 1.0",
        "matrix product int8 broken fails on this card and not used: it does not compile",
        "the kernel of gelu int8 is wrong on this card and not used: rows",
        "measuring matrix products of int8", "examining the other kernels",
    ):  # fmt: skip
        assert named.count(words) == 1, words
    assert settled.as_dict() == {
        "products": {"int8": ["sound", "steady"]},
        "refused": [
            "gelu int8: rows: relative error 1.0", "product int8, quick: normal: relative error 1.0, allowed 0.0",
            "product int8, broken: it does not compile",
        ],
    }  # fmt: skip
    assert set(choices.read_choices(CARD)) == {"operators", "product int8"}
    # Another process reads them.
    choices._FOUND.clear()
    refuse(CARD, ())
    assert choices.settle(CARD, {"int8", "fp8"}).products["fp8"] == ("sound", "steady")
    assert is_refused("gelu int8", CARD) and card.examined == ["operators", "int8", "fp8"]
    # What attention got wrong is told, too.
    choices.attention_choice(CARD, "bf16", 100)
    assert card.examined == ["operators", "int8", "fp8"]
    assert any(r.startswith("attention bf16 small, fast: normal") for r in choices.settle(CARD).refused)


def test_products_that_came_or_went_are_measured_anew(card: FakeCard) -> None:
    assert choices.product_choice(CARD, "int8") == ("sound", "steady")
    card.gone = "sound"
    assert choices.product_choice(CARD, "int8") == ("steady",)
    card.gone = ""
    assert choices.product_choice(CARD, "int8") == ("sound", "steady")
    assert card.examined == ["int8"] * 3
    card.facts = card.facts | {"driver": "1.3"}
    assert choices.product_choice(CARD, "int8") and card.examined == ["int8"] * 4


def test_no_product_is_right(card: FakeCard) -> None:
    del card.products["sound"], card.products["steady"]
    with pytest.raises(SolostepError, match="No matrix product is right: quick wrong .*; broken failed .*--precision"):
        choices.settle(CARD, {"int8"})


def test_where_nothing_can_be_kept_one_process_measures_once(card: FakeCard, cache: Path) -> None:
    cache.write_text("a file, where a folder has to be")
    for _ in range(2):
        settled = choices.settle(CARD, {"int8"})
        assert settled.products == {"int8": ("sound", "steady")} and len(settled.refused) == 3
    assert card.examined == ["operators", "int8"]


def test_a_lack_of_memory_is_no_fault(card: FakeCard) -> None:
    card.faulty = {"gelu int8": Verdict("", "gelu int8", "failed", choices.OUT_OF_MEMORY)}
    card.products["sound"] = Verdict("int8", "sound", "failed", choices.OUT_OF_MEMORY)
    settled = choices.settle(CARD, {"int8"})
    assert settled.products == {"int8": ("steady",)} and not is_refused("gelu int8", CARD)
    assert choices.read_choices(CARD) == {}  # the next process tries again
    card.faulty = {"gelu int8": Verdict("", "gelu int8", "failed", "it broke")}
    choices._FOUND.clear()
    assert "gelu int8: it broke" in choices.settle(CARD).refused and is_refused("gelu int8", CARD)


def test_on_a_cpu_there_is_nothing_to_settle(card: FakeCard, cache: Path) -> None:
    assert choices.settle(CPU, {"int8", "fp8"}) == choices.Settled() and not card.examined and not cache.exists()


def test_rows_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, want in (
        (10**12, 75_888),
        (10**9, 128),
        (2 * (12 * 18_432 * 6144 + 1000 * (4 * 6144 + 8 * 18_432)), 1000),
    ):
        monkeypatch.setattr(choices, "free_memory", lambda device, free=free: free)
        assert choices.fitting_rows(CARD, choices.GEMMS[0], 75_888) == want


# --- how they reach the linears -----------------------------------------------------------------------------------


def test_networks_from_files_are_told(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    component = open_component(demo_model(), "transformer")
    whole = build_on_meta(component)
    names = [n for n, m in whole.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks.0." in n]
    found = weights._right_products(whole, {names[0]: "int8", names[1]: "nf4"}, CARD)
    assert found == {"int8": ("sound", "steady")} and weights._right_products(whole, {names[0]: "int8"}, CPU) == {}
    install(whole, {names[0]: "fp8"}, torch.bfloat16)  # one that is stored so
    assert set(weights._right_products(whole, {}, CARD)) == {"fp8"}
    # As loading does it, but for the card.
    monkeypatch.setattr(weights, "_right_products", lambda *args: found)
    loaded = weights.load(component, CPU, torch.bfloat16, recipe=Recipe("some", ((names[0], "int8"),)))
    assert loaded.get_submodule(names[0]).products == ("sound", "steady")


def test_blocks_made_for_timing_are_told(card: FakeCard) -> None:
    linear = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
    install(linear, {"0": "int8"}, torch.bfloat16)
    choices.use_right_products(linear, CARD)
    assert linear[0].products == ("sound", "steady")
    choices.use_right_products(linear, CPU)
    assert linear[0].products is None
