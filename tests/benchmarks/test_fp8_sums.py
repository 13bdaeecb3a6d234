"""The emulation of sums in FP8 units: where they stall, and that folds help."""

from __future__ import annotations

import pytest
import torch

from solostep.benchmarks import fp8_sums


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sum_of_ones_stalls_where_one_is_below_the_last_bit(sign: float) -> None:
    a, b = torch.full((1, 32_768), sign), torch.ones(32_768, 2)
    assert fp8_sums.imprecise_mm(a, b, 0).tolist() == [[sign * 2.0**14] * 2]
    assert fp8_sums.imprecise_mm(a, b, 64).tolist() == [[sign * 2.0**15] * 2]


def test_products_are_cut_off_towards_zero_one_by_one() -> None:
    a, b = torch.zeros(1, 32), torch.ones(32, 1)
    a[0, :3] = torch.tensor([1.0, 2.0**-14, 2.0**-14])  # together the last bit, but each is below it
    assert float(fp8_sums.imprecise_mm(a, b, 0)) == 1.0
    a[0, 1] = -(2.0**-13)
    assert float(fp8_sums.imprecise_mm(a, b, 0)) == 1.0 - 2.0**-13


def test_local_means_lose_most_without_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_sums, "FOLDS", (1, 0))
    found, normal = (fp8_sums.attention_errors(kind, 4096) for kind in ("local means", "normal"))
    assert 4 * found["1"] < found["0"] and normal["1"] < normal["0"] < found["0"]
    assert found["formats"] < 5e-3 < normal["formats"]
