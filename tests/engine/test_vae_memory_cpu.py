"""What decoding takes on a CPU: the count against a run, and what is chosen by it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from separate import run_separately

from solostep.engine.config import VAEConfig
from solostep.engine.decoding import WHOLE, choose_decoding
from solostep.engine.models.vae_bytes import decode_bytes
from solostep.engine.models.vae_bytes_cpu import SMALL, Processor, decode_bytes_on_cpu, this_processor
from solostep.engine.pipeline import StepVideoPipeline

RUN = """
import torch
from solostep.engine.checkpoint import load, open_model
from solostep.engine.decoding import WHOLE
from solostep.engine.models.vae import decode_chunks
from solostep.engine.models.vae_bytes_cpu import decode_bytes_on_cpu, this_processor
from solostep.engine.runtime import Stage, host_peak, measured, numerics, release_memory, return_large_tensors

CPU = torch.device("cpu")

def resident():  # the peak begins anew, from these bytes
    with measured("", CPU, []):
        return host_peak()

return_large_tensors()
model = open_model("demo")
decoder = load(model.components["vae"], CPU, torch.bfloat16, part="decoder")
with numerics():
    for size in (16, 64):  # the first loads what libraries need
        z = torch.randn(1, 3, model.vae_config.z_channels, size // 16, size // 16).bfloat16()
        release_memory(CPU)
        before, stages = resident(), []
        with measured("decode", CPU, stages):
            for frames in decode_chunks(decoder, z):
                del frames
print(decode_bytes_on_cpu(model.vae_config, 64, 64, *WHOLE, 2, this_processor()), stages[0].host_peak - before)
tensors = [torch.ones(1 << 20) for _ in range(32)]  # 4 MiB each
full = resident()
del tensors[:-1:2]  # holes between what is kept
print(full - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell a process's peak")
def test_the_count_is_what_a_process_takes(tmp_path: Path) -> None:
    """In a process of its own, which is then slower: freed tensors go back at once."""
    counted, took, back = map(int, run_separately(RUN, tmp_path).split())
    assert 0.85 * counted < took < 1.15 * counted
    assert back > 12 * (4 << 20)


def test_which_convolutions_torch_gives_to_onednn() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    weight = torch.empty(4, 8, 3, 3, 3, device="cpu")
    names = []
    for height in (SMALL // (8 * 4), SMALL // (8 * 4) + 1):
        x = torch.empty(1, 8, 4, height, 3)
        found = torch._C._select_conv_backend(x, weight, None, [1] * 3, [0, 1, 1], [1] * 3, False, [0] * 3, 1, None)
        names.append(found.name)
    assert names == ["Slow3d", "Mkldnn"]


def test_a_cpu_takes_more_than_a_card_and_chooses_by_it() -> None:
    config, host = VAEConfig(), 10**12
    wide, narrow, without = Processor(True, True), Processor(True, False), Processor(False, False)
    counts = [decode_bytes_on_cpu(config, 192, 192, *WHOLE, 2, cpu) for cpu in (narrow, wide, without)]
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[2]
    room = decode_bytes(config, 192, 192, *WHOLE, 2)
    assert choose_decoding(config, 192, 192, room, 2, host, False) == (WHOLE, room)
    way, needed = choose_decoding(config, 192, 192, room, 2, host, False, wide)
    assert way != WHOLE and needed <= room < counts[1]
    with pytest.raises(ValueError, match="no frames of 8x192"):
        decode_bytes_on_cpu(config, 8, 192, *WHOLE, 2, wide)


def test_the_report_of_a_run_without_a_budget() -> None:
    pipe = StepVideoPipeline.from_pretrained(device="cpu", cache=False)
    found = pipe("a circle", seed=1, num_frames=17, height=32, width=48, num_inference_steps=1, progress=False)
    assert found.record["plan"] is None  # nothing was held back
    lines = {line["stage"]: line for line in pipe.memory_report()}
    config = pipe.model.vae_config
    counted = decode_bytes_on_cpu(config, 32, 48, *WHOLE, 2, this_processor()) + pipe.memory.sizes.vae
    assert lines["decode and write"]["planned_gpu_bytes"] == counted
    assert all(line["planned_context_bytes"] == 0 and line["planned_gpu_bytes"] > 0 for line in lines.values())
