"""torchao's and bitsandbytes' linears: each works here, or says in one sentence why not."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from solostep.benchmarks.linear_error import relative_error
from solostep.quant import foreign
from solostep.quant.formats import check_format, quantize, quantize_linear, stored

INSTALLED = {name for name in ("torchao", "bitsandbytes") if importlib.util.find_spec(name)}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(before)


def linear(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> nn.Linear:
    with torch.inference_mode(False):
        torch.manual_seed(0)
        return nn.Linear(256, 128, bias=bias).to(dtype)


def need(spec: str) -> None:
    module = foreign.PACKAGES[spec.partition(":")[0]]
    if module not in INSTALLED:
        pytest.skip(f"{module} is not installed")


@pytest.mark.parametrize("spec", foreign.names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_each_works_here_or_says_why_not(spec: str, dtype: torch.dtype, bias: bool) -> None:
    need(spec)
    foreign.check(spec)
    check_format(spec)
    original = linear(dtype, bias)
    x = torch.randn(9, 256).to(dtype)
    exact = x.double() @ original.weight.double().T + (original.bias.double() if bias else 0)
    try:
        module = quantize_linear(original, spec)
    except ValueError as error:
        # On a CPU torchao has no products in fp8. Whatever the package's reason, it is one line, and it is given.
        assert spec.startswith("torchao:fp8") and "-weight" not in spec, error
        assert re.fullmatch(rf"{spec} cannot quantize a linear of 128 x 256 on cpu: \S.*\.", str(error))
        return
    out = module(x)
    assert out.dtype == dtype and out.shape == (9, 128)
    bound = 0.13 if "4" in spec else 0.03 if "fp8" in spec else 0.012
    assert 1e-4 < relative_error(out, exact) < bound


def test_a_class_of_torchao_by_its_name() -> None:
    need("torchao:")
    for name in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig"):
        foreign.check(f"torchao:{name}")
        module = foreign.convert(linear(), f"torchao:{name}")
        assert module(torch.randn(2, 256).bfloat16()).shape == (2, 128)
    with pytest.raises(ValueError, match="torchao:NoSuchConfig is unknown: this torchao has no NoSuchConfig"):
        foreign.check("torchao:NoSuchConfig")


def test_a_class_that_needs_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    class NeedsConfig:
        def __init__(self, bits: int) -> None: ...

    monkeypatch.setattr(foreign, "_torchao", lambda: types.SimpleNamespace(NeedsConfig=NeedsConfig))
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="torchao:NeedsConfig cannot be chosen by its name alone: .*'bits'"):
        foreign.check("torchao:NeedsConfig")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("torchao:int3", "torchao:int3 is unknown; torchao has int8, fp8, .* or the class of a configuration"),
        ("torchao:", "torchao: is unknown; torchao has"),
        ("bnb:int3", r"bnb:int3 is unknown; bnb has int8, nf4, fp4\.$"),
        ("bnb:Int8WeightOnlyConfig", "bnb:Int8WeightOnlyConfig is unknown"),
        ("quanto:int8", "'quanto:int8' is unknown; choose one of bf16, int8"),
        ("torchao", "'torchao' is unknown"),
    ],
)
def test_unknown_names(spec: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: object())  # whatever is installed here
    with pytest.raises(ValueError, match=words):
        check_format(spec)


@pytest.mark.parametrize(("spec", "module"), [("torchao:int8", "torchao"), ("bnb:nf4", "bitsandbytes")])
def test_a_package_that_is_not_installed(spec: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: None if name == module else real(name))
    with pytest.raises(ValueError, match=f"^{spec} needs {module}; install it with `pip install {module}`.$"):
        check_format(spec)
    monkeypatch.setitem(sys.modules, module, None)  # and one that is there but does not load
    monkeypatch.setitem(sys.modules, f"{module}.quantization", None)
    with pytest.raises(ValueError, match=f"^{spec} cannot quantize a linear of 128 x 256 on cpu: .*{module}"):
        quantize_linear(linear(), spec)


def test_they_are_never_stored() -> None:
    for call in (lambda: quantize("bnb:nf4", torch.ones(4, 4)), lambda: stored("bnb:nf4", 4, 4)):
        need("bnb:nf4")
        with pytest.raises(ValueError, match="bnb:nf4 cannot be stored"):
            call()


def test_out_of_memory_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(foreign, "_with_torchao", full)
    with pytest.raises(torch.OutOfMemoryError):
        foreign.convert(linear(), "torchao:int8")


def test_loggers_and_weights_are_left_as_they_were() -> None:
    """Another package's talk is silenced while it works and no longer; bitsandbytes leaves the given linear alone."""
    need("bnb:nf4")
    levels = {name: logging.getLogger(name).level for name in ("torchao", "bitsandbytes", "")}
    original = linear()
    before = original.weight.clone()
    foreign.convert(original, "bnb:nf4")
    assert torch.equal(original.weight, before) and original.weight.dtype == torch.bfloat16
    assert {name: logging.getLogger(name).level for name in levels} == levels
