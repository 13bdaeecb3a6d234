"""The planner's arithmetic: sums that can be checked by hand, and what a user relies on."""

from __future__ import annotations

import pytest

from solostep.offload.planner import (
    ACTIVATIONS,
    MARGIN,
    BudgetError,
    Clip,
    Network,
    Rates,
    activation_bytes,
    plan_blocks,
    step_seconds,
)

GB = 10**9
REAL = Network(blocks=48, block=604_000_000, rest=700_000_000, dropped=75_000_000)
FULL = Clip(tokens=75_888, width=6144)
SHORT = Clip(tokens=18_972, width=6144)
H200 = Rates(attention=830e12, linears=1400e12, bus=55e9)


@pytest.mark.parametrize(("attention", "gib"), [("bf16", 3.47), ("int8", 4.36), ("int8-fp8", 4.79), ("official", 8.69)])
def test_a_block_s_memory_is_what_was_measured(attention: str, gib: float) -> None:
    streams, text = 2 * 2 * 75_888 * 6144, 2 * 48 * 4 * 397 * 6144
    rest = streams + MARGIN + (0 if attention == "official" else text)
    assert (activation_bytes(REAL, FULL, attention, 18_972) - rest) / 2**30 == pytest.approx(gib, rel=0.01)


def test_all_stay_where_there_is_room() -> None:
    plan = plan_blocks(REAL, FULL, 80 * GB, "int8")
    assert (plan.resident, plan.slots, plan.host, plan.streams) == (48, 0, 0, False)
    assert plan.device == 48 * REAL.block + REAL.rest + activation_bytes(REAL, FULL, "int8", 18_972)


@pytest.mark.parametrize("attention", list(ACTIVATIONS))
@pytest.mark.parametrize("clip", [FULL, SHORT, Clip(300, 6144, 1)], ids=["204", "51", "tiny"])
def test_budgets_are_kept_and_used(attention: str, clip: Clip) -> None:
    last = -1
    for tenth in range(10, 800, 7):
        budget = tenth * GB // 10
        try:
            plan = plan_blocks(REAL, clip, budget, attention)
        except BudgetError as error:
            assert last == -1 and error.least > budget
            assert plan_blocks(REAL, clip, error.least, attention).slots == 1
            with pytest.raises(BudgetError):
                plan_blocks(REAL, clip, error.least - 1, attention)
            continue
        assert plan.device <= budget and plan.resident >= last  # more budget never keeps fewer
        assert plan.host == (48 - plan.resident) * REAL.block * plan.streams
        if plan.streams and plan.slots == 2:
            assert plan.device + REAL.block > budget or plan.resident == 46
        last = plan.resident


def test_an_impossible_budget_says_the_least() -> None:
    with pytest.raises(BudgetError, match=r"1\.0 GB are too little: 9\.\d GB are the least that would do"):
        plan_blocks(REAL, FULL, GB, "int8")
    with pytest.raises(ValueError, match="attention has to be one of official, bf16, int8, int8-fp8, not 'int4'"):
        plan_blocks(REAL, FULL, GB, "int4")


def test_copies_hide_at_full_length_and_bind_short_clips() -> None:
    whole, streamed = (plan_blocks(REAL, FULL, budget * GB, "int8") for budget in (80, 12))
    assert streamed.resident < 5
    assert step_seconds(REAL, FULL, streamed, H200) == step_seconds(REAL, FULL, whole, H200)
    few = Clip(tokens=1500, width=6144)
    slow = plan_blocks(REAL, few, 4 * GB, "int8")
    copies = (48 - slow.resident) * (REAL.block - REAL.dropped) / H200.bus
    assert step_seconds(REAL, few, slow, H200) == pytest.approx(copies)
    last = float("inf")
    for budget in range(3, 40):  # more budget is never slower
        seconds = step_seconds(REAL, few, plan_blocks(REAL, few, budget * GB, "int8"), H200)
        assert seconds <= last
        last = seconds


def test_a_step_s_seconds_by_hand() -> None:
    network, clip = Network(blocks=2, block=10, rest=0), Clip(tokens=100, width=10, rows=1, text=0)
    plan = plan_blocks(network, clip, 10**12, "bf16")
    rates = Rates(attention=4e5, linears=2.8e5, bus=1.0)  # 4 S^2 d = 4e5, 28 S d^2 = 2.8e5: one second each
    assert step_seconds(network, clip, plan, rates) == pytest.approx(2 * (1 + 1))
