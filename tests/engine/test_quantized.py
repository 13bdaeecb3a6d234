"""Precision modes: quantized while loading, stored quantized, and all that goes by them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import nn

import solostep.engine.stages as stages_module
from solostep import StepVideoPipeline
from solostep.engine import memory, runtime, text
from solostep.engine.checkpoint import build_on_meta, describe, load, memory_bytes, open_component
from solostep.engine.config import MODES, PRECISIONS
from solostep.engine.demo import demo_model
from solostep.engine.errors import CheckpointError, SolostepError, UsageError
from solostep.engine.interfaces import cli
from solostep.engine.latents import read_latents
from solostep.engine.quantization import linears
from solostep.engine.runtime import numerics
from solostep.engine.video import read_metadata
from solostep.engine.weights import Component
from solostep.quant.formats import FORMATS, quantize
from solostep.quant.linear import QuantizedLinear
from solostep.quant.recipe import Recipe, default_recipe, precisions

pytestmark = pytest.mark.usefixtures("fast")

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"num_frames": 17, "height": 32, "width": 48, "num_inference_steps": 2, "progress": False}
PROMPT = "a red circle moving right on a blue background"


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all tests keep the embeddings of their few prompts in."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, embeddings: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "embeddings").symlink_to(embeddings)
    return tmp_path / "cache"


def demo() -> Path:
    return Path(demo_model())


def store(root: Path, network: str, recipe: Recipe) -> Path:
    """Quantizes one network of a model folder in place, as a converter writes it."""
    folder = root / network
    component = open_component(root, network)
    modules = recipe.resolve(linears(build_on_meta(component), network))
    for file in component.files:
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            path = name.removesuffix(".weight")
            if name.endswith(".weight") and path in modules:
                tensors |= {f"{path}.{k}": t for k, t in quantize(modules[path], tensor).items()}
            else:
                tensors[name] = tensor
        save_file(tensors, file)
    described = {"solostep_quantization": 1, "precision": recipe.name, "recipe": recipe.as_dict(), "modules": modules}
    described |= {"source": {"model": "demo", "files": {}}, "versions": {"solostep": "0", "torch": "0"}}
    (folder / "quantization.json").write_text(json.dumps(described))
    return root


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model."""
    return Path(shutil.copytree(demo(), tmp_path / "model"))


@pytest.fixture
def int8(model: Path) -> Path:
    """A copy of the demo model whose transformer is stored in int8."""
    return store(model, "transformer", default_recipe("int8", "transformer"))


def latents_of(pipe: StepVideoPipeline, **changes: Any) -> torch.Tensor:
    return pipe(changes.pop("prompt", PROMPT), **({"seed": 7, **TINY, "output_type": "latent"} | changes))


def pipeline(model: Path | None = None, precision: str | None = None, **options: Any) -> StepVideoPipeline:
    return StepVideoPipeline.from_pretrained(model, precision, "cpu", **options)


@pytest.fixture(scope="module")
def base(embeddings: Path) -> torch.Tensor:
    """Latents in bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLOSTEP_CACHE", str(embeddings.parent / "base"))
        return latents_of(pipeline())


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert bool(torch.isfinite(a).all())
    return float((a - b).norm() / b.norm())


# --- every precision ----------------------------------------------------------------------------------------------

BOUNDS = {
    "int8": 0.12, "fp8": 0.2, "int8-weight": 0.1, "fp8-weight": 0.15, "nf4": 0.45, "int4-weight": 0.35,
    "torchao:int8-weight": 0.1, "bnb:nf4": 0.45,
}  # fmt: skip
"""Twice the relative L2 distance to bf16 that was seen for these latents."""


@pytest.mark.parametrize(
    "precision",
    [pytest.param(p, marks=pytest.mark.more) if p in ("torchao:int8-weight", "bnb:nf4") else p for p in BOUNDS],
)
def test_every_precision_makes_nearly_the_same_video(precision: str, base: torch.Tensor) -> None:
    pipe = pipeline(precision=precision)
    far = distance(latents_of(pipe), base)
    assert BOUNDS[precision] / 20 < far < BOUNDS[precision]
    assert pipe.precision == precision


def test_every_precision_is_tested_and_described() -> None:
    assert set(precisions()) <= set(BOUNDS)
    assert list(MODES) == [*PRECISIONS, *precisions()]


@pytest.mark.parametrize("network", ["transformer", "step_llm"])
@pytest.mark.parametrize("precision", [*precisions(), "int8-plain"])
def test_stored_is_quantized_on_load(precision: str, network: str, model: Path) -> None:
    """Bit for bit: names, types, values; and nothing outside the blocks is touched."""
    recipe = default_recipe(precision, network)
    source = open_component(model, network)
    made = load(source, CPU, torch.bfloat16, recipe=recipe)
    count, size = source.parameters, memory_bytes(source, torch.bfloat16, recipe)
    on_disk = source.stored_bytes
    kept = open_component(store(model, network, recipe), network)
    stored = load(kept, CPU, torch.bfloat16)
    a, b = (dict(m.named_parameters()) for m in (made, stored))
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and not tensor.requires_grad
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name
    assert kept.quantization is not None
    for path, part in stored.named_modules():
        expected = FORMATS[kept.quantization.modules[path]].kind if path in kept.quantization.modules else None
        assert type(part) is expected if expected else not isinstance(part, QuantizedLinear)
        if isinstance(part, nn.Linear):
            assert not path.startswith(("transformer_blocks", "transformer.layers"))
    # The figures that memory checks and `info` go by.
    assert kept.parameters == count
    real = sum(p.nbytes for p in stored.parameters())
    assert real == size == memory_bytes(kept, torch.bfloat16) < 2 * count
    assert kept.stored_bytes < 0.7 * on_disk


def test_a_stored_model_needs_no_option(int8: Path, base: torch.Tensor) -> None:
    pipe = pipeline(int8)
    video = pipe(PROMPT, seed=7, **TINY)
    made = pipeline(precision="int8")
    assert torch.equal(video.latents, latents_of(made))
    assert (pipe.precision, pipe.text_precision) == ("int8", "bf16")
    for key in ("precision", "text_precision", "recipe"):
        assert video.record[key] == {"precision": "int8", "text_precision": "bf16",
                                     "recipe": default_recipe("int8", "transformer").as_dict()}[key]  # fmt: skip
    assert torch.equal(latents_of(pipeline(int8, "int8")), video.latents), "asking for what is there is no mistake"


def test_activations_of_a_stored_network_can_be_fp32(int8: Path) -> None:
    network: Any = load(open_component(int8, "transformer"), CPU, torch.float32)
    assert network.dtype == torch.float32
    kinds = {p.dtype for p in network.parameters()}
    assert kinds == {torch.float32, torch.int8}
    block = network.transformer_blocks[0].attn1.wo
    x = torch.randn(5, 256)
    with numerics():
        assert block(x).dtype == torch.float32


def test_text_precision(base: torch.Tensor, model: Path, cache: Path) -> None:
    """Step-LLM alone; embeddings are kept apart."""
    (cache / "embeddings").unlink()
    entries = [0]

    def with_text(root: Path | None, precision: str | None, **options: Any) -> torch.Tensor:
        made = latents_of(pipeline(root, text_precision=precision, **options))
        entries.append(len(list((cache / "embeddings").iterdir())))
        return made

    assert torch.equal(with_text(None, None), base)
    eight, four = with_text(None, "int8"), with_text(None, "nf4")
    assert entries == [0, 2, 4, 6]
    assert 0 < distance(eight, base) < 0.1
    assert 0 < distance(four, base) < 0.2
    assert not torch.equal(eight, four)
    stored = with_text(store(model, "step_llm", default_recipe("int8", "step_llm")), None)
    assert torch.equal(stored, eight)
    assert pipeline(model).text_precision == "int8"
    full = with_text(None, "fp32")
    assert 0 < distance(full, base) < 0.2
    assert pipeline(None, "fp32").text_precision == "fp32"
    with pytest.raises(UsageError, match=r"--text-precision nf4: .*step_llm is stored in int8"):
        pipeline(model, text_precision="nf4")


# --- numerics that hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_company_changes_no_bits(precision: str) -> None:
    pipe = pipeline(precision=precision, keep_loaded=True)
    small = TINY | {"output_type": "latent", "num_inference_steps": 1}
    alone = pipe("b", seed=5, **small)
    assert torch.equal(pipe(["a", "b"], seed=4, **small)[1], alone)
    assert torch.equal(pipe(["b", "a"], seed=5, **small)[0], alone)


class Stop(Exception):
    pass


def stop_after(step: int) -> Callable[..., None]:
    def callback(pipe: Any, done: int, timestep: float, state: Any) -> None:
        if done == step:
            raise Stop

    return callback


@pytest.mark.parametrize("precision", ["int8", pytest.param("fp8", marks=pytest.mark.more)])
def test_resume_gives_the_same_bits(precision: str, tmp_path: Path) -> None:
    whole = latents_of(pipeline(precision=precision), num_inference_steps=3)
    place = {"latents_path": tmp_path / "x.latents.safetensors", "num_inference_steps": 3}
    with pytest.raises(Stop):
        latents_of(pipeline(precision=precision), callback_on_step_end=stop_after(0), **place)
    assert read_latents(place["latents_path"]).step == 1
    for other in ({"precision": "int8-weight"}, {"precision": None}, {"recipe": Recipe(precision, (("*", "int8"),))}):
        with pytest.raises(UsageError, match=r"step 1 of 3\) that differs in .*(precision|recipe)"):
            latents_of(pipeline(**other), **place)
    with pytest.raises(UsageError, match="differs in text_precision, text_recipe;"):
        latents_of(pipeline(precision=precision, text_precision="fp8"), **place)
    seen: list[int] = []
    resumed = latents_of(
        pipeline(precision=precision), callback_on_step_end=lambda p, step, *_: seen.append(step), **place
    )
    assert seen == [1, 2]
    assert torch.equal(resumed, whole)


def test_modes_do_not_share_unfinished_runs(cache: Path) -> None:
    """Without a path of their own, too: the same call in another mode begins anew."""
    with pytest.raises(Stop):
        latents_of(pipeline(precision="int8"), callback_on_step_end=stop_after(0))
    seen: list[int] = []
    latents_of(pipeline(precision="fp8"), callback_on_step_end=lambda p, step, *_: seen.append(step))
    assert seen == [0, 1]
    assert len(list((cache / "runs").glob("finished-*"))) == 1


# --- recipes ------------------------------------------------------------------------------------------------------


def test_a_recipe_of_ones_own(tmp_path: Path, base: torch.Tensor) -> None:
    file = tmp_path / "mine.json"
    rules = [["*.ff.net.2", "bf16"], ["transformer_blocks.0.*", "fp8-weight"], ["*", "int8"]]
    file.write_text(json.dumps({"name": "mine", "rules": rules}))
    pipe = pipeline(recipe=file, keep_loaded=True)
    video = pipe(PROMPT, seed=7, **TINY)
    assert 0 < distance(video.latents, base) < BOUNDS["fp8"]
    assert (video.record["precision"], video.record["recipe"]) == ("mine", {"name": "mine", "rules": rules})
    network = pipe._networks["transformer"].network
    assert type(network.transformer_blocks[0].attn1.wo) is FORMATS["fp8-weight"].kind
    assert type(network.transformer_blocks[1].attn1.wo) is FORMATS["int8"].kind
    assert type(network.transformer_blocks[1].ff.net[2]) is nn.Linear
    assert type(network.proj_out) is nn.Linear, "outside the blocks nothing is quantized, whatever a pattern says"
    metadata = tmp_path / "x.mp4"
    video.save(metadata)
    assert read_metadata(metadata)["recipe"] == video.record["recipe"]
    many = Recipe("many", tuple((f"transformer_blocks.{i}.attn1.wo", "int8") for i in range(200)))
    video.record["recipe"] = many.as_dict()
    video.save(metadata)
    assert set(read_metadata(metadata)["recipe"]) == {"name", "sha256"}, "a video file holds little"


WRONG_RECIPES = {
    "text": ("nothing", "is not JSON"),
    "list": ("[]", "has to be"),
    "no rules": ('{"name": "x"}', "is no recipe"),
    "odd rule": ('{"rules": [["a"]]}', "is no recipe"),
    "unknown format": ('{"rules": [["*", "int3"]]}', "'int3' is unknown; choose one of bf16, int8"),
    "another network": ('{"rules": [["layers.*", "int8"]]}', "fits no linear of this network"),
}


@pytest.mark.parametrize("kind", WRONG_RECIPES)
def test_what_is_no_recipe(kind: str, tmp_path: Path) -> None:
    written, words = WRONG_RECIPES[kind]
    (tmp_path / "mine.json").write_text(written)
    with pytest.raises(UsageError, match="mine.json") as error:
        pipeline(recipe=str(tmp_path / "mine.json"))
    assert words in str(error.value)


def test_auto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measured once, when it is needed and after all that can be refused."""
    calls: list[tuple[Any, ...]] = []
    module = ModuleType("solostep.engine.sensitivity")

    def auto_recipe(*args: Any) -> Recipe:
        calls.append(args)
        return Recipe("auto:0.02", (("*.attn1.*", "int8"),))

    module.auto_recipe = auto_recipe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    pipe = pipeline(recipe="auto:0.02")
    request = pipe.request(PROMPT, latents_path=tmp_path / "x.latents.safetensors")
    assert not pipe.is_finished(request)
    with pytest.raises(UsageError, match="empty"):
        pipe(" ")
    assert (calls, pipe.precision) == ([], "auto:0.02")
    first, second = latents_of(pipe), latents_of(pipe, seed=8)
    assert not torch.equal(first, second)
    assert len(calls) == 1
    assert calls[0][:3] == (pipe.model, 0.02, CPU)
    assert torch.equal(first, latents_of(pipeline(recipe=Recipe("auto:0.02", (("*.attn1.*", "int8"),)))))


# --- what a folder can be wrong in --------------------------------------------------------------------------------

Q = "transformer/quantization.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LINEAR = "transformer_blocks.1.attn1.wqkv"
Damage = Callable[[Path], "tuple[object, ...]"]
DAMAGES: dict[str, Damage] = {}


def damage(function: Damage) -> Damage:
    DAMAGES[function.__name__] = function
    return function


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def rewrite_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@damage
def lost(m: Path) -> tuple[object, ...]:
    (m / Q).unlink()
    return m / Q, "is missing", "transformer_blocks.0", "I8", "copy it", "solostep quantize"


@damage
def no_json(m: Path) -> tuple[object, ...]:
    (m / Q).write_text('{"modules": ')
    return m / Q, "not JSON"


@damage
def a_list(m: Path) -> tuple[object, ...]:
    (m / Q).write_text("[1]")
    return m / Q, "JSON object"


@damage
def another_version(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v.update(solostep_quantization=2))
    return m / Q, "version 2", "reads version 1", "update solostep"


@damage
def no_modules(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v.pop("modules"))
    return m / Q, "modules is missing"


@damage
def no_precision(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v.update(precision=8))
    return m / Q, "precision"


@damage
def no_recipe(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v.update(recipe={"rules": "int8"}))
    return m / Q, "no recipe"


@damage
def unknown_format(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v["modules"].update({LINEAR: "int5"}))
    return m / Q, LINEAR, "'int5'", "int8-plain"


@damage
def foreign_format(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v["modules"].update({LINEAR: "bnb:nf4"}))
    return m / Q, LINEAR, "'bnb:nf4'"


@damage
def no_such_module(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v["modules"].update({"transformer_blocks.6.attn1.wo": "int8"}))
    return m / Q, "transformer_blocks.6.attn1.wo", "not a linear"


@damage
def a_module_that_is_no_linear(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v["modules"].update({"transformer_blocks.1.attn1.q_norm": "int8"}))
    return m / Q, "transformer_blocks.1.attn1.q_norm", "not a linear"


@damage
def outside_the_blocks(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v["modules"].update({"proj_out": "int8"}))
    return m / Q, "proj_out", "not a linear inside the blocks"


@damage
def a_module_too_few(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v["modules"].pop(LINEAR))
    return m / WEIGHTS, f"{LINEAR}.weight_scale", "unknown"


@damage
def another_format(m: Path) -> tuple[object, ...]:
    rewrite_json(m / Q, lambda v: v["modules"].update({LINEAR: "fp8"}))
    return m / WEIGHTS, f"{LINEAR}.weight ", "stored as I8", "F8_E4M3"


@damage
def float_weights(m: Path) -> tuple[object, ...]:
    rewrite(m / WEIGHTS, lambda t: t.update({f"{LINEAR}.weight": t[f"{LINEAR}.weight"].bfloat16()}))
    return m / WEIGHTS, f"{LINEAR}.weight ", "stored as BF16", "I8"


@damage
def no_scale(m: Path) -> tuple[object, ...]:
    rewrite(m / WEIGHTS, lambda t: t.pop(f"{LINEAR}.weight_scale"))
    return m / "transformer", f"{LINEAR}.weight_scale", "missing"


@damage
def half_scale(m: Path) -> tuple[object, ...]:
    rewrite(m / WEIGHTS, lambda t: t.update({f"{LINEAR}.weight_scale": t[f"{LINEAR}.weight_scale"].half()}))
    return m / WEIGHTS, f"{LINEAR}.weight_scale", "F16", "F32"


@damage
def short_scale(m: Path) -> tuple[object, ...]:
    rewrite(m / WEIGHTS, lambda t: t.update({f"{LINEAR}.weight_scale": t[f"{LINEAR}.weight_scale"][:5].clone()}))
    return m / WEIGHTS, f"{LINEAR}.weight_scale", "[5]", "[768]"


@damage
def whole_numbers_elsewhere(m: Path) -> tuple[object, ...]:
    rewrite(m / WEIGHTS, lambda t: t.update({"proj_out.weight": t["proj_out.weight"].to(torch.int8)}))
    return m / WEIGHTS, "proj_out.weight", "I8", "BF16"


@pytest.fixture(scope="module")
def stored_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(demo() / "transformer", tmp_path_factory.mktemp("int8") / "transformer")).parent
    return store(root, "transformer", default_recipe("int8", "transformer"))


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders(name: str, stored_int8: Path, tmp_path: Path) -> None:
    """Seen from headers alone."""
    root = Path(shutil.copytree(stored_int8, tmp_path / "model"))
    mentions = DAMAGES[name](root)
    with pytest.raises(CheckpointError) as error:
        open_component(root, "transformer")
    said = str(error.value)
    assert [str(m) for m in mentions if str(m) not in said] == [], said
    assert said.endswith(".")


VALUES = {
    "nan in e4m3": ("fp8", "weight", 0x7F, "NaN or infinity"),
    "negative nan in e4m3": ("fp8", "weight", 0xFF, "NaN or infinity"),
    "nan in a scale": ("fp8", "weight_scale", float("nan"), "NaN, infinity or a negative scale"),
    "infinity in a scale": ("int8", "weight_scale", float("inf"), "NaN, infinity or a negative scale"),
    "a negative scale": ("int8", "weight_scale", -1e-3, "NaN, infinity or a negative scale"),
    "nan in a zero point": ("int4-weight", "weight_zero", float("nan"), "NaN or infinity"),
    "nan that would be quantized": ("bf16", "weight", float("nan"), "NaN or infinity"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_no_weight_can_have(kind: str, tmp_path: Path) -> None:
    precision, leaf, value, words = VALUES[kind]
    root = Path(shutil.copytree(demo() / "transformer", tmp_path / "model" / "transformer")).parent
    if precision != "bf16":
        store(root, "transformer", default_recipe(precision, "transformer"))
    name = f"{LINEAR}.{leaf}"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        t = tensors[name]
        (t.view(torch.uint8) if isinstance(value, int) else t).view(-1)[-1] = value

    rewrite(root / WEIGHTS, spoil)
    component = open_component(root, "transformer")
    recipe = default_recipe("int8", "transformer") if precision == "bf16" else None
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: tensor {name} holds {words}; .*download it again"):
        load(component, CPU, torch.bfloat16, recipe=recipe)


def test_zero_rows_are_right(tmp_path: Path) -> None:
    root = Path(shutil.copytree(demo() / "transformer", tmp_path / "model" / "transformer")).parent
    rewrite(root / WEIGHTS, lambda t: t[f"{LINEAR}.weight"][:9].zero_())
    for precision in precisions():
        network: Any = load(
            open_component(root, "transformer"), CPU, torch.bfloat16, recipe=default_recipe(precision, "transformer")
        )
        with numerics():
            out = network.get_submodule(LINEAR)(torch.randn(2, 256).bfloat16())
        assert bool(torch.isfinite(out).all())
        assert not out[:, :9].any()
        assert out[:, 9:].any()


def test_a_file_that_changes_between_the_check_and_the_load(int8: Path) -> None:
    component = open_component(int8, "transformer")
    rewrite(int8 / WEIGHTS, lambda t: t.update({LINEAR + ".weight": t[LINEAR + ".weight"][:4].clone()}))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} changed after it was checked"):
        load(component, CPU, torch.bfloat16)


# --- asking for what cannot be ------------------------------------------------------------------------------------


def test_another_precision_than_the_stored_one(int8: Path) -> None:
    for precision in ("bf16", "fp32", "fp8", "torchao:int8"):
        with pytest.raises(UsageError) as error:
            pipeline(int8, precision)
        said = str(error.value)
        assert f"--precision {precision}: " in said
        for words in (str(int8 / "transformer"), "stored in int8", "leave --precision out", "--model"):
            assert words in said
    for recipe in ("auto:0.5", Recipe("mine", (("*", "fp8"),))):
        with pytest.raises(UsageError, match="--recipe: .*stored in int8 and cannot be quantized again"):
            pipeline(int8, recipe=recipe)
    with pytest.raises(UsageError, match="stored in int8 and cannot be quantized again"):
        load(open_component(int8, "transformer"), CPU, torch.bfloat16, recipe=default_recipe("fp8", "transformer"))


def test_memory_is_counted_as_it_will_be(int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that holds the model in int8 and not in bf16 is no reason to refuse int8, and one to refuse bf16."""
    transformer = open_component(demo(), "transformer")
    whole = 2 * transformer.parameters
    latents_of(pipeline(int8), num_inference_steps=1)  # its texts are kept: Step-LLM needs more than there is below
    for module in (memory, runtime):
        monkeypatch.setattr(module, "free_memory", lambda device: int(0.6 * whole))
    for pipe in (pipeline(int8), pipeline(precision="int8"), pipeline(precision="nf4")):
        latents_of(pipe, num_inference_steps=1)
    with pytest.raises(SolostepError, match=r"The transformer in bf16 takes 0\.0 GB and cpu has 0\.0 GB free"):
        latents_of(pipeline(), num_inference_steps=1)


# --- what is told -------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_quantization(int8: Path) -> None:
    first = open_component(int8, "transformer")
    assert first.fingerprint != open_component(demo(), "transformer").fingerprint
    rewrite_json(int8 / Q, lambda v: v["modules"].update({LINEAR: "int8-plain"}))
    second = open_component(int8, "transformer")  # the same files but for this word
    assert second.files == first.files
    assert second.fingerprint != first.fingerprint


def test_info(int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {c["name"]: c for c in describe(int8)["components"]}
    assert found["transformer"]["quantization"] == {
        "precision": "int8", "recipe": "int8", "linears": {"int8": 36, "int8-weight": 6},
    }  # fmt: skip
    assert found["transformer"]["parameters"] == open_component(demo(), "transformer").parameters
    assert found["step_llm"]["quantization"] is None
    shown = command(capsys, "info", int8)
    assert "BF16 F32 I8" in shown
    assert "transformer is stored in int8: linears 36 int8, 6 int8-weight\n" in shown
    rewrite_json(int8 / Q, lambda v: v["recipe"].update(name="mine"))
    assert "transformer is stored in int8 (recipe mine): " in command(capsys, "info", int8)


def command(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(cli.app).main([str(a) for a in args], prog_name="solostep")
    said = capsys.readouterr()
    assert int(ended.value.code or 0) == code, said.err
    return said.out if code == 0 else said.err


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], int8: Path
) -> None:
    """A run in a mode, its record, and its latents decoded where only the VAE is needed."""
    monkeypatch.chdir(tmp_path)
    small = "--frames 17 --height 32 --width 48 --steps 1 --seed 3 --device cpu".split()
    options = ["-m", int8, "-o", "a.mp4", "--text-precision", "int8-weight", "--json", *small]
    record = json.loads(command(capsys, "generate", PROMPT, *options))
    kept = read_metadata(Path("a.mp4"))
    for told in (record, kept):
        assert (told["precision"], told["text_precision"], told["recipe"]["name"]) == ("int8", "int8-weight", "int8")
    assert "already_finished" in command(capsys, "generate", PROMPT, *options)
    assert "another generation" in command(capsys, "generate", PROMPT, "-m", int8, "-o", "a.mp4", *small, code=2), (
        "without the text precision it is another video"
    )
    loaded: list[tuple[str, torch.dtype]] = []
    real = stages_module.load

    def watched(component: Component, device: Any, dtype: torch.dtype, *args: Any, **kwargs: Any) -> nn.Module:
        loaded.append((component.name, dtype))
        return real(component, device, dtype, *args, **kwargs)

    for module in (stages_module, text):
        monkeypatch.setattr(module, "load", watched)
    again = json.loads(command(capsys, "decode", "a.latents.safetensors", "-o", "b.mp4", "--json", "--device", "cpu"))
    assert loaded == [("vae", torch.bfloat16)]
    assert Path("b.mp4").read_bytes() == Path("a.mp4").read_bytes()
    assert {k: again[k] for k in ("precision", "text_precision")} == {
        "precision": "int8",
        "text_precision": "int8-weight",
    }
    command(capsys, "decode", "a.latents.safetensors", "-o", "c.mp4", "--precision", "fp32", "--device", "cpu")
    assert loaded[1:] == [("vae", torch.float32)]
    refused = command(capsys, "decode", "a.latents.safetensors", "-o", "d.mp4", "--precision", "int8", code=2)
    assert "--precision int8 is unknown; choose one of bf16, fp32" in refused
