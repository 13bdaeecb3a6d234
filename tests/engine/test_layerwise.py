"""Parts of networks where they are wanted: in homes of their own, one after the other, and Step-LLM layer by layer."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solostep.engine import placing, runtime, text
from solostep.engine.checkpoint import Component, ModelFolder, build_on_meta, open_component, open_model
from solostep.engine.errors import CheckpointError, SolostepError, UsageError
from solostep.engine.precision import Mode, choose_mode
from solostep.engine.quantization import linears
from solostep.engine.runtime import numerics
from solostep.engine.weights import largest_part_bytes, load, load_each, memory_bytes
from solostep.offload import reader
from solostep.quant.formats import quantize
from solostep.quant.recipe import Recipe, default_recipe

T2V = Path(__file__).parents[1] / "golden" / "tiny-stepvideo-t2v"
CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
LAYERS = ["transformer.layers.0", "transformer.layers.1"]
BLOCK = "transformer_blocks.1."
TEXTS = ["a red panda", "一只猫在唱歌，尾巴很长", ""]

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny text-to-video checkpoint."""
    return Path(shutil.copytree(T2V, tmp_path / "model"))


def spoil(folder: Path, name: str) -> None:
    """Puts a NaN into a stored tensor."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(-1)[-1] = math.nan
            save_file(tensors, file)


def recipe_of(precision: str | None, network: str) -> Recipe | None:
    return None if precision is None else default_recipe(precision, network)


def equal(a: nn.Module, b: nn.Module, prefix: str = "") -> bool:
    """Whether a module has the values of another one, or of what is in it under ``prefix``."""
    mine, others = dict(a.named_parameters()), dict(b.named_parameters())
    others = {k.removeprefix(prefix): p for k, p in others.items() if k.startswith(prefix)}
    same = [mine[k].dtype == others[k].dtype and torch.equal(mine[k], others[k]) for k in mine]
    return mine.keys() == others.keys() and all(same)


def all_on_meta(module: nn.Module) -> bool:
    return all(p.is_meta for p in module.parameters())


# --- homes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("precision", [None, "int8", "fp8", "nf4", "int4-weight"])
def test_parameters_go_to_their_homes(precision: str | None, dtype: torch.dtype) -> None:
    """A block in one run of memory, another one nowhere; the rest stays on the device."""
    component, recipe = open_component(T2V, "transformer"), recipe_of(precision, "transformer")
    plain = load(component, CPU, dtype, recipe=recipe)
    given: dict[str, Tensor | None] = {}

    def homes(network: nn.Module) -> dict[str, Tensor | None]:
        assert not given, "called once"
        kinds = {name: p.dtype for name, p in plain.named_parameters()}
        assert {name: p.dtype for name, p in network.named_parameters()} == kinds
        assert all_on_meta(network)
        slab = torch.zeros(sum(p.nbytes + 256 for p in network.parameters()), dtype=torch.uint8)
        at = 0
        for name, p in network.named_parameters():
            if name.startswith("transformer_blocks.0."):
                given[name] = None
            elif name.startswith(BLOCK):
                given[name] = slab[at : at + p.nbytes].view(p.dtype).view(p.shape)
                at += -(-p.nbytes // 256) * 256
        return given

    network = load(component, CPU, dtype, recipe=recipe, homes=homes)
    found = dict(network.named_parameters())
    assert given and found.keys() == dict(plain.named_parameters()).keys()
    for name, wanted in plain.named_parameters():
        parameter = found[name]
        assert not parameter.requires_grad
        if name in given and given[name] is None:
            assert parameter.is_meta and (parameter.shape, parameter.dtype) == (wanted.shape, wanted.dtype)
            continue
        assert torch.equal(parameter, wanted), name
        home = given.get(name)
        if home is not None:
            assert parameter.data_ptr() == home.data_ptr() and torch.equal(home, wanted)


def test_a_home_keeps_its_strides(model: Path) -> None:
    name = f"{BLOCK}ff.net.0.proj.weight"
    component = open_component(model, "transformer")

    def homes(network: nn.Module) -> dict[str, Tensor | None]:
        rows, columns = network.get_parameter(name).shape
        return {name: torch.zeros(columns, rows, dtype=BF16).t()}

    parameter = load(component, CPU, BF16, homes=homes).get_parameter(name)
    assert parameter.stride() == (1, parameter.shape[0])
    assert torch.equal(parameter, load(component, CPU, BF16).get_parameter(name))


def test_homes_of_a_part_have_its_names() -> None:
    component = open_component(T2V, "transformer")
    part = BLOCK.removesuffix(".")
    block = load(component, CPU, BF16, part, homes=lambda m: {n: torch.zeros(p.shape, dtype=BF16)
                                                              for n, p in m.named_parameters()})  # fmt: skip
    assert equal(block, load(component, CPU, BF16), BLOCK)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_what_goes_nowhere_is_checked(precision: str | None, model: Path) -> None:
    name = f"{BLOCK}ff.net.2.weight"
    spoil(model / "transformer", name)
    component, recipe = open_component(model, "transformer"), recipe_of(precision, "transformer")
    with pytest.raises(CheckpointError, match=rf"tensor {BLOCK}ff\.net\.2\.weight holds NaN"):
        load(component, CPU, BF16, recipe=recipe, homes=lambda network: dict.fromkeys(dict(network.named_parameters())))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (f"{BLOCK}ff.net.2.weight", lambda t: t[1:], "has to be"),
        (f"{BLOCK}ff.net.2.weight", lambda t: t.float(), "torch.float32 and has to be .* torch.bfloat16"),
        (f"{BLOCK}ff.net.2.weigth", lambda t: t, "no parameter"),
    ],
)
def test_wrong_homes(name: str, change: Callable[[Tensor], Tensor], said: str) -> None:
    def homes(network: nn.Module) -> dict[str, Tensor | None]:
        return {name: change(torch.zeros(network.get_parameter(f"{BLOCK}ff.net.2.weight").shape, dtype=BF16))}

    with pytest.raises(ValueError, match=said):
        load(open_component(T2V, "transformer"), CPU, BF16, homes=homes)


def test_formats_of_other_packages_have_no_homes() -> None:
    component, recipe = open_component(T2V, "transformer"), default_recipe("torchao:int8-weight", "transformer")
    name = f"{BLOCK}ff.net.2.weight"
    for home in (None, torch.zeros(1)):
        with pytest.raises(SolostepError, match=r"ff\.net\.2: torchao:int8-weight .* choose another --precision"):
            load(component, CPU, BF16, recipe=recipe, homes=lambda network, home=home: {name: home})
    outside = "proj_out.weight"
    network = load(component, CPU, BF16, recipe=recipe, homes=lambda n: {outside: n.get_parameter(outside).new_zeros(
        n.get_parameter(outside).shape, device="cpu")})  # fmt: skip
    assert torch.equal(network.get_parameter(outside), load(component, CPU, BF16).get_parameter(outside))


# --- one part after the other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("precision", [None, "int8", "nf4"])
def test_parts_come_as_load_fills_them(
    precision: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    component, recipe = open_component(T2V, "step_llm"), recipe_of(precision, "step_llm")
    whole = load(component, CPU, dtype, recipe=recipe)
    streams: list[int] = []
    real = placing.read_tensors

    def counted(extents: Any, device: Any) -> Iterator[Tensor]:
        streams.append(len(extents))
        return real(extents, device)

    monkeypatch.setattr(placing, "read_tensors", counted)
    said: list[tuple[int, int]] = []
    before: list[nn.Module] = []
    order = [*reversed(LAYERS), "tok_embeddings"]  # not that of the files, and layer 0 lies in two of them
    for part, module in zip(
        order, load_each(component, CPU, dtype, order, recipe, lambda *a: said.append(a)), strict=True
    ):
        assert all(all_on_meta(other) for other in before)
        assert equal(module, whole, f"{part}.") and not module.training
        before.append(module)
    assert all(all_on_meta(other) for other in before)
    assert streams == [len(component.tensors)]
    assert said == sorted(said) and said[-1] == (component.parameters, component.parameters)


def test_a_part_that_is_left_gives_its_weights_back() -> None:
    parts = load_each(open_component(T2V, "step_llm"), CPU, BF16, LAYERS)
    first = next(parts)
    weight = weakref.ref(first.get_parameter("attention.wo.weight"))
    assert not all_on_meta(first)
    parts.close()  # type: ignore[attr-defined]
    assert all_on_meta(first) and weight() is None
    again = load(open_component(T2V, "step_llm"), CPU, BF16, LAYERS[0])
    assert not all_on_meta(again)


@pytest.mark.parametrize("precision", ["torchao:int8-weight", "bnb:nf4"])
def test_parts_in_formats_of_other_packages(precision: str) -> None:
    component, recipe = open_component(T2V, "step_llm"), default_recipe(precision, "step_llm")
    whole: Any = load(component, CPU, BF16, recipe=recipe)
    x, bias = torch.randn(1, 5, 48).bfloat16(), torch.zeros(4, 5, 5).bfloat16()
    with numerics():
        for i, layer in enumerate(load_each(component, CPU, BF16, LAYERS, recipe)):
            assert type(layer.feed_forward.w1.weight) is type(whole.transformer.layers[i].feed_forward.w1.weight)
            assert torch.equal(layer(x, bias), whole.transformer.layers[i](x, bias))
    assert all_on_meta(layer) and type(layer.feed_forward.w1) is nn.Linear


def test_a_part_is_checked_before_it_is_given(model: Path) -> None:
    spoil(model / "step_llm", "transformer.layers.1.feed_forward.w2.weight")
    given = []
    with pytest.raises(CheckpointError, match=r"00002.*transformer\.layers\.1\.feed_forward\.w2\.weight holds NaN"):
        for layer in load_each(open_component(model, "step_llm"), CPU, BF16, LAYERS):
            given.append(layer)
    assert len(given) == 1 and all_on_meta(given[0])


def store_int8(model: Path) -> Component:
    """Quantizes the Step-LLM of a folder in place, and opens it."""
    folder, recipe = model / "step_llm", default_recipe("int8", "step_llm")
    component = open_component(model, "step_llm")
    modules = recipe.resolve(linears(build_on_meta(component), "step_llm"))
    for file in component.files:
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            path = name.removesuffix(".weight")
            made = quantize(modules[path], tensor) if path in modules else {"weight": tensor}
            tensors |= {f"{path}.{k}": t for k, t in made.items()}
        save_file(tensors, file)
    described = {"solostep_quantization": 1, "precision": recipe.name, "recipe": recipe.as_dict(), "modules": modules}
    (folder / "quantization.json").write_text(json.dumps(described | {"source": {}}))
    index = folder / "model.safetensors.index.json"
    where = {name: file.name for file in component.files for name in load_file(file)}
    index.write_text(json.dumps({"weight_map": where}))
    return open_component(model, "step_llm")


def test_what_is_stored_quantized_is_not_quantized_again(model: Path) -> None:
    component = store_int8(model)
    whole = load(component, CPU, BF16)
    for part, layer in zip(LAYERS, load_each(component, CPU, BF16, LAYERS), strict=True):
        assert equal(layer, whole, f"{part}.")
    with pytest.raises(UsageError, match="cannot be quantized again"):
        next(load_each(component, CPU, BF16, LAYERS, default_recipe("int8", "step_llm")))


# --- Step-LLM -----------------------------------------------------------------------------------------------------


def whole_network(model: ModelFolder, mode: Mode) -> dict[str, tuple[Tensor, int]]:
    """Hidden states from all of Step-LLM at once."""
    tokenizer = text.LLMTokenizer(text.tokenizer_files(model.root)[0])
    network: Any = load(model.components["step_llm"], CPU, mode.dtype, recipe=mode.on_load)
    found = {}
    for t in TEXTS:
        ids, length = tokenizer(t)
        found[t] = network(torch.tensor([ids]))[0], length
    return found


def same_states(a: dict[str, tuple[Tensor, int]], b: dict[str, tuple[Tensor, int]]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[t][0], b[t][0]) and a[t][0].dtype == b[t][0].dtype and a[t][1] == b[t][1] for t in a
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4", "stored", "torchao:int8-weight"])
def test_layer_by_layer_is_the_whole_network_bit_by_bit(precision: str, model: Path) -> None:
    if precision == "stored":
        store_int8(model)
    folder = open_model(model)
    asked = None if precision == "stored" else precision
    mode = choose_mode(folder.components["step_llm"], asked, "bf16", "--text-precision", BF16)
    said: list[tuple[int, int]] = []
    with numerics():
        found = text.run_step_llm(folder, TEXTS, CPU, mode.dtype, lambda *a: said.append(a), mode.on_load)
        assert same_states(found, whole_network(folder, mode))
        alone = text.run_step_llm(folder, TEXTS[1:2], CPU, mode.dtype, recipe=mode.on_load)
    assert torch.equal(alone[TEXTS[1]][0], found[TEXTS[1]][0]), "whatever else is encoded"
    component = folder.components["step_llm"]
    total = sum(info.numbers for info in component.tensors.values())
    assert said == sorted(said) and len(said) == len(component.tensors) and said[-1] == (total, total)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], ModelFolder]:
    """Makes models whose Step-LLM has so many layers, of 7.3 MB in bf16, and a small table."""
    folder = open_model(T2V)

    def make(layers: int) -> ModelFolder:
        root = tmp_path_factory.mktemp("deep")
        config = {
            "hidden_size": 256,
            "num_layers": layers,
            "num_attention_heads": 4,
            "num_attention_groups": 2,
            "ffn_hidden_size": 4352,
            "padded_vocab_size": 960,
        }
        where = root / "step_llm"
        where.mkdir()
        (where / "config.json").write_text(json.dumps(config))
        component = Component("step_llm", where, config, (), {})
        torch.manual_seed(0)
        tensors = {
            name: torch.randn(p.shape).mul(0.02).bfloat16() for name, p in build_on_meta(component).named_parameters()
        }
        save_file(tensors, where / "model.safetensors")
        return replace(folder, components={**folder.components, "step_llm": open_component(root, "step_llm")})

    return make


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known and storage.nbytes():
                    self.known[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key)


PRECISIONS = ["bf16", "fp32", "int8", "nf4", "int4-weight"]


@pytest.mark.parametrize(
    "precision", ["bf16", "int8", *(pytest.param(p, marks=pytest.mark.more) for p in ("fp32", "nf4", "int4-weight"))]
)
def test_one_layer_is_in_memory_at_a_time(
    precision: str, deep: Callable[[int], ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all tensors, small ones included: the peak is below what is asked for, and does not grow with the depth."""
    # The usual ring, of 34 MB, would hold four layers.
    monkeypatch.setattr(reader, "default_ring", lambda device: reader.Ring(threads=2, buffers=2, size=1 << 18))
    monkeypatch.setattr(text, "default_ring", reader.default_ring)
    asked: list[int] = []
    monkeypatch.setattr(text, "require_memory", lambda needed, device, what: asked.append(needed))
    peaks = []
    for layers in (2, 4):
        model = deep(layers)
        component = model.components["step_llm"]
        mode = choose_mode(component, precision, "bf16", "--text-precision", BF16)
        gc.collect()
        gc.disable()  # when it runs by itself, the peak depends on what ran before
        try:
            with numerics(), Living() as living:
                found = text.run_step_llm(model, ["a", "b"], CPU, mode.dtype, recipe=mode.on_load)
        finally:
            gc.enable()
        peaks.append(living.peak)
        stays = sum(states.nbytes for states, _ in found.values())
        assert stays <= living.now <= stays + 64, "all else is gone, but for the 16 values of nf4"
        weights = memory_bytes(component, mode.dtype, mode.on_load)
        layer = (weights - 960 * 256 * mode.dtype.itemsize) // layers
        assert layer < living.peak <= asked[-1]
        if precision in PRECISIONS[:2]:
            work = asked[-1] - largest_part_bytes(component, mode.dtype, [LAYERS[0]])
            assert living.peak < 2 * layer + work
    assert peaks[1] < 1.15 * peaks[0]  # readers may be ahead by a tensor; two layers more would be twice as much
    assert asked[0] == asked[1]


def test_parameters_of_two_layers_never_live_together(
    deep: Callable[[int], ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the table of embeddings beside any of them."""
    living: list[weakref.ref[nn.Parameter]] = []
    most: list[int] = []
    real = placing.Placer.place

    def watched(self: placing.Placer, name: str, *args: Any) -> None:
        real(self, name, *args)
        path, _, leaf = name.rpartition(".")
        living.append(weakref.ref(self.module.get_submodule(path)._parameters[leaf]))  # type: ignore[arg-type]
        most.append(sum(p.numel() for ref in living if (p := ref()) is not None and not p.is_meta))

    monkeypatch.setattr(placing.Placer, "place", watched)
    model = deep(6)
    with numerics():
        text.run_step_llm(model, ["a"], CPU, BF16)
    tensors = model.components["step_llm"].tensors
    layer = sum(info.numbers for name, info in tensors.items() if name.startswith("transformer.layers.0."))
    assert len(most) == len(tensors) and max(most) == layer
    assert all(ref() is None for ref in living)


def test_too_little_memory_for_a_layer_is_known_before_anything_is_read(
    deep: Callable[[int], ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep(4)
    needed = text.llm_bytes(model.components["step_llm"], BF16, 1, CPU)
    free = [needed - 1]
    monkeypatch.setattr(runtime, "free_memory", lambda device: free[0])
    with monkeypatch.context() as patch, pytest.raises(SolostepError, match="Step-LLM takes .* GB free"):
        patch.setattr(text, "load", lambda *a, **k: pytest.fail("the table was read"))
        text.run_step_llm(model, ["a"], CPU, BF16)
    free[0] = needed
    with numerics():
        text.run_step_llm(model, ["a"], CPU, BF16)
