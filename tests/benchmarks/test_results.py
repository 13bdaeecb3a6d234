"""The format of results: what is written is read again, what is damaged is named, and nothing is lost to a rewrite."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from solostep.benchmarks import results
from solostep.benchmarks.readme_tables import results_in
from solostep.benchmarks.results import Cell, environment_key, read_result, read_results, write_json, write_result
from solostep.engine.errors import OutputError, UsageError


def example() -> dict[str, Any]:
    """A result with everything in it: two pairs, three steps, two blocks, one sample."""
    steps = [[0.01, 0.02, 0.03], [0.01, 0.02, 0.04]]
    cell = Cell(
        "demo", "int8", 17, 96, 96, 3, 5.0, 13.0, ("a red circle",), (1, 2), attention="official", levels=("free",)
    )
    return {
        "solostep_bench": 1, "id": "0123456789abcdef", "cell": cell.as_dict(), "label": "int8", "synthetic": False,
        "environment": {"card": None, "cpu": "x", "commit": "abc", "date": "2026-01-01"}, "seconds": 4.5,
        "speed": {"step_seconds": [1.0, 1.1], "first_step_seconds": 2.0, "stages": {"text": 1.0}, "video_seconds": 5.0,
                  "frames_written": 17, "end_to_end": {"50": {"seconds": 60.0, "extrapolated": True}}},
        "memory": {"gpu_peak_bytes": None, "driver_peak_bytes": None, "host_peak_bytes": 10**9, "stages": [{"a": 1}]},
        "plan": None, "events": [], "pairs": [{"prompt": "a red circle", "seed": s} for s in (1, 2)],
        "drift": {
            "blocks": {"names": ["0", "1"], "error": [[0.1], [0.2]], "samples": [{"pair": 0, "step": 1}]},
            "operators": {"attn1.wqkv": [[0.1], [0.1]]},
            "teacher": {"sigmas": [1.0, 0.9, 0.5], "error": steps, "cosine": steps},
            "free": {"sigmas": [1.0, 0.9, 0.5], "error": steps, "diverged_at": [None, 2]},
            "video": {"psnr": [None, 51.0], "ssim": [1.0, 0.99]},
        },
        "score": {"kind": [1, 2], "pairs": {"kind": [True, False]}}, "frames": None,
    }  # fmt: skip


def test_a_result_comes_back_as_it_was(tmp_path: Path):
    path = write_result(tmp_path / "a.json", example())
    found = read_result(path)
    assert found.as_dict() == example() and found.path == path
    assert found.cell.pairs == [("a red circle", 1), ("a red circle", 2)]
    assert write_result(tmp_path / "b.json", found) == tmp_path / "b.json"
    assert read_result(tmp_path / "b.json") == found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *way, last = [int(k) if k in ("0", "1") else k for k in key.split(".")]
    for step in way:
        values = values[step]
    if value is ...:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("solostep_bench", ..., "solostep_bench is missing"),
        ("solostep_bench", 2, "this version reads 1"),
        ("id", "xyz", "id has to be 16 hexadecimal digits"),
        ("cell", ..., "cell is missing"),
        ("cell.precision", "", "cell.precision has to be text"),
        ("cell.num_frames", "17", "cell.num_frames has to be a whole number"),
        ("cell.seeds", [1, 2.5], r"cell.seeds\[1\] has to be a whole number"),
        ("cell.role", "judge", "cell.role has to be one of reference"),
        ("seconds", True, "seconds has to be a number"),
        ("speed.step_seconds", [1.0, None], r"speed.step_seconds\[1\]"),
        ("speed.end_to_end.50.extrapolated", ..., "speed.end_to_end.50.extrapolated is missing"),
        ("memory.host_peak_bytes", -1, "memory.host_peak_bytes"),
        ("drift.teacher.error.1", [0.1], r"drift.teacher.error\[1\] has 1 entries and has to have 3"),
        ("drift.free.diverged_at", [None], "drift.free.diverged_at has 1 entries"),
        ("drift.video.psnr", [1.0], "drift.video.psnr has 1 entries"),
        ("drift.blocks.error.0", [], r"drift.blocks.error\[0\] has 0 entries"),
        ("drift.operators.attn1.wqkv", [[0.1]], None),
        ("score.kind", [3, 2], r"score.kind has to be \[hits, tries\]"),
        ("score.pairs.kind", [True], "score.pairs.kind has 1 entries and has to have 2"),
        ("score.pairs.kind", [True, 1], r"score.pairs.kind\[1\] has to be true or false"),
        ("drift.video.ssim", [1.0, math.nan], r"drift.video.ssim\[1\] is NaN or infinite"),
        ("drift.teacher.error.0.1", math.inf, "NaN or infinite"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, key: str, value: Any, words: str | None):
    values = example()
    if words is None:  # a key with a dot in it
        values["drift"]["operators"]["attn1.wqkv"], words = value, "drift.operators.attn1.wqkv has 1 entries"
    else:
        _set(values, key, value)
    with pytest.raises(UsageError, match=words) as refused:
        write_result(tmp_path / "a.json", values)
    assert str(tmp_path / "a.json") in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.json").write_text(json.dumps(values))
    with pytest.raises(UsageError):
        read_result(tmp_path / "b.json")


def test_damaged_files_are_named(tmp_path: Path):
    path = tmp_path / "a.json"
    with pytest.raises(UsageError, match=r"a\.json cannot be read"):
        read_result(path)
    for content in ("", "{", '{"solostep_bench": 1, "seconds": NaN}', "[1]"):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"a\.json"):
            read_result(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"a\.json is no JSON"):
        read_result(path)


def test_folders_hold_more_than_results(tmp_path: Path):
    with pytest.raises(UsageError, match="holds no result"):
        read_results([tmp_path])
    with pytest.raises(UsageError, match="is not there"):
        read_results([tmp_path / "none"])
    a, b = (write_result(tmp_path / f"{name}.json", example() | {"label": name, "id": name * 16}) for name in "ab")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / f"c{results.FAILED}").write_text(json.dumps({"solostep_bench": 1}))
    assert [r.label for r in read_results([tmp_path])] == ["a", "b"]
    assert [r.label for r in read_results([b, tmp_path, a])] == ["b", "a"]
    with pytest.raises(UsageError, match="other.json"):
        read_results([tmp_path / "other.json"])  # asked for by name
    a.write_text('{"solostep_bench": 1, "id"')
    with pytest.raises(UsageError, match=r"a\.json is no result .*; delete it or move it elsewhere\. .*no JSON"):
        read_results([tmp_path])  # a damaged result does not drop out of a table without a word
    with pytest.raises(UsageError, match="give a result of") as named:
        read_results([a])
    assert "delete" not in str(named.value)


def test_folders_below_are_read_as_well(tmp_path: Path):
    """As `record` lays them out: a folder for each measurement. What is no folder of results is passed over."""
    (tmp_path / "loop").symlink_to(tmp_path)
    for n, place in enumerate((".", "fifty", "short/more", "cache", "passes", "logs", "done", ".running-x")):
        write_result(tmp_path / "h200" / place / "a.json", example() | {"label": place, "id": f"{n:016x}"})
    write_json(tmp_path / "h200" / "short" / f"b{results.FAILED}", {"label": "nf4", "error": "no room"})
    assert [r.label for r in read_results([tmp_path])] == [".", "fifty", "short/more"]
    assert [r.label for r in results_in(tmp_path)] == [".", "fifty", "short/more"]
    assert results.failed_in([tmp_path]) == [f"nf4 failed: no room (b{results.FAILED})"]
    assert results_in(tmp_path / "h200" / "cache" / "none") == []
    assert [r.label for r in read_results([tmp_path / "h200" / "cache"])] == ["cache"]  # asked for by name


def test_a_measurement_in_two_files_is_one_result(tmp_path: Path):
    one = example()
    write_result(tmp_path / "a.json", one)
    copy_of = write_result(tmp_path / "old" / "a.json", one)
    (found,) = read_results([tmp_path])
    assert found.path == tmp_path / "a.json"
    elsewhere = write_result(tmp_path / "old" / "b.json", one | {"environment": {"card": "Another"}})
    assert len(read_results([tmp_path])) == 2  # the same cell on another card
    elsewhere.unlink()
    write_json(copy_of, one | {"seconds": 9.0})
    with pytest.raises(UsageError, match=r"a\.json and .*old.*a\.json hold the same measurement"):
        read_results([tmp_path])


def test_nothing_is_written_over(tmp_path: Path):
    path, first = tmp_path / "a.json", example()
    write_result(path, first)
    with pytest.raises(UsageError, match="already"):
        write_result(path, copy.deepcopy(first) | {"seconds": 9.0})
    later = first["environment"] | {"date": "2026-01-02", "command": "again"}
    with pytest.raises(UsageError, match="already"):  # the same measurement on another day
        write_result(path, first | {"environment": later})
    elsewhere = first | {"environment": first["environment"] | {"card": "NVIDIA H200"}}
    assert write_result(path, elsewhere).name == "a-2.json"
    assert write_result(path, first | {"id": "f" * 16}).name == "a-3.json"
    with pytest.raises(UsageError, match=r"a-2\.json holds"):
        write_result(path, elsewhere)
    assert read_result(path).seconds == 4.5
    again = [write_result(path, one | {"seconds": 9.0}, overwrite=True).name for one in (first, elsewhere)]
    assert again == ["a.json", "a-2.json"] and read_result(path).seconds == 9.0
    third = first | {"environment": first["environment"] | {"card": "Another"}}
    assert write_result(path, third, overwrite=True).name == "a-4.json"  # not in the place of another card's
    (tmp_path / "a-2.json").unlink()
    with pytest.raises(UsageError, match=r"a-4\.json holds"):  # there, behind a gap
        write_result(path, third)


def test_what_makes_another_environment():
    here = {"card": "A", "commit": "a", "host_memory_bytes": 5, "variables": {"OMP_NUM_THREADS": "2"}}
    same = [
        {"commit": "b"}, {"host_memory_bytes": 6}, {"date": "today"},
        {"variables": here["variables"] | {"CUDA_VISIBLE_DEVICES": "1", "SOLOSTEP_CACHE": ".../cache"}},
    ]  # fmt: skip
    assert {environment_key(here | other) for other in same} == {environment_key(here)}
    others = [{"card": "B"}, {"variables": {"OMP_NUM_THREADS": "4"}}, {"variables": {}}]
    assert len({environment_key(here | other) for other in (*others, {})}) == 4


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        write_result(tmp_path / "file" / "a.json", example())
