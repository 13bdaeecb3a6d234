"""The table of kernels: rates and ratios of made-up times, and the error of each case on a CPU, far smaller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from solostep.benchmarks import kernel_cases, kernel_cases_rest, kernels
from solostep.benchmarks.kernel_cases import Case, Group
from solostep.benchmarks.kernels import KINDS, attention_data, error_table, missed, page, rows_of, table

CPU = torch.device("cpu")
CEILINGS = {"TB/s": 4.0, "TFLOP/s": 700.0}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fake_group() -> Group:
    cases = [Case("eager", lambda: None, 8e9), Case("ours", lambda: None, 4e9), Case("broken", lambda: None, 1)]
    return Group("pass", "10 x 10", "TB/s", "eager", cases)


def test_rates_fractions_and_ratios() -> None:
    rows = rows_of(fake_group(), {"eager": 8.0, "ours": 2.0}, {"ours": 1e-3}, CEILINGS)
    assert [(r.variant, r.rate, r.fraction, r.ratio, r.error) for r in rows] == [
        ("eager", 1.0, 0.25, 1.0, None), ("ours", 2.0, 0.5, 4.0, 1e-3),
    ]  # fmt: skip
    assert rows_of(fake_group(), {"ours": 2.0}, {}, CEILINGS)[0].ratio is None
    lines = table(rows).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| pass<br>10 x 10 | eager | 8.000 | 1.00 TB/s | 25% |")
    assert lines[3] == "|  | ours | 2.000 | 2.00 TB/s | 50% | 1.0e-03 | 4.00 |"


def test_what_fails_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no such\nkernel")

    def milliseconds(runs: dict[str, Any], rounds: int, turn: float) -> dict[str, float]:
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr(kernels, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cases = [
        Case("good", lambda: None, 1e9, lambda: 0.5),
        Case("bad", broken, 1e9),
        Case("worse", broken, 1, lambda: 0.1),
    ]
    rows, notes = kernels.bench(Group("pass", "", "TB/s", "good", cases), CEILINGS, 1, 1)
    assert [row.variant for row in rows] == ["good"] and rows[0].error == 0.5
    assert notes == ["pass, bad: no such kernel", "pass, worse: no such kernel"]


def test_bars() -> None:
    assert missed("int8", {"normal": 1.3e-2, "qknorm": 4.1e-3, "peaky": float("nan")}) == ["qknorm", "peaky"]
    assert missed("int8-fp8", dict.fromkeys(KINDS, 9e-3)) == [] == missed("bf16", {"normal": 1.0})
    errors = {"normal": 1e-2, "qknorm": 5e-3, "peaky": 2e-2}
    lines = [
        {"errors": "int8", "backend": "x", **errors, "bars": kernels.BARS["int8"], "missed": missed("int8", errors)},
        {"errors": "bf16", "backend": "y", "normal": 1e-3, "bars": None, "missed": []},
    ]
    text = error_table(lines)
    assert (
        "| int8 | x | 1.0e-02 | **5.0e-03** (bar 4.0e-03) | 2.0e-02 |" in text
        and "| bf16 | y | 1.0e-03 |  |  |" in text
    )
    whole = page(rows_of(fake_group(), {"ours": 2.0}, {}, CEILINGS), lines, ["a note"], {"card": "Fake"})
    assert whole.startswith("# Kernels\n\nWhat stands together") and "- a note" in whole and "card Fake" in whole


def test_data_is_of_its_kind_and_seeded() -> None:
    for kind in KINDS:
        q, k, v = attention_data(kind, 400, 30)
        assert q.shape == (30, 3, 128) and k.shape == v.shape == (400, 3, 128) and q.dtype == torch.bfloat16
        assert torch.equal(k, attention_data(kind, 400, 30)[1])
        ratio = float(k.float().abs().mean((0, 1)).max() / k.float().abs().mean((0, 1)).median())
        assert ratio < 1.5 if kind == "normal" else ratio > 4
    with pytest.raises(ValueError, match="kind must be"):
        attention_data("other")


def test_errors_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_data
    monkeypatch.setattr(kernels, "attention_data", lambda kind, seed: real(kind, 1000, 20, seed))
    monkeypatch.setattr(kernels, "DATA_DRAWS", 2)
    lines, notes = kernels.data_errors(CPU)
    assert not notes
    found = {(line["errors"], line["backend"]): line for line in lines}
    assert {("bf16", "sdpa"), ("int8", "torch"), ("int8-fp8", "torch")} <= set(found)
    for kind in KINDS:
        errors = [found[mode][kind] for mode in (("bf16", "sdpa"), ("int8", "torch"), ("int8-fp8", "torch"))]
        assert 1e-3 < errors[0] < 2.7e-3 < errors[1] < errors[2] < 5e-2


def small_groups() -> Iterator[Group]:
    for make in (
        kernel_cases.norm_group,
        kernel_cases.gate_group,
        kernel_cases.gelu_group,
        kernel_cases.quantize_group,
    ):
        yield make(70, CPU)
    yield from kernel_cases.attention_passes(300, 2, CPU)
    yield kernel_cases.attention_group(150, 2, CPU)[0]
    yield from (group for group, _ in kernel_cases.gemm_groups(70, CPU))
    yield kernel_cases_rest.norm_heads_group(70, 2, CPU)
    yield kernel_cases_rest.cross_group(70, 2, CPU)[0]
    yield kernel_cases_rest.text_group(70, CPU)
    yield kernel_cases_rest.vae_group(70, CPU)
    for group, notes in kernel_cases_rest.epilogue_groups(70, CPU):
        assert "needs a card with FP8 units" in notes[0]
        assert [case.name for case in group.cases] == ["int8", "int8 + bias", "int8 + gated residual"]
        yield group


def test_every_case_runs_and_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "DIM", 256)
    narrow = [type(x)(x.name, x.out_features // 24, x.in_features // 24, x.count) for x in kernel_cases.LINEARS]
    monkeypatch.setattr(kernel_cases, "LINEARS", narrow)
    seen = []
    for group in small_groups():
        seen.append(group.name)
        assert group.baseline in [case.name for case in group.cases] and group.unit in CEILINGS
        for case in group.cases:
            case.run()
            assert case.work > 0
            error = 0.0 if case.error is None else case.error()
            assert error < (5e-2 if "fp8" in case.name or "int8" in case.name or "e4m3" in case.name else 4e-3), (
                case.name
            )
    assert seen == ["layer_norm_modulate", "gate_residual", "gelu", "quantize_rows", "qk_norm_rope", "quantize_v",
                    "attention", *(f"product, {x.name}" for x in narrow), "norm_heads", "cross-attention",
                    "Step-LLM's attention", "the VAE's attention",
                    *(f"product with epilogue, {x.name}" for x in narrow)]  # fmt: skip


def test_rows_are_kept_as_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that cannot be made, and one whose second group fails, lose themselves alone; the third is cut."""
    out, markdown = tmp_path / "a.jsonl", tmp_path / "a.md"

    def none(tokens: int, heads: int, device: torch.device) -> Group:
        raise torch.OutOfMemoryError("no room")

    def cut(tokens: int, heads: int, device: torch.device) -> Group:
        raise KeyboardInterrupt

    def bench(group: Group, ceilings: Any, rounds: int, turn: float) -> Any:
        if group.shape == "bad":
            raise RuntimeError("launch failed")
        return rows_of(group, {"eager": 8.0, "ours": 2.0}, {}, ceilings), ["broken: it is"]

    good = fake_group()
    parts = {
        "none": kernels.alone(none),
        "two": kernels.each(lambda *_: iter([good, replace(good, shape="bad"), replace(good, shape="last")])),
        "cut": kernels.alone(cut),
    }  # fmt: skip
    monkeypatch.setattr(kernels, "PARTS", parts)
    monkeypatch.setattr(kernels, "bench", bench)
    kept = kernels.Kept(out, markdown, {"card": "Fake"})
    with pytest.raises(KeyboardInterrupt):
        kernels.measure(["none", "two", "cut"], 128, 1, 1, 1, CPU, CEILINGS, kept)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("shape") or line["note"] for line in lines] == [
        "none: no room", "10 x 10", "10 x 10", "broken: it is", "two: launch failed", "last", "last", "broken: it is",
    ]  # fmt: skip
    assert all(line["card"] == "Fake" for line in lines)
    text = markdown.read_text()
    assert text.count("| ours |") == 2 and "- two: launch failed" in text and "second table" not in text
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.jsonl", "a.md"]


def test_parts_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    assert kernels.parse(["--only", "epilogue", "cross"]).only == ["epilogue", "cross"]
    for wrong, words in (
        (["--only", "gemm"], "invalid choice"),
        (["-o", str(tmp_path)], "-o"),
        (["-o", "/nowhere/a.jsonl"], "-o /nowhere"),
    ):
        with pytest.raises(SystemExit):
            kernels.parse(wrong)
        assert words in capsys.readouterr().err


def test_the_command_needs_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA card"):
        kernels.main([])
    with pytest.raises(SystemExit):
        kernels.main(["--tokens", "5"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_the_command_on_a_card(tmp_path: Path) -> None:
    files = tmp_path / "a.jsonl", tmp_path / "a.md"
    arguments = ["--tokens", "2000", "--heads", "4", "--rounds", "1", "--turn", "5"]
    kernels.main([*arguments, "-o", str(files[0]), "--markdown", str(files[1])])
    lines = [json.loads(line, parse_constant=pytest.fail) for line in files[0].read_text().splitlines()]
    rows = [line for line in lines if "operator" in line]
    assert {
        "layer_norm_modulate",
        "gelu",
        "quantize_v",
        "attention",
        "product, qkv",
        "norm_heads",
        "cross-attention",
        "Step-LLM's attention",
        "the VAE's attention",
        "product with epilogue, qkv",
    } <= {r["operator"] for r in rows}
    assert all(0 < r["fraction"] and (r["error"] is None or r["error"] < 6e-2) for r in rows)
    assert "# Kernels" in files[1].read_text()


def test_a_page_of_recorded_lines_has_the_last_of_each(tmp_path: Path) -> None:
    """Of two runs, each of which the page says what it is of."""
    file, page = tmp_path / "a.jsonl", tmp_path / "a.md"
    first, second = (kernels.Kept(file, None, {"card": "Fake", "commit": name}) for name in ("early", "late"))
    group = fake_group()
    other = Group("other", group.shape, group.unit, group.baseline, group.cases)
    for kept, ms in ((first, 2.0), (second, 3.0)):
        for which in (group, other) if kept is first else (group,):
            kept.add(rows_of(which, {"eager": 8.0, "ours": ms}, {}, CEILINGS), ["none is installed"])
    kernels.main(["--page", str(file), "--markdown", str(page)])
    text = page.read_text()
    assert text.count("| ours | 3.000 |") == text.count("| ours | 2.000 |") == 1 and "second table" not in text
    assert text.count("- none is installed") == 1
    assert "commit late, of pass" in text and "commit early, of other" in text
    with pytest.raises(SystemExit):
        kernels.main(["--page", str(file)])
