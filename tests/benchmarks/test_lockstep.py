"""Drift in lockstep: zero for the same computation, the known number for an injected error, the pipeline's velocity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from solostep.benchmarks import full_size
from solostep.benchmarks.cell_card import Sampling
from solostep.benchmarks.floors import permute
from solostep.benchmarks.lockstep import FLOORS, Lockstep, Mode, Streams, compared, shared
from solostep.benchmarks.results import read_result
from solostep.benchmarks.synthetic import Drawn, draw_block
from solostep.benchmarks.synthetic_samples import SyntheticSamples
from solostep.engine.activations import TransformerSamples, conditions_for, spread_steps
from solostep.engine.checkpoint import open_model
from solostep.engine.config import GenerationSettings, TransformerConfig
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.runtime import numerics
from solostep.engine.sampling import GuidedVelocity
from solostep.engine.scheduler import make_sigmas
from solostep.engine.text import PromptEmbedding
from solostep.engine.weights import load
from solostep.quant.recipe import default_recipe

pytestmark = pytest.mark.usefixtures("fast")
CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parents[1] / "golden" / "tiny-stepvideo-t2v"
CONFIG = TransformerConfig(
    num_attention_heads=2, num_layers=2, in_channels=4, out_channels=4, caption_channels=(48, 32)
)
CLIP = GenerationSettings(num_frames=17, height=32, width=48, num_inference_steps=10)
OFFICIAL = Mode()
MODES = [Mode.parse(name) for name in ("int8/int8", "fp8/int8-fp8", "nf4/bf16", "int8-weight/official")]


@pytest.fixture(scope="module")
def samples() -> SyntheticSamples:
    with numerics():
        return SyntheticSamples(CONFIG, CLIP, 0, CPU, times=1)


def _run(samples: TransformerSamples, modes: list[Mode], **options: Any) -> list[Any]:
    with numerics():
        return Lockstep(samples, modes, **({"operators": False} | options)).run()


def test_the_same_computation_has_no_drift_and_each_other_one_has_some(samples: SyntheticSamples) -> None:
    same, *others = _run(samples, [OFFICIAL, *FLOORS, *MODES])
    assert same.blocks == same.stream == [[0.0, 0.0]] * 2
    assert same.velocity == [0.0, 0.0]
    assert (same.error, same.cosine) == ([0.0], [1.0])
    median = {(d.mode.role, str(d.mode)): max(e for block in d.blocks for e in block) for d in others}
    backend, order, int8, fp8, nf4, weight = median.values()
    assert 0 < order < 0.02
    assert 0 < backend < 0.03 < fp8 < nf4 < 1
    assert 0.005 < int8 < fp8
    assert 0.002 < weight < 0.05
    assert all(0 < d.error[0] < 1 and 0.5 < d.cosine[0] < 1 for d in others)
    assert {d.mode.role: d.backend for d in others[:2]} == {"floor-backend": "math", "floor-order": None}
    assert "math" in others[0].note and others[1].note is None


def test_operators_are_those_that_a_mode_computes_otherwise(samples: SyntheticSamples) -> None:
    linears = {"attn1.wqkv", "attn1.wo", "attn2.wq", "attn2.wo", "ff.net.0.proj", "ff.net.2"}
    attention = {"attn1.attention", "attn2.attention"}
    wanted = [set(), attention, linears | {"attn2.wkv"}, linears | attention | {"attn2.wkv"}, attention]
    modes = [OFFICIAL, *FLOORS, MODES[0], Mode.parse("bf16/bf16")]
    found = _run(samples, modes, own=False, operators=True)
    assert [set(d.operators) for d in found] == wanted
    for drift in found:
        for errors in drift.operators.values():
            assert [len(block) for block in errors] == [2, 2]
            assert 0 < max(e for block in errors for e in block) < 0.03
    backend, fused = found[1].operators, found[4].operators
    assert backend["attn1.attention"] != fused["attn1.attention"]
    assert [d.blocks for d in _run(samples, modes, own=False)] == [d.blocks for d in found]  # watching changes nothing


def test_an_injected_error_is_what_is_found(samples: SyntheticSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that adds 1.25 times as much: a relative error of 0.25, but for bf16."""

    class Louder(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
            return (x.float() + 1.25 * (self.block(x, *args).float() - x.float())).to(x.dtype)

    monkeypatch.setattr(Mode, "block", lambda self, block, samples, backend: Louder(block))
    (found,) = _run(samples, [OFFICIAL], own=False)
    assert [e for block in found.blocks for e in block] == pytest.approx([0.25] * 4, rel=0.01)
    assert found.error is found.velocity is found.stream is found.operators is None


def test_parked_streams_and_separate_runs_give_the_same_bits(samples: SyntheticSamples) -> None:
    modes = [MODES[0], FLOORS[0]]
    together = _run(samples, modes, parked=False)
    assert _run(samples, modes, parked=True) == together
    alone = _run(samples, [MODES[0]], block_level=False)[0]
    assert (alone.stream, alone.error) == (together[0].stream, together[0].error)
    assert _run(samples, [FLOORS[0]], own=False)[0].blocks == together[1].blocks
    short = _run(samples, [MODES[0]], count=1)[0]
    assert short.blocks == together[0].blocks[:1]
    assert short.error != together[0].error


def _sampled() -> TransformerSamples:
    model = open_model(TINY)
    conditions = conditions_for(
        model, ["a red ball"], times=2, num_frames=17, height=32, width=32, num_inference_steps=3
    )  # fmt: skip
    return TransformerSamples(model, conditions, CPU, torch.bfloat16, lambda stage, done, total: None)


@pytest.mark.parametrize("name", ["int8/int8", "bf16/bf16", "fp8/official"])
def test_the_velocity_is_the_pipelines_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Mode.parse(name)
    with numerics():
        samples = _sampled()
        component = open_model(TINY).components["transformer"]
        recipe = None if mode.precision == "bf16" else default_recipe(mode.precision, "transformer")
        networks = [load(component, CPU, torch.bfloat16, recipe=r) for r in (None, recipe)]
        texts = [PromptEmbedding(torch.zeros(1, 48), torch.zeros(1, 32), 2)] * 2
        wants = []
        for t in range(2):
            row = 2 * t
            made = []
            for network, attention in zip(networks, ("official", mode.attention), strict=True):
                velocity = GuidedVelocity(network, texts, samples.settings, attention=attention)
                velocity.context[:] = samples.contexts[row : row + 2]
                made.append(velocity(samples.latents[row].float(), samples.sigmas[row]))
            wants.append(compared(made[1], made[0]))
    (found,) = _run(samples, [mode])
    assert list(zip(found.error, found.cosine, strict=True)) == wants
    assert all(error > 0 for error in found.error)


def test_reordered_linears_are_the_same_function() -> None:
    block = draw_block(Drawn(CONFIG, 0, CPU), 0).double()
    x = torch.randn(5, 256, dtype=torch.float64)
    other = permute(shared(block))
    want = block.attn1.wo(x)
    assert (other.attn1.wo(x) - want).norm() < 1e-13 * want.norm()
    assert torch.equal(block.attn1.wo(x), want)  # the other one is changed, this one is not
    assert other.attn1.wo.weight.data_ptr() == block.attn1.wo.weight.data_ptr()
    narrow = block.float()
    assert not torch.equal(permute(shared(narrow)).attn1.wo(x.float()), narrow.attn1.wo(x.float()))


def test_numbers_that_are_not_finite_stop_the_run(samples: SyntheticSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = draw_block(Drawn(CONFIG, 0, CPU), 0)
    broken.ff.net[2].weight[3, 3] = float("nan")
    monkeypatch.setattr(Mode, "block", lambda self, block, samples, backend: broken)
    with pytest.raises(SolostepError, match="Block 0 in the mode int8/int8"):
        _run(samples, [MODES[0]])


def test_parked_streams_are_copies() -> None:
    streams = Streams(CPU, parked=True)
    streams.put("out", torch.zeros(1, 2, 2))
    streams.put("in", torch.ones(1, 2, 2))
    streams.own("out").add_(5)
    streams.rename("out", "in")
    assert streams.get("in").sum() == 0
    assert "out" in streams


@pytest.mark.parametrize("name", ["int8", "int9/int8", "int8/none", "bf16/official@cudnn", "int8/int8@", "/int8"])
def test_a_mode_that_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--mode"):
        Mode.parse(name)


def test_noise_levels_by_step_and_sigma() -> None:
    """Of 50 steps at the released time shift, 13: sigma is (1 - t) / (1 + 12 t) at t = 1 - step / 50."""
    clip = GenerationSettings()
    assert (clip.num_inference_steps, clip.time_shift) == (50, 13.0)
    sigmas = make_sigmas(50, 13.0)
    assert [round(float(sigmas[step]), 3) for step in (0, 25, 46, 47, 49)] == [0, 0.071, 0.469, 0.547, 0.79]
    assert (spread_steps(clip, 1), spread_steps(clip, 2), spread_steps(clip, 4)) == ([46], [0, 49], [0, 16, 33, 49])
    assert full_size.steps_at("25, 0.5,0.0,0,1.0", clip) == [0, 25, 46, 49]
    for wrong in ("50", "-1", "1.5", "half", "", "1,,2", "nan", "1e9"):
        with pytest.raises(UsageError, match="--at"):
            full_size.steps_at(wrong, clip)


SMALL = ["--heads", "1", "--layers", "2", "--frames", "17", "--height", "32", "--width", "32", "--device", "cpu"]


def test_passes_of_few_modes_are_kept_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["drift", *SMALL, "--at", "0.5", "--per-pass", "1", "-o", str(tmp_path), "--mode", "nf4/official"]
    monkeypatch.setattr(full_size, "expanded_by_torch", lambda names, device: f"{names[0]} is slow")
    run, passes = Lockstep.run, list[list[str]]()

    def once(self: Lockstep) -> Any:
        passes.append([m.role for m in self.modes])
        if len(passes) == 3:
            raise KeyboardInterrupt
        return run(self)

    monkeypatch.setattr(Lockstep, "run", once)
    with pytest.raises(KeyboardInterrupt):
        full_size.main(call)
    assert {read_result(p).role for p in tmp_path.glob("*.json")} == {"floor-backend", "floor-order"}
    assert full_size.main(call) == 0
    assert passes == [["floor-backend"], ["floor-order"], ["mode"], ["mode"]]
    found = {(r := read_result(p)).role: r for p in tmp_path.glob("*.json")}
    assert "One text: numbers, and no interval" in capsys.readouterr().err
    backend, mode = found["floor-backend"], found["mode"]
    assert backend.drift["attention_backend"] == "math"
    assert backend.events[0].startswith("Attention of this floor: torch's math kernel in place of its own choice")
    assert set(backend.drift["operators"]) == {"attn1.attention", "attn2.attention"}
    assert mode.events == ["nf4 is slow"] and len(mode.drift["operators"]["ff.net.2"]) == 2
    assert mode.drift["teacher"]["sigmas"] == [pytest.approx(0.469, abs=1e-3)]
    for wrong in (["--per-pass", "0"], ["--texts", "0"], ["--at", "50"]):
        assert full_size.main([*call, *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err


def clocks_by_pass(*clocks: float) -> Any:
    """In the place of a card's: a sample in each pass, of this clock, if the pass said that it was busy."""
    left = list(clocks)

    @contextlib.contextmanager
    def sampling(device: torch.device) -> Iterator[Sampling]:
        found = Sampling([])
        yield found
        found.samples += [(left.pop(0), 600.0, 50.0)] if found.busy else []

    return sampling


def test_the_command_writes_results_goes_on_and_adds_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["drift", *SMALL, "--times", "2", "-o", str(tmp_path), "--mode", "int8/int8"]
    passes: list[int] = []
    run = Lockstep.run
    monkeypatch.setattr(Lockstep, "run", lambda self: passes.append(len(self.modes)) or run(self))
    assert full_size.main(call) == 0
    found = {(r := read_result(p)).role: r for p in tmp_path.glob("*.json")}
    assert set(found) == {"mode", "floor-backend", "floor-order"}
    mode = found["mode"]
    assert mode.synthetic["seed"] == 0  # and a trial is known as one
    assert mode.synthetic.items() >= {"heads": 1, "layers": 2}.items()
    assert mode.cell.model == "synthetic, heads 1, layers 2"
    assert len(mode.drift["blocks"]["error"]) == 2
    assert len(mode.drift["blocks"]["samples"]) == 4
    assert len(mode.drift["teacher"]["error"][0]) == len(mode.drift["teacher"]["sigmas"]) == 2
    assert mode.environment["clocks"] is None  # of no card
    monkeypatch.setattr(full_size, "sampling", clocks_by_pass(1980.0, 1500.0))
    assert full_size.main([*call, "--mode", "fp8/bf16"]) == 0
    assert passes == [3, 3, 1, 1]
    assert len(list(tmp_path.glob("*.json"))) == 4
    (clocks,) = (r.environment["clocks"] for p in tmp_path.glob("fp8*.json") if (r := read_result(p)))
    assert clocks["samples"] == 2 and (clocks["sm_mhz"], clocks["sm_mhz_least"]) == (1740, 1500)
    assert "is there already" in capsys.readouterr().err
    assert full_size.main([*call, "--times", "99"]) == 2
    assert "--times" in capsys.readouterr().err
