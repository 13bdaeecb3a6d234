"""torchao's and bitsandbytes' own linears, for comparison: a report can put them beside ours.

``torchao:int8``, ``torchao:fp8`` ... are their configurations of the same kind as ours; any other is selected by the
name of its class (``torchao:Int8WeightOnlyConfig``). They keep tensor subclasses or own modules, so they are made when
a model is loaded, on its device, and are never written to a file or moved between devices.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

PACKAGES = {"torchao": "torchao", "bnb": "bitsandbytes"}
TORCHAO = (
    "int8", "fp8", "fp8-tensor", "int8-weight", "fp8-weight",
    "int4-weight", "int4-weight-asymmetric", "int4-weight-hqq",
)  # fmt: skip
BITSANDBYTES = ("int8", "nf4", "fp4")


def names() -> list[str]:
    """The short names of all formats of other packages."""
    return [f"torchao:{n}" for n in TORCHAO] + [f"bnb:{n}" for n in BITSANDBYTES]


def is_foreign(spec: str) -> bool:
    return spec.partition(":")[0] in PACKAGES and ":" in spec


def check(spec: str) -> None:
    """Holds a name against what the package has.

    Raises:
        ValueError: the package is not installed, or has no such configuration.
    """
    package, _, name = spec.partition(":")
    module = PACKAGES[package]
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{spec} needs {module}; install it with `pip install {module}`.")
    known = TORCHAO if package == "torchao" else BITSANDBYTES
    if name in known:
        return
    if package == "torchao" and name.endswith("Config"):
        _check_class(spec, name)
        return
    raise ValueError(f"{spec} is unknown; {package} has {', '.join(known)}" + _classes(package) + ".")


def _check_class(spec: str, name: str) -> None:
    try:
        made = getattr(_torchao(), name, None)
        if made is None:
            raise ValueError(f"{spec} is unknown: this torchao has no {name}.")
        made()
    except ValueError:
        raise
    except Exception as error:  # a package of any version: what it raises is not ours to know
        raise ValueError(f"{spec} cannot be chosen by its name alone: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].removesuffix(".") + "." if lines else f"{type(error).__name__}."


def _classes(package: str) -> str:
    if package != "torchao":
        return ""
    return " or the class of a configuration, such as torchao:Int8WeightOnlyConfig"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Both packages tell on import and use which of their kernels do not fit this machine; that is not news here."""
    loggers = [logging.getLogger(n) for n in ("torchao", "bitsandbytes", "torch.utils._pytree", "")]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


def _torchao() -> Any:
    with quiet():
        import torchao.quantization as quantization

        return quantization


def _torchao_config(name: str) -> Any:
    q = _torchao()
    groups = {"weight_dtype": torch.int4, "granularity": q.PerGroup(128)}
    makers: dict[str, Callable[[], Any]] = {
        "int8": q.Int8DynamicActivationInt8WeightConfig,
        "fp8": lambda: q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow()),
        "fp8-tensor": lambda: q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerTensor()),
        "int8-weight": q.Int8WeightOnlyConfig,
        "fp8-weight": q.Float8WeightOnlyConfig,
        "int4-weight": lambda: q.IntxWeightOnlyConfig(**groups),
        "int4-weight-asymmetric": lambda: q.IntxWeightOnlyConfig(**groups, mapping_type=q.MappingType.ASYMMETRIC),
        "int4-weight-hqq": lambda: q.IntxWeightOnlyConfig(**groups, intx_choose_qparams_algorithm="hqq_scale_only"),
    }
    return makers[name]() if name in makers else getattr(q, name)()


def convert(linear: nn.Linear, spec: str) -> nn.Module:
    """The linear in a format of another package; its weight is on the device where it is to stay.

    Raises:
        ValueError: the package refuses this layer on this device; the message says why.
    """
    package, _, name = spec.partition(":")
    try:
        with quiet():
            return _with_torchao(linear, name) if package == "torchao" else _with_bitsandbytes(linear, name)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a package of any version: what it raises is not ours to know
        shape = f"{linear.out_features} x {linear.in_features} on {linear.weight.device}"
        raise ValueError(f"{spec} cannot quantize a linear of {shape}: {_first_line(error)}") from error


def _with_torchao(linear: nn.Linear, name: str) -> nn.Module:
    holder = nn.Sequential(linear)
    _torchao().quantize_(holder, _torchao_config(name))
    return holder[0]


def _with_bitsandbytes(linear: nn.Linear, name: str) -> nn.Module:
    import bitsandbytes as bnb

    weight, bias = linear.weight.detach(), linear.bias
    shape = (linear.in_features, linear.out_features, bias is not None)
    made: Any
    if name == "int8":
        made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
        # It quantizes what comes from the CPU alone; a weight that is on the card would stay there, in both types.
        made.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(*shape, compute_dtype=weight.dtype, quant_type=name, quant_storage=torch.uint8)
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=name)
    if bias is not None:
        made.bias = bias
    return made.to(weight.device)
