"""Recipes: which format each linear of a network gets.

Only the linears inside the blocks are ever quantized (99 % of the 29 billion parameters of the DiT). adaLN, timestep
and caption projections, patch and output layers stay in bf16: together 0.3 billion parameters that everything hangs
on. A rule is a pattern on a module's path (``fnmatch``) and a format; the first that fits counts.

The text keys and values of the DiT's cross-attention stay bf16 too: their projection ``attn2.wkv`` runs once a prompt
on at most 397 tokens, so that 8-bit products would gain nothing; its weights alone are stored in 8 bits.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .formats import FORMATS, UNQUANTIZED, check_format, is_storable

Rules = tuple[tuple[str, str], ...]

BLOCKS = {"transformer": "transformer_blocks.*", "step_llm": "transformer.layers.*"}
"""Where the linears are that a recipe may quantize, by network."""
WEIGHT_ONLY = {"int8": "int8-weight", "int8-plain": "int8-weight", "fp8": "fp8-weight"}


@dataclass(frozen=True)
class Recipe:
    """An ordered list of (pattern, format); what no pattern fits stays as it is."""

    name: str
    rules: Rules = ()

    def __post_init__(self) -> None:
        for pattern, name in self.rules:
            if not pattern:
                raise ValueError(f"Recipe {self.name}: a pattern is empty.")
            check_format(name)

    def format_of(self, path: str) -> str:
        return next((name for pattern, name in self.rules if fnmatch.fnmatchcase(path, pattern)), UNQUANTIZED)

    def resolve(self, linears: Iterable[str]) -> dict[str, str]:
        """Format of every linear that is quantized, by its path.

        Raises:
            ValueError: rules of which none fits any linear: a recipe for another network.
        """
        paths = list(linears)
        found = {path: name for path in paths if (name := self.format_of(path)) != UNQUANTIZED}
        if self.rules and not any(fnmatch.fnmatchcase(p, pattern) for p in paths for pattern, _ in self.rules):
            patterns = ", ".join(pattern for pattern, _ in self.rules)
            example = paths[0] if paths else "-"
            raise ValueError(
                f"Recipe {self.name} fits no linear of this network: its patterns are {patterns}, "
                f"and a linear is called {example}."
            )
        return found

    @property
    def storable(self) -> bool:
        """Whether a converter can write it: formats of other packages cannot be written."""
        return all(is_storable(name) for _, name in self.rules)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "rules": [list(rule) for rule in self.rules]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str) -> Recipe:
        """Raises ValueError, which names ``origin``, for what is no recipe."""
        rules = values.get("rules")
        good = isinstance(rules, list) and all(
            isinstance(r, (list, tuple)) and len(r) == 2 and all(isinstance(part, str) for part in r) for r in rules
        )
        if not good:
            raise ValueError(f'{origin} is no recipe; it has to be {{"rules": [["pattern", "format"], ...]}}.')
        assert isinstance(rules, list)
        name = values.get("name")
        try:
            return cls(name if isinstance(name, str) and name else origin, tuple((r[0], r[1]) for r in rules))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None


def default_recipe(precision: str, network: str) -> Recipe:
    """What a precision means for a network (``transformer`` or ``step_llm``).

    Raises:
        ValueError: an unknown format.
    """
    check_format(precision)
    blocks = BLOCKS[network]
    if precision == UNQUANTIZED:
        return Recipe(UNQUANTIZED)
    rules = [(blocks, precision)]
    if network == "transformer" and precision in WEIGHT_ONLY:
        rules.insert(0, (f"{blocks}.attn2.wkv", WEIGHT_ONLY[precision]))
    return Recipe(precision, tuple(rules))


def read_recipe(path: Path) -> Recipe:
    """A recipe from a JSON file.

    Raises:
        ValueError: the file cannot be read, or is no recipe; it is named.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"Recipe {path} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Recipe {path} is not JSON ({error}).") from None
    if not isinstance(values, dict):
        raise ValueError(f'Recipe {path} has to be {{"rules": [["pattern", "format"], ...]}}.')
    return Recipe.from_dict(values, f"Recipe {path}")


def precisions() -> list[str]:
    """Our formats that can be a precision of a whole network."""
    return [name for name in FORMATS if name != "int8-plain"]
