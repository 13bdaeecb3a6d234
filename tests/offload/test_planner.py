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
    Savings,
    activation_bytes,
    all_savings,
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
    assert (activation_bytes(REAL, FULL, attention) - rest) / 2**30 == pytest.approx(gib, rel=0.01)


def test_all_stay_where_there_is_room() -> None:
    plan = plan_blocks(REAL, FULL, 80 * GB, "int8")
    assert (plan.resident, plan.slots, plan.host, plan.streams) == (48, 0, 0, False)
    assert plan.device == 48 * REAL.block + REAL.rest + activation_bytes(REAL, FULL, "int8")


@pytest.mark.parametrize("attention", list(ACTIVATIONS))
@pytest.mark.parametrize("clip", [FULL, SHORT, Clip(300, 6144, 1)], ids=["204", "51", "tiny"])
@pytest.mark.parametrize("host", [None, 20 * GB, 6 * GB])
def test_budgets_are_kept_and_more_is_never_slower(attention: str, clip: Clip, host: int | None) -> None:
    last = float("inf")
    for tenth in range(10, 800, 7):
        budget = tenth * GB // 10
        try:
            plan = plan_blocks(REAL, clip, budget, attention, host=host, rates=H200)
        except BudgetError as error:
            assert last == float("inf") and error.least > budget
            assert plan_blocks(REAL, clip, error.least, attention).slots == 1
            with pytest.raises(BudgetError):
                plan_blocks(REAL, clip, error.least - 1, attention)
            continue
        assert plan.device <= budget and (host is None or plan.host <= host)
        weights = (plan.resident + plan.slots) * REAL.block + REAL.rest
        assert plan.device == weights + activation_bytes(REAL, clip, attention, plan.savings)
        assert 0 <= plan.disk <= REAL.blocks - plan.resident
        seconds = step_seconds(REAL, clip, plan, H200)
        assert seconds <= last
        last = seconds
    assert last < float("inf")


def test_savings_are_counted() -> None:
    """At full length: a parked row, half of the text, a quarter of the heads."""
    whole = activation_bytes(REAL, FULL, "int8")
    values, text = FULL.tokens * FULL.width, 4 * FULL.text * FULL.width
    assert whole - activation_bytes(REAL, FULL, "int8", Savings(park=True)) == 2 * values
    assert whole - activation_bytes(REAL, FULL, "int8", Savings(keep_text=False)) == (2 * 48 - 1) * text
    # rows in 8 bits 1, output 2, and a quarter of qkv 6 and of q and k in 8 bits 2
    assert whole - activation_bytes(REAL, FULL, "int8", Savings(head_groups=4)) == int((10 - 1 - 2 - 8 / 4) * values)
    fewer = [activation_bytes(REAL, FULL, "int8", s) for s in all_savings(REAL, FULL, "int8")]
    assert whole == max(fewer) and min(fewer) < 0.5 * whole
    assert list(all_savings(REAL, FULL, "official")) == [Savings()]
    assert not any(s.park for s in all_savings(REAL, Clip(5000, 6144, 1), "bf16"))


def test_the_least_that_spares_is_taken_and_spares_more_below() -> None:
    plans = [plan_blocks(REAL, FULL, tenth * GB // 10, "int8", rates=H200) for tenth in (400, 120, 92, 78, 58, 50)]
    assert plans[0].savings == plans[1].savings == Savings()
    assert plans[0].resident == 48 and 0 < plans[1].resident < 10 and plans[1].slots == 2
    assert not plans[2].savings.keep_text and plans[2].savings.head_groups == 1
    assert plans[3].savings.head_groups == 2 and plans[4].savings.head_groups > 2
    assert plans[5].savings.park and plans[5].resident == 0
    seconds = [step_seconds(REAL, FULL, plan, H200) for plan in plans]
    assert seconds == sorted(seconds) and seconds[3] < 1.02 * seconds[0]


def test_little_host_memory_means_reading_from_disk() -> None:
    plan = plan_blocks(REAL, FULL, 12 * GB, "int8", host=10 * GB)
    staging, streamed = 2 * REAL.block, 48 - plan.resident
    assert plan.host == staging + (streamed - plan.disk) * REAL.block <= 10 * GB
    assert plan.host + REAL.block > 10 * GB and 0 < plan.disk < streamed
    none = plan_blocks(REAL, FULL, 12 * GB, "int8", host=4 * GB)
    assert none.disk > plan.disk and none.host <= 4 * GB
    slow = Rates(disk=5e8)
    assert step_seconds(REAL, FULL, none, slow) == pytest.approx(none.disk * (REAL.block - REAL.dropped) / 5e8)
    with pytest.raises(BudgetError):  # nowhere to put them
        plan_blocks(REAL, FULL, 12 * GB, "int8", host=4 * GB, from_files=False)


@pytest.mark.parametrize("from_files", [True, False])
def test_too_little_host_memory_says_the_least(from_files: bool) -> None:
    with pytest.raises(BudgetError) as refused:
        plan_blocks(REAL, FULL, 12 * GB, "int8", host=GB, from_files=from_files)
    least = refused.value.least
    assert refused.value.host and (least == 2 * REAL.block if from_files else least > 30 * REAL.block)
    assert plan_blocks(REAL, FULL, 12 * GB, "int8", host=least, from_files=from_files).host <= least
    with pytest.raises(BudgetError):
        plan_blocks(REAL, FULL, 12 * GB, "int8", host=least - 1, from_files=from_files)


def test_a_parked_row_needs_host_memory_too() -> None:
    few = Network(blocks=2, block=1000, rest=1000)
    fixed = activation_bytes(few, FULL, "int8")
    assert plan_blocks(few, FULL, fixed + 10**4, "int8", host=0).host == 0
    budget = min(activation_bytes(few, FULL, "int8", s) for s in all_savings(few, FULL, "int8")) + 10**4
    assert plan_blocks(few, FULL, budget, "int8").savings.park
    with pytest.raises(BudgetError) as refused:
        plan_blocks(few, FULL, budget, "int8", host=10**6)
    assert refused.value.host and refused.value.least > 10**9


def test_an_impossible_budget_says_the_least() -> None:
    with pytest.raises(BudgetError, match=r"1\.0 GB are too little: 4\.\d GB are the least that would do"):
        plan_blocks(REAL, FULL, GB, "int8")
    with pytest.raises(ValueError, match="attention has to be one of official, bf16, int8, int8-fp8, not 'int4'"):
        plan_blocks(REAL, FULL, GB, "int4")


def test_copies_hide_at_full_length_and_bind_short_clips() -> None:
    whole, streamed = (plan_blocks(REAL, FULL, budget * GB, "int8") for budget in (80, 12))
    assert streamed.resident < 5
    assert step_seconds(REAL, FULL, streamed, H200) == step_seconds(REAL, FULL, whole, H200)
    few = Clip(tokens=1500, width=6144)
    slow = plan_blocks(REAL, few, 4 * GB, "int8", rates=H200)
    copies = (48 - slow.resident) * (REAL.block - REAL.dropped) / H200.bus
    assert step_seconds(REAL, few, slow, H200) == pytest.approx(copies)


def test_a_step_s_seconds_by_hand() -> None:
    network, clip = Network(blocks=2, block=10, rest=0), Clip(tokens=100, width=10, rows=1, text=0)
    plan = plan_blocks(network, clip, 10**12, "bf16")
    rates = Rates(attention=4e5, linears=2.8e5, bus=1.0)  # 4 S^2 d = 4e5, 28 S d^2 = 2.8e5: one second each
    assert step_seconds(network, clip, plan, rates) == pytest.approx(2 * (1 + 1))
