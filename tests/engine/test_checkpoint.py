"""Model folders that are put together in unusual ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from solostep.engine.checkpoint import COMPONENTS, describe, open_model, tokenizer_files
from solostep.engine.demo import demo_model
from solostep.engine.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """An image-to-video folder that takes its text encoders and VAE from the folder beside it."""
    whole, lean = tmp_path / "whole", tmp_path / "lean"
    shutil.copytree(GOLDEN / "tiny-stepvideo-ti2v", whole)
    shutil.copytree(whole / "transformer", lean / "transformer")
    (lean / "model_index.json").write_text(json.dumps({"solostep": {"shared": "../whole"}}))
    return lean


def test_shared_networks_are_found(pair: Path) -> None:
    lean, whole = open_model(pair), open_model(pair.parent / "whole")
    assert lean.is_image_to_video
    for name in COMPONENTS:
        assert lean.components[name].fingerprint == whole.components[name].fingerprint
    assert tokenizer_files(pair) == tokenizer_files(pair.parent / "whole")
    assert describe(pair)["problems"] == []


def test_own_networks_come_before_shared_ones(pair: Path) -> None:
    shutil.copytree(GOLDEN / "tiny-stepvideo-ti2v" / "vae", pair / "vae")
    assert open_model(pair).components["vae"].folder == pair / "vae"


def test_a_missing_shared_folder_is_named(pair: Path) -> None:
    shutil.rmtree(pair.parent / "whole" / "vae")
    with pytest.raises(CheckpointError, match="no folder vae"):
        open_model(pair)


def test_fingerprints_follow_the_weights(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        shutil.copytree(GOLDEN / "tiny-stepvideo-t2v", folder)
    assert open_model(first).components["vae"].fingerprint == open_model(second).components["vae"].fingerprint
    path = second / "vae" / "vae_v2.safetensors"
    data = bytearray(path.read_bytes())
    start = len(data) // 2  # one of the sampled places
    data[start : start + 64] = bytes(64)
    path.write_bytes(bytes(data))
    assert open_model(first).components["vae"].fingerprint != open_model(second).components["vae"].fingerprint
    config = second / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_eps": 1e-5}))
    a, b = (open_model(f).components["transformer"].fingerprint for f in (first, second))
    assert a != b


def test_the_demo_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is no folder: that of results has one called so."""
    monkeypatch.chdir(tmp_path)
    own = Path("demo")
    shutil.copytree(GOLDEN / "tiny-stepvideo-t2v", own)
    assert open_model("demo").root == open_model(demo_model()).root
    assert open_model("./demo").root == open_model(own).root == own.resolve()
