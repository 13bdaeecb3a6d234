"""Which card the driver's numbers are of, and what is recorded of it and of the variables: with a stand-in for
`nvidia-smi` that knows three cards."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from solostep.benchmarks import cell_card, cell_speed
from solostep.benchmarks.cell_card import cards, number_of, sampling, summary, taken
from solostep.benchmarks.environment import clocks_of, shown, variables

SMI = """#!{python} -S
import sys
asked = dict(a.partition("=")[::2] for a in sys.argv[1:])
cards = [
    {{"uuid": "GPU-aa11", "memory.total": "1000", "memory.used": "10", "clocks.sm": "210"}},
    {{"uuid": "GPU-bb22", "memory.total": "1000", "memory.used": "20", "clocks.sm": "1410"}},
    {{"uuid": "GPU-cc33", "memory.total": "1000", "memory.used": "30", "clocks.sm": "1755"}},
]
chosen = cards if "--id" not in asked else [cards[int(asked["--id"])]]
for card in chosen:
    told = card | {{"power.draw": "[N/A]", "temperature.gpu": "61"}}
    print(", ".join(told[name] for name in asked["--query-gpu"].split(",")))
"""


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a CUDA device with a UUID and so much memory."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(index: int, uuid: str = "", total: int = 1000 << 20) -> torch.device:
        properties = SimpleNamespace(total_memory=total, **({"uuid": uuid} if uuid else {}))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return torch.device("cuda", index)

    return make


def test_a_card_is_found_by_its_uuid(device: Any) -> None:
    before = cards()
    assert [card.used >> 20 for card in before] == [10, 20, 30]
    assert taken(device(0, "cc33"), before) == 30 << 20
    assert taken(device(0, "GPU-BB22"), before) == 20 << 20
    assert taken(torch.device("cpu"), before) is taken(device(0, "cc33"), None) is None


def test_or_by_its_place(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cards()
    assert [number_of(device(i), before) for i in range(4)] == [0, 1, 2, None]
    for visible, wanted in (("2,0", [2, 0, None]), ("GPU-bb, GPU-aa11", [1, 0, None]), ("MIG-1", [None, None, None])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [number_of(device(i), before) for i in range(3)] == wanted
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert number_of(device(1, "of a container"), before) == 1
    assert number_of(device(1, "MIG-7", total=140 << 20), before) is None  # a part of a card


def test_without_the_program_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert cell_speed.driver_before() is None


def test_clocks_are_those_of_a_busy_card(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    ask = cell_card._ask
    monkeypatch.setattr(cell_card, "_ask", lambda names, number=None: asked.append(number) or ask(names, number))
    with sampling(device(0, "bb22"), interval=0.01) as found:
        time.sleep(0.1)
        assert asked == [None]  # which card it is; idle, it is not asked
        found.busy = True
        late = time.monotonic() + 20
        while len(found.samples) < 2 and time.monotonic() < late:
            time.sleep(0.01)
    assert found.samples[:2] == [(1410.0, None, 61.0)] * 2 and set(asked[1:]) == {1}
    told = summary(found.samples)
    assert told is not None and told["sm_mhz"] == told["sm_mhz_least"] == 1410 and told["power_w"] is None
    with sampling(torch.device("cpu"), interval=0.01) as none:
        none.busy = True
        time.sleep(0.03)
    assert summary(none.samples) is None


def test_an_environment_has_the_clocks_of_the_run() -> None:
    idle = {"clocks": {"sm_mhz": 210.0, "power_limit_w": 700.0}, "card": "x"}
    made = clocks_of(idle, {"sm_mhz": 1410.0, "samples": 3})
    assert made == {"clocks": {"sm_mhz": 1410.0, "power_limit_w": 700.0, "samples": 3}, "card": "x"}
    assert clocks_of(idle, None) == {"clocks": {"power_limit_w": 700.0}, "card": "x"}
    assert clocks_of({"clocks": None}, None) == {"clocks": None}  # no card


def test_a_module_is_called_by_its_name() -> None:
    """So that a recorded command can be typed, but for folders of the machine."""
    place = Path(cell_card.__file__).parent
    assert shown([str(place / "full_size.py"), "drift", "-o", "/a/b/c"]) == (
        "python -m solostep.benchmarks.full_size drift -o .../c"
    )
    assert shown(["/usr/bin/solostep", "bench", "-m", "a b"]) == "solostep bench -m 'a b'"
    assert shown(["/some/where/full_size.py", "drift"]) == "full_size.py drift"
    assert shown("as it is") == "as it is"


def test_variables_without_secrets_and_folders() -> None:
    given = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "2", "HOME": "/a",
        "SOLOSTEP_CACHE": "/a/b/cache", "SOLOSTEP_API_KEY": "abc", "TORCH_TOKEN": "abc",
        "TRITON_PATHS": "/a/b:/c/d",
    }  # fmt: skip
    assert variables(given) == {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "2",
        "SOLOSTEP_CACHE": ".../cache", "TRITON_PATHS": ".../b:.../d",
    }  # fmt: skip
