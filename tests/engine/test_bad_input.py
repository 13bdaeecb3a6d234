"""Bad input: each gives one sentence that names the file, tensor or option, before any long work, and loses nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file

import solostep.engine.stages as stages_module
from solostep.engine import latents as storage
from solostep.engine import runtime, streaming, text
from solostep.engine.demo import demo_model
from solostep.engine.interfaces import cli
from solostep.engine.latents import SavedLatents, read_latents, save_latents
from solostep.engine.video import read_frames

pytestmark = pytest.mark.usefixtures("fast")

GOLDEN = Path(__file__).parents[1] / "golden"
COMMAND = typer.main.get_command(cli.app)
T2V, TI2V = GOLDEN / "tiny-stepvideo-t2v", GOLDEN / "tiny-stepvideo-ti2v"
SMALL = "--frames 17 --height 32 --width 48 --steps 2 --guidance 1 --seed 1 --device cpu --precision fp32".split()
SHARD_1 = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
SHARD_2 = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
DIT_INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
CLIP_BIN = "hunyuan_clip/clip_text_encoder/pytorch_model.bin"
SPM = "step_llm/step1_chat_tokenizer.model"
VOCAB = "hunyuan_clip/tokenizer/vocab.txt"

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX limits")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; the cache, and the place where latents are rescued to, lie outside it."""
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rescue").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "rescue"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny text-to-video checkpoint, to be damaged."""
    return Path(shutil.copytree(T2V, tmp_path / "model"))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@dataclass
class Outcome:
    """One call of the command line. ``loaded`` names the networks whose loading was begun, in order."""

    code: int
    out: str
    err: str
    loaded: list[str]
    changed: bool

    @property
    def message(self) -> str:
        return self.err.strip().splitlines()[-1]

    def refused(self, code: int, *mentions: object, loaded: tuple[str, ...] = (), changed: bool = False) -> str:
        """It ended with this code and one sentence that holds ``mentions``, and nothing was begun that shows."""
        assert (self.code, self.out) == (code, ""), self.err
        assert [line for line in self.err.splitlines() if line.startswith("error: ")] == [self.message], self.err
        assert "Traceback" not in self.err
        said = self.message
        assert said.startswith("error: ") and said.endswith("."), said
        # What other libraries say is quoted in brackets, commands in backticks, values in quotes.
        plain = re.sub(r"\(.*\)|`[^`]*`|'[^']*'|\"[^\"]*\"", "", said)
        assert not re.search(r"[.!?] +[A-Z]", plain), said
        assert [str(m) for m in mentions if str(m) not in said] == [], said
        assert self.loaded == list(loaded)
        assert self.changed == changed
        return said


Run = Callable[..., Outcome]


@pytest.fixture
def solostep(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the command line in this process."""
    loaded: list[str] = []
    real = stages_module.load

    def watched(component: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        loaded.append(component.name)
        return real(component, *args, **kwargs)

    for module in (stages_module, streaming, text):
        monkeypatch.setattr(module, "load", watched)

    def run(*args: object) -> Outcome:
        loaded.clear()
        capsys.readouterr()
        before = tree(work)
        with pytest.raises(SystemExit) as ended:
            COMMAND.main([str(a) for a in args], prog_name="solostep")
        said = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), said.out, said.err, list(loaded), tree(work) != before)

    return run


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Applies ``change`` to the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"format": "pt"})


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def set_header(path: Path, header: dict[str, Any]) -> None:
    data = path.read_bytes()
    rest = data[8 + struct.unpack("<Q", data[:8])[0] :]
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + rest)


def a_tensor(path: Path) -> str:
    return sorted(load_file(path))[0]


# --- a damaged model folder ---------------------------------------------------------------------------------------

Damage = Callable[[Path], "tuple[object, ...]"]
"""Damages a model folder and gives what the message has to name."""
DAMAGES: dict[str, Damage] = {}


def damage(function: Damage) -> Damage:
    DAMAGES[function.__name__] = function
    return function


@damage
def missing_shard(m: Path) -> tuple[object, ...]:
    (m / SHARD_2).unlink()
    return m / SHARD_2, "missing", "hf download stepfun-ai/stepvideo-t2v --local-dir"


@damage
def missing_shard_of_the_llm(m: Path) -> tuple[object, ...]:
    (m / "step_llm/model-00001-of-00002.safetensors").unlink()
    return m / "step_llm/model-00001-of-00002.safetensors", "missing", "hf download"


@damage
def no_weights(m: Path) -> tuple[object, ...]:
    for file in (m / "transformer").glob("diffusion*"):
        file.unlink()
    return m / "transformer", "diffusion_pytorch_model.safetensors", "hf download"


@damage
def missing_network(m: Path) -> tuple[object, ...]:
    shutil.rmtree(m / "step_llm")
    return m, "step_llm", "hf download"


def truncated(name: str, keep: Callable[[int, int], int]) -> Damage:
    """Cuts shard 2; ``keep`` gets the lengths of its header and of the whole file."""

    def cut(m: Path) -> tuple[object, ...]:
        data = (m / SHARD_2).read_bytes()
        length = keep(8 + struct.unpack("<Q", data[:8])[0], len(data))
        assert 0 <= length < len(data)
        (m / SHARD_2).write_bytes(data[:length])
        return m / SHARD_2, "download it again"

    DAMAGES[f"truncated_{name}"] = cut
    return cut


truncated("to_nothing", lambda header, size: 0)
truncated("in_the_length", lambda header, size: 5)
truncated("in_the_header", lambda header, size: header // 2)
truncated("after_the_header", lambda header, size: header)
truncated("in_the_data", lambda header, size: (header + size) // 2)
truncated("by_one_byte", lambda header, size: size - 1)


@damage
def too_long(m: Path) -> tuple[object, ...]:
    (m / SHARD_2).write_bytes((m / SHARD_2).read_bytes() + b"more")
    return m / SHARD_2, "download it again"


@damage
def header_against_itself(m: Path) -> tuple[object, ...]:
    """The shape says one thing, the offsets another; names, shapes and the file's length are right."""
    header = header_of(m / SHARD_2)
    name = a_tensor(m / SHARD_2)
    start, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [start, end - 4]
    set_header(m / SHARD_2, header)
    return m / SHARD_2, name, "download it again"


@damage
def overlapping_tensors(m: Path) -> tuple[object, ...]:
    header = header_of(m / SHARD_2)
    first, second = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])[:2]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [0, size]
    set_header(m / SHARD_2, header)
    return m / SHARD_2, "download it again"


@damage
def text_for_a_shard(m: Path) -> tuple[object, ...]:
    (m / SHARD_1).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 764656\n")
    return m / SHARD_1, "not a safetensors file", "download it again"


@damage
def odd_header(m: Path) -> tuple[object, ...]:
    set_header(m / SHARD_1, {a_tensor(m / SHARD_1): [1, 2]})
    return m / SHARD_1, "download it again"


@damage
def index_names_a_missing_file(m: Path) -> tuple[object, ...]:
    rewrite_json(m / DIT_INDEX, lambda v: v["weight_map"].update(extra="nowhere.safetensors"))
    return m / "transformer/nowhere.safetensors", Path(DIT_INDEX).name, "hf download"


@damage
def index_is_not_json(m: Path) -> tuple[object, ...]:
    (m / DIT_INDEX).write_text('{"weight_map": {')
    return m / DIT_INDEX, "not JSON", "download it again"


@damage
def index_is_not_text(m: Path) -> tuple[object, ...]:
    (m / DIT_INDEX).write_bytes(b"\xff\xfe\x00\x81")
    return m / DIT_INDEX, "not JSON", "download it again"


@damage
def index_without_a_map(m: Path) -> tuple[object, ...]:
    (m / DIT_INDEX).write_text("{}")
    return m / DIT_INDEX, "weight_map", "download it again"


@damage
def index_with_numbers(m: Path) -> tuple[object, ...]:
    rewrite_json(m / DIT_INDEX, lambda v: v["weight_map"].update(extra=7))
    return m / DIT_INDEX, "weight_map", "download it again"


@damage
def wrong_shape(m: Path) -> tuple[object, ...]:
    name = "transformer_blocks.0.attn1.q_norm.weight"
    file = next(m / f for f in (SHARD_1, SHARD_2) if name in load_file(m / f))
    rewrite(file, lambda t: t.update({name: torch.ones(64)}))
    return file, name, "[64]", "[128]"


@damage
def wrong_type(m: Path) -> tuple[object, ...]:
    name = a_tensor(m / SHARD_2)
    rewrite(m / SHARD_2, lambda t: t.update({name: t[name].to(torch.int64)}))
    return m / SHARD_2, name, "I64", "BF16"


@damage
def unknown_tensor(m: Path) -> tuple[object, ...]:
    rewrite(m / SHARD_2, lambda t: t.update(surprise=torch.ones(2)))
    return m / SHARD_2, "surprise", "unknown"


@damage
def missing_tensor(m: Path) -> tuple[object, ...]:
    name = a_tensor(m / SHARD_2)
    rewrite(m / SHARD_2, lambda t: t.pop(name))
    return m / "transformer", name, "missing"


@damage
def tensor_twice(m: Path) -> tuple[object, ...]:
    name = a_tensor(m / SHARD_1)
    rewrite(m / SHARD_2, lambda t: t.update({name: torch.ones(2)}))
    return m / SHARD_1, m / SHARD_2, name, "remove one"


@damage
def missing_tensor_of_the_vae(m: Path) -> tuple[object, ...]:
    rewrite(m / "vae/vae_v2.safetensors", lambda t: t.pop("decoder.conv_out.weight"))
    return m / "vae", "decoder.conv_out", "missing"


@damage
def no_sentencepiece_model(m: Path) -> tuple[object, ...]:
    (m / SPM).unlink()
    return m / SPM, "missing", "hf download"


@damage
def no_vocabulary(m: Path) -> tuple[object, ...]:
    (m / VOCAB).unlink()
    return m / VOCAB, "missing", "hf download"


@damage
def text_for_sentencepiece(m: Path) -> tuple[object, ...]:
    (m / SPM).write_text("not found")
    return m / SPM, "sentencepiece", "download it again"


@damage
def half_of_sentencepiece(m: Path) -> tuple[object, ...]:
    data = (m / SPM).read_bytes()
    (m / SPM).write_bytes(data[: len(data) // 2])
    return m / SPM, "sentencepiece", "download it again"


@damage
def empty_sentencepiece(m: Path) -> tuple[object, ...]:
    (m / SPM).write_bytes(b"")
    return m / SPM, "sentencepiece", "download it again"


@damage
def sentencepiece_of_another_model(m: Path) -> tuple[object, ...]:
    """More tokens than the network has rows: it would fail in the middle, or read another word's row."""
    name = "tok_embeddings.word_embeddings.weight"
    rewrite(m / "step_llm/model-00001-of-00002.safetensors", lambda t: t.update({name: t[name][:512]}))
    rewrite_json(m / "step_llm/config.json", lambda v: v.update(padded_vocab_size=512))
    return m / SPM, "900", "512"


@damage
def binary_vocabulary(m: Path) -> tuple[object, ...]:
    (m / VOCAB).write_bytes(bytes(range(256)))
    return m / VOCAB, "download it again"


@damage
def empty_vocabulary(m: Path) -> tuple[object, ...]:
    (m / VOCAB).write_text("")
    return m / VOCAB, "download it again"


@damage
def vocabulary_without_its_marks(m: Path) -> tuple[object, ...]:
    (m / VOCAB).write_text((m / VOCAB).read_text(encoding="utf-8").replace("[SEP]", "sep"), encoding="utf-8")
    return m / VOCAB, "[SEP]", "download it again"


@damage
def vocabulary_of_another_model(m: Path) -> tuple[object, ...]:
    (m / VOCAB).write_text((m / VOCAB).read_text(encoding="utf-8") + "one\nmore\n", encoding="utf-8")
    return m / VOCAB, "216", "214"


@damage
def no_clip_weights(m: Path) -> tuple[object, ...]:
    (m / CLIP_BIN).unlink()
    return m / CLIP_BIN, "missing", "hf download"


def cut_clip(name: str, keep: float) -> None:
    def cut(m: Path) -> tuple[object, ...]:
        data = (m / CLIP_BIN).read_bytes()
        (m / CLIP_BIN).write_bytes(data[: int(len(data) * keep)])
        return m / CLIP_BIN, "download it again"

    DAMAGES[f"clip_truncated_{name}"] = cut


cut_clip("to_nothing", 0)
cut_clip("near_its_start", 0.001)
cut_clip("in_the_middle", 0.5)
cut_clip("near_its_end", 0.9999)


@damage
def text_for_clip(m: Path) -> tuple[object, ...]:
    (m / CLIP_BIN).write_text("hello")
    return m / CLIP_BIN, "download it again"


@damage
def clip_without_tensors(m: Path) -> tuple[object, ...]:
    torch.save([1, 2], m / CLIP_BIN)
    return m / CLIP_BIN, "table of tensors", "download it again"


@damage
def clip_of_whole_numbers(m: Path) -> tuple[object, ...]:
    state = torch.load(m / CLIP_BIN, weights_only=True)
    name = next(k for k in state if k.endswith("word_embeddings.weight"))
    state[name] = state[name].to(torch.int32)
    torch.save(state, m / CLIP_BIN)
    return m / CLIP_BIN, name, "int32"


for _folder in ("transformer", "step_llm", "hunyuan_clip/clip_text_encoder"):

    def _no_config(m: Path, folder: str = _folder) -> tuple[object, ...]:
        (m / folder / "config.json").unlink()
        return m / folder / "config.json", "missing", "download it again"

    def _broken_config(m: Path, folder: str = _folder) -> tuple[object, ...]:
        (m / folder / "config.json").write_text('{"hidden_size": 48,')
        return m / folder / "config.json", "not JSON", "download it again"

    def _listed_config(m: Path, folder: str = _folder) -> tuple[object, ...]:
        (m / folder / "config.json").write_text("[]")
        return m / folder / "config.json", "JSON object", "download it again"

    _short = _folder.split("/")[0]
    DAMAGES |= {
        f"no_config_{_short}": _no_config,
        f"broken_config_{_short}": _broken_config,
        f"listed_config_{_short}": _listed_config,
    }


@damage
def broken_vae_config(m: Path) -> tuple[object, ...]:
    (m / "vae/config.json").write_text("{")
    return m / "vae/config.json", "not JSON", "download it again"


@damage
def released_vae_config(m: Path) -> tuple[object, ...]:
    """Without its config.json this VAE has to be the released one, and is not."""
    (m / "vae/config.json").unlink()
    return m / "vae", "config.json", "of another model"


@damage
def more_layers(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "transformer/config.json", lambda v: v.update(num_layers=3))
    return m / "transformer", "transformer_blocks.2", "missing", "config.json is of another model"


@damage
def fewer_layers(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "step_llm/config.json", lambda v: v.update(num_layers=1))
    return m / "step_llm", "unknown", "config.json is of another model"


@damage
def wider(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "transformer/config.json", lambda v: v.update(num_attention_heads=2))
    return m / "transformer", "128]", "256]", "config.json is of another model"


@damage
def odd_heads(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "transformer/config.json", lambda v: v.update(attention_head_dim=64))
    return "transformer/config.json", "attention_head_dim", "128"


@damage
def words_for_numbers(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "transformer/config.json", lambda v: v.update(num_layers="two"))
    return "transformer/config.json", "num_layers", "'two'"


@damage
def words_for_widths(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "transformer/config.json", lambda v: v.update(caption_channels=["a", "b"]))
    return m / "transformer/config.json", "download it again"


@damage
def clip_that_cannot_be(m: Path) -> tuple[object, ...]:
    file = "hunyuan_clip/clip_text_encoder/config.json"
    rewrite_json(m / file, lambda v: v.update(num_attention_heads=5))
    return m / file, "download it again"


@damage
def vae_that_cannot_be(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "vae/config.json", lambda v: v.update(decoder=7))
    return m / "vae/config.json", "download it again"


@damage
def version_1_vae(m: Path) -> tuple[object, ...]:
    (m / "vae/vae_v2.safetensors").rename(m / "vae/vae.safetensors")
    return m / "vae/vae_v2.safetensors", "version 1", "hf download"


@damage
def version_1_in_the_config(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "vae/config.json", lambda v: v.update(version=1))
    return "vae/config.json", "version 2", "1"


@damage
def vae_of_another_model(m: Path) -> tuple[object, ...]:
    shutil.rmtree(m / "vae")
    shutil.copytree(TI2V / "vae", m / "vae")
    return m, "VAE has 1 latent channels", "transformer 2", "different models"


@damage
def llm_of_another_model(m: Path) -> tuple[object, ...]:
    from solostep.engine.demo import demo_model

    shutil.rmtree(m / "step_llm")
    shutil.copytree(demo_model() / "step_llm", m / "step_llm")
    return m, "128 and 32", "[48, 32]", "different models"


@damage
def broken_model_index(m: Path) -> tuple[object, ...]:
    (m / "model_index.json").write_text("{")
    return m / "model_index.json", "not JSON", "download it again"


@damage
def shared_folder_that_is_gone(m: Path) -> tuple[object, ...]:
    shutil.rmtree(m / "vae")
    rewrite_json(m / "model_index.json", lambda v: v.update(solostep={"shared": "../elsewhere"}))
    return m.parent / "elsewhere", "vae", "hf download"


@damage
def odd_preset(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "model_index.json", lambda v: v.update(solostep={"preset": ["t2v"]}))
    return m / "model_index.json", "preset"


@damage
def unknown_default(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "model_index.json", lambda v: v.update(solostep={"defaults": {"framez": 3}}))
    return m / "model_index.json", "framez"


@damage
def default_that_is_no_number(m: Path) -> tuple[object, ...]:
    rewrite_json(m / "model_index.json", lambda v: v.update(solostep={"defaults": {"time_shift": "high"}}))
    return m / "model_index.json", "time_shift", "'high'"


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_models(name: str, model: Path, solostep: Run) -> None:
    """Seen from headers alone: no network is loaded. `info` says the same, and still lists the rest."""
    mentions = DAMAGES[name](model)
    solostep("generate", "a cat", "-m", model, "-o", "out.mp4", *SMALL).refused(1, *mentions)
    shown = solostep("info", model)
    assert (shown.code, shown.err, shown.loaded) == (1, "", [])
    problems = [line for line in shown.out.splitlines() if line.startswith("problem: ")]
    assert [p for p in problems if all(str(m) in p for m in mentions)], shown.out
    assert all(network in shown.out for network in ("transformer", "vae", "step_llm", "hunyuan_clip"))


def test_the_undamaged_copy_is_complete(model: Path, solostep: Run) -> None:
    """What the tests above rest on."""
    shown = solostep("info", model)
    assert shown.code == 0
    assert shown.out.count("complete") == 4


def test_the_command_that_is_advised_is_of_the_right_model(tmp_path: Path, solostep: Run) -> None:
    model = Path(shutil.copytree(TI2V, tmp_path / "anything"))
    shutil.rmtree(model / "vae")
    run = solostep("generate", "a cat", "-m", model)
    run.refused(1, "vae", f"hf download stepfun-ai/stepvideo-ti2v --local-dir {model} ")
    turbo = Path(shutil.copytree(T2V, tmp_path / "my-Turbo"))
    (turbo / SHARD_1).unlink()
    run = solostep("generate", "a cat", "-m", turbo)
    run.refused(1, turbo / SHARD_1, f"hf download stepfun-ai/stepvideo-t2v-turbo --local-dir {turbo} ")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_run(zipped: bool, model: Path, tmp_path: Path, solostep: Run) -> None:
    state: dict[str, Any] = torch.load(model / CLIP_BIN, weights_only=True)
    state["bert.extra"] = Evil(tmp_path / "executed")
    torch.save(state, model / CLIP_BIN, _use_new_zipfile_serialization=zipped)
    assert b"mkdir" in (model / CLIP_BIN).read_bytes(), "the file has to be armed"
    run = solostep("generate", "a cat", "-m", model, "-o", "out.mp4", *SMALL)
    said = run.refused(1, model / CLIP_BIN, "never run", "download it again")
    assert "weights_only" not in said, "torch's advice to run the code is not passed on"
    assert solostep("info", model).code == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("value", "file", "tensor", "loaded"),
    [
        (float("nan"), "step_llm/model-00002-of-00002.safetensors", None, ("step_llm",)),
        (float("inf"), CLIP_BIN, "bert.encoder.layer.1.output.dense.weight", ("step_llm", "hunyuan_clip")),
        (float("-inf"), SHARD_2, None, ("step_llm", "hunyuan_clip", "transformer")),
        (float("nan"), SHARD_2, None, ("step_llm", "hunyuan_clip", "transformer")),
    ],
)
def test_weights_that_are_no_numbers(
    value: float, file: str, tensor: str | None, loaded: tuple[str, ...], model: Path, solostep: Run
) -> None:
    """Only the data shows it. Nothing is left that would stand in the way of the repaired model."""
    whole = (model / file).read_bytes()
    if tensor is None:
        name = tensor = next(k for k in sorted(load_file(model / file)) if load_file(model / file)[k].ndim == 2)
        rewrite(model / file, lambda t: t[name][-1, -1].fill_(value))
    else:
        state = torch.load(model / file, weights_only=True)
        state[tensor][-1, -1] = value
        torch.save(state, model / file)
    run = solostep("generate", "a cat", "-m", model, "-o", "out.mp4", *SMALL)
    run.refused(1, model / file, tensor, "NaN or infinity", "download it again", loaded=loaded)
    if value == float("-inf"):
        (model / file).write_bytes(whole)
        assert solostep("generate", "a cat", "-m", model, "-o", "out.mp4", *SMALL).code == 0


def test_nan_in_the_vae_keeps_the_latents(model: Path, solostep: Run) -> None:
    file = model / "vae/vae_v2.safetensors"
    whole = file.read_bytes()
    rewrite(file, lambda t: t["decoder.conv_out.weight"].view(-1)[3:4].fill_(float("nan")))
    run = solostep("generate", "a cat", "-m", model, "-o", "out.mp4", *SMALL)
    networks = ("step_llm", "hunyuan_clip", "transformer", "vae")
    latents = "out.latents.safetensors"
    # By the name that it has in the file, which is not the network's.
    run.refused(1, file, "tensor decoder.conv_out.weight", "NaN", latents, loaded=networks, changed=True)
    assert list(tree(Path())) == [latents]
    file.write_bytes(whole)
    again = solostep("generate", "a cat", "-m", model, "-o", "out.mp4", *SMALL)
    assert (again.code, again.loaded) == (0, ["vae"])


# --- no model at all ----------------------------------------------------------------------------------------------


def test_not_a_checkpoint(tmp_path: Path, solostep: Run) -> None:
    (tmp_path / "empty").mkdir()
    solostep("generate", "a cat", "-m", tmp_path / "empty").refused(1, tmp_path / "empty", "not a Step-Video model")
    demo, other = demo_model().resolve(), demo_model(True).resolve()  # in a folder that is no model itself
    said = solostep("generate", "a cat", "-m", demo.parent).refused(1, "holds some; give one", demo, other)
    assert "download" not in said
    (tmp_path / "file.safetensors").write_bytes(b"123")
    solostep("generate", "a cat", "-m", tmp_path / "file.safetensors").refused(
        2, tmp_path / "file.safetensors", "is a file", "folder"
    )
    for name in ("no such thing", "a/b/c", "./gone", "gone", "https://example.org/a/b", ""):
        said = solostep("generate", "a cat", "-m", name).refused(2, name, "neither a folder nor a Hugging Face id")
        assert "--model" in said
    for command in ("info", "decode"):
        args = [tmp_path / "file.safetensors"] if command == "info" else ["x", "-m", "gone"]
        assert solostep(command, *args).code == 2


@pytest.mark.parametrize(
    ("name", "known"),
    [("stepfun-ai/stepvideo-t2v", "stepfun-ai/stepvideo-t2v"), ("turbo", "stepfun-ai/stepvideo-t2v-turbo")],
)
def test_no_network(name: str, known: str, solostep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("[Errno 101] Network is unreachable\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    said = solostep("generate", "a cat", "-m", name).refused(
        1, known, "Network is unreachable", f"`hf download {known} --local-dir DIR --include ", "--model DIR"
    )
    assert "second line" not in said
    assert "vae/vae.safetensors" not in said, "the version-1 VAE is not needed"


@pytest.mark.parametrize("under", ["file/cache", "/proc/none"])
def test_cache_that_cannot_be_written(under: str, solostep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if under.startswith("/proc") and sys.platform != "linux":
        pytest.skip("needs Linux")
    Path("file").write_text("in the way")
    monkeypatch.setenv("SOLOSTEP_CACHE", under)
    solostep("generate", "a cat", "-m", T2V, *SMALL).refused(1, under, "SOLOSTEP_CACHE")
    solostep("generate", "a cat", *SMALL).refused(1, under, "SOLOSTEP_CACHE")
    assert solostep("info").code == 0, "looking needs no cache"


# --- wrong options ------------------------------------------------------------------------------------------------

HUB = "stepfun-ai/stepvideo-t2v"


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are looked at before a model is: its download takes hours."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("a download was begun"))


WRONG_OPTIONS: list[tuple[list[str], list[str]]] = [
    (["--frames", "0"], ["--frames", "0"]),
    (["--frames", "-17"], ["--frames", "-17"]),
    (["--height", "15"], ["--height", "16", "15"]),
    (["--width", "0"], ["--width"]),
    (["--steps", "0"], ["--steps"]),
    (["--steps", "-1"], ["--steps"]),
    (["--guidance", "-1"], ["--guidance"]),
    (["--guidance", "nan"], ["--guidance", "nan"]),
    (["--guidance", "inf"], ["--guidance", "inf"]),
    (["--time-shift", "0"], ["--time-shift", "above 0"]),
    (["--time-shift", "nan"], ["--time-shift"]),
    (["--motion-score", "-2"], ["--motion-score"]),
    (["--motion-score", "nan"], ["--motion-score"]),
    (["--seed", "-1"], ["--seed"]),
    (["--seed", str(2**63)], ["--seed", "2^63"]),
    (["--seed", str(2**63 - 1), "--num-videos", "2"], ["--seed", "2^63"]),
    (["--precision", "fp7"], ["--precision", "fp7", "bf16", "int8-weight", "torchao:int8"]),
    (["--precision", "int8-plain"], ["--precision", "int8-plain", "int8,"]),
    (["--precision", "torchao:int3"], ["--precision", "torchao:int3", "int8-weight"]),
    (["--text-precision", "int9"], ["--text-precision", "int9", "bf16"]),
    (["--recipe", "nothing.json"], ["--recipe", "nothing.json", "No such file"]),
    (["--recipe", "auto:much"], ["--recipe auto:much", "number above 0", "auto:0.02"]),
    (["--recipe", "auto:-1"], ["--recipe auto:-1", "number above 0"]),
    (["--recipe", "auto:nan"], ["--recipe auto:nan", "number above 0"]),
    (["--recipe", "auto:0.02", "--precision", "int8"], ["--recipe", "--precision int8", "leave one of them out"]),
    (["--device", "toaster"], ["--device", "toaster", "cpu"]),
    (["--device", "meta"], ["--device", "meta", "cpu"]),
    (["--device", "cuda:99"], ["--device", "cuda:99"]),
    (["--codec", "mpeg1"], ["--codec", "mpeg1", "h264"]),
    (["--codec", "lossless", "--quality", "50"], ["--quality", "lossless"]),
    (["--preset", "t3v"], ["t3v", "turbo", "ti2v"]),
    (["-o", "out.webm"], ["out.webm", "h264", ".mp4"]),
    (["-o", "nowhere/out.mp4"], ["nowhere"]),
    (["-o", "."], ["--output", "folder"]),
    (["--codec", "png", "-o", "out.mp4"], ["out.mp4", "png"]),
    (["--image", "nothing.png"], ["--image", "nothing.png", "no such file"]),
    (["--prompts", "list.txt"], ["PROMPT", "--prompts"]),
]


@pytest.mark.parametrize(("options", "mentions"), WRONG_OPTIONS, ids=[" ".join(o) for o, _ in WRONG_OPTIONS])
def test_wrong_options(options: list[str], mentions: list[str], no_download: None, solostep: Run) -> None:
    solostep("generate", "a cat", "-m", HUB, *options).refused(2, *mentions)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--no-such-option"], "--no-such-option"),
        (["--frames", "many"], "--frames"),
        (["--num-videos", "0"], "--num-videos"),
        (["--quality", "101"], "--quality"),
        (["--quality", "nan"], "--quality"),
        (["--fps", "0"], "--fps"),
        (["--fps", "nan"], "--fps"),
        (["a second prompt"], "a second prompt"),
    ],
)
def test_options_that_cannot_be_read(options: list[str], named: str, no_download: None, solostep: Run) -> None:
    run = solostep("generate", "a cat", "-m", HUB, *options)
    assert (run.code, run.out, run.loaded, run.changed) == (2, "", [], False)
    assert named in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize("prompt", ["", "  ", "\n\t"])
def test_empty_prompt(prompt: str, no_download: None, solostep: Run) -> None:
    solostep("generate", prompt, "-m", HUB).refused(2, "prompt is empty", "say what the video shows")


def test_no_prompt(no_download: None, solostep: Run) -> None:
    solostep("generate", "-m", HUB).refused(2, "PROMPT", "--prompts FILE")


def test_prompt_that_is_no_text(no_download: None, solostep: Run) -> None:
    """How bytes of another encoding arrive from a terminal."""
    solostep("generate", os.fsdecode(b"caf\xe9") + "\udce9", "-m", HUB).refused(2, "prompt", "UTF-8")
    solostep("generate", "a cat", "--negative", "\udce9", "-m", HUB).refused(2, "--negative", "UTF-8")


def test_image_and_model_have_to_fit(solostep: Run) -> None:
    Image.new("RGB", (64, 48), "red").save("first.png")
    solostep("generate", "a cat", "-m", T2V, "--image", "first.png", *SMALL).refused(
        2, "--image", T2V, "stepfun-ai/stepvideo-ti2v"
    )
    solostep("generate", "a cat", "-m", TI2V, *SMALL).refused(2, TI2V, "--image FILE")
    demo = demo_model()  # its sister takes images, and needs no download
    solostep("generate", "a cat", "-m", demo, "--image", "first.png").refused(2, "--model", demo_model(True))


@pytest.mark.parametrize("content", [b"", b"hello, I am text", b"\x89PNG\r\n\x1a\n", "cut", "folder"])
def test_unreadable_images(content: bytes | str, no_download: None, solostep: Run) -> None:
    if content == "folder":
        Path("first.png").mkdir()
    elif content == "cut":
        Image.effect_noise((64, 48), 50).save("first.png")
        Path("first.png").write_bytes(Path("first.png").read_bytes()[:700])
    elif isinstance(content, bytes):
        Path("first.png").write_bytes(content)
    solostep("generate", "a cat", "-m", HUB, "--image", "first.png").refused(2, "--image first.png", "read")
    solostep("generate", "a cat", "-m", TI2V, "--image", "first.png").refused(2, "--image first.png", "read")


def test_a_prompt_too_long_for_the_metadata(solostep: Run) -> None:
    """ffmpeg takes no more in its command line: said before the denoising, not after it."""
    run = solostep("generate", "a cat " * 6000, "-m", T2V, "-o", "out.mp4", *SMALL)
    run.refused(2, "out.mp4", "metadata", "shorten", "--no-metadata")


# --- files of prompts ---------------------------------------------------------------------------------------------

GOOD = '{"prompt": "a cat"}'
WRONG_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["holds no prompt", "one a line"]),
    "blank": (b"\n  \n\t\n", ["holds no prompt"]),
    "other_encoding": ("ein Bär".encode("latin-1"), ["UTF-8"]),
    "broken": (f"\n{GOOD}\n\n".encode() + b'{"prompt": "a dog"', ["line 4", "not JSON"]),
    "unknown_key": (f'{GOOD}\n{{"prompt": "a dog", "frames": 17}}'.encode(), ["line 2", "'frames'", "num_frames"]),
    "no_prompt": (f'{GOOD}\n{{"seed": 3}}'.encode(), ["line 2", "prompt"]),
    "prompt_is_a_number": (f'\n{GOOD}\n{{"prompt": 3}}'.encode(), ["line 3", "prompt"]),
    "empty_prompt": (f'{GOOD}\n\n{{"prompt": " "}}'.encode(), ["line 3", "prompt is empty"]),
    "zero_frames": (f'{GOOD}\n\n{{"prompt": "x", "num_frames": 0}}'.encode(), ["line 3", "num_frames", "0"]),
    "text_for_a_number": (f'{GOOD}\n{{"prompt": "x", "width": "48"}}'.encode(), ["line 2", "width", "'48'"]),
    "not_a_number": (f'{GOOD}\n{{"prompt": "x", "time_shift": NaN}}'.encode(), ["line 2", "time_shift", "nan"]),
    "half_a_seed": (f'{GOOD}\n{{"prompt": "x", "seed": 1.5}}'.encode(), ["line 2", "seed", "1.5"]),
    "negative_is_a_number": (f'{GOOD}\n{{"prompt": "x", "negative_prompt": 5}}'.encode(), ["line 2", "negative"]),
    "raw_is_text": (f'{GOOD}\n{{"prompt": "x", "raw_prompt": "no"}}'.encode(), ["line 2", "raw_prompt"]),
    "image_is_a_number": (f'{GOOD}\n{{"prompt": "x", "image": 5}}'.encode(), ["line 2", "image"]),
    "image_is_missing": (f'{GOOD}\n{{"prompt": "x", "image": "no.png"}}'.encode(), ["line 2", "no.png", "such file"]),
    "output_is_a_number": (f'{GOOD}\n{{"prompt": "x", "output": 5}}'.encode(), ["line 2", "output"]),
    "output_is_empty": (f'{GOOD}\n{{"prompt": "x", "output": ""}}'.encode(), ["line 2", "output"]),
    "half_a_character": (f'{GOOD}\n{{"prompt": "\\ud83d"}}'.encode(), ["line 2", "prompt", "UTF-8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_of_prompts(name: str, no_download: None, solostep: Run) -> None:
    """The line is named; not even the folder for the videos is made."""
    content, mentions = WRONG_FILES[name]
    Path("list.txt").write_bytes(content)
    solostep("generate", "--prompts", "list.txt", "-o", "videos", "-m", HUB).refused(2, "list.txt", *mentions)


def test_missing_files_of_prompts(no_download: None, solostep: Run) -> None:
    solostep("generate", "--prompts", "gone.txt", "-m", HUB).refused(2, "--prompts gone.txt", "No such file")
    Path("folder").mkdir()
    solostep("generate", "--prompts", "folder", "-m", HUB).refused(2, "--prompts folder")


def test_outputs_of_prompts(solostep: Run) -> None:
    Path("list.txt").write_text('{"prompt": "a", "output": "x.mp4"}\n{"prompt": "b", "output": "x.mp4"}\n')
    run = solostep("generate", "--prompts", "list.txt", "-m", T2V, *SMALL)
    run.refused(2, "x.mp4", "more than one prompt")
    Path("file").write_text("mine")
    Path("list.txt").write_text("a\nb\n")
    run = solostep("generate", "--prompts", "list.txt", "-o", "file", "-m", T2V, *SMALL)
    run.refused(2, "--output file", "is a file")
    Path("list.txt").write_text('a\n{"prompt": "b", "output": "deeper/x.mp4"}\n')
    run = solostep("generate", "--prompts", "list.txt", "-o", "videos", "-m", T2V, *SMALL)
    run.refused(2, "line 2", "deeper")
    Path("list.txt").write_text('a\n{"prompt": "b", "width": 32, "image": "file"}\n')
    run = solostep("generate", "--prompts", "list.txt", "-o", "videos", "-m", T2V, *SMALL)
    run.refused(2, "line 2", "image")


# --- outputs ------------------------------------------------------------------------------------------------------


@linux
def test_a_place_where_nobody_can_write(solostep: Run) -> None:
    solostep("generate", "a cat", "-m", T2V, "-o", "/proc/out.mp4", *SMALL).refused(2, "/proc", "-o")


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(solostep: Run) -> None:
    Path("locked").mkdir(mode=0o500)
    solostep("generate", "a cat", "-m", T2V, "-o", "locked/out.mp4", *SMALL).refused(2, "locked", "-o")


def test_an_existing_file_is_not_touched(solostep: Run) -> None:
    Path("out.mp4").write_bytes(b"mine")
    run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", *SMALL)
    run.refused(2, "out.mp4", "another generation", "--overwrite", "-o")


def unfinished(path: Path, step: int = 1) -> None:
    """Latents of another generation."""
    settings = {"num_frames": 17, "height": 32, "width": 48}
    identity, info = {"prompt": "other"}, {"model": str(T2V), "precision": "fp32", "settings": settings}
    save_latents(path, SavedLatents(torch.zeros(1, 3, 2, 2, 3), step, 9, 1, True, identity, info))


def test_latents_of_another_generation_are_not_touched(solostep: Run) -> None:
    unfinished(Path("out.latents.safetensors"))
    run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", *SMALL)
    run.refused(2, "out.latents.safetensors", "step 1 of 9", "prompt", "choose another output")


def test_kept_results_of_another_generation_are_not_replaced(solostep: Run) -> None:
    """Their video could not be written, say: the latents are all there is of it."""
    unfinished(Path("a-cat.latents.safetensors"), step=9)
    kept = Path("a-cat.latents.safetensors").read_bytes()
    run = solostep("generate", "a cat", "-m", T2V, "-o", "a-cat.mp4", *SMALL)
    run.refused(2, "`solostep decode a-cat.latents.safetensors`", "--overwrite", "-o")
    run = solostep("generate", "a cat", "-m", T2V, *SMALL)
    assert (run.code, run.out.strip()) == (0, "a-cat-2.mp4"), run.err
    assert Path("a-cat.latents.safetensors").read_bytes() == kept


@pytest.mark.parametrize("kind", ["text", "folder", "damaged"])
def test_what_is_in_the_place_of_the_latents_is_not_touched(kind: str, solostep: Run) -> None:
    path = Path("out.latents.safetensors")
    if kind == "folder":
        path.mkdir()
    else:
        unfinished(path)
        path.write_bytes(b"mine" if kind == "text" else path.read_bytes()[:-5])
    run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", *SMALL)
    run.refused(2, path, "in the way", "choose another output")


def test_latents_before_the_first_step_are_worth_nothing(solostep: Run) -> None:
    unfinished(Path("out.latents.safetensors"), step=0)
    run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", *SMALL)
    assert (run.code, run.out.strip()) == (0, "out.mp4"), run.err


def test_decoding_what_is_no_latents(model: Path, solostep: Run) -> None:
    solostep("decode", "gone.latents.safetensors").refused(2, "gone.latents.safetensors", "no such file")
    Path("x.latents.safetensors").write_bytes(b"mine")
    solostep("decode", "x.latents.safetensors").refused(2, "x.latents.safetensors", "damaged")
    solostep("decode", T2V / "vae/vae_v2.safetensors").refused(2, "vae_v2.safetensors", "solostep wrote")
    unfinished(Path("x.latents.safetensors"))
    Path("x.mp4").write_bytes(b"mine")
    solostep("decode", "x.latents.safetensors").refused(2, "x.mp4", "already there", "--overwrite")
    solostep("decode", "x.latents.safetensors", "-o", "y.mp4", "--host-ram", "8").refused(2, "--host-ram 8 is no size")
    solostep("decode", "x.latents.safetensors", "-o", "y.mp4", "-m", TI2V).refused(2, "2 channels", "--model")
    solostep("decode", "x.latents.safetensors", "-o", "no/y.mp4").refused(2, "folder no", "-o")
    saved = read_latents(Path("x.latents.safetensors"))
    saved.info = {"model": str(T2V)}
    save_latents(Path("x.latents.safetensors"), saved)
    solostep("decode", "x.latents.safetensors", "-o", "y.mp4").refused(2, "x.latents.safetensors", "settings")


# --- a full disk, too little memory -------------------------------------------------------------------------------


class FailingSync:
    """The ``os`` of latents.py with a full disk: some calls of ``fsync`` fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *fails: int) -> None:
        self.calls = 0
        self.fails = fails
        monkeypatch.setattr(storage, "os", SimpleNamespace(**(vars(os) | {"fsync": self})))

    def __call__(self, handle: int) -> None:
        self.calls += 1
        if self.calls in self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_from_the_start(solostep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    FailingSync(monkeypatch, 1)
    run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", *SMALL)
    run.refused(1, "out.latents.safetensors", os.strerror(errno.ENOSPC), "-o")


def test_a_disk_that_fills_while_denoising(tmp_path: Path, solostep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on, says so, and puts the final latents where there is room."""
    disk = FailingSync(monkeypatch, 2, 3)
    run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", "--json", *SMALL)
    assert (run.code, disk.calls) == (0, 4), run.err
    rescued = tmp_path / "rescue" / "out.latents.safetensors"
    assert json.loads(run.out)["latents_file"] == str(rescued)
    assert read_latents(rescued).finished
    assert os.strerror(errno.ENOSPC) in run.err
    assert f"the latents are kept in {rescued}" in run.err
    assert len(read_frames("out.mp4")) == 17
    assert read_latents(Path("out.latents.safetensors")).step == 0, "the file that was there is whole"
    assert not [name for name in tree(Path()) if name.startswith(".")]


def test_a_disk_that_takes_no_latents_at_all(solostep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    FailingSync(monkeypatch, 2, 3, 4)
    run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", "--json", *SMALL)
    assert run.code == 0, run.err
    assert json.loads(run.out)["latents_file"] is None
    assert "Going on without" in run.err
    assert len(read_frames("out.mp4")) == 17


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process or ffmpeg can grow over ``size`` bytes: a write fails as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@posix
def test_no_room_for_latents(solostep: Run) -> None:
    with file_size_limit(700):
        run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", *SMALL)
    run.refused(1, "out.latents.safetensors", os.strerror(errno.EFBIG))


@posix
def test_no_room_for_the_video(solostep: Run) -> None:
    """Room for the latents (2 kB), not for the video: it can be made later from what was kept."""
    with file_size_limit(4096):
        run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", "--quality", "100", *SMALL)
    kept = "out.latents.safetensors"
    networks = ("step_llm", "hunyuan_clip", "transformer", "vae")
    run.refused(1, "out.mp4", f"kept in {kept}", f"`solostep decode {kept}`", loaded=networks, changed=True)
    assert list(tree(Path())) == [kept]
    with file_size_limit(4096):
        again = solostep("decode", kept, "--quality", "100")
    again.refused(1, "out.mp4", loaded=("vae",))
    done = solostep("decode", kept, "--quality", "100")
    assert (done.code, done.out.strip(), done.loaded) == (0, "out.mp4", ["vae"]), done.err
    assert len(read_frames("out.mp4")) == 17


@pytest.mark.parametrize(("free", "named"), [([1_500_000] * 9, "transformer"), ([10**12, 1_000], "Step-LLM")])
def test_too_little_memory(free: list[int], named: str, solostep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the largest network, which is needed last: known before the first one is loaded."""
    left = iter(free)
    monkeypatch.setattr(runtime, "free_memory", lambda device: next(left))
    run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", *SMALL)
    run.refused(1, named, "GB free", "memory")


def test_a_clip_that_no_memory_holds(solostep: Run) -> None:
    options = [*SMALL, "--height", 200_000_000, "--width", 200_000_000]
    run = solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", *options)
    run.refused(1, "out of memory", "--height")


def test_messages_show_names_as_they_are(tmp_path: Path, solostep: Run) -> None:
    """No markup, no emoji names, no cut lines in what comes from outside."""
    name = "[red]:cat:[/red]" + "x" * 150
    (tmp_path / name).mkdir(parents=True)
    solostep("generate", "a cat", "-m", tmp_path / name).refused(1, tmp_path / name)
