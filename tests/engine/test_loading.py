"""Loading checkpoints: memory, types, parts, what is passed over, and which released model a folder is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from solostep import StepVideoPipeline
from solostep.engine import hub
from solostep.engine.checkpoint import Component, build_on_meta, describe, load, open_component, open_model
from solostep.engine.config import PRESETS
from solostep.engine.errors import CheckpointError, UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
T2V, TI2V = GOLDEN / "tiny-stepvideo-t2v", GOLDEN / "tiny-stepvideo-ti2v"
DIT = "diffusion_pytorch_model"
CLIP_BIN = "hunyuan_clip/clip_text_encoder/pytorch_model.bin"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny text-to-video checkpoint."""
    return Path(shutil.copytree(T2V, tmp_path / "model"))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a network's safetensors files, as they are stored."""
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def values(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


# --- memory -------------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
from pathlib import Path
import torch
from solostep.engine.checkpoint import load, open_component
from solostep.quant.recipe import default_recipe

def status(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name + ":"))

small, big = (open_component(Path(root), "transformer") for root in sys.argv[1:3])
modes = [(getattr(torch, t), default_recipe(p, "transformer")) for t, p in (mode.split(":") for mode in sys.argv[3:])]
for dtype, recipe in modes:
    load(small, "cpu", dtype, recipe=recipe)  # what a first load imports
before = status("VmRSS")
for dtype, recipe in modes:
    network = load(big, "cpu", dtype, recipe=recipe)
    peak = status("VmHWM") - before
    size = sum(p.nbytes for p in network.parameters())
    total = sum(float(part.double().sum()) for p in network.parameters() for part in p.reshape(-1).split(100000))
    del network
    print(json.dumps({"peak": peak, "size": size, "total": total}))
"""


@pytest.fixture(scope="module")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, float]]:
    """A transformer of about 120 MB in 4 shards, and the sum of its weights."""
    root = tmp_path_factory.mktemp("big")
    folder = root / "transformer"
    folder.mkdir()
    config = {
        "num_attention_heads": 4,
        "num_layers": 14,
        "in_channels": 4,
        "out_channels": 4,
        "caption_channels": [64, 32],
    }
    (folder / "config.json").write_text(json.dumps(config))
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {
        name: block.repeat(-(-p.numel() // len(block)))[: p.numel()].reshape(p.shape)
        for name, p in build_on_meta(Component("transformer", folder, config, (), {})).named_parameters()
    }
    names = list(tensors)
    files = {
        f"{DIT}-{i + 1:05d}-of-00004.safetensors": names[i * len(names) // 4 : (i + 1) * len(names) // 4]
        for i in range(4)
    }
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / f"{DIT}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    yield root, float(sum(t.double().sum() for t in tensors.values()))
    shutil.rmtree(root)


@pytest.mark.skipif(sys.platform != "linux", reason="reads peaks from /proc")
@pytest.mark.parametrize("precision", ["fp8", pytest.param("int8", marks=pytest.mark.more)])  # six times as long
def test_a_model_is_never_held_twice(precision: str, big_model: tuple[Path, float]) -> None:
    """Peaks in a process of its own: the model and a little that is read ahead, but no shard and no second model. Each
    load takes more than the one before, so all three peaks are seen."""
    root, total = big_model
    command = [
        sys.executable,
        "-c",
        PEAK,
        str(T2V),
        str(root),
        f"bfloat16:{precision}",
        "bfloat16:bf16",
        "float32:bf16",
    ]
    # glibc keeps freed memory for itself, more or less of it from run to run, unless its threshold is set.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "250000"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    quantized, same, wider = map(json.loads, ended.stdout.splitlines())
    assert 115e6 < same["size"] < 130e6
    assert wider["size"] == 2 * same["size"]
    assert same["total"] == wider["total"] == pytest.approx(total)
    # Below the model's own size, the figure would be worth nothing.
    assert 0.95 * same["size"] < same["peak"] < 1.15 * same["size"]
    # Cast tensor by tensor: bf16 shards do not add up behind the fp32 model.
    assert 0.95 * wider["size"] < wider["peak"] < wider["size"] + 0.15 * same["size"]
    # Quantized tensor by tensor: some fp32 copies of the widest, 4 MB each, and never the float model.
    assert 0.5 * same["size"] < quantized["size"] < 0.55 * same["size"]
    assert 0.95 * quantized["size"] < quantized["peak"] < 0.9 * same["size"]


# --- types and parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type_is_cast(kept: torch.dtype, wanted: torch.dtype, model: Path) -> None:
    for file in (model / "transformer").glob("*.safetensors"):
        # Not every tensor: files mix types.
        save_file({k: t.to(kept) if t.ndim > 1 else t for k, t in load_file(file).items()}, file)
    component = open_component(model, "transformer")
    assert len(component.dtypes) == (1 if kept == torch.bfloat16 else 2)
    network = load(component, CPU, wanted)
    on_disk = stored(model / "transformer")
    assert set(values(network)) == set(on_disk)
    for name, parameter in network.named_parameters():
        assert parameter.dtype == wanted
        assert not parameter.requires_grad
        assert torch.equal(parameter, on_disk[name].to(wanted)), name
    assert not network.training


def test_a_part_reads_only_its_own_tensors(model: Path) -> None:
    """What is not read cannot fail: the encoder is full of NaN."""
    file = model / "vae" / "vae_v2.safetensors"
    whole = load_file(file)
    save_file({k: torch.full_like(t, float("nan")) if k.startswith("encoder.") else t for k, t in whole.items()}, file)
    component = open_component(model, "vae")
    decoder = load(component, CPU, torch.float32, part="decoder")
    with pytest.raises(CheckpointError, match=r"tensor encoder\..* holds NaN"):
        load(component, CPU, torch.float32, part="encoder")
    with pytest.raises(CheckpointError, match=r"tensor encoder\..* holds NaN"):
        load(component, CPU, torch.float32)
    # The release keeps an older name for one tensor.
    names = {f"decoder.{k}".replace("conv_out.conv.", "conv_out."): p for k, p in decoder.named_parameters()}
    assert set(names) == {k for k in whole if k.startswith("decoder.")}
    assert all(torch.equal(p, whole[k].float()) for k, p in names.items())


def test_one_file_without_an_index(model: Path) -> None:
    folder = model / "transformer"
    tensors, fingerprint = stored(folder), open_component(model, "transformer").fingerprint
    for file in folder.glob(f"{DIT}*"):
        file.unlink()
    save_file(tensors, folder / f"{DIT}.safetensors")
    component = open_component(model, "transformer")
    assert all(torch.equal(p, tensors[k]) for k, p in load(component, CPU, torch.bfloat16).named_parameters())
    assert component.fingerprint != fingerprint


def test_progress_ends_at_the_whole(model: Path) -> None:
    said: list[tuple[int, int]] = []
    component = open_component(model, "step_llm")
    load(component, CPU, torch.bfloat16, progress=lambda done, total: said.append((done, total)))
    assert said == sorted(said)
    assert len(said) == len(component.tensors)
    assert said[-1] == (component.parameters, component.parameters)


@pytest.mark.parametrize(
    ("name", "file", "dtype"),
    [
        ("transformer", f"transformer/{DIT}-00001-of-00002.safetensors", torch.bfloat16),
        ("transformer", f"transformer/{DIT}-00001-of-00002.safetensors", torch.float32),
        ("hunyuan_clip", CLIP_BIN, torch.float32),
    ],
)
def test_what_is_loaded_outlives_the_file(name: str, file: str, dtype: torch.dtype, model: Path) -> None:
    """In the stored type too, where a tensor could be a view of the file."""
    network = load(open_component(model, name), CPU, dtype)
    before = {k: p.clone() for k, p in network.named_parameters()}
    size = (model / file).stat().st_size
    with (model / file).open("r+b") as stream:  # in place, and not cut: that would end a process that maps it
        stream.write(b"\x55" * size)
    assert all(torch.equal(p, before[k]) for k, p in network.named_parameters())
    (model / file).unlink()
    assert all(torch.equal(p, before[k]) for k, p in network.named_parameters())


# --- Hunyuan-CLIP -------------------------------------------------------------------------------------------------


def clip_state(model: Path) -> dict[str, torch.Tensor]:
    return torch.load(model / CLIP_BIN, weights_only=True)


def load_clip(model: Path) -> dict[str, torch.Tensor]:
    return values(load(open_component(model, "hunyuan_clip"), CPU, torch.float32))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_clip_passes_over_what_is_not_its_encoder(model: Path) -> None:
    base, state = load_clip(model), clip_state(model)
    assert same(base, {k: t for k, t in state.items() if "pooler" not in k})
    state |= {"logit_scale": torch.ones(()), "visual.conv1.weight": torch.ones(2, 2), "output_t5.weight": torch.ones(3)}
    state |= {"bert.embeddings.position_ids": torch.arange(9)}
    torch.save(state, model / CLIP_BIN)
    assert same(load_clip(model), base)
    ignored = open_component(model, "hunyuan_clip").ignored
    assert {"logit_scale", "visual.conv1.weight", "output_t5.weight", "bert.pooler.dense.weight"} <= set(ignored)
    state["bert.encoder.layer.9.output.dense.weight"] = torch.ones(2)
    torch.save(state, model / CLIP_BIN)
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.9\.output\.dense\.weight is unknown"):
        open_component(model, "hunyuan_clip")


def test_clip_without_its_prefix(model: Path) -> None:
    base, state = load_clip(model), clip_state(model)
    torch.save(
        {k.removeprefix("bert."): t for k, t in state.items()} | {"logit_scale": torch.ones(())}, model / CLIP_BIN
    )
    assert same(load_clip(model), base)


@pytest.mark.parametrize("zipped", [True, False])
def test_clip_from_old_pickles_and_from_safetensors(zipped: bool, model: Path) -> None:
    base, state = load_clip(model), clip_state(model)
    torch.save(state, model / CLIP_BIN, _use_new_zipfile_serialization=zipped)
    assert same(load_clip(model), base)
    (model / CLIP_BIN).unlink()
    save_file(state, (model / CLIP_BIN).with_name("model.safetensors"))
    assert same(load_clip(model), base)


# --- which model it is --------------------------------------------------------------------------------------------


def change_index(root: Path, **section: Any) -> None:
    path = root / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"solostep": section}))


def test_text_to_video_is_what_nothing_says_otherwise() -> None:
    model = open_model(T2V)
    assert model.preset == PRESETS["t2v"]
    assert not model.is_image_to_video


def test_image_to_video_is_seen_in_the_transformer(tmp_path: Path) -> None:
    root = Path(shutil.copytree(TI2V, tmp_path / "turbo-of-some-kind"))
    change_index(root, preset="turbo")
    model = open_model(root)
    assert model.preset == PRESETS["ti2v"]
    assert model.is_image_to_video


@pytest.mark.parametrize("name", ["stepvideo-t2v-turbo", "My Turbo", "models--a--turbo/snapshots/0123abc"])
def test_turbo_is_known_by_its_folder(name: str, tmp_path: Path) -> None:
    root = Path(shutil.copytree(T2V, tmp_path / name))
    assert open_model(root).preset == PRESETS["turbo"]
    if "--" not in name:
        other = shutil.copytree(T2V, root / "other")
        assert open_model(other).preset == PRESETS["t2v"], "not by a folder above"
    change_index(root, preset="t2v")
    assert open_model(root).preset == PRESETS["t2v"], "what the model says of itself goes before a name"
    assert open_model(root, "turbo").preset == PRESETS["turbo"], "and what is asked for before all"


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
def test_turbo_is_known_by_its_origin(file: str, model: Path) -> None:
    """What diffusers writes into a copy that it saves."""
    values = json.loads((model / file).read_text()) | {"_name_or_path": "stepfun-ai/stepvideo-t2v-turbo"}
    (model / file).write_text(json.dumps(values))
    assert open_model(model).preset == PRESETS["turbo"]


def test_turbo_is_known_by_model_index(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_index(model, preset="turbo", defaults={"num_inference_steps": 4, "height": 32}, note="Mind this.")
    opened = open_model(model)
    assert (opened.preset.name, opened.preset.num_inference_steps, opened.preset.height) == ("turbo", 4, 32)
    assert (opened.preset.time_shift, opened.preset.width) == (PRESETS["turbo"].time_shift, PRESETS["turbo"].width)
    assert opened.note == "Mind this." and not caplog.messages
    assert open_model(model, "t2v").preset.num_inference_steps == 4
    assert "defaults of its own, which stay: num_inference_steps, height" in caplog.text
    with pytest.raises(UsageError, match="t3v is unknown"):
        open_model(model, "t3v")


def test_turbo_is_known_by_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub keeps snapshots in folders that are named by a hash."""
    asked: list[tuple[str, list[str]]] = []

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(T2V)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name, preset in (("turbo", "turbo"), ("t2v", "t2v"), ("someone/turbo-finetune", "turbo"), ("a/b", "t2v")):
        model = open_model(name)
        assert model.preset == PRESETS[preset]
        assert model.source == hub.HUB_IDS.get(name, name)
        assert asked[-1] == (model.source, hub.HUB_FILES)
        assert describe(name)["preset"]["name"] == preset


def test_a_download_holds_all_that_is_read_and_not_the_old_vae() -> None:
    from fnmatch import fnmatch

    def downloaded(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in hub.HUB_FILES)

    files = [p.relative_to(T2V).as_posix() for p in T2V.rglob("*") if p.is_file()]
    assert len(files) > 15
    assert [f for f in files if not downloaded(f)] == []
    assert not downloaded("vae/vae.safetensors")
    assert not downloaded("lib/liboptimus_ths-torch2.5-cu124.cpython-310-x86_64-linux-gnu.so")


def test_defaults_of_the_presets() -> None:
    """The numbers of the model cards."""
    rows = {
        name: (p.num_frames, p.height, p.width, p.num_inference_steps, p.guidance_scale, p.time_shift, p.max_frames)
        for name, p in PRESETS.items()
    }
    assert rows == {
        "t2v": (204, 544, 992, 50, 9.0, 13.0, 204),
        "turbo": (204, 544, 992, 15, 5.0, 17.0, 204),
        "ti2v": (102, 544, 992, 50, 9.0, 13.0, 102),
    }
    assert {p.motion_score for p in PRESETS.values()} == {5.0}
    assert PRESETS["t2v"].positive == PRESETS["turbo"].positive != PRESETS["ti2v"].positive
    assert PRESETS["t2v"].negative == PRESETS["turbo"].negative != PRESETS["ti2v"].negative


@pytest.mark.parametrize(("root", "preset"), [(T2V, "t2v"), (T2V, "turbo"), (TI2V, "ti2v")])
def test_defaults_reach_a_request(root: Path, preset: str) -> None:
    pipe = StepVideoPipeline.from_pretrained(root, device="cpu", preset=preset if preset == "turbo" else None)
    image = torch.zeros(3, 8, 8) if pipe.model.is_image_to_video else None
    request, expected = pipe.request("a cat", image=image), PRESETS[preset]
    names = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "time_shift", "motion_score")
    assert [getattr(request.settings, n) for n in names] == [getattr(expected, n) for n in names]
    assert request.texts == ["a cat" + expected.positive, expected.negative]
    assert request.settings.notes == ()
    changed = pipe.request("a cat", image=image, num_inference_steps=3, height=96)
    assert (changed.settings.num_inference_steps, changed.settings.height) == (3, 96)
    assert changed.settings.width == expected.width
