"""Recipes: which rule counts, what they refuse, and what the precisions mean on the released networks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from solostep.quant.formats import FORMATS
from solostep.quant.recipe import BLOCKS, Recipe, default_recipe, precisions, read_recipe

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"


def linears(name: str) -> list[str]:
    """Paths of all matrices of a released network but embedding tables, inside its blocks and outside."""
    shapes = json.loads((MANIFESTS / f"{name}.json").read_text())["state_dict"]
    paths = [k.removesuffix(".weight") for k, shape in shapes.items() if k.endswith(".weight") and len(shape) == 2]
    assert len(paths) > 100
    return [path for path in paths if not path.endswith("embeddings")]


def test_the_first_rule_that_fits_counts() -> None:
    recipe = Recipe("mixed", (("*.0.*", "bf16"), ("*.ff.*", "fp8"), ("blocks.*", "int8"), ("blocks.1.ff.*", "nf4")))
    found = {path: recipe.format_of(path) for path in ("blocks.0.ff.a", "blocks.1.ff.a", "blocks.1.attn", "head")}
    assert found == {"blocks.0.ff.a": "bf16", "blocks.1.ff.a": "fp8", "blocks.1.attn": "int8", "head": "bf16"}
    assert recipe.resolve(found) == {"blocks.1.ff.a": "fp8", "blocks.1.attn": "int8"}  # what stays is not named
    assert Recipe("case", (("Blocks.*", "int8"),)).format_of("blocks.1") == "bf16"


def test_a_recipe_for_another_network_is_refused() -> None:
    words = r"Recipe r fits no linear of this network: its patterns are a\.\*, b, and a linear is called head\."
    with pytest.raises(ValueError, match=words):
        Recipe("r", (("a.*", "int8"), ("b", "fp8"))).resolve(["head", "tail"])
    assert Recipe("empty").resolve(["head"]) == {}
    assert Recipe("stays", (("head", "bf16"),)).resolve(["head"]) == {}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "FILE is no recipe; it has to be"),
        ({"rules": "int8"}, "FILE is no recipe"),
        ({"rules": {"*": "int8"}}, "FILE is no recipe"),
        ({"rules": [["*"]]}, "FILE is no recipe"),
        ({"rules": [["*", "int8", "fp8"]]}, "FILE is no recipe"),
        ({"rules": [["*", 8]]}, "FILE is no recipe"),
        ({"rules": ["ab"]}, "FILE is no recipe"),
        ({"rules": [["*", "int9"]]}, "FILE: The format 'int9' is unknown; choose one of bf16, int8"),
        ({"rules": [["", "int8"]]}, "FILE: Recipe FILE: a pattern is empty"),
    ],
)
def test_what_is_no_recipe(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe.from_dict(values, "FILE")


def test_round_trip_and_names(tmp_path: Path) -> None:
    recipe = Recipe("mine", (("a.*", "int8"), ("*", "fp8-weight")))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict())), "elsewhere") == recipe
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.as_dict()))
    assert read_recipe(path) == recipe
    for name in ({}, {"name": None}, {"name": ""}, {"name": 3}):
        assert Recipe.from_dict({**name, "rules": []}, "FILE").name == "FILE"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"Recipe .*recipe\.json cannot be read \(No such file"),
        ("{", r"Recipe .*recipe\.json is not JSON"),
        ("[" * 100_000, r"Recipe .*recipe\.json is not JSON"),
        ("\udcff", r"Recipe .*recipe\.json is not JSON"),
        ("[]", r'Recipe .*recipe\.json has to be \{"rules"'),
        ('{"rules": 3}', r"Recipe .*recipe\.json is no recipe"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "recipe.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=words):
        read_recipe(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_recipe(tmp_path)


def test_what_can_be_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solostep.quant.foreign.importlib.util.find_spec", lambda name: object())
    assert all(default_recipe(name, network).storable for name in precisions() for network in BLOCKS)
    assert not Recipe("theirs", (("*", "torchao:int8"),)).storable


# --- the released networks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit_t2v", "dit_ti2v"])
def test_precisions_on_the_released_transformer(name: str) -> None:
    paths = linears(name)
    for precision in FORMATS:
        found = default_recipe(precision, "transformer").resolve(paths)
        by_place: dict[str, set[str]] = {}
        for path, form in found.items():
            blocks, index, place = path.split(".", 2)
            assert blocks == "transformer_blocks" and int(index) < 48  # nothing outside the blocks
            by_place.setdefault(place, set()).add(form)
        want = {
            place: {precision}
            for place in ("attn1.wqkv", "attn1.wo", "attn2.wq", "attn2.wo", "ff.net.0.proj", "ff.net.2")
        }
        weights = {"int8": "int8-weight", "int8-plain": "int8-weight", "fp8": "fp8-weight"}
        want |= {"attn2.wkv": {weights.get(precision, precision)}}
        assert by_place == want
        assert Counter(path.split(".")[1] for path in found) == {str(i): 7 for i in range(48)}
    outside = {path.split(".")[0] for path in paths} - {"transformer_blocks"}
    assert {"adaln_single", "caption_projection", "clip_projection", "proj_out"} <= outside


def test_precisions_on_the_released_step_llm() -> None:
    paths = linears("step_llm")
    for precision in precisions():
        found = default_recipe(precision, "step_llm").resolve(paths)
        assert set(found.values()) == {precision}
        places = Counter(path.split(".", 3)[3] for path in found)
        assert places == dict.fromkeys(("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2"), 48)


def test_names_of_precisions() -> None:
    assert default_recipe("bf16", "transformer").rules == ()
    assert set(precisions()) == set(FORMATS) - {"int8-plain"}
    with pytest.raises(ValueError, match="'int9' is unknown"):
        default_recipe("int9", "transformer")
