"""Which recipe meets an error budget, and the report of `solostep sensitivity`.

The error that counts is that of the velocity: for each sample (a prompt, a time along its trajectory, a guidance
branch) the relative L2 error against the network in bf16, |v - v_bf16| / |v_bf16|, in fp32; a recipe's error is the
mean over the samples. How it is measured stands in study.py, what a recipe costs and how one is chosen in
quant/sensitivity.py.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..quant.formats import UNQUANTIZED
from ..quant.recipe import Recipe, default_recipe, precisions
from ..quant.sensitivity import CANDIDATES, Frontier, compress, cost, search, settled
from .activations import Conditions, Progress
from .checkpoint import ModelFolder
from .errors import UsageError
from .request import versions
from .study import FLOOR, EndToEnd, Study, checked_format

log = logging.getLogger("solostep")

REPORT = 1
"""Version of the report's layout."""


def check_budget(budget: Any) -> float:
    """Raises UsageError for what is not a positive number."""
    good = isinstance(budget, (int, float)) and not isinstance(budget, bool) and 0 < budget < math.inf
    if not good:
        raise UsageError(f"An error budget has to be a number above 0, such as 0.02, not {budget!r}.")
    return float(budget)


def auto_recipe(
    model: ModelFolder,
    budget: float,
    device: torch.device | str,
    progress: Progress | None = None,
    *,
    network: str = "transformer",
    candidates: Sequence[str] = CANDIDATES,
    conditions: Conditions | None = None,
) -> Recipe:
    """The cheapest recipe (quant/sensitivity.py says what that costs) whose measured error is within ``budget``.

    ``budget`` is the mean over the samples of the relative L2 error of the velocity against bf16, so 0.02 is 2 %. The
    choice is predicted from the errors of single linears, measured as a whole, and tightened until it holds. The same
    model, budget and device give the same recipe; a second call takes the measurements from the cache. If no linear can
    be quantized within the budget, all stay bf16 and a warning says what could be reached.

    Raises:
        UsageError: a budget that is no positive number, a stored quantized model, a candidate of another package.
    """
    budget = check_budget(budget)
    study = Study(model, network, conditions, device, torch.bfloat16, progress)
    try:
        recipe, mix, error = _chosen(study, budget, candidates)
        if mix:
            named = ", ".join(f"{name} for {count}" for name, count in Counter(mix.values()).most_common())
            log.warning("%s: %s of %d linears; the velocity is off by %.2g %%.", recipe.name, named, len(study.paths),
                        100 * error)  # fmt: skip
        return recipe
    finally:
        study.close()


def choose_recipe(study: Study, budget: float, candidates: Sequence[str] = CANDIDATES) -> Recipe:
    """As :func:`auto_recipe`, in a study that is already there."""
    return _chosen(study, budget, candidates)[0]


def _chosen(study: Study, budget: float, candidates: Sequence[str]) -> tuple[Recipe, dict[str, str], float]:
    """The recipe, the format of each linear that it quantizes, and its measured error."""
    budget = check_budget(budget)
    for name in candidates:
        checked_format(name)
        if ":" in name:
            raise UsageError(f"{name} is for comparison only; an error budget is met with solostep's own formats.")
    name = f"auto:{budget:g}"
    table = study.table(candidates)
    frontier = Frontier(table, candidates)

    def mix_at(position: int) -> dict[str, str]:
        return settled(table, frontier.mix(position))

    found = search(frontier, budget, lambda position: study.end_to_end([mix_at(position)])[0].error)
    mix = mix_at(found.position)
    if not mix:
        log.warning(
            "No linear can be quantized within an error of %g: all stay bf16. The least that was reached is %.2g, as "
            "even a small change makes bf16 round differently everywhere.", budget, found.reachable,
        )  # fmt: skip
        return Recipe(name), mix, 0.0
    recipe = Recipe(name, compress(mix, study.paths, study.network))
    assert study.mix_of(recipe) == mix
    return recipe, mix, found.error


# --- report -------------------------------------------------------------------------------------------------------


def report(
    study: Study,
    formats: Sequence[str],
    recipes: Sequence[Recipe | float] = (),
    candidates: Sequence[str] = CANDIDATES,
) -> dict[str, Any]:
    """Everything that `solostep sensitivity` measures, in JSON's types.

    Args:
        recipes: measured end to end beside the default recipes of ``formats``; a number is an error budget, which is
            spent on ``candidates``.
    """
    budgets = any(not isinstance(r, Recipe) for r in recipes)
    table = study.table([*formats, *(candidates if budgets else ())])
    asked = [r if isinstance(r, Recipe) else choose_recipe(study, r, candidates) for r in recipes]
    defaults = [default_recipe(n, study.network) for n in formats if n in precisions() or ":" in n]
    chosen = list(dict.fromkeys([*defaults, *asked]))
    mixes = [study.mix_of(recipe) for recipe in chosen]
    floor, *errors = study.end_to_end([FLOOR, *mixes])
    ends = [_entry("fp32" if study.dtype == torch.bfloat16 else UNQUANTIZED, floor)]
    for recipe, mix, error in zip(chosen, mixes, errors, strict=True):
        ends.append(_entry(recipe.name, error) | cost(table.linears, mix) | {"recipe": recipe.as_dict()})
    return {
        "solostep_sensitivity": REPORT,
        "model": study.model.source if not Path(study.model.source).is_absolute() else Path(study.model.source).name,
        "network": study.network,
        "conditions": study.identity(),
        "samples": study.sizes(),
        "versions": versions(),
        "table": table.as_dict(digits=4),
        "end_to_end": ends,
    }


def _entry(name: str, error: EndToEnd) -> dict[str, Any]:
    return {"name": name, **asdict(error)}
