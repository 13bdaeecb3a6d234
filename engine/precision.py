"""In which precision a network runs: what was asked for, held against what its folder is stored in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.attention import MODES as FUSED
from ..quant import foreign
from ..quant.formats import kinds_of
from ..quant.recipe import Recipe, default_recipe, precisions, read_recipe
from .config import MODES, PRECISIONS
from .errors import UsageError
from .quantization import formats_of
from .weights import Component, build_on_meta, memory_bytes

if TYPE_CHECKING:
    from .checkpoint import ModelFolder

AUTO = "auto:"
OFFICIAL = "official"
ATTENTION = (OFFICIAL, *FUSED)
"""How a block is computed: in the official order of operations and roundings; or by fused kernels, with attention in
16 bits, with int8 q k^T, or with int8 q k^T and 8-bit P V."""

Recipes = Recipe | str | Path | None
"""A recipe, the path of a JSON file with one, or ``auto:BUDGET``."""


@dataclass(frozen=True)
class Mode:
    """How one network runs.

    ``name`` is what a user calls it (bf16, int8, the name of a recipe); ``dtype`` the type of its activations and of
    its weights that are not quantized; ``recipe`` what is quantized, if anything, and ``stored`` whether it already is
    in the files.
    """

    name: str
    dtype: torch.dtype
    recipe: Recipe | None = None
    stored: bool = False

    @property
    def on_load(self) -> Recipe | None:
        """What :func:`solostep.engine.weights.load` is to quantize."""
        return None if self.stored else self.recipe

    @property
    def product_kinds(self) -> set[str]:
        """The kinds of operands (int8, fp8) that its linears multiply in 8 bits."""
        return set() if self.recipe is None else kinds_of(name for _, name in self.recipe.rules)

    def described(self) -> dict[str, Any] | None:
        """The recipe in JSON's types, for records and identities."""
        return None if self.recipe is None else self.recipe.as_dict()

    def memory_bytes(self, component: Component) -> int:
        """What the network's weights take on a device."""
        return memory_bytes(component, self.dtype, self.on_load)


def check_precision(precision: str | None, option: str = "--precision") -> None:
    """Raises UsageError for what is no precision, or needs a package that is not here."""
    if precision is None or precision in PRECISIONS or precision in precisions():
        return
    if foreign.is_foreign(precision):
        try:
            foreign.check(precision)
        except ValueError as error:
            raise UsageError(f"{option} {error}") from None
        return
    raise UsageError(
        f"{option} {precision} is unknown; choose one of {', '.join(MODES)}, "
        f"or for comparison one of {', '.join(foreign.names())}."
    )


def check_attention(asked: str | None, precision: str | None) -> None:
    """Raises UsageError for no mode of attention, or one that the precision does not have."""
    if asked is None:
        return
    if asked not in ATTENTION:
        raise UsageError(f"--attention {asked} is unknown; choose one of {', '.join(ATTENTION)}.")
    if precision == "fp32" and asked != OFFICIAL:
        raise UsageError(f"--attention {asked} computes in 16 or 8 bits; --precision fp32 has {OFFICIAL} only.")


def choose_attention(asked: str | None, mode: Mode, device: torch.device) -> str:
    """How the transformer's blocks are computed: as asked; else in the official way on a CPU and in fp32, by fused
    kernels on a card, with int8 q k^T where the linears multiply in 8 bits too."""
    if asked is not None:
        return asked
    if device.type != "cuda" or mode.dtype != torch.bfloat16:
        return OFFICIAL
    return "int8" if mode.product_kinds else "bf16"


def read_recipe_option(recipe: Recipes, precision: str | None) -> Recipe | float | None:
    """A recipe, or the budget of ``auto:BUDGET``, from what was given as ``recipe``.

    Raises:
        UsageError: no recipe, a file that is none, a budget that is no number, or a precision beside it.
    """
    if recipe is None:
        return None
    if precision is not None:
        raise UsageError(f"--recipe takes the place of --precision {precision}; leave one of them out.")
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe).startswith(AUTO):
        text = str(recipe).removeprefix(AUTO)
        try:
            budget = float(text)
        except ValueError:
            budget = math.nan
        if not 0 < budget < math.inf:
            raise UsageError(f"--recipe {recipe}: the budget has to be a number above 0, as in auto:0.02.")
        return budget
    try:
        return read_recipe(Path(recipe))
    except ValueError as error:
        raise UsageError(f"--recipe {recipe}: {error}") from None


def choose_mode(component: Component, asked: str | None, default: str, option: str, dtype: torch.dtype) -> Mode:
    """The mode of a network: as asked, else as it is stored, else ``default``.

    Args:
        asked, default: names of precisions, already checked. ``option`` is how a user gives ``asked``.
        dtype: what a quantized network computes in.

    Raises:
        UsageError: the network is stored in another precision.
    """
    stored = component.quantization
    if stored is not None:
        if asked not in (None, stored.precision):
            raise UsageError(
                f"{option} {asked}: {component.folder} is stored in {stored.precision}, and what was lost in it does "
                f"not come back; leave {option} out, or give the original model with --model."
            )
        return Mode(stored.precision, dtype, stored.recipe, stored=True)
    name = asked or default
    if name in PRECISIONS:
        return Mode(name, torch.bfloat16 if name == "bf16" else torch.float32)
    return Mode(name, dtype, default_recipe(name, component.name))


def choose_recipe(component: Component, recipe: Recipe | float) -> Mode | None:
    """The mode of a network with a recipe of its own; None for a budget, which first has to be measured.

    Raises:
        UsageError: the network is already quantized, or the recipe fits none of its linears.
    """
    if component.quantization is not None:
        raise UsageError(
            f"--recipe: {component.folder} is stored in {component.quantization.precision} and cannot be quantized "
            "again; leave --recipe out, or give the original model with --model."
        )
    if not isinstance(recipe, Recipe):
        return None
    formats_of(recipe, build_on_meta(component), component.name)
    return Mode(recipe.name, torch.bfloat16, recipe)


def measure_recipe(
    model: ModelFolder, budget: float, device: torch.device, progress: Callable[[str, int, int], None] | None
) -> Mode:
    """The cheapest recipe of the transformer whose measured error is within a budget."""
    from .sensitivity import auto_recipe

    recipe = auto_recipe(model, budget, device, progress)
    return Mode(recipe.name, torch.bfloat16, recipe)
