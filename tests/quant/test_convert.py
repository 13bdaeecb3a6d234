"""The converter: what it writes, that it goes on where it was stopped, what it refuses, and what memory it takes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from solostep import StepVideoPipeline
from solostep.benchmarks.convert_speed import manifest_bytes
from solostep.engine import assemble, conversion, convert
from solostep.engine.checkpoint import COMPONENTS, build_on_meta, describe, load, open_component, open_model
from solostep.engine.convert import quantize_model
from solostep.engine.demo import demo_model
from solostep.engine.digests import Digests
from solostep.engine.errors import CheckpointError, OutputError, UsageError
from solostep.engine.interfaces import cli
from solostep.quant.convert import Item, index, is_finished, kept, plan_shards, stream
from solostep.quant.recipe import Recipe, default_recipe
from solostep.quant.writing import FileWriter, ShardWriter

pytestmark = pytest.mark.usefixtures("fast")

GOLDEN = Path(__file__).parents[1] / "golden"
T2V, TI2V = GOLDEN / "tiny-stepvideo-t2v", GOLDEN / "tiny-stepvideo-ti2v"
COMMAND = typer.main.get_command(cli.app)
SMALL = 150_000
"""Bytes of a shard that cut the tiny transformer into several."""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads peaks from /proc")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(T2V, tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def manifest(out: Path, network: str = "transformer") -> dict[str, Any]:
    return json.loads((out / network / "quantization.json").read_text())


# --- the whole folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "text_precision"), [("int8", "nf4"), ("fp8", None), ("int4-weight", "int8")])
def test_a_stored_model_is_the_one_quantized_on_load(precision: str, text_precision: str | None, out: Path) -> None:
    """Bit for bit, and without another option; the source is as it was."""
    before = contents(T2V)
    record = quantize_model(T2V, out, precision, text_precision, shard_bytes=SMALL)
    assert contents(T2V) == before
    stored = open_model(out)
    for name, wanted in (("transformer", precision), ("step_llm", text_precision)):
        ours = stored.components[name]
        recipe = None if wanted is None else default_recipe(wanted, name)
        expected = load(open_component(T2V, name), "cpu", torch.bfloat16, recipe=recipe).state_dict()
        found = load(ours, "cpu", torch.bfloat16).state_dict()
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert tensor.dtype == found[key].dtype
            assert torch.equal(tensor.view(-1).view(torch.uint8), found[key].view(-1).view(torch.uint8)), key
        assert (ours.quantization is None) == (wanted is None)
    assert record["networks"].keys() == {"transformer", "step_llm"} if text_precision else {"transformer"}
    assert StepVideoPipeline.from_pretrained(out, device="cpu").precision == precision


def test_a_video_comes_out_of_it(out: Path) -> None:
    quantize_model(T2V, out, "int8", "nf4")
    pipe = StepVideoPipeline.from_pretrained(out, device="cpu")
    video = pipe("a cat", num_frames=17, height=32, width=32, num_inference_steps=1, guidance_scale=1, seed=1)
    assert video.frames.shape == (17, 32, 32, 3)
    assert video.record["precision"] == "int8" and video.record["text_precision"] == "nf4"


def test_what_is_written_beside_the_weights(model: Path, out: Path) -> None:
    (model / "LICENSE").write_text("free")
    (model / "vae" / "vae.safetensors").write_text("version 1, which nobody needs")
    (model / "lib").mkdir()
    (model / "lib" / "closed.so").write_text("")
    (model / "transformer" / ".cache").mkdir()
    (model / "transformer" / ".cache" / "x.json").write_text("{}")
    quantize_model(model, out, "fp8", shard_bytes=SMALL)
    names = set(contents(out))
    assert "LICENSE" in names and "scheduler/scheduler_config.json" in names
    assert not {"vae/vae.safetensors", "lib/closed.so", "transformer/.cache/x.json", "conversion.json"} & names
    assert not [name for name in names if ".part" in name]
    shards = sorted(name for name in names if name.startswith("transformer/diffusion") and name.endswith("tensors"))
    assert len(shards) > 3 and shards[0].endswith(f"-00001-of-{len(shards):05d}.safetensors")
    for name in shards:
        assert (out / name).stat().st_size < 200_000  # one tensor is larger than a shard
    told = manifest(out)
    assert told["precision"] == "fp8" and told["modules"]["transformer_blocks.0.attn2.wkv"] == "fp8-weight"
    assert told["source"]["model"] == "model" and set(told["versions"]) == {"solostep", "torch"}
    assert told["source"]["files"] == {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in (model / "transformer").glob("*.safetensors")
    }
    assert describe(out)["problems"] == []


def test_unquantized_tensors_keep_their_bytes(out: Path) -> None:
    quantize_model(T2V, out, "int8")
    before = {k: t for f in (T2V / "transformer").glob("*.safetensors") for k, t in load_file(f).items()}
    after = {k: t for f in (out / "transformer").glob("*.safetensors") for k, t in load_file(f).items()}
    same = [k for k in before if k in after and before[k].dtype == after[k].dtype]
    assert "pos_embed.proj.weight" in same and "transformer_blocks.0.attn1.q_norm.weight" in same
    assert all(torch.equal(before[k], after[k]) for k in same)
    assert len(before) - len(same) == len(manifest(out)["modules"])


@pytest.mark.parametrize("link", [False, True])
def test_a_model_that_shares_networks(link: bool, tmp_path: Path) -> None:
    """The image-to-video demo takes its encoders and VAE from the folder beside it."""
    ti2v, t2v = demo_model(image_to_video=True), demo_model()
    out = tmp_path / "out"
    quantize_model(ti2v, out, "int8-weight", link=link)
    stored, source = open_model(out), open_model(ti2v)
    assert stored.preset == source.preset and stored.is_image_to_video
    for name in COMPONENTS[1:]:
        assert stored.components[name].fingerprint == source.components[name].fingerprint
        assert (t2v in stored.components[name].folder.parents) == link
        assert (out / name).exists() != link


def test_a_link_beside_the_source_moves_with_it(model: Path, out: Path, tmp_path: Path) -> None:
    quantize_model(model, out, "fp8", link=True)
    (tmp_path / "elsewhere").mkdir()
    for folder in (model, out):
        shutil.move(folder, tmp_path / "elsewhere" / folder.name)
    assert describe(tmp_path / "elsewhere" / "out")["problems"] == []


def test_only_one_folder_can_be_linked(model: Path, tmp_path: Path) -> None:
    """A model with a VAE of its own, and the encoders of another: the smaller part is copied, and said."""
    lean, out = tmp_path / "lean", tmp_path / "out"
    for name in ("transformer", "vae"):
        shutil.copytree(model / name, lean / name)
    (lean / "model_index.json").write_text(json.dumps({"solostep": {"shared": "../model"}}))
    record = quantize_model(lean, out, "int8", link=True)
    assert record["unlinked"] == ["step_llm", "hunyuan_clip"]
    assert open_model(out).components["vae"].folder == lean / "vae"
    assert (out / "step_llm" / "step1_chat_tokenizer.model").exists()


def test_turbo_stays_turbo(tmp_path: Path) -> None:
    """It is known by its folder's name only."""
    source = Path(shutil.copytree(T2V, tmp_path / "stepvideo-t2v-turbo"))
    quantize_model(source, tmp_path / "out", "int8")
    assert open_model(tmp_path / "out").preset == open_model(source).preset
    assert open_model(source).preset.name == "turbo"


def test_only_the_text_encoder(out: Path) -> None:
    quantize_model(T2V, out, "bf16", "nf4")
    stored = open_model(out)
    assert stored.components["transformer"].quantization is None
    assert stored.components["step_llm"].quantization.precision == "nf4"
    again = quantize_model(out, out.parent / "again", "fp8")  # the other half later, from the first result
    assert again["networks"].keys() == {"transformer"}
    assert open_model(out.parent / "again").components["step_llm"].quantization.precision == "nf4"


def test_a_recipe_of_ones_own(tmp_path: Path, out: Path) -> None:
    recipe = {"name": "mine", "rules": [["*.ff.*", "int8-plain"], ["transformer_blocks.1.attn1.*", "fp8"]]}
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    quantize_model(T2V, out, recipe=tmp_path / "mine.json")
    told = manifest(out)
    assert told["precision"] == told["recipe"]["name"] == "mine"
    assert set(told["modules"].values()) == {"int8-plain", "fp8"} and len(told["modules"]) == 6


def test_a_measured_recipe_is_measured_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that goes on takes the recipe of its first run: another measurement may differ in a digit."""
    recipes = [Recipe("auto:0.02", (("*.ff.*", "int8"),)), Recipe("auto:0.02", (("*.attn1.*", "int8"),))]

    def measured(*_: object) -> Any:
        return type("Mode", (), {"recipe": recipes.pop(0)})

    monkeypatch.setattr(convert, "measure_recipe", measured)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(T2V, out, recipe="auto:0.02", progress=stop_after(0.4), shard_bytes=SMALL)
    quantize_model(T2V, out, recipe="auto:0.02", shard_bytes=SMALL)
    assert len(recipes) == 1
    assert all(".ff." in path for path in manifest(out)["modules"])


def test_sizes_of_the_released_model() -> None:
    """29.3 billion parameters: 29.5 GB in 8 bits, within 2 %."""
    for precision in ("int8", "fp8"):
        assert manifest_bytes(precision) == pytest.approx(29.5e9, rel=0.02)
        assert manifest_bytes(precision, "dit_ti2v") == pytest.approx(29.5e9, rel=0.02)
    assert manifest_bytes("bf16") == 2 * 29_342_478_400


# --- stopping and going on ----------------------------------------------------------------------------------------


def stop_after(part: float) -> Callable[[str, int, int], None]:
    """Progress that stops a conversion like Ctrl-C, when this part of its network is done."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("quantize") and done > part * total:
            raise KeyboardInterrupt

    return progress


def finished(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (out / "transformer").glob("diffusion*.safetensors")}


def test_a_stopped_conversion_goes_on(out: Path, tmp_path: Path) -> None:
    quantize_model(T2V, tmp_path / "whole", "int8", shard_bytes=SMALL)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(T2V, out, "int8", progress=stop_after(0.6), shard_bytes=SMALL)
    kept_shards = finished(out)
    assert len(kept_shards) >= 2
    with pytest.raises(CheckpointError, match="is a conversion that is not finished"):
        open_model(out)
    record = quantize_model(T2V, out, "int8", shard_bytes=SMALL)
    assert record["networks"]["transformer"]["kept_shards"] == len(kept_shards)
    assert {name: time for name, time in finished(out).items() if name in kept_shards} == kept_shards
    assert contents(out) == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
from solostep.engine.convert import quantize_model

def progress(stage, done, total):
    if stage.startswith("quantize") and done > 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_model(sys.argv[1], sys.argv[2], "int8", progress=progress, shard_bytes=int(sys.argv[3]))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_killed_conversion_goes_on(out: Path, tmp_path: Path) -> None:
    quantize_model(T2V, tmp_path / "whole", "int8", shard_bytes=SMALL)
    command = [sys.executable, "-c", KILLED, str(T2V), str(out), str(SMALL)]
    assert subprocess.run(command, timeout=120, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert finished(out)
    for leftover in (".diffusion_pytorch_model-00009-of-00009.safetensors.part", ".tmpoaZ5KD"):
        (out / "transformer" / leftover).write_text("half")
    quantize_model(T2V, out, "int8", shard_bytes=SMALL)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_conversion_is_left_alone(out: Path) -> None:
    assert not quantize_model(T2V, out, "int8", "nf4")["already_finished"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert quantize_model(T2V, out, "int8", "nf4")["already_finished"]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_what_a_finished_conversion_lost_is_made_again(out: Path) -> None:
    quantize_model(T2V, out, "int8", shard_bytes=SMALL)
    before = contents(out)
    (out / "transformer" / sorted(finished(out))[2]).unlink()
    shutil.rmtree(out / "vae")
    record = quantize_model(T2V, out, "int8", shard_bytes=SMALL)["networks"]["transformer"]
    assert record["kept_shards"] == record["shards"] - 1
    assert contents(out) == before


def test_two_conversions_are_never_mixed(model: Path, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, out, "int8", progress=stop_after(0.6), shard_bytes=SMALL)
    for other in ({"precision": "fp8", "shard_bytes": SMALL}, {"precision": "int8", "shard_bytes": 2 * SMALL},
                  {"precision": "int8", "text_precision": "nf4", "shard_bytes": SMALL},
                  {"precision": "int8", "link": True, "shard_bytes": SMALL}):  # fmt: skip
        with pytest.raises(UsageError, match="unfinished conversion that differs"):
            quantize_model(model, out, **other)
    file = model / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    save_file({k: t + 1 for k, t in load_file(file).items()}, file)
    with pytest.raises(UsageError, match="unfinished conversion that differs in the transformer"):
        quantize_model(model, out, "int8", shard_bytes=SMALL)


def test_a_strange_shard_is_not_taken(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize_model(T2V, out, "int8", progress=stop_after(0.6), shard_bytes=SMALL)
    shard = sorted((out / "transformer").glob("diffusion*"))[0]
    save_file(load_file(shard), shard)  # the same tensors, from somewhere else
    with pytest.raises(CheckpointError, match=rf"{shard.name} is not of this conversion"):
        quantize_model(T2V, out, "int8", shard_bytes=SMALL)


def test_a_full_disk_keeps_what_is_finished(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = safetensors.torch.save_file, []

    def full(tensors: Any, path: Any, metadata: Any) -> None:
        calls.append(path)
        real(tensors, path, metadata)
        if len(calls) == 3:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OutputError, match="is full: finished shards are kept"):
        quantize_model(T2V, out, "int8", shard_bytes=SMALL)
    assert [name[:29] for name in sorted(finished(out))] == [f"diffusion_pytorch_model-{i:05d}" for i in (1, 2)]
    assert not list(out.rglob(".*.part"))
    record = quantize_model(T2V, out, "int8", shard_bytes=SMALL)
    assert record["networks"]["transformer"]["kept_shards"] == 2


def test_a_bad_number_is_found_and_not_written(model: Path, out: Path) -> None:
    file = model / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    tensors = load_file(file)
    name = next(k for k, t in tensors.items() if k.endswith("wo.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{file.name}: tensor {name} holds NaN"):
        quantize_model(model, out, "int8", shard_bytes=SMALL)
    written = [k for p in (out / "transformer").glob("diffusion*.safetensors") for k in load_file(p)]
    assert written and name not in written


def test_another_process_at_work(out: Path) -> None:
    def again(stage: str, done: int, total: int) -> None:
        with pytest.raises(UsageError, match="Another process"):
            quantize_model(T2V, out, "int8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(T2V, out, "int8", progress=again)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp32"}, "--precision fp32 is a type to compute in"),
        ({"precision": "int5"}, "--precision int5 is unknown"),
        ({"text_precision": "fp32"}, "--text-precision fp32"),
        ({"precision": "bf16"}, "Nothing is to be quantized"),
        ({"precision": "int8", "recipe": "auto:0.02"}, "--recipe takes the place of --precision int8"),
        ({"recipe": "auto:much"}, "has to be a number"),
        ({"recipe": "nowhere.json"}, "cannot be read"),
        ({"recipe": Recipe("empty")}, "nothing is to be quantized"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_options_that_do_not_go(options: dict[str, Any], message: str, out: Path) -> None:
    with pytest.raises(UsageError, match=message):
        quantize_model(T2V, out, **options)
    assert not out.exists()


def test_formats_of_other_packages_are_not_written(out: Path) -> None:
    with pytest.raises(UsageError, match="another package's format and cannot be written"):
        quantize_model(T2V, out, "torchao:int8")
    with pytest.raises(UsageError, match="formats of other packages cannot be written"):
        quantize_model(T2V, out, recipe=Recipe("x", (("*.ff.*", "int8"), ("*", "torchao:int8"))))


def test_places_that_do_not_go(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for place, message in (
        (model, "is the model itself"),
        (model / "transformer", "is inside the model"),
        (model / "new", "is inside the model"),
        (tmp_path, "holds the model"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "other", "is not empty"),
    ):
        with pytest.raises(UsageError, match=message):
            quantize_model(model, place, "int8")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_a_linked_folder_is_part_of_the_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is inside the model"):
        quantize_model(demo_model(image_to_video=True), demo_model() / "new", "int8")


def test_nothing_is_quantized_twice(out: Path, tmp_path: Path) -> None:
    quantize_model(T2V, out, "int8", "nf4")
    with pytest.raises(UsageError, match=r"transformer is already quantized to int8.*--precision bf16"):
        quantize_model(out, tmp_path / "two", "fp8")
    with pytest.raises(UsageError, match=r"step_llm is already quantized to nf4.*--text-precision bf16"):
        quantize_model(out, tmp_path / "two", "bf16", "int8")
    with pytest.raises(UsageError, match="is another conversion"):
        quantize_model(T2V, out, "fp8")


def test_the_disk_is_looked_at_first(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(OutputError, match=r"needs 0\.02 GB and its disk has 0\.00 GB free"):
        quantize_model(T2V, out, "int8")
    assert not any(out.rglob("*")) if out.exists() else True


# --- the stream ---------------------------------------------------------------------------------------------------


def floats(count: int, size: int = 100) -> list[Item]:
    return [kept(f"t{i}", Path("x"), ((size,), torch.float32)) for i in range(count)]


def test_shards_are_filled_in_order() -> None:
    items = [
        *floats(5),
        kept("large", Path("x"), ((10_000,), torch.float32)),
        kept("last", Path("x"), ((), torch.int8)),
    ]
    shards = plan_shards(items, "model", 1000)
    assert [[i.name for i in s.items] for s in shards] == [["t0", "t1"], ["t2", "t3"], ["t4"], ["large"], ["last"]]
    assert [s.nbytes for s in shards] == [800, 800, 400, 40_000, 1]
    assert index(shards)["metadata"] == {"total_size": 42_001}
    assert index(shards)["weight_map"]["large"] == "model-00004-of-00005.safetensors"


def test_writing_does_not_hold_up_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second shard is filled while the first is being written, and the third waits for it."""
    items, real, second = floats(6), safetensors.torch.save_file, threading.Event()

    def slow(tensors: Any, path: Any, metadata: Any) -> None:
        assert second.wait(30)
        real(tensors, path, metadata)

    def source() -> Any:
        for i, item in enumerate(items):
            if i == 3:
                second.set()
            yield item, torch.full((100,), float(i))

    monkeypatch.setattr(safetensors.torch, "save_file", slow)
    shards = plan_shards(items, "model", 800)
    with ShardWriter(tmp_path, shards, "id") as writer:
        stream(source(), writer.take)
    assert [float(load_file(tmp_path / s.name)[i.name][0]) for s in shards for i in s.items] == [0, 1, 2, 3, 4, 5]
    assert all(is_finished(tmp_path, shard, "id") for shard in shards)


def test_every_type_of_number_is_checked() -> None:
    good = torch.tensor([1.0, -2.0])
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = torch.tensor([1.0, value]).to(dtype)
            if not torch.isfinite(bad.float()).all():  # e4m3 has no infinity
                item = kept("x", Path("f"), ((2,), dtype))
                with pytest.raises(ValueError, match="f: tensor x holds NaN or infinity"):
                    stream(iter([(item, bad)]), lambda item, made: None)
        largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=torch.float64).to(dtype)
        for tensor in (good.to(dtype), largest):
            stream(iter([(kept("x", Path("f"), ((2,), dtype)), tensor)]), lambda item, made: None)


def test_one_file_tensor_by_tensor(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).to(torch.float8_e4m3fn), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4),
        "a": torch.randn(7).bfloat16(), "q": torch.arange(-5, 6).to(torch.int8),
    }  # fmt: skip
    outputs = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    path = tmp_path / "x.safetensors"
    with FileWriter(path, outputs, {"format": "pt"}) as writer:
        for name in ("q", "b", "a", "scalar", "empty"):  # as they come, not as they lie
            writer.put({name: tensors[name]})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].float(), tensor.float())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="tensor b was announced"):
        with FileWriter(path, {"a": ((1,), torch.int8), "b": ((1,), torch.int8)}, {}) as writer:
            writer.put({"a": torch.ones(1, dtype=torch.int8)})
    with pytest.raises(RuntimeError), FileWriter(path, {"a": ((1,), torch.int8)}, {}):
        raise RuntimeError
    with pytest.raises(ValueError, match="announced otherwise"):
        with FileWriter(path, {"a": ((1,), torch.int8)}, {}) as writer:
            writer.put({"a": torch.ones(2, dtype=torch.int8)})
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"] if (tmp_path / "cache").exists() else True
    assert not list(tmp_path.glob("*x.safetensors*"))


def test_a_hash_is_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    known: dict[str, str] = {}
    saved = []
    for size in (0, 1, 3 << 20, (8 << 20) + 1, 20 << 20):
        file.write_bytes(os.urandom(1 << 20) * (size >> 20) + os.urandom(size % (1 << 20)))
        with Digests(known, lambda: saved.append(1)) as digests:
            follower = digests.follow(f"f{size}", file)
            for offset in range(0, size, 5 << 20):
                follower.reached(offset)
            follower.reached(float("inf"))
        assert known[f"f{size}"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(saved) == 5
    with Digests(known, lambda: None) as digests:
        assert digests.follow("f1", file) is None


def test_a_hash_of_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(20 << 20))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        with Digests({}, lambda: None) as digests:
            follower = digests.follow("f", file)
            follower.reached(9 << 20)
            with file.open("ab") as stream:
                stream.write(b"more")
            follower.reached(float("inf"))


def test_a_stopped_hash_ends(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(20 << 20))
    known: dict[str, str] = {}
    with contextlib.suppress(KeyboardInterrupt), Digests(known, lambda: None) as digests:
        digests.follow("f", file).reached(0)
        raise KeyboardInterrupt
    assert known == {}


# --- memory -------------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
from solostep.engine.convert import quantize_model
from solostep.quant.recipe import Recipe

def status(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name + ":"))

recipe = Recipe("few", (("*.attn1.wo", "fp8-weight"),))  # the rest passes through: as much to hold, less to compute
quantize_model(sys.argv[1], sys.argv[2] + "-first", recipe=recipe, link=True)  # what a first conversion imports
before = status("VmRSS")
record = quantize_model(sys.argv[3], sys.argv[2], recipe=recipe, link=True)
print(json.dumps({"peak": status("VmHWM") - before, **record["networks"]["transformer"]}))
"""


def hollow_model(root: Path, layers: int, files: int) -> None:
    """A wide transformer of zeros in files that take no room, with everything else of the demo."""
    folder = root / "transformer"
    folder.mkdir(parents=True)
    config = json.loads((demo_model() / "transformer" / "config.json").read_text())
    config |= {"num_attention_heads": 6, "num_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    (root / "model_index.json").write_text(json.dumps({"solostep": {"shared": str(demo_model())}}))
    component = conversion.Component("transformer", folder, config, (), {})
    shapes = {n: list(p.shape) for n, p in build_on_meta(component).named_parameters()}
    names, weight_map = list(shapes), {}
    for i in range(files):
        path = folder / f"diffusion_pytorch_model-{i + 1:05d}-of-{files:05d}.safetensors"
        header, end = {}, 0
        for name in names[i * len(names) // files : (i + 1) * len(names) // files]:
            start, end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@linux
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """310 MB in files of up to 24 MB become 300 MB: neither the model nor all of the output is ever held."""
    hollow_model(tmp_path / "model", 16, 16)
    command = [sys.executable, "-c", PEAK, str(T2V), str(tmp_path / "out"), str(tmp_path / "model")]
    done = subprocess.run(command, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    largest = max(p.stat().st_size for p in (tmp_path / "model" / "transformer").iterdir())
    assert found["source_bytes"] > 10 * largest and found["shards"] >= 12
    # Two shards, each at most a source file, 64 MB that are read ahead, and what quantizing a matrix takes.
    assert largest < found["peak"] < 2 * largest + 100e6 < 0.6 * found["bytes"]


# --- the command --------------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    try:
        COMMAND.main([str(a) for a in arguments], prog_name="solostep", standalone_mode=True)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("quantize", T2V, "-o", out, "--text-precision", "nf4", "--link", "--device", "cpu") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(out)]
    assert "transformer in int8: " in said.err and "step_llm in nf4: " in said.err
    assert command("quantize", T2V, "-o", out, "--text-precision", "nf4", "--link", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["already_finished"] and "is already finished" in said.err
    assert command("quantize", T2V, "-o", out, "--precision", "fp32") == 2
    assert command("quantize", T2V, "-o", T2V) == 2
    assert command("quantize", T2V) == 2


def test_errors_of_the_disk_are_told(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied", "somewhere")

    monkeypatch.setattr(safetensors.torch, "save_file", denied)
    with pytest.raises(OutputError, match=r"somewhere cannot be read or written \(Permission denied\)"):
        quantize_model(T2V, out, "int8")
