"""The networks against numbers recorded from the official code, and proof that these tests can tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from solostep.engine import golden, golden_cases
from solostep.engine.checkpoint import Component, TensorInfo, build_on_meta, check_tensors
from solostep.engine.errors import CheckpointError, UsageError
from solostep.engine.models import step_llm, transformer
from solostep.engine.runtime import numerics

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))
CPU = torch.device("cpu")


def run(name: str, dtype: str) -> list[golden.Result]:
    with numerics():
        return golden.run_case(golden_cases.read_case(GOLDEN / f"{name}.safetensors"), dtype, CPU)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_case(path: Path, dtype: str) -> None:
    case = golden_cases.read_case(path)
    if dtype == "bf16" and not case.bf16_outputs and not case.component.startswith("e2e_"):
        pytest.skip("this case holds no bf16 run")
    results = run(path.stem, dtype)
    assert results
    assert [f"{r.tensor}: {r.rel_l2:.1e} / {r.max_abs:.1e}, limit {r.limit}" for r in results if not r.passed] == []


@pytest.mark.parametrize("variant", ["t2v", "ti2v"])
def test_tokenizers(variant: str) -> None:
    results = list(golden._tokenizers(GOLDEN / f"tokenizer_cases_{variant}.json"))
    assert len(results) > 20
    assert all(r.passed for r in results)


def over(results: list[golden.Result]) -> set[str]:
    return {r.tensor for r in results if not r.passed}


def test_limits_catch_a_missing_distance_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_llm, "alibi_slopes", lambda heads: [0.0] * heads)
    assert over(run("step_llm", "fp32")) == over(run("step_llm", "bf16")) == {"y"}


def test_limits_catch_exact_rope_angles_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = transformer.rope_angles

    def rounded_late(length: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = exact(length, width, torch.float32)
        return cos.to(dtype), sin.to(dtype)

    for module in (transformer, golden):
        monkeypatch.setattr(module, "rope_angles", rounded_late)
    assert {"out", "cos_64", "sin_64"} <= over(run("rope3d_long", "bf16"))
    assert not over(run("rope3d_long", "fp32"))


def test_limits_catch_an_exact_timestep_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = transformer.sinusoid
    monkeypatch.setattr(transformer, "sinusoid", lambda values, width=256: exact(values.float() * 0.9973, width))
    assert "adaln_6dim" in over(run("dit_t2v", "fp32"))


def test_limits_catch_one_wrong_weight() -> None:
    case = golden_cases.read_case(GOLDEN / "dit_t2v.safetensors")
    case.weights["transformer_blocks.1.attn2.k_norm.weight"][5] *= 1.5
    with numerics():
        results = golden.run_case(case, "fp32", CPU)
    assert over(results) == {"block_1", "x"}


def test_non_finite_output_never_passes() -> None:
    nan = torch.full((3,), float("nan"))
    assert golden_cases.differences(nan, torch.zeros(3)) == (float("inf"), float("inf"))
    assert not golden_cases.compare("c", "t", "fp32", nan, nan, golden_cases.Limit(rel_l2=1.0)).passed


def test_verify_folder_runs_what_it_has_never_seen(tmp_path: Path) -> None:
    """Only metadata counts: a renamed file in another folder runs, an unknown component fails and hides nothing."""
    from safetensors.torch import save_file

    shutil.copy(GOLDEN / "rms_norm_128.safetensors", tmp_path / "anything.safetensors")
    metadata = {"component": "warp_drive", "config": "{}"}
    save_file({"outputs.x": torch.zeros(1)}, tmp_path / "a_new_one.safetensors", metadata=metadata)
    results = golden.verify_folder(tmp_path, "cpu")
    failed = [r for r in results if not r.passed]
    assert {r.case for r in results if r.passed} == {"anything"}
    assert {r.case for r in failed} == {"a_new_one"}
    assert "warp_drive" in failed[0].error


def test_verify_folder_needs_cases(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no golden cases"):
        golden.verify_folder(tmp_path)
    with pytest.raises(UsageError, match="not a folder"):
        golden.verify_folder(tmp_path / "absent")


def test_an_output_that_is_not_made_is_a_failure(tmp_path: Path) -> None:
    case = golden_cases.read_case(GOLDEN / "rms_norm_128.safetensors")
    case.outputs["surprise"] = torch.zeros(2)
    with pytest.raises(golden.SolostepError, match="surprise"):
        golden.run_case(case, "fp32", CPU)


# --- the real tensor lists ----------------------------------------------------------------------------------------

MANIFESTS = {
    "dit_t2v": "transformer",
    "dit_ti2v": "transformer",
    "vae_v2": "vae",
    "step_llm": "step_llm",
    "hunyuan_clip": "hunyuan_clip",
}


def manifest(name: str) -> tuple[Component, int]:
    """The released model's tensors as a component without files."""
    listed = json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())
    prefix = "bert." if name == "hunyuan_clip" else ""
    tensors = {
        prefix + key: TensorInfo(Path(name), key, tuple(shape), "BF16")
        for key, shape in listed["state_dict"].items()
        if not key.startswith("pooler.")  # not used
    }
    return Component(MANIFESTS[name], Path(name), listed["config"], (), tensors), listed["n_parameters"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_released_tensors_fit(name: str) -> None:
    component, parameters = manifest(name)
    module = build_on_meta(component)
    check_tensors(component, module)
    assert all(p.is_meta for p in module.parameters())
    pooler = 1_049_600 if name == "hunyuan_clip" else 0
    assert component.parameters + pooler == parameters


@pytest.mark.parametrize("name", MANIFESTS)
def test_default_configurations_are_the_released_ones(name: str) -> None:
    from solostep.engine.config import StepLLMConfig, TransformerConfig, VAEConfig

    component, _ = manifest(name)
    classes = {"transformer": TransformerConfig, "vae": VAEConfig, "step_llm": StepLLMConfig}
    if name in ("dit_t2v", "vae_v2", "step_llm"):
        made = classes[MANIFESTS[name]]
        assert made.from_dict(component.config) == made()


@pytest.mark.parametrize("name", MANIFESTS)
def test_released_tensors_are_checked_strictly(name: str) -> None:
    component, _ = manifest(name)
    module = build_on_meta(component)
    key = sorted(component.tensors)[len(component.tensors) // 2]
    info = component.tensors[key]

    def with_tensors(tensors: dict[str, TensorInfo]) -> Component:
        return Component(component.name, component.folder, component.config, (), tensors)

    rest = {k: t for k, t in component.tensors.items() if k != key}
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        check_tensors(with_tensors(rest), module)
    with pytest.raises(CheckpointError, match="extra.weight is unknown"):
        check_tensors(with_tensors({**component.tensors, "extra.weight": info}), module)
    longer = TensorInfo(info.file, info.stored_name, (info.shape[0] + 1, *info.shape[1:]), info.dtype)
    with pytest.raises(CheckpointError, match=f"{key} has shape"):
        check_tensors(with_tensors({**rest, key: longer}), module)
    whole = TensorInfo(info.file, info.stored_name, info.shape, "I64")
    with pytest.raises(CheckpointError, match=f"{key} is stored as I64"):
        check_tensors(with_tensors({**rest, key: whole}), module)


@pytest.mark.more
def test_rounding_once_in_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that CUDA takes for bf16, made to run here: within the same limits, and really another path."""
    from solostep.engine.models import vae

    plain = {r.tensor: r.rel_l2 for r in run("vae_v2_encoder", "bf16")}
    monkeypatch.setattr(vae, "_rounds_once", lambda m, x: hasattr(m, "round_once") and x.dtype == torch.bfloat16)
    results = run("vae_v2_encoder", "bf16")
    assert not over(results)
    assert {r.tensor: r.rel_l2 for r in results} != plain
    before = {r.tensor: r.rel_l2 for r in run("vae_v2_decoder", "bf16")}
    monkeypatch.undo()
    assert {r.tensor: r.rel_l2 for r in run("vae_v2_decoder", "bf16")} == before
