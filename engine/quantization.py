"""What is quantized in a network: as its folder says (quantization.json), or as a recipe asks for."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, UsageError
from .headers import read_json

if TYPE_CHECKING:
    from torch import nn

    from ..quant.recipe import Recipe

QUANTIZATION_FILE = "quantization.json"
VERSION = 1
AGAIN = "make the folder again with `solostep quantize`"


@dataclass(frozen=True)
class Quantization:
    """A network that is stored quantized: ``modules`` gives the format of every quantized linear by its path.

    A loader goes by ``modules``; ``precision``, ``recipe`` and ``source`` say how it came about.
    """

    precision: str
    recipe: Recipe
    modules: Mapping[str, str]
    source: Mapping[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """How many linears there are in each format."""
        return dict(sorted(Counter(self.modules.values()).items()))

    def identity(self) -> str:
        """What the weights' meaning depends on, as text."""
        return json.dumps([self.precision, sorted(self.modules.items())])


def read_quantization(folder: Path) -> Quantization | None:
    """What ``quantization.json`` of a network's folder says; None if there is none.

    Raises:
        CheckpointError: it is damaged, of another version, or holds an unknown format; the file and module are named.
    """
    from ..quant.formats import FORMATS
    from ..quant.recipe import Recipe

    path = folder / QUANTIZATION_FILE
    if not path.exists():
        return None
    values = read_json(path)
    version = values.get("solostep_quantization")
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{path} is of version {version!r} and this solostep reads version {VERSION}; update solostep or {AGAIN}."
        )
    for key, kind, meant in (("precision", str, "text"), ("modules", dict, "an object"), ("recipe", dict, "an object"),
                             ("source", dict, "an object")):  # fmt: skip
        if not isinstance(values.get(key), kind) or (key in ("precision", "modules") and not values[key]):
            raise CheckpointError(f"{path}: {key} is missing or is not {meant}; {AGAIN}.")
    for module, name in values["modules"].items():
        if not isinstance(name, str) or name not in FORMATS:
            raise CheckpointError(
                f"{path}: module {module} has the unknown format {name!r} and known are {', '.join(FORMATS)}; "
                f"update solostep or {AGAIN}."
            )
    try:
        recipe = Recipe.from_dict(values["recipe"], f"the recipe in {path}")
    except ValueError as error:
        raise CheckpointError(f"{str(error)[:1].upper()}{str(error)[1:].removesuffix('.')}; {AGAIN}.") from None
    return Quantization(values["precision"], recipe, dict(values["modules"]), dict(values["source"]))


def linears(module: nn.Module, network: str) -> list[str]:
    """Paths of the linears that may be quantized: those inside the blocks of the DiT or of Step-LLM, in order.

    What is outside the blocks stays as it is (a network's own type is that of its last linear).
    """
    from torch import nn

    from ..quant.linear import QuantizedLinear
    from ..quant.recipe import BLOCKS

    pattern = BLOCKS.get(network)
    return [
        path
        for path, part in module.named_modules()
        if isinstance(part, (nn.Linear, QuantizedLinear)) and pattern and fnmatch.fnmatchcase(path, pattern)
    ]


def install_stored(module: nn.Module, network: str, quantization: Quantization, folder: Path) -> None:
    """Puts the quantized linears of a stored network, without memory, in the place of its own.

    Raises:
        CheckpointError: a module of quantization.json is no linear inside this network's blocks; it is named.
    """
    import torch

    from ..quant.formats import install

    known = set(linears(module, network))
    for path in quantization.modules:
        if path not in known:
            raise CheckpointError(
                f"{folder / QUANTIZATION_FILE}: module {path} is not a linear inside the blocks of this network; "
                f"the file is of another model: {AGAIN}."
            )
    install(module, quantization.modules, torch.float32)


def formats_of(recipe: Recipe, module: nn.Module, network: str) -> dict[str, str]:
    """The format of every linear that a recipe quantizes, by its path.

    Raises:
        UsageError: the recipe fits no linear of the network.
    """
    try:
        return recipe.resolve(linears(module, network))
    except ValueError as error:
        raise UsageError(str(error)) from None
