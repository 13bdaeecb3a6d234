"""The 8-bit linears: what they store, what they compute, and what they do with numbers that are none."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from solostep.benchmarks.linear_error import KINDS, relative_error
from solostep.engine.checkpoint import build_on_meta, open_component
from solostep.engine.demo import demo_model
from solostep.kernels import scaled_mm
from solostep.kernels.quantize import quantize_rows, unrotate
from solostep.quant import linear as linear_module
from solostep.quant.formats import (
    FORMATS,
    check_format,
    install,
    is_storable,
    kinds_of,
    quantize,
    quantize_linear,
    stored,
)
from solostep.quant.linear import (
    EightBitLinear,
    QuantizedLinear,
    assign,
    narrowed,
    product_kinds,
    rotation_group,
    use_products,
)
from solostep.quant.recipe import default_recipe

TINY = Path(__file__).parents[1] / "golden" / "tiny-stepvideo-t2v"
ALL = list(FORMATS)
W8A8 = ["int8", "int8-plain", "fp8"]
WEIGHT_ONLY = [name for name in ALL if name not in W8A8]
ODD = [(32, 64), (1, 16), (7, 1), (5, 6), (33, 200), (100, 257), (48, 384), (3, 1030)]
"""[N, K], most of them no multiples of 16, 64, 128 or 256."""


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """No gradients, and no threads that wait for each other on small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(name: str, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    """As a loader makes it: empty, then filled."""
    module = FORMATS[name].kind(weight.shape[1], weight.shape[0], bias is not None, dtype)
    assign(module, quantize(name, weight) | ({} if bias is None else {"bias": bias}))
    return module


def exact(name: str, module: QuantizedLinear, x: Tensor) -> Tensor:
    """The product in fp64, of the numbers that the format stands for."""
    rows = x.reshape(-1, x.shape[-1])
    if name in W8A8:
        kind = torch.float8_e4m3fn if name == "fp8" else torch.int8
        group = rotation_group(x.shape[-1]) if name == "int8" else 1
        q, scale = quantize_rows(rows, kind, group)
        taken = unrotate(q.float(), group).double() * scale.double()[:, None]
    else:
        taken = rows.double()
    out = taken @ module.dequantized().double().T
    if module.bias is not None:
        out = out + module.bias.double()
    return out.view(*x.shape[:-1], -1)


# --- what is stored -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", ODD)
def test_stored_is_what_quantize_gives(name: str, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        found = {k: (tuple(t.shape), t.dtype) for k, t in quantize(name, random(*shape).to(dtype)).items()}
        assert found == stored(name, shape[1], shape[0])
    empty = FORMATS[name].kind(shape[1], shape[0], True, torch.bfloat16)
    assert {k: (tuple(p.shape), p.dtype) for k, p in empty.named_parameters() if k != "bias"} == found
    assert all(p.is_meta and not p.requires_grad for p in empty.parameters())
    assert empty.bias is not None and empty.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ALL)
def test_bits_are_those_of_the_stored_tensors(name: str) -> None:
    bits = sum(8 * torch.Size(shape).numel() * kind.itemsize for shape, kind in stored(name, 6144, 6144).values())
    assert bits / 6144**2 == pytest.approx(FORMATS[name].bits, rel=2e-3)


@pytest.mark.parametrize("name", ALL)
def test_the_weight_is_close_to_what_it_was(name: str) -> None:
    bound = {"fp8": 2.8e-2, "fp8-weight": 2.8e-2, "nf4": 0.1, "int4-weight": 0.1}.get(name, 1e-2)
    for shape in [shape for shape in ODD if shape[0] * shape[1] > 1000]:
        weight = random(*shape, seed=3)
        assert relative_error(made(name, weight).dequantized(), weight.double()) < bound


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(37, 96)
    whole = {name: quantize(name, weight) for name in ALL}
    real = linear_module.row_chunks
    for module in (linear_module, sys.modules["solostep.quant.four_bit"]):
        monkeypatch.setattr(module, "row_chunks", lambda w: real(w, 500))
    for name in ALL:
        for key, tensor in quantize(name, weight).items():
            assert torch.equal(tensor.view(torch.uint8), whole[name][key].view(torch.uint8)), (name, key)


@pytest.mark.parametrize("name", ["int8", "int8-plain", "int8-weight"])
def test_int8_rows_are_never_worse_than_with_their_whole_range(name: str) -> None:
    """Cutting a row's largest values off is for rows where it pays; one value alone, or many alike, stay exact."""
    group = 64 if name == "int8" else 1
    rows = random(6, 6144 * 4)
    rows[1] = torch.nn.functional.one_hot(torch.tensor(17), rows.shape[1]) * 0.3
    rows[2] = 0.25
    rows[3] = torch.sign(rows[3]) * 3
    rows[4, :20] *= 30
    q, scale = quantize_rows(rows, torch.int8, rotation_group(rows.shape[1]) if group > 1 else 1)
    if name == "int8":
        plain = unrotate(q.float() * scale[:, None], rotation_group(rows.shape[1]))
    else:
        plain = q.float() * scale[:, None]
    ours = (made(name, rows).dequantized() - rows).norm(dim=1)
    before = (plain - rows).norm(dim=1)
    assert bool((ours <= before * (1 + 1e-4) + 1e-5).all())
    assert float(ours[0]) < 0.985 * float(before[0])
    assert float(ours[1]) < 1e-6 and float(ours[2]) < 1e-4


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_product_of_the_stored_numbers(name: str, bias: bool) -> None:
    for n, k in ODD:
        module = made(name, random(n, k, seed=1) * 0.05, random(n, seed=2) if bias else None)
        x = random(9, k, seed=4)
        assert relative_error(module(x), exact(name, module, x)) < 2e-6


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 6e-4), (torch.float32, 2e-6)])
def test_the_result_has_the_type_of_the_activation(name: str, dtype: torch.dtype, bound: float) -> None:
    module = made(name, random(40, 192, seed=1) * 0.05, random(40, seed=2, dtype=torch.bfloat16), torch.bfloat16)
    x = random(11, 192, seed=3, dtype=dtype)
    out = module(x)
    assert out.dtype == dtype
    assert relative_error(out, exact(name, module, x)) < bound


@pytest.mark.parametrize("name", ALL)
def test_any_number_of_dimensions(name: str) -> None:
    module = made(name, random(10, 48), random(10))
    x = random(2, 3, 4, 48, seed=5)
    out = module(x)
    assert out.shape == (2, 3, 4, 10)
    assert torch.allclose(out.flatten(0, 2), module(x.flatten(0, 2)), atol=1e-5)
    assert torch.allclose(module(x[1, 2, 3]), out[1, 2, 3], atol=1e-5) and module(x[1, 2, 3]).shape == (10,)
    turned = x.transpose(0, 2)  # not contiguous
    assert torch.allclose(module(turned), out.transpose(0, 2), atol=1e-5)
    assert module(x[:0]).shape == (0, 3, 4, 10) and module(x[0, 0, :0]).shape == (0, 10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_other_rows(name: str, dtype: torch.dtype) -> None:
    module = made(name, random(50, 320, seed=1), random(50), dtype)
    x = random(24, 320, seed=2, dtype=dtype)
    out = module(x)
    others = x.clone()
    others[1::2] = random(12, 320, seed=3, dtype=dtype) * 1e4
    others[3], others[5] = torch.nan, torch.inf
    assert torch.equal(module(others)[::2], out[::2])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    if name in ("int8", "int8-plain"):  # exact sums: no matter where a row stands, or beside how many
        assert torch.equal(module(x[order]), out[order])
        assert all(torch.equal(module(x[i : i + 1])[0], out[i]) for i in range(24))
        assert torch.equal(module(x[:7]), out[:7])


BOUNDS = {
    "int8": {"normal": 1.4e-2, "outliers": 1.4e-2, "heavy tails": 1.4e-2, "gelu": 1.4e-2},
    "int8-plain": {"normal": 1.4e-2, "gelu": 1.6e-2},
    "fp8": {"normal": 3.9e-2, "outliers": 3.9e-2, "heavy tails": 3.9e-2, "gelu": 3.9e-2},
    "int8-weight": {"normal": 1e-2, "outliers": 1e-2, "heavy tails": 1e-2, "gelu": 1e-2},
    "fp8-weight": {"normal": 2.8e-2, "outliers": 2.8e-2, "heavy tails": 2.8e-2, "gelu": 2.8e-2},
    "nf4": {"normal": 9.5e-2, "outliers": 9.5e-2, "heavy tails": 9.5e-2},
    "int4-weight": {"normal": 9.7e-2, "outliers": 9.7e-2, "heavy tails": 9.7e-2, "gelu": 9.7e-2},
}


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name != "wide gelu"], ids=lambda k: k.name)
def test_errors_are_within_their_bounds(kind: Any) -> None:
    """The floor of each format at K = 6144, bf16 in and out."""
    x, weight = kind.data(1, torch.device("cpu"))
    x, weight = x[:96], weight[:96]
    product = x.double() @ weight.double().T
    for name, bounds in BOUNDS.items():
        if kind.name in bounds:
            found = relative_error(made(name, weight, dtype=torch.bfloat16)(x), product)
            assert found < bounds[kind.name], (name, found)


# --- some of the output channels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALL, None])
@pytest.mark.parametrize("bias", [False, True])
def test_narrowed_gives_some_channels_without_a_copy(name: str | None, bias: bool) -> None:
    weight, shift = random(48, 384, seed=1) * 0.05, random(48, seed=2) if bias else None
    if name is None:
        whole: Any = nn.Linear(384, 48, bias)
        whole.load_state_dict({"weight": weight} | ({} if shift is None else {"bias": shift}))
    else:
        whole = made(name, weight, shift)
    x = random(11, 384, seed=3)
    out, known = whole(x), {n: p.data_ptr() for n, p in whole.named_parameters()}
    for start, stop in ((0, 16), (16, 17), (5, 48), (0, 48)):
        part: Any = narrowed(whole, start, stop)
        assert type(part) is type(whole) and (part.in_features, part.out_features) == (384, stop - start)
        # Sums of int8 products are exact; others may be added in another order.
        assert relative_error(part(x), out[:, start:stop].double()) < 1e-6
        if name in ("int8", "int8-plain"):
            assert torch.equal(part(x), out[:, start:stop])
            rows = quantize_rows(x, torch.int8, part.rotated_together)
            assert torch.equal(part.product(*rows, torch.float32), out[:, start:stop])
        for key, held in part._parameters.items():
            if held is not None:
                owner = getattr(whole, key)
                assert held.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()
        if name is not None:
            assert torch.equal(part.dequantized(), whole.dequantized()[start:stop])
            assert {k: tuple(p.shape) for k, p in part._parameters.items() if k != "bias"} == {
                k: shape for k, (shape, _) in stored(name, 384, stop - start).items()
            }
    assert whole.out_features == 48 and {n: p.data_ptr() for n, p in whole.named_parameters()} == known
    assert torch.equal(whole(x), out)


def test_narrowed_follows_parameters_that_are_replaced() -> None:
    """As streamed blocks' are, at each visit."""
    module, other = made("int8", random(8, 64)), made("int8", random(8, 64, seed=9))
    x = random(3, 64, seed=3)
    first = narrowed(module, 2, 6)(x)
    for name in ("weight", "weight_scale"):
        module._parameters[name] = other._parameters[name]
    assert torch.equal(narrowed(module, 2, 6)(x), other(x)[:, 2:6])
    assert not torch.equal(first, other(x)[:, 2:6])


@pytest.mark.parametrize("name", W8A8)
def test_products_are_by_the_back_ends_that_it_was_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the engine found right; views of the layer and formats of the same operands among them."""
    used: list[int] = []

    def run(x: scaled_mm.Operands) -> Tensor:
        used.append(len(x.b))
        return torch.full((len(x.a), len(x.b)), 7.0, dtype=x.out_dtype)

    kinds = ("fp8",) if name == "fp8" else ("int8",)
    found = scaled_mm.Product("told", kinds, lambda device, kind: None, lambda x: True, run)
    monkeypatch.setitem(scaled_mm.PRODUCTS, "told", found)
    network = nn.Sequential(made(name, random(6, 16)), nn.Linear(6, 4))
    x, first = random(3, 16), cast(EightBitLinear, network[0])
    assert product_kinds(network) == kinds_of([name, "nf4", "torchao:int8"]) == set(kinds)
    plain = first(x)
    use_products(network, {kinds[0]: ("told",)})
    assert torch.equal(first(x), torch.full((3, 6), 7.0)) and torch.equal(narrowed(first, 1, 3)(x), first(x)[:, 1:3])
    assert used == [6, 2, 6]
    use_products(network, {"other": ("told",)})
    assert torch.equal(first(x), plain) and len(used) == 3


def test_what_cannot_be_narrowed_is_refused() -> None:
    class Tagged(Tensor):
        pass

    foreign = nn.Linear(8, 4)
    foreign.weight = nn.Parameter(torch.ones(4, 8).as_subclass(Tagged))
    for layer in (foreign, nn.LayerNorm(4), type("Linear4bit", (nn.Linear,), {})(8, 4)):
        with pytest.raises(ValueError, match="head groups are not possible"):
            narrowed(layer, 0, 2)
    for start, stop in ((-1, 2), (2, 2), (3, 5)):
        with pytest.raises(ValueError, match=r"Channels .* are not among the 4"):
            narrowed(nn.Linear(8, 4), start, stop)
    odd = made("nf4", random(6, 96))  # blocks of 64 go on from one row to the next
    # The weights are the same; a product of fewer channels may add them in another order.
    torch.testing.assert_close(narrowed(odd, 2, 4)(random(3, 96)), odd(random(3, 96))[:, 2:4])
    assert torch.equal(narrowed(odd, 0, 6)(random(3, 96)), odd(random(3, 96)))
    with pytest.raises(ValueError, match="Channels 1 ... 4 of 96 nf4 weights each share blocks of 64"):
        narrowed(odd, 1, 4)


# --- numbers that are none, or nearly -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_zero_rows_give_zero(name: str) -> None:
    weight, bias = random(6, 130), random(6, seed=1)
    weight[2] = 0
    x = random(5, 130, seed=2)
    x[3] = 0
    out = made(name, weight, bias)(x)
    assert torch.equal(out[3], bias) and torch.equal(out[:, 2], bias[2].expand(5))
    assert torch.equal(made(name, torch.zeros(6, 130))(x), torch.zeros(5, 6))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none_and_stays_in_its_row(name: str, bad: float) -> None:
    x, weight = random(4, 256), random(5, 256, seed=1)
    clean = made(name, weight)(x)
    x[1, 77] = bad
    out = made(name, weight)(x)
    assert not bool(out[1].isfinite().any())
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])
    weight[3, 5] = bad  # a loader refuses such weights; here they must not turn into plausible numbers
    out = made(name, weight)(random(4, 256))
    assert not bool(out[:, 3].isfinite().any()) and bool(out[:, [0, 1, 2, 4]].isfinite().all())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_and_huge_values(name: str, dtype: torch.dtype) -> None:
    module = made(name, random(16, 256, seed=1).to(dtype) * 0.02, dtype=dtype)
    x = random(4, 256, seed=2, dtype=dtype)
    x[0] *= 1e-40  # denormal
    x[1, 9] = 1e30
    x[2] *= 1e-25
    x[3] *= 1e25
    out, product = module(x), exact(name, module, x)
    assert bool(out.isfinite().all())
    assert float(out[0].abs().max()) < 1e-36
    assert all(relative_error(out[i], product[i]) < (5e-3 if dtype == torch.bfloat16 else 2e-6) for i in (1, 2, 3))
    # What the outlier costs is bounded: of its own size, and of nothing else's.
    true = x[1].double() @ module.dequantized().double().T
    assert relative_error(out[1], true) < (0.1 if name in W8A8 else 5e-3)


@pytest.mark.parametrize("name", ALL)
def test_weights_of_any_size(name: str) -> None:
    weight = random(6, 256, seed=1)
    weight[0] *= 1e-25
    weight[1] *= 1e25
    weight[2, 3] = 1e30
    weight[3] *= 1e-40
    found = made(name, weight).dequantized()
    assert bool(found.isfinite().all())
    bound = 0.15 if FORMATS[name].bits < 8 else 0.03
    for row in (0, 1, 4, 5):
        assert relative_error(found[row], weight[row].double()) < bound, row
    assert relative_error(found[2], weight[2].double()) < 0.3
    assert float(found[3].abs().max()) < 1e-29


# --- as a module --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_moves_and_copies_leave_types_alone(name: str) -> None:
    module = made(name, random(12, 130, seed=1), random(12), torch.float32)
    kinds = {k: kind for k, (_, kind) in stored(name, 130, 12).items()}
    bits = {k: module.get_parameter(k).clone().view(torch.uint8) for k in kinds}

    def check(moved: nn.Module, bias: torch.dtype) -> None:
        for key, kind in kinds.items():
            assert moved.get_parameter(key).dtype == kind
            assert torch.equal(moved.get_parameter(key).view(torch.uint8), bits[key])
        assert moved.get_parameter("bias").dtype == bias

    changes = {
        torch.bfloat16: lambda m: m.to(torch.bfloat16), torch.float16: lambda m: m.half(),
        torch.float64: lambda m: m.double(), torch.float32: lambda m: m.float().cpu().to("cpu", torch.float32),
    }  # fmt: skip
    for dtype, change in changes.items():
        # In a network too, where the type goes down from the top.
        network = nn.Sequential(nn.Linear(2, 2), copy.deepcopy(module))
        check(change(network)[1], dtype)
        assert network[0].weight.dtype == dtype
    check(copy.deepcopy(module), torch.float32)
    assert module.to("meta").weight.is_meta and module.weight.dtype == kinds["weight"]
    assert not module.to_empty(device="cpu").weight.is_meta and module.weight.dtype == kinds["weight"]


@pytest.mark.parametrize("name", ALL)
def test_state_round_trip(name: str) -> None:
    module = made(name, random(12, 130, seed=1), random(12))
    x = random(3, 130)
    for assign_tensors in (False, True):
        other = made(name, random(12, 130, seed=7), random(12, seed=8))
        assert not torch.equal(other(x), module(x))
        other.load_state_dict(module.state_dict(), assign=assign_tensors)
        assert torch.equal(other(x), module(x))


def test_a_state_of_another_format_is_refused() -> None:
    """The names are the same: without a look at the types, torch would cast e4m3 to int8 and say nothing."""
    fp8, int8 = (nn.ModuleDict({"wo": made(name, random(4, 32))}) for name in ("fp8", "int8"))
    before = int8["wo"](random(2, 32))
    with pytest.raises(RuntimeError, match="wo.weight is torch.float8_e4m3fn and has to be torch.int8"):
        int8.load_state_dict(fp8.state_dict())
    assert torch.equal(int8["wo"](random(2, 32)), before)
    with pytest.raises(RuntimeError, match="wo.weight is torch.float32 and has to be torch.int8"):
        int8.load_state_dict({"wo.weight": random(4, 32), "wo.weight_scale": torch.ones(4)})


def test_assign_holds_shapes_and_types() -> None:
    module = FORMATS["int8"].kind(32, 4, True, torch.bfloat16)
    good = quantize("int8", random(4, 32))
    with pytest.raises(ValueError, match=r"weight is \[4, 31\] in torch.int8 and has to be \[4, 32\] in torch.int8"):
        assign(module, {"weight": good["weight"][:, 1:]})
    with pytest.raises(ValueError, match=r"weight_scale is \[4\] in torch.bfloat16"):
        assign(module, {"weight_scale": good["weight_scale"].bfloat16()})
    assign(module, good | {"bias": random(4)})  # any type: it is what the network computes in
    assert module.weight.data_ptr() == good["weight"].data_ptr()
    assert "in_features=32, out_features=4, bias=True" in repr(module)


# --- by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["transformer", "step_llm"])
@pytest.mark.parametrize("root", [Path(demo_model()), TINY], ids=["demo", "tiny"])
def test_install_in_the_networks(network: str, root: Path) -> None:
    module = build_on_meta(open_component(root, network))
    before = {path for path, part in module.named_modules() if isinstance(part, nn.Linear)}
    formats = default_recipe("int8", network).resolve(before)
    names = set(dict(module.named_parameters()))
    install(module, formats, torch.bfloat16)
    for path, part in module.named_modules():
        if path in formats:
            assert type(part) is FORMATS[formats[path]].kind and not part.training
        else:
            assert not isinstance(part, QuantizedLinear)
    # Names are kept; only scales come beside them.
    after = set(dict(module.named_parameters()))
    assert names <= after and after - names == {f"{path}.weight_scale" for path in formats}


def test_install_refuses_what_is_no_linear_and_changes_nothing() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    for path, words in {"b": "b is not a linear", "norm": "norm is not a linear", "": "The whole network"}.items():
        with pytest.raises(ValueError, match=words):
            install(module, {"a": "int8", path: "int8"}, torch.float32)
        assert type(module["a"]) is nn.Linear
    with pytest.raises(ValueError, match="'int7' is unknown"):
        install(module, {"a": "int7"}, torch.float32)
    install(module, {"a": "bf16", "nowhere": "torchao:int8"}, torch.float32)  # left to others
    assert type(module["a"]) is nn.Linear


@pytest.mark.parametrize("name", ALL)
def test_quantize_linear_leaves_the_linear_as_it_is(name: str) -> None:
    with torch.inference_mode(False):
        linear = nn.Linear(64, 8)
        quantized = cast(QuantizedLinear, quantize_linear(linear, name))
        assert quantized.bias is not linear.bias and not quantized.bias.requires_grad
        out = quantized(random(3, 64))
        assert not out.requires_grad
    assert type(linear) is nn.Linear and linear.weight.dtype == torch.float32
    assert torch.equal(out, made(name, linear.weight.detach(), linear.bias.detach())(random(3, 64)))
    assert quantize_linear(linear, "bf16") is linear


def test_wrong_weights_and_names() -> None:
    for weight in (random(4), random(2, 3, 4), torch.ones(4, 4, dtype=torch.int8), random(4, 0), random(0, 4)):
        with pytest.raises(ValueError, match=r"Only a matrix of floats can be quantized, not \["):
            quantize("int8", weight)
    with pytest.raises(ValueError, match="'int3' is unknown; choose one of bf16, int8, .*torchao:int8"):
        check_format("int3")
    for call in (lambda name: quantize(name, random(4, 4)), lambda name: stored(name, 4, 4)):
        with pytest.raises(ValueError, match="'int3' is unknown"):
            call("int3")
        with pytest.raises(ValueError, match="bf16 cannot be stored; the formats that can are int8"):
            call("bf16")
    assert is_storable("int8") and is_storable("bf16") and not is_storable("torchao:int8")


def test_quant_is_imported_without_the_other_packages() -> None:
    """A machine without torchao and bitsandbytes quantizes and computes all the same, and nobody loads them unasked."""
    code = (
        "import sys, torch\n"
        "for name in ('torchao', 'bitsandbytes'): sys.modules[name] = None\n"
        "from solostep.quant.formats import FORMATS, quantize_linear\n"
        "for name in FORMATS: quantize_linear(torch.nn.Linear(64, 8), name)(torch.ones(2, 64))\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr
