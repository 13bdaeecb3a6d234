"""What tests share. They run in two processes; each of them, and what it starts, takes one thread, or they wait for
each other."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, which is why the fixture imports it itself
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell, and so would be all
    signal.signal(signal.SIGINT, signal.default_int_handler)  # that tests start and interrupt


LONG = (
    "kernels/test_fused.py",
    "kernels/test_attention_triton.py",
    "kernels/test_attention_hopper.py",
    "kernels/test_scaled_mm.py",
    "kernels/test_quantize.py",
    "engine/test_demo.py",
    "quant/test_convert.py",
    "benchmarks/test_gate.py",
    "engine/test_cli.py",
    "engine/test_fused_blocks.py",
    "engine/test_layerwise.py",
    "engine/test_loading.py",
    "engine/test_memory.py",
    "engine/test_pipeline.py",
    "engine/test_quantized.py",
    "engine/test_sensitivity.py",
    "engine/test_vae_memory.py",
    "offload/test_streamer.py",
    "test_house.py",
)
"""What takes long: first, or one process compiles at the end while the other has nothing left to do."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the cases that only repeat others at greater length")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        more = [item for item in items if item.get_closest_marker("more")]
        config.hook.pytest_deselected(items=more)
        items[:] = [item for item in items if item not in more]
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))  # stable: the others stay as they are


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What has been imported stays, so garbage collections need not go through it: half a second each, and runs and
    tests ask for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    """Linears as in a run, also where a test calls networks by itself: on a CPU that is slow in bf16 they are not."""
    if "torch" not in sys.modules:
        yield
        return
    from solostep.engine.runtime import RoundedOnce, slow_in_bf16

    with RoundedOnce() if slow_in_bf16() else contextlib.nullcontext():
        yield


@pytest.fixture(scope="module")
def fast() -> Iterator[None]:
    """Without what takes most of the time of tiny networks: threads that wait for each other, garbage collections that
    go through all imported modules, and building the same networks on the meta device to look at their shapes."""
    import torch

    from solostep.engine import checkpoint, comfy, conversion
    from solostep.engine.demo import demo_model

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    checkpoint.open_model(demo_model())  # imports what is imported on first use
    gc.collect()
    gc.freeze()
    build, built = checkpoint.build_on_meta, dict[str, Any]()

    def build_once(component: checkpoint.Component) -> Any:
        stored = "" if component.quantization is None else component.quantization.identity()
        key = component.name + stored + json.dumps(dict(component.config), sort_keys=True)
        if key not in built:
            built[key] = build(component)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint, conversion, comfy):
            patch.setattr(module, "build_on_meta", build_once)
        yield
    torch.set_num_threads(before)
