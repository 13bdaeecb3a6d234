"""4-bit weights expanded: the kernels' bits, interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest
from separate import run_separately

INTERPRETED = """
import torch
from solostep.kernels import expand

torch.manual_seed(0)
for rows, columns, dtype in ((3, 300, torch.float32), (2, 2304, torch.float16), (1, 1, torch.float16)):
    groups = -(-columns // 128)
    packed = torch.randint(256, (rows, groups * 64)).to(torch.uint8)
    scale, zero = (torch.rand(2, rows, groups) * 8 + 0.1).bfloat16()
    out = torch.full((rows, columns), torch.nan, dtype=dtype)
    expand.launch_int4(packed, scale, zero, out)
    assert torch.equal(out, expand.expand_int4_reference(packed, scale, zero, columns, dtype)), (rows, columns)
for shape, dtype in (((7, 301), torch.float32), ((2, 2304), torch.float16), ((1, 1), torch.float16)):
    n = shape[0] * shape[1]
    packed, amax = torch.randint(256, (-(-n // 2),)).to(torch.uint8), torch.rand(-(-n // 64))
    values = torch.randn(16)
    out = torch.full(shape, torch.nan, dtype=dtype)
    expand.launch_nf4(packed, amax, values, out)
    assert torch.equal(out, expand.expand_nf4_reference(packed, amax, values, shape, dtype)), shape
print("equal")
"""


def test_the_interpreted_kernels_give_the_reference_bits(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_separately(INTERPRETED, tmp_path, TRITON_INTERPRET="1").split() == ["equal"]
