"""A cell of the benchmark on the tiny checkpoint: identical runs read zero, and what was put in is what is read."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from solostep.benchmarks import cell as cell_module
from solostep.benchmarks import cell_speed, floors, video_metrics
from solostep.benchmarks import reference as reference_module
from solostep.benchmarks.cell import main, measure, score_of
from solostep.benchmarks.cell_frames import short_clip
from solostep.benchmarks.cell_spec import Cell
from solostep.benchmarks.cell_speed import Part, Timed
from solostep.engine.checkpoint import open_model
from solostep.engine.demo.captions import held_out_prompts
from solostep.engine.demo.data import draw_clips, to_frames
from solostep.engine.demo.rules import read_clips
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.pipeline import StepVideoPipeline
from solostep.kernels.attention import BACKENDS

TINY = Path(__file__).parents[1] / "golden" / "tiny-stepvideo-t2v"
STEPS = 3
BASE: dict[str, Any] = {
    "model": str(TINY), "prompts": ["a red panda", "a blue bird"], "seeds": [1, 2], "device": "cpu",
    "num_frames": 1, "height": 32, "width": 32, "num_inference_steps": STEPS,
}  # fmt: skip
ONE = {"prompts": BASE["prompts"][:1], "seeds": [1]}
DRIFT = ["blocks", "teacher", "free"]

pytestmark = pytest.mark.usefixtures("fast")


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """References that the tests of this file share, as the modes of a benchmark do."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLOSTEP_CACHE", str(folder / "cache"))
        yield folder


def measured(work: Path, levels: list[str], **changes: Any) -> dict[str, Any]:
    return measure({"cell": BASE | {"levels": levels} | changes}, work, quiet)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precision of every video that a pipeline is asked for."""
    asked: list[str] = []
    generate = StepVideoPipeline.generate

    def counted(self: StepVideoPipeline, requests: Any, *rest: Any, **more: Any) -> Any:
        asked.extend([self.precision] * len(requests))
        return generate(self, requests, *rest, **more)

    monkeypatch.setattr(StepVideoPipeline, "generate", counted)
    return asked


# --- what a cell reads --------------------------------------------------------------------------------------------


def test_an_identical_run_reads_zero(work: Path) -> None:
    result = measured(work, DRIFT, role="mode", precision="bf16")
    drift = result["drift"]
    assert drift["teacher"]["error"] == [[0.0] * STEPS] * 4
    assert drift["teacher"]["cosine"] == [[1.0] * STEPS] * 4
    assert drift["free"]["error"] == [[0.0] * STEPS] * 4
    assert drift["free"]["diverged_at"] == [None] * 4
    samples = drift["blocks"]["samples"]
    assert drift["blocks"]["names"] == ["0", "1"]
    assert drift["blocks"]["error"] == [[0.0] * len(samples)] * 2
    assert {(s["pair"], s["step"], s["branch"]) for s in samples} == {
        (pair, step, branch) for pair in (0, 2) for step in (0, STEPS - 1) for branch in ("text", "unconditional")
    }
    assert drift["operators"] is None
    assert result["events"] == []  # the inputs of the blocks were made again to the bit
    assert result["pairs"] == [{"prompt": p, "seed": s} for p in BASE["prompts"] for s in BASE["seeds"]]
    json.dumps(result, allow_nan=False)


def test_a_second_mode_runs_no_reference(work: Path, runs: list[str]) -> None:
    measured(work, ["free"], role="reference")
    runs.clear()
    drift = measured(work, DRIFT, role="mode", precision="int8")["drift"]
    assert runs == ["int8"] * 8
    assert all(0.005 < e < 0.05 for block in drift["blocks"]["error"] for e in block)
    assert set(drift["operators"]) >= {"attn1.wqkv", "attn1.wo", "ff.net.0.proj", "ff.net.2"}
    assert all(0.003 < e < 0.02 for rows in drift["operators"].values() for row in rows for e in row)
    assert all(0.001 < e < 0.5 for level in ("teacher", "free") for row in drift[level]["error"] for e in row)
    assert all(0.8 < c < 1 for row in drift["teacher"]["cosine"] for c in row)
    for level, count in (("teacher", STEPS), ("free", STEPS)):
        assert len(drift[level]["sigmas"]) == count
    assert drift["teacher"]["sigmas"][1:] == drift["free"]["sigmas"][:-1]
    assert drift["teacher"]["sigmas"][0] == 0 and drift["free"]["sigmas"][-1] == 1


def test_a_mode_is_measured_with_its_attention(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_module, "expanded_by_torch", lambda names, device: f"slow: {sorted(set(names))}")
    result = measured(work, ["blocks"], precision="int8", **ONE)
    assert result["events"] == ["slow: ['int8', 'int8-weight']"]
    plain = result["drift"]
    other = measured(work, ["blocks"], precision="int8", attention="int8", **ONE)["drift"]
    assert plain["attention_backend"] is None and "int8" in BACKENDS[other["attention_backend"]].modes
    official, fused = plain["blocks"]["error"], other["blocks"]["error"]
    assert official != fused
    assert all(0.005 < e < 0.05 for block in fused for e in block)


@pytest.mark.parametrize("role", ["floor-backend", "floor-order"])
def test_floors_read_little(work: Path, role: str) -> None:
    result = measured(work, DRIFT, role=role, **ONE)
    drift = result["drift"]
    blocks = [e for block in drift["blocks"]["error"] for e in block]
    assert max(blocks) < 0.02
    assert max(e for row in drift["free"]["error"] for e in row) < 0.2
    if role == "floor-backend":
        assert min(blocks) > 0
        assert drift["attention_backend"] == "math" and "torch's math kernel" in result["events"][0]
        assert set(drift["operators"]) == {"attn1.attention", "attn2.attention"}


def test_the_pipeline_of_another_order_permutes_its_blocks(work: Path) -> None:
    pipe = floors.ChangedPipeline(open_model(TINY), "bf16", "cpu", keep_loaded=True, change=floors.permute)
    size = {"num_frames": 1, "height": 32, "width": 32, "num_inference_steps": 1}
    pipe("a red panda", seed=1, **size, output_type="latent", progress=False)
    network = pipe.memory.networks["transformer"].network
    assert sum(isinstance(m, floors.PermutedLinear) for m in network.modules()) == 2 * 7


def test_image_to_video(work: Path) -> None:
    """The condition is made again for the blocks too."""
    ti2v = {"model": str(TINY.with_name("tiny-stepvideo-ti2v")), "prompts": ["a red panda"], "seeds": [1]}
    result = measured(work, ["blocks", "teacher"], role="mode", precision="bf16", **ti2v)
    assert result["drift"]["teacher"]["error"] == [[0.0] * STEPS]
    assert max(e for block in result["drift"]["blocks"]["error"] for e in block) == 0
    assert result["events"] == []


def test_another_seed_is_far(work: Path, runs: list[str]) -> None:
    drift = measured(work, ["free"], role="other-seed")["drift"]
    assert not runs
    assert all(0.5 < e < 3 for row in drift["free"]["error"] for e in row)
    assert drift["free"]["diverged_at"] == [0] * 4
    assert drift["teacher"] is drift["blocks"] is None


def test_speed_and_video(work: Path, runs: list[str], tmp_path: Path) -> None:
    """One prompt and seed: the timed run is the free run too."""
    spec = {"cell": BASE | ONE | {"levels": ["speed", "free", "video"]}}
    spec |= {"frames_dir": str(tmp_path), "id": "0123456789abcdef", "write": "count"}
    spec["cell"] |= {"role": "mode", "precision": "bf16", "attention": "official"}
    result = measure(spec, work, quiet)
    assert len(runs) == 1 + (len(runs) > 1)  # one more if no test before this one made the reference
    speed, memory = result["speed"], result["memory"]
    assert len(speed["step_seconds"]) == STEPS - 1 and speed["frames_written"] == 1 and speed["written"] == "counted"
    assert set(speed["stages"]) >= {"text", "load transformer", "denoise", "decode and write"}
    steps = speed["first_step_seconds"] + sum(speed["step_seconds"])
    assert 0 < steps <= speed["stages"]["denoise"] + 1e-3 < speed["video_seconds"]
    assert sum(speed["stages"].values()) <= speed["video_seconds"] + 1e-2
    assert speed["end_to_end"]["50"]["extrapolated"] is True
    assert memory["gpu_peak_bytes"] is memory["driver_peak_bytes"] is None
    assert memory["host_peak_bytes"] == max(row["host_peak_bytes"] for row in memory["stages"])
    video = result["drift"]["video"]
    assert video["psnr"] == [None]
    if cell_speed.has_ffmpeg():
        xpsnr = video_metrics.available()["xpsnr"] is True  # older builds of ffmpeg have none
        assert video["xpsnr"] == ([None] if xpsnr else None) and video["ssim"] == [1.0]
    assert video["psnr_video"] == [None]
    assert video["flicker"] is None and any("No flicker: it needs 3 frames" in note for note in result["events"])
    with np.load(tmp_path / result["frames"]["file"]) as frames:
        assert result["frames"] == {"file": "0123456789abcdef.frames.npz", "index": [0]}
        assert frames["frames"].shape == (1, 32, 32, 3) and frames["clip"].shape == (1, 32, 32, 3)
        assert np.array_equal(frames["frames"], frames["reference_frames"])


def test_what_is_lacking_without_ffmpeg_is_said(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell is lost for it: PSNR is ours, the video is counted, and the rest is left out as a whole."""

    def none() -> str:
        raise SolostepError("No ffmpeg starts")

    for module in (video_metrics, cell_speed):
        monkeypatch.setattr(module, "find_ffmpeg", none)
    two = ONE | {"seeds": [1, 2]}
    result = measured(work, ["speed", "video"], **two, role="mode", precision="fp8", attention="official")
    ends = [row[-1] for row in result["drift"]["free"]["error"]]
    assert len(ends) == 2 and result["frames"]["worst"] == ends.index(max(ends))  # whose frames are kept, too
    assert result["speed"]["written"] == "counted"
    video = result["drift"]["video"]
    assert video["psnr"][0] is not None and video["ssim"] is video["vmaf"] is video["xpsnr"] is None
    assert any("No ssim: No ffmpeg starts" in note for note in result["events"])


def test_speed_alone_records_nothing(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("recorded")

    monkeypatch.setattr(reference_module.Recorder, "step", never)
    result = measured(tmp_path, ["speed"], role="reference", **ONE)
    assert result["speed"]["frames_written"] == 1 and len(result["speed"]["step_seconds"]) == STEPS - 1
    assert not list(tmp_path.glob("references/*"))


# --- known errors -------------------------------------------------------------------------------------------------


def test_an_injected_error_of_the_velocity_is_read(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(work, ["free"], role="reference", **ONE)
    from solostep.engine import stages

    class Off(stages.GuidedVelocity):
        def __call__(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return super().__call__(latents, sigma).float() * 1.01

    monkeypatch.setattr(stages, "GuidedVelocity", Off)
    drift = measured(work, DRIFT, precision="bf16", **ONE)["drift"]
    for row, cosines in zip(drift["teacher"]["error"], drift["teacher"]["cosine"], strict=True):
        assert row == pytest.approx([0.01] * STEPS, rel=1e-3)
        assert cosines == pytest.approx([1.0] * STEPS, abs=1e-9)
    assert all(0 < e < 0.1 for row in drift["free"]["error"] for e in row)
    assert max(e for block in drift["blocks"]["error"] for e in block) == 0  # it is not in a block


def test_a_run_that_is_not_finite_is_no_speed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from solostep.engine import stages

    class Broken(stages.GuidedVelocity):
        def __call__(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return super().__call__(latents, sigma) * float("nan")

    monkeypatch.setattr(stages, "GuidedVelocity", Broken)
    with pytest.raises(SolostepError, match="not finite; leave this mode out"):
        measured(work, ["speed"], precision="bf16", **ONE)


def test_an_injected_error_of_a_linear_is_read(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Louder(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.25

    def louder(block: torch.nn.Module) -> torch.nn.Module:
        block.get_submodule("ff.net.2").__class__ = Louder
        return block

    monkeypatch.setattr(cell_module.floors, "permute", louder)
    drift = measured(work, ["blocks"], role="floor-order", **ONE)["drift"]
    assert list(drift["operators"]) == ["ff.net.2"]
    assert [e for row in drift["operators"]["ff.net.2"] for e in row] == pytest.approx([0.25] * 8, rel=1e-2)
    assert all(0.02 < e < 0.25 for block in drift["blocks"]["error"] for e in block)


def test_the_reports_fixture_has_the_keys_of_a_cell(work: Path) -> None:
    """What the report is tested with is what there is."""
    spec = importlib.util.spec_from_file_location("report_fixtures", Path(__file__).with_name("report_fixtures.py"))
    assert spec is not None and spec.loader is not None
    made: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    levels = ["speed", *DRIFT, "video"]
    found = {
        "int8 · int8 attention": measured(work, levels, precision="int8", attention="int8", **ONE),
        "other-seed": measured(work, ["free", "video"], role="other-seed", **ONE | {"seeds": [1, 2]}),
    }
    for name, real in found.items():
        fake = made.make_result(name, pairs=1, steps=STEPS, blocks=2, levels=tuple(real_levels(real)))
        for part in ("speed", "memory", "drift", "score"):
            assert shape_of(fake[part]) == shape_of(real[part]), (name, part)
        assert fake["pairs"] == made.pair_list(1, len(real["pairs"])) and set(real) <= set(fake)


def real_levels(result: dict[str, Any]) -> list[str]:
    return [k for k in ("blocks", "teacher", "free", "video") if result["drift"][k]] + ["speed"] * bool(result["speed"])


def shape_of(value: Any, where: str = "") -> Any:
    """Keys of objects and lengths of lists; of what differs by network and machine only that it is there."""
    if where in ("ran", "video", "operators", "stages", "end_to_end", "step_seconds"):
        return type(value)
    if isinstance(value, dict):
        return {k: shape_of(v, k) for k, v in value.items() if k != "attention_backend"}
    if isinstance(value, list):
        return [shape_of(v) for v in value]
    return None


def test_score_counts_hits() -> None:
    prompts = held_out_prompts(4)
    asked = [p.attributes for p in prompts]
    batch, _ = draw_clips(asked, 0, "cpu", 96)
    readings = read_clips(to_frames(batch.video))
    names, right = ("kind", "colour", "background", "motion", "all"), score_of(readings, asked)
    assert right == {k: [4, 4] for k in names} | {"pairs": {k: [True] * 4 for k in names}}
    wrong = [(a[0], (a[1] + 1) % 8, a[2], a[3]) for a in asked[:1]] + asked[1:]
    of_pairs = right["pairs"] | {k: [False, True, True, True] for k in ("colour", "all")}
    assert score_of(readings, wrong) == right | {"colour": [3, 4], "all": [3, 4], "pairs": of_pairs}


def test_times_of_a_whole_video() -> None:
    """110 s as run, 10 of them for recording; 3 steps of 5, 2 and 4 s; everything else is 89 s."""
    stages = [
        {"stage": "denoise", "seconds": 18.0, "gpu_peak_bytes": None, "host_peak_bytes": 7},
        {"stage": "decode and write", "seconds": 33.0, "gpu_peak_bytes": None, "host_peak_bytes": 9},
    ]
    told = {"plan": None, "events": ["x"], "precision": "int8"}
    result = Timed(110.0, [Part(steps=[5.0, 2.0, 4.0])], stages, (6.0, 4.0), 17, True, told).result()
    assert result["speed"]["video_seconds"] == 100
    assert result["speed"]["stages"] == {"denoise": 12.0, "decode and write": 29.0}
    assert result["speed"]["end_to_end"]["50"] == {"seconds": 89 + 5 + 49 * 3.0, "extrapolated": True}
    assert result["memory"]["host_peak_bytes"] == 9
    fifteen = Timed(110.0, [Part(steps=[2.0] * 15)], stages, (6.0, 4.0), 17, True, told).result()["speed"]["end_to_end"]
    assert fifteen["15"] == {"seconds": 100.0, "extrapolated": False}
    alone = Timed(110.0, [Part(steps=[2.0])], stages, (6.0, 4.0), 17, True, told).result()["speed"]
    assert alone["end_to_end"] == {} and alone["step_seconds"] == []


# --- nothing half-made is used ------------------------------------------------------------------------------------


def test_an_interrupted_run_is_not_gone_on_with(work: Path) -> None:
    """The pipeline would go on from latents that a teacher had put in."""
    pipe = StepVideoPipeline.from_pretrained(TINY, "bf16", "cpu", cache=False)
    request = pipe.request("a red panda", seed=1, **{k: BASE[k] for k in BASE if k.startswith(("num", "he", "wi"))})
    seen: list[int] = []

    def stop(pipe: Any, step: int, sigma: float, state: dict[str, Any]) -> None:
        seen.append(step)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference_module.run_once(pipe, request, work / "run.latents.safetensors", stop)
    reference_module.run_once(pipe, request, work / "run.latents.safetensors", stop)
    assert seen == [0, 1, 0, 1, 2]


def test_the_command_writes_all_or_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, out = tmp_path / "spec.json", tmp_path / "out.json"
    spec.write_text(json.dumps({"cell": BASE | {"role": "mode", "precision": "int8", "levels": ["teacher"]}}))
    arguments = [str(spec), str(out), "--work", str(work)]
    with monkeypatch.context() as patch:
        patch.setattr(cell_module.Measurement, "_teacher", lambda self, references: {"error": [math.nan]})
        with pytest.raises(SystemExit, match="1"):
            main(arguments)
    assert "drift.teacher.error[0] is nan" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["spec.json"]
    main(arguments)
    assert json.loads(out.read_text())["drift"]["teacher"]["sigmas"][0] == 0
    assert "teacher-forced run 4 of 4: denoise 3/3" in capsys.readouterr().err
    before = out.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "is there already" in capsys.readouterr().err and out.read_bytes() == before


# --- bad input ----------------------------------------------------------------------------------------------------


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "model has to be"),
    ({"model": "/nowhere"}, "/nowhere"),
    ({"prompts": []}, "prompts has to be a list"),
    ({"prompts": ["a", "a"]}, "different texts"),
    ({"prompts": [" "]}, "prompt is empty"),
    ({"seeds": [1.5]}, "seeds has to be a list of different whole numbers"),
    ({"seeds": [True]}, "whole numbers"),
    ({"seeds": [-1]}, "seed"),
    ({"role": "best"}, "role has to be one of"),
    ({"levels": ["speed", "feel"]}, "levels has to be a list of some of"),
    ({"levels": ["score"]}, "demo model's videos"),
    ({"steps": 3}, "unknown key 'steps'"),
    ({"num_frames": 0}, "num_frames"),
    ({"precision": "int7"}, "int7"),
    ({"role": "reference", "precision": "int8"}, "the role reference has precision bf16"),
    ({"role": "floor-order", "attention": "int8"}, "the role floor-order has attention official"),
    ({"role": "floor-backend", "attention": "bf16"}, "the role floor-backend has attention official"),
    ({"role": "floor-backend", "attention_backend": "hopper"}, "floor-backend is one of cudnn"),
    ({"role": "other-seed", "seeds": [1]}, "give at least two"),
    ({"attention": "int8", "attention_backend": "sdpa"}, "sdpa is unknown for int8"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_cell_is_refused_before_anything_runs(
    work: Path, runs: list[str], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        measured(work, change.pop("levels", ["free"]), **change)
    assert not runs


def test_a_bad_specification_is_refused(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match='the key "cell"'):
        Cell.read([])
    with pytest.raises(UsageError, match="write has to be one of"):
        measure({"cell": BASE, "write": "gif"}, work, quiet)
    with pytest.raises(SolostepError, match="other --work"):
        (tmp_path / "file").write_text("")
        measure({"cell": BASE}, tmp_path / "file", quiet)
    for text, message in ((None, "cannot be read"), ("{", "is not JSON"), ("[]", "JSON object")):
        spec = tmp_path / "spec.json"
        if text is not None:
            spec.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main([str(spec), str(tmp_path / "out.json")])
        assert message in capsys.readouterr().err


def test_demo_prompts_are_checked_for_the_score(work: Path) -> None:
    with pytest.raises(UsageError, match="'a red panda' is none"):
        measured(work, ["score"], model="demo")


def test_a_short_clip_is_small() -> None:
    frames = np.zeros((40, 300, 520, 3), dtype=np.uint8)
    frames[:, :, :3] = 90
    clip = short_clip(frames)
    assert clip.shape == (34, 100, 173, 3)
    assert (clip[:, :, 0] == 90).all() and (clip[:, :, 1:] == 0).all()
