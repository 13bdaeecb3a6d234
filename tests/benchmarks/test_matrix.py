"""From options to cells: what is run and in which order, what is refused beforehand, and identities that stay."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from solostep.benchmarks import matrix
from solostep.benchmarks.matrix import Options, build, built_in_prompts, identity, label
from solostep.benchmarks.results import Cell
from solostep.benchmarks.statistics import fewest
from solostep.engine.convert import quantize_model
from solostep.engine.errors import SolostepError, UsageError

TINY = Path(__file__).resolve().parents[1] / "golden" / "tiny-stepvideo-t2v"
pytestmark = pytest.mark.usefixtures("fast")


def of(**options: Any) -> list[tuple[str, str]]:
    made = build(Options(device="cpu", **options))
    return [(p.cell.role, p.label) for p in made.planned]


def test_what_modes_need_comes_before_them():
    assert of(precision=("bf16", "int8"), attention=(None, "int8"), vram=(None, "8GB")) == [
        ("reference", "reference"),
        ("floor-order", "floor: other order"),
        ("floor-backend", "floor: other back end"),
        ("other-seed", "other seeds"),
        ("mode", "bf16 · official · 8GB"),  # without the budget it is the reference
        ("mode", "bf16 · int8 attention"),
        ("mode", "bf16 · int8 attention · 8GB"),
        ("mode", "int8 · official"),
        ("mode", "int8 · official · 8GB"),
        ("mode", "int8 · int8 attention"),
        ("mode", "int8 · int8 attention · 8GB"),
    ]


def test_drift_is_measured_in_one_budget():
    made = build(Options(device="cpu", precision=("bf16", "int8"), vram=("8GB", None)))
    levels = {p.label: p.cell.levels for p in made.planned}
    assert levels["int8 · official · 8GB"] == levels["reference"] and len(levels["reference"]) > 1
    assert levels["int8 · official"] == ("speed",) and "bf16 · official" not in levels  # that is the reference
    assert any("drift is measured in the first budget" in note for note in made.notes)
    assert not any("budget" in note for note in build(Options(device="cpu", precision=("int8",))).notes)


def test_every_clip_has_its_reference():
    made = build(Options(device="cpu", precision=("int8",), frames=(17, 34), size=((64, 96), None), steps=(2, 3)))
    cells = [p.cell for p in made.planned]
    clips = [c.clip for c in cells if c.role == "reference"]
    assert len(clips) == len(set(clips)) == 8 and clips[0] == "17 x 64x96, 2 steps"
    seen: set[str] = set()
    for cell in cells:
        seen |= {cell.clip} if cell.role == "reference" else set()
        assert cell.clip in seen
    assert len({p.id for p in made.planned}) == len({p.name for p in made.planned}) == len(cells)


def test_roles_and_levels():
    assert of(precision=("int8",), levels=("teacher",)) == [
        ("reference", "reference"), ("floor-order", "floor: other order"), ("floor-backend", "floor: other back end"),
        ("mode", "int8 · official"),
    ]  # fmt: skip
    assert of(precision=("int8",), levels=("speed",)) == [("reference", "reference"), ("mode", "int8 · official")]
    assert of(precision=("int8",), roles=("mode",)) == [("mode", "int8 · official")]
    made = build(Options(device="cpu", precision=("int8",), levels=("score", "free")))
    assert {p.cell.role: p.cell.levels for p in made.planned} == {
        "reference": ("free", "score"), "floor-order": ("free", "score"), "floor-backend": ("free", "score"),
        "other-seed": ("free",), "mode": ("free", "score"),
    }  # fmt: skip


def test_defaults_give_intervals():
    """Prompts enough for the interval of a median, one seed of them, and a second of the reference alone."""
    made = build(Options(device="cpu", precision=("int8",), steps=(8,)))
    cells = {p.cell.role: p for p in made.planned}
    assert all(len(p.cell.prompts) == 8 >= fewest() for p in made.planned)
    assert {role: p.cell.seeds for role, p in cells.items()} == {
        "reference": (1,), "floor-order": (1,), "floor-backend": (1,), "mode": (1,), "other-seed": (1, 2)
    }  # fmt: skip
    assert cells["other-seed"].runs == pytest.approx(8.1) and cells["reference"].runs == 8
    # Free, teacher-forced, and three steps' blocks of eight pairs, as the reference and as the mode.
    assert cells["mode"].runs == 8 + 8 + 8 * 3 * 2 / 8
    several = build(Options(device="cpu", precision=("int8",), seeds=(7, 9)))
    assert {p.cell.seeds for p in several.planned} == {(7, 9)} and not any(p.fresh for p in several.planned)
    other = [p.cell for p in build(Options(device="cpu", seeds=(2**63 - 1,), roles=("other-seed",))).planned]
    assert [c.seeds for c in other] == [(2**63 - 1, 0)]


def test_own_prompts_of_the_demo_have_no_score():
    """By default, and it is said; those that are captions have one."""
    made = build(Options(device="cpu", precision=("int8",), prompts=("a cat",)))
    assert all("score" not in p.cell.levels and p.cell.levels for p in made.planned)
    assert any("score is left out" in note and "'a cat' is none" in note for note in made.notes)
    made = build(
        Options(device="cpu", precision=("int8",), prompts=("a red circle moving right on a blue background",))
    )
    assert "score" in made.planned[0].cell.levels and not made.notes


def test_one_frame_has_no_score():
    """Its motion would count as wrong in every video; other clips of the same run have one."""
    made = build(Options(device="cpu", precision=("int8",), frames=(1, 17)))
    scored = {p.cell.num_frames: "score" in p.cell.levels for p in made.planned if p.cell.role == "mode"}
    assert scored == {1: False, 17: True} and made.notes == ("The level score is left out: one frame shows no motion.",)


def test_a_mode_that_is_the_reference_is_said_where_it_was_asked_for():
    made = build(Options(device="cpu", precision=("bf16", "int8")))
    assert [p.label for p in made.planned if p.cell.role == "mode"] == ["int8 · official"]
    assert any(note.startswith("bf16 · official is the reference itself") for note in made.notes)
    assert not build(Options(device="cpu")).notes


def test_built_in_prompts():
    for is_demo in (False, True):
        found = built_in_prompts(12, is_demo)
        assert len(set(found)) == 12 and found[:8] == built_in_prompts(8, is_demo)
        chinese = [any("\u4e00" <= c <= "\u9fff" for c in prompt) for prompt in found]
        assert chinese == [False, True] * 6
    made = build(Options(device="cpu", model=str(TINY), n=12, precision=("int8",), roles=("mode",)))
    assert [p.cell.prompts for p in made.planned] == [built_in_prompts(12, False)]
    with pytest.raises(UsageError, match="-n 13 is more than the 12 prompts that are built in; give --prompts"):
        build(Options(device="cpu", model=str(TINY), n=13))
    with pytest.raises(UsageError, match="-n 5000 is more than"):
        build(Options(device="cpu", n=5000))


def test_sizes_are_rounded_as_the_engine_does():
    made = build(Options(device="cpu", precision=("int8",), frames=(20,), size=((100, 64),)))
    assert {(p.cell.num_frames, p.cell.height, p.cell.width) for p in made.planned} == {(17, 96, 64)}
    assert "num_frames 20 rounded down to 17" in made.notes[0]
    # Per pair: latents [3, 8, 6, 4] in fp32 before and after each step, and the frames.
    steps, pairs = made.planned[0].cell.num_inference_steps, 8 * 2
    assert made.reference_bytes == pairs * ((steps + 1) * 3 * 8 * 6 * 4 * 4 + 17 * 96 * 64 * 3)


CELL = Cell("demo", "int8", 17, 96, 96, 4, 5.0, 13.0, ("a", "b"), (1, 2), attention="official")


def test_identities_stay_and_tell_apart(tmp_path: Path):
    weights = {"transformer": "abc"}
    assert identity(CELL, weights, "code") == "c495f3be63699f3f"
    assert identity(replace(CELL, model="elsewhere"), weights, "code") == identity(CELL, weights, "code")
    recipe = tmp_path / "mine.json"
    recipe.write_text("{}")
    others = [
        identity(CELL, {"transformer": "abd"}, "code"), identity(CELL, weights, "other code"),
        identity(replace(CELL, recipe=str(recipe)), weights, "code"),
        *(identity(replace(CELL, **change), weights, "code") for change in (
            {"precision": "fp8"}, {"attention": "int8"}, {"vram": "8GB"}, {"seeds": (1,)}, {"prompts": ("a",)},
            {"num_frames": 34}, {"role": "reference"}, {"levels": ("free",)}, {"text_precision": "int8"},
        )),
    ]  # fmt: skip
    assert len({identity(CELL, weights, "code"), *others}) == len(others) + 1
    recipe.write_text("[]")
    assert identity(replace(CELL, recipe=str(recipe)), weights, "code") not in others


def test_the_code_is_part_of_an_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    monkeypatch.setattr(matrix, "__file__", str(tmp_path / "benchmarks" / "matrix.py"))
    compute = matrix.code_identity.__wrapped__
    before = compute()
    (tmp_path / "benchmarks" / "report.py").write_text("1")  # no number depends on it
    assert compute() == before
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert compute() != before


def test_labels():
    assert label(replace(CELL, attention="int8-fp8", attention_backend="torch", vram="24GB", host_ram="32GB")) == (
        "int8 · int8-fp8 attention · torch · 24GB · host 32GB"
    )
    assert label(replace(CELL, recipe="some/where/mine.json", text_precision="nf4")) == (
        "recipe mine · text nf4 · official"
    )
    assert label(replace(CELL, recipe="auto:0.02", attention=None)) == "recipe auto:0.02"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": ("int9",)}, "--precision int9 is unknown"),
        ({"text_precision": ("int9",)}, "--text-precision int9 is unknown"),
        ({"attention": ("fp8",)}, "--attention fp8 is unknown"),
        ({"precision": ("int8", "fp32"), "attention": ("int8",)}, "--precision fp32 has official only"),
        ({"attention": ("int8",), "attention_backend": ("sdpa",)}, "--attention-backend sdpa is unknown for int8"),
        ({"attention": ("int8",), "attention_backend": ("hopper",)}, "not to be had on cpu"),
        ({"attention_backend": ("nonsense",)}, "--attention-backend nonsense is unknown; choose one of"),
        ({"attention_backend": ("torch",)}, "--attention-backend torch: no mode has an attention"),
        ({"vram": ("24",)}, "--vram 24 is no size"),
        ({"vram": ("24GB", None), "levels": ("free",)}, "add speed to --levels"),
        ({"host_ram": ("lots",)}, "--host-ram lots is no size"),
        ({"recipe": ("none.json",)}, "--recipe none.json"),
        ({"recipe": ("auto:x",)}, "--recipe auto:x"),
        ({"levels": ("speed", "drift")}, "--levels drift; choose from"),
        ({"levels": ()}, "--levels names none"),
        ({"roles": ("judge",)}, "--roles judge"),
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (1, 1)}, "a seed is given twice"),
        ({"prompts": ("a", "a")}, "a prompt is given twice"),
        ({"prompts": ("a", " ")}, "The prompt is empty"),
        ({"prompts": ("a cat",), "levels": ("free", "score")}, "--levels score: it knows what a caption of the demo"),
        ({"frames": (17, 1), "levels": ("score",)}, "--levels score: one frame shows no motion"),
        ({"precision": ("bf16",), "roles": ("mode",)}, "Nothing is left to measure"),
        ({"roles": ("floor-order",), "levels": ("speed",)}, "Nothing is left to measure"),
        ({"frames": (0,)}, "num_frames"),
        ({"steps": (0,)}, "num_inference_steps"),
        ({"size": ((8, 96),)}, "height"),
        ({"time_shift": 0.0}, "time_shift"),
        ({"model": "not/a model"}, "--model"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_wrong_options_are_refused_before_any_work(options: dict[str, Any], words: str):
    with pytest.raises(UsageError) as refused:
        build(Options(**{"device": "cpu"} | options))
    assert words in str(refused.value)


def test_a_damaged_model(tmp_path: Path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "transformer" / "config.json").unlink()
    with pytest.raises(SolostepError, match=r"config\.json"):
        build(Options(device="cpu", model=str(tmp_path / "model")))


def test_a_stored_precision_has_no_drift(tmp_path: Path):
    stored = str(tmp_path / "stored")
    quantize_model(TINY, stored, "int8", device="cpu", link=True)
    with pytest.raises(UsageError, match="stored in int8"):
        of(model=stored)
    assert of(model=stored, levels=("speed",)) == [("mode", "int8 · official")]
    with pytest.raises(UsageError, match="--precision fp8"):
        of(model=stored, levels=("speed",), precision=("fp8",))
