"""`solostep quantize`: which networks of a model become what, from what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..quant.recipe import Recipe, default_recipe, precisions
from .assemble import check_place
from .checkpoint import ModelFolder, open_model
from .conversion import Progress, State, plan_network, write_model
from .errors import UsageError
from .precision import Recipes, check_precision, choose_recipe, measure_recipe, read_recipe_option
from .runtime import pick_device
from .weights import Component

DEFAULT = "int8"


def quantize_model(
    model: str | Path | ModelFolder,
    out: str | Path,
    precision: str | None = None,
    text_precision: str | None = None,
    recipe: Recipes = None,
    device: str | torch.device | None = None,
    link: bool = False,
    progress: Progress | None = None,
    shard_bytes: int | None = None,
) -> dict[str, Any]:
    """Writes a quantized copy of a model; the same call again goes on with what a stopped one left.

    Args:
        out: the new folder. When this returns it is whole, and a model like any other.
        precision: of the transformer; by default int8, or what ``recipe`` says; bf16 leaves it as it is.
        text_precision: of Step-LLM; by default bf16, which leaves it as it is.
        recipe: in place of ``precision``, as in :meth:`StepVideoPipeline.from_pretrained`.
        device: where weights are quantized; by default the first CUDA card, else the CPU.
        link: refer to the networks that are not quantized where they are, instead of copying them.
        shard_bytes: of an output file at most; by default 2 GB, or less where the source's files are smaller.

    Returns:
        A record: ``output``, ``already_finished``, ``seconds``, and for each network its precision and bytes.

    Raises:
        UsageError: options that do not go together, or a folder that is something else; nothing was begun.
        CheckpointError: the model is incomplete or damaged.
        OutputError: the folder cannot be written, or its disk is full; finished shards are kept.
    """
    chosen = pick_device(device)
    check_format(precision, "--precision")
    check_format(text_precision, "--text-precision")
    asked = read_recipe_option(recipe, precision)
    if isinstance(asked, Recipe) and not asked.storable:
        raise UsageError(f"--recipe {recipe}: formats of other packages cannot be written to a file; use our own.")
    if asked is None and precision == "bf16" and text_precision in (None, "bf16"):
        raise UsageError(
            "Nothing is to be quantized: with --precision bf16 give a --text-precision, or give another --precision."
        )
    folder = model if isinstance(model, ModelFolder) else open_model(model)
    place = Path(out).expanduser().resolve()
    check_place(place, folder)
    recipes: dict[str, Recipe] = {}
    kept: dict[str, Any] = {}
    if asked is not None:
        recipes["transformer"] = _recipe(folder, place, asked, str(recipe), chosen, progress, kept)
    elif precision != "bf16":
        recipes["transformer"] = default_recipe(precision or DEFAULT, "transformer")
    if text_precision not in (None, "bf16"):
        recipes["step_llm"] = default_recipe(text_precision, "step_llm")
    networks = []
    for name, wanted in recipes.items():
        _check_float(folder.components[name])
        network = plan_network(folder.components[name], wanted, wanted.name, shard_bytes)
        if network.formats:
            networks.append(network)
    if not networks:
        raise UsageError(f"--recipe {recipe} leaves every linear in bf16: nothing is to be quantized.")
    return write_model(folder, place, networks, chosen, link, progress, kept)


def check_format(name: str | None, option: str) -> None:
    """Raises UsageError for what is no format, or cannot be stored."""
    if name in (None, "bf16"):
        return
    check_precision(name, option)
    if name not in precisions():
        why = "a type to compute in" if name == "fp32" else "another package's format and cannot be written to a file"
        raise UsageError(f"{option} {name} is {why}; choose one of {', '.join(precisions())}, or bf16.")


def _check_float(component: Component) -> None:
    """Raises UsageError for a network that is quantized already."""
    if component.quantization is not None:
        option = "--precision" if component.name == "transformer" else "--text-precision"
        raise UsageError(
            f"{component.folder} is already quantized to {component.quantization.precision}, and what was lost does "
            f"not come back; give the original model, or {option} bf16 to take it along as it is."
        )


def _recipe(
    folder: ModelFolder, out: Path, asked: Recipe | float, text: str, device: torch.device, progress: Progress | None,
    kept: dict[str, Any],
) -> Recipe:  # fmt: skip
    """A recipe, measured if it is a budget; one that a stopped conversion to ``out`` measured is taken from there."""
    component = folder.components["transformer"]
    mode = choose_recipe(component, asked)
    if mode is not None:
        assert isinstance(asked, Recipe)
        return asked
    assert isinstance(asked, float)
    state = State.read(out)
    found = {} if state is None else state.asked.get(text, {})
    if found.get("fingerprint") == component.fingerprint:
        recipe = Recipe.from_dict(found["recipe"], f"{out / 'conversion.json'}")
    else:
        measured = measure_recipe(folder, asked, device, progress).recipe
        assert measured is not None
        recipe = measured
    kept[text] = {"fingerprint": component.fingerprint, "recipe": recipe.as_dict()}
    return recipe
