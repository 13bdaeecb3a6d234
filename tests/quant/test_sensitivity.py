"""Choosing formats under an error budget: never over it, close to optimal, and written as few rules."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping

import pytest

from solostep.quant.recipe import Recipe
from solostep.quant.sensitivity import (
    CANDIDATES,
    Errors,
    Frontier,
    Linear,
    Table,
    compress,
    cost,
    raw_error,
    search,
    settled,
)

KINDS = ("attn1.wqkv", "attn2.wkv", "ff.net.2")


def made_table(seed: int, blocks: int = 2, kinds: tuple[str, ...] = KINDS) -> Table:
    """Errors of a plausible order, each drawn within a factor of three; widths and tokens differ."""
    draw = random.Random(seed)
    usual = {"int8": 0.01, "int8-plain": 0.015, "fp8": 0.03, "int8-weight": 0.007, "nf4": 0.08}
    linears = []
    for block, kind in itertools.product(range(blocks), kinds):
        errors = {n: Errors(*(e * draw.uniform(0.5, 1.5) for _ in range(3))) for n, e in usual.items()}
        width = draw.choice((256, 512, 1024))
        linears.append(Linear(f"transformer_blocks.{block}.{kind}", width, 256, draw.choice((50.0, 400.0)), errors))
    return Table("transformer", tuple(linears), {0: 0.01})


def choose(table: Table, budget: float, formats: Iterable[str] = CANDIDATES) -> dict[str, str]:
    """The cheapest mix with a predicted error of at most the budget."""
    frontier = Frontier(table, formats)
    return frontier.mix(frontier.furthest(budget))


def everything(table: Table, formats: tuple[str, ...]) -> list[dict[str, str]]:
    paths = [x.path for x in table.linears]
    return [dict(zip(paths, names, strict=True)) for names in itertools.product(("bf16", *formats), repeat=len(paths))]


# --- choosing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_choice_against_all_mixes(seed: int) -> None:
    """Within the budget, and costlier than the best mix by no more than the step that did not fit."""
    table = made_table(seed)
    formats = ("int8", "int8-weight", "fp8")
    mixes = [(raw_error(table, mix), cost(table.linears, mix)["cost"]) for mix in everything(table, formats)]
    frontier = Frontier(table, formats)
    for budget in (0.001, 0.008, 0.015, 0.025, 0.05, 1.0):
        mix = choose(table, budget, formats=formats)
        best = min(price for error, price in mixes if error <= budget)
        assert raw_error(table, mix) <= budget
        own = cost(table.linears, mix)["cost"]
        position = frontier.furthest(budget)
        short = frontier.steps[position].saving if position < len(frontier) else 0.0
        assert best - 1e-12 <= own <= best + short + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_every_position_of_the_frontier_is_optimal_for_its_error(seed: int) -> None:
    table = made_table(seed)
    formats = ("int8", "int8-weight", "fp8")
    mixes = [(raw_error(table, mix), cost(table.linears, mix)["cost"]) for mix in everything(table, formats)]
    frontier = Frontier(table, formats)
    for position in range(len(frontier) + 1):
        error = frontier.error(position)
        assert error == pytest.approx(raw_error(table, frontier.mix(position)))
        best = min(price for e, price in mixes if e <= error + 1e-12)
        assert cost(table.linears, frontier.mix(position))["cost"] == pytest.approx(best)


def test_choice_is_monotone_in_the_budget() -> None:
    table = made_table(7, blocks=12)
    budgets = [0.0005 * 1.3**i for i in range(25)]
    prices = [cost(table.linears, choose(table, b))["cost"] for b in budgets]
    assert prices == sorted(prices, reverse=True)
    assert prices[0] == pytest.approx(1.25) and prices[-1] < 0.7
    errors = [raw_error(table, choose(table, b)) for b in budgets]
    assert errors == sorted(errors)


def test_tight_budget_keeps_the_sensitive_linear_in_bf16() -> None:
    table = made_table(3, blocks=8)
    worst = "transformer_blocks.5.attn1.wqkv"
    linears = tuple(
        Linear(x.path, x.in_features, x.out_features, x.tokens,
               {n: Errors(*(40 * v for v in (e.output, e.update, e.stream))) for n, e in x.errors.items()})
        if x.path == worst else x
        for x in table.linears
    )  # fmt: skip
    planted = Table(table.network, linears)
    mix = choose(planted, 0.1)
    assert worst not in mix and len(mix) == len(linears) - 1
    assert all(planted.ranked(n)[0].path == worst for n in CANDIDATES)


def test_weights_alone_where_products_cost_too_much_accuracy() -> None:
    """int8-weight saves memory only: it is taken before W8A8 on a linear that products in 8 bits would spoil."""
    errors = {"int8": Errors(0.5, 0.5, 0.5), "int8-weight": Errors(0.001, 0.001, 0.001)}
    linear = Linear("transformer_blocks.0.ff.net.2", 1024, 1024, 100.0, errors)
    table = Table("transformer", (linear,))
    assert choose(table, 0.0005, formats=errors) == {}
    assert choose(table, 0.01, formats=errors) == {linear.path: "int8-weight"}
    assert choose(table, 1.0, formats=errors) == {linear.path: "int8"}


def test_cost_model() -> None:
    linear = Linear("transformer_blocks.0.ff.net.2", 1024, 512, 100.0)
    assert cost([linear], {}) == {"time": 1.0, "bytes": 1.0, "cost": 1.25}
    scales = 4 / (2 * 1024)
    assert cost([linear], {linear.path: "fp8"}) == pytest.approx(
        {"time": 0.5, "bytes": 0.5 + scales, "cost": 0.5 + 0.25 * (0.5 + scales)}
    )
    assert cost([linear], {linear.path: "int8-weight"})["time"] > 1
    assert linear.saved("int8") == 1024 * 512 - 4 * 512 and linear.saved("bf16") == 0


def test_an_error_that_is_no_number_is_never_chosen() -> None:
    errors = {"int8": Errors(math.nan, math.nan, math.nan), "fp8": Errors(math.inf, math.inf, math.inf)}
    table = Table("transformer", (Linear("transformer_blocks.0.ff.net.2", 64, 64, 1.0, errors),))
    assert choose(table, 1e9, formats=errors) == {}


def test_a_format_that_was_not_measured() -> None:
    with pytest.raises(ValueError, match="'int4-weight' was not measured; measured are int8"):
        Frontier(made_table(0), ("int4-weight",))


# --- searching with measurements ------------------------------------------------------------------------------------


Law = Callable[[float], float]
LAWS: dict[str, Law] = {
    "as predicted": lambda raw: raw,
    "half of it": lambda raw: 0.5 * raw,
    "with rounding noise": lambda raw: math.hypot(0.004, 0.8 * raw) if raw else 0.0,
    "noise that saturates": lambda raw: math.hypot(0.009 * min(1.0, raw / 0.002), 0.4 * raw),
    "bent": lambda raw: 0.3 * raw**0.5,
    "steps": lambda raw: math.floor(raw * 300) / 300,
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("budget", [0.002, 0.01, 0.03, 0.5])
def test_search_is_within_the_budget_and_close_to_it(law: Law, budget: float) -> None:
    frontier = Frontier(made_table(11, blocks=16))
    asked: list[int] = []

    def measure(position: int) -> float:
        asked.append(position)
        return law(frontier.error(position))

    found = search(frontier, budget, measure)
    assert found.error == law(frontier.error(found.position)) <= budget
    assert len(set(asked)) == len(asked) <= 12
    reach = max(p for p in range(len(frontier) + 1) if law(frontier.error(p)) <= budget)
    if found.error <= 0.95 * budget:
        assert found.position >= reach - 1


def test_search_tells_what_could_be_reached() -> None:
    frontier = Frontier(made_table(5))
    found = search(frontier, 0.001, lambda position: 0.02 + 0.001 * position)  # bf16 itself is not asked
    assert (found.position, found.error) == (0, 0.0)
    assert found.reachable == pytest.approx(0.021)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_table_survives_json() -> None:
    import json

    table = made_table(1)
    assert Table.from_dict(json.loads(json.dumps(table.as_dict()))) == table
    short = table.as_dict(digits=3)["linears"][0]["errors"]["fp8"]["output"]
    assert short == pytest.approx(table.linears[0].errors["fp8"].output, rel=5e-3)
    assert len(str(short)) <= 8


def test_tables_are_put_together_by_format() -> None:
    table = made_table(1)

    def only(name: str) -> Table:
        linears = [
            Linear(x.path, x.in_features, x.out_features, x.tokens, {name: x.errors[name]}) for x in table.linears
        ]
        return Table(table.network, tuple(linears), {})

    both = only("fp8").merged(only("int8"))
    assert both.formats == ["fp8", "int8"]
    assert both.linears[2].errors["int8"] == table.linears[2].errors["int8"]
    with pytest.raises(ValueError, match="different linears"):
        both.merged(made_table(1, blocks=3))


def test_by_kind_is_a_root_mean_square() -> None:
    errors = [Errors(3.0, 0.0, 1.0), Errors(4.0, 0.0, 1.0)]
    linears = [Linear(f"transformer_blocks.{i}.ff.net.2", 8, 8, 1.0, {"int8": e}) for i, e in enumerate(errors)]
    assert Table("transformer", tuple(linears)).by_kind("int8") == {
        "ff.net.2": Errors(pytest.approx(math.sqrt(12.5)), 0.0, 1.0)
    }


# --- rules ----------------------------------------------------------------------------------------------------------


def paths_of(blocks: int) -> list[str]:
    return [f"transformer_blocks.{i}.{kind}" for i in range(blocks) for kind in KINDS]


def resolved(mix: Mapping[str, str], paths: list[str]) -> tuple[Recipe, dict[str, str]]:
    recipe = Recipe("test", compress(mix, paths, "transformer"))
    return recipe, recipe.resolve(paths)


@pytest.mark.parametrize("seed", range(6))
def test_rules_give_every_linear_its_format(seed: int) -> None:
    """Of block 1 and block 11 likewise: a pattern of one must not fit the other."""
    draw = random.Random(seed)
    paths = paths_of(14)
    names = ["int8"] * 8 + ["bf16", "fp8", "int8-weight"][: 1 + seed % 3]
    mix = {p: n for p in paths if (n := draw.choice(names)) != "bf16"}
    recipe, found = resolved(mix, paths)
    assert found == mix
    assert len(recipe.rules) <= sum(mix.get(p) != "int8" for p in paths) + len(KINDS) + 1


def test_rules_are_few() -> None:
    paths = paths_of(48)
    mix = dict.fromkeys(paths, "int8")
    assert resolved(mix, paths)[0].rules == (("transformer_blocks.*", "int8"),)
    mix |= {p: "int8-weight" for p in paths if "wkv" in p and "wqkv" not in p}
    mix = {p: n for p, n in mix.items() if ".0." not in p}
    mix["transformer_blocks.7.ff.net.2"] = "fp8"
    recipe, found = resolved(mix, paths)
    assert found == mix
    assert recipe.rules == (
        ("transformer_blocks.0.*", "bf16"),
        ("transformer_blocks.7.ff.net.2", "fp8"),
        ("transformer_blocks.*.attn2.wkv", "int8-weight"),
        ("transformer_blocks.*", "int8"),
    )


def test_no_quantized_linear_is_no_rule() -> None:
    assert compress({}, paths_of(2), "transformer") == ()


def test_settling_takes_the_usual_format_where_it_makes_no_difference() -> None:
    def linear(i: int, int8: float, plain: float) -> Linear:
        errors = {"int8": Errors(int8, int8, int8), "int8-plain": Errors(plain, plain, plain)}
        return Linear(f"transformer_blocks.{i}.ff.net.2", 256, 256, 1.0, errors)

    near = [linear(i, 0.0100, 0.0200) for i in range(8)] + [linear(8, 0.0101, 0.0100)]
    table = Table("transformer", tuple(near))
    mix = choose(table, 1.0, formats=("int8", "int8-plain"))
    assert mix[near[8].path] == "int8-plain"
    assert set(settled(table, mix).values()) == {"int8"}
    far = Table("transformer", (*near[:8], linear(8, 0.05, 0.01)))
    assert settled(far, choose(far, 1.0, formats=("int8", "int8-plain")))[near[8].path] == "int8-plain"
