"""The command line: what it makes, says and leaves behind, and that an interrupted run loses no finished step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import solostep.engine.stages as stages_module
from solostep.engine import streaming, text
from solostep.engine.config import T2V_NEGATIVE, T2V_POSITIVE
from solostep.engine.errors import UsageError
from solostep.engine.interfaces import cli
from solostep.engine.interfaces.outputs import slug
from solostep.engine.latents import read_latents, save_latents
from solostep.engine.video import read_frames, read_metadata

pytestmark = pytest.mark.usefixtures("fast")

GOLDEN = Path(__file__).parents[1] / "golden"
COMMAND = typer.main.get_command(cli.app)
T2V, TI2V = GOLDEN / "tiny-stepvideo-t2v", GOLDEN / "tiny-stepvideo-ti2v"
SMALL = "--frames 17 --height 16 --width 32 --steps 2 --guidance 1 --device cpu --precision fp32".split()

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; the cache lies outside it."""
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def names(folder: Path | str = ".") -> list[str]:
    """Every file below a folder, hidden ones too."""
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def fps_of(path: str) -> float:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    return next(imageio_ffmpeg.read_frames(path))["fps"]


@dataclass
class Outcome:
    """One call of the command line. ``loaded`` names the networks that were loaded, in order."""

    code: int
    out: str
    err: str
    loaded: list[str]

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def record(self) -> dict[str, Any]:
        """Standard output, which has to be one JSON value and nothing else."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def notes(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("note: ")]


Run = Callable[..., Outcome]


@pytest.fixture
def solostep(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the command line in this process; a test that expects another exit code than 0 says so."""
    loaded: list[str] = []
    real = stages_module.load

    def watched(component: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        loaded.append(component.name)
        return real(component, *args, **kwargs)

    for module in (stages_module, streaming, text):
        monkeypatch.setattr(module, "load", watched)

    def run(*args: object, code: int = 0) -> Outcome:
        loaded.clear()
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            COMMAND.main([str(a) for a in args], prog_name="solostep")
        said = capsys.readouterr()
        outcome = Outcome(int(ended.value.code or 0), said.out, said.err, list(loaded))
        assert outcome.code == code, said.err
        return outcome

    return run


# --- generate -----------------------------------------------------------------------------------------------------


def test_the_first_command(solostep: Run) -> None:
    """No model, no name: the demo model, a name from the prompt, and another name the second time."""
    first = solostep("generate", "A cat & a dog!", *SMALL)
    assert first.out == "a-cat-a-dog.mp4\n"
    assert first.loaded == ["step_llm", "hunyuan_clip", "transformer", "vae"]
    for stage in ("text encoders", "load transformer", "denoise: 2/2", "decode: 17/17"):
        assert stage in first.err
    assert read_frames("a-cat-a-dog.mp4").shape == (17, 16, 32, 3)
    second = solostep("generate", "A cat & a dog!", *SMALL)
    assert second.out == "a-cat-a-dog-2.mp4\n"
    assert names() == [f"a-cat-a-dog{n}{end}" for n in ("-2", "") for end in (".latents.safetensors", ".mp4")]
    one, two = (read_metadata(name.strip()) for name in (first.out, second.out))
    assert one is not None and two is not None
    assert one["prompt"] == two["prompt"] == "A cat & a dog!"
    assert one["seed"] != two["seed"], "a seed is drawn for each"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A cat, on a  skateboard!", "a-cat-on-a-skateboard"),
        ("一只猫。跑", "一只猫-跑"),
        ("../../etc/passwd", "etc-passwd"),
        ("!?", "video"),
        (".hidden -o x", "hidden-o-x"),
        ("x" * 300, "x" * 48),
    ],
)
def test_names_from_prompts(prompt: str, name: str) -> None:
    assert slug(prompt) == name


RECORD = {
    "solostep", "model", "model_fingerprint", "preset", "prompt", "negative_prompt", "raw_prompt", "texts", "seed",
    "settings", "precision", "text_precision", "recipe", "attention", "attention_backend",
    "kernels", "image_sha256", "noise_sha256", "device", "versions", "notes",
    "steps_done", "resumed_from_step", "latents_file", "stages", "plan", "events", "output",
}  # fmt: skip


def test_the_record(solostep: Run) -> None:
    prompt = "[bold]a :cat:[/bold] \\ 'x' \"y\"\t一只猫"  # reaches the file as it is
    command = ["generate", prompt, "-m", T2V, "-o", "out.mp4", "--seed", 7, "--negative", "dogs", "--json", *SMALL]
    command += ["--fps", 10]
    record = solostep(*command).record
    assert fps_of("out.mp4") == 10
    assert set(record) == RECORD
    assert (record["prompt"], record["negative_prompt"], record["seed"]) == (prompt, "dogs", 7)
    assert (record["model"], record["preset"], record["precision"]) == (str(T2V), "t2v", "fp32")
    assert (record["solostep"], record["versions"]["torch"]) == (version("solostep"), torch.__version__)
    assert (record["steps_done"], record["resumed_from_step"], record["notes"]) == (2, None, [])
    assert (record["output"], record["latents_file"]) == ("out.mp4", "out.latents.safetensors")
    wanted = {"num_frames": 17, "height": 16, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
    assert record["settings"].items() >= wanted.items()
    stages = [stage["stage"] for stage in record["stages"]]
    assert stages == ["text", "load transformer", "denoise", "load vae", "decode and write"]
    assert all(stage["seconds"] > 0 for stage in record["stages"])
    kept = read_metadata("out.mp4")
    assert kept is not None
    assert kept.items() >= {"prompt": prompt, "negative_prompt": "dogs", "seed": 7, "model": T2V.name}.items()
    assert kept["settings"] == record["settings"]
    assert str(GOLDEN) not in json.dumps(kept), "a video tells nothing about the disk it was made on"
    # The same command again finds it finished.
    again = solostep(*command)
    assert again.loaded == []
    assert (again.record["already_finished"], again.record["seed"]) == (True, 7)
    assert any("out.mp4 is already finished" in note for note in again.notes)


def test_metadata_can_be_left_out(solostep: Run) -> None:
    solostep("generate", "a secret cat", "-m", T2V, "-o", "out.mp4", "--no-metadata", *SMALL)
    assert not read_metadata("out.mp4")
    assert b"secret" not in Path("out.mp4").read_bytes()
    solostep("decode", "out.latents.safetensors", "-o", "with.mp4")
    assert b"secret" in Path("with.mp4").read_bytes()
    solostep("decode", "out.latents.safetensors", "-o", "without.mp4", "--no-metadata")
    assert b"secret" not in Path("without.mp4").read_bytes()


def test_raw_prompts(solostep: Run) -> None:
    both = [*SMALL, "--guidance", 2, "--seed", 1, "--negative", "dogs", "--json"]
    plain = solostep("generate", "a cat", "-m", T2V, "-o", "a.mp4", *both).record
    raw = solostep("generate", "a cat", "-m", T2V, "-o", "b.mp4", "--raw-prompt", *both).record
    assert plain["texts"] == ["a cat" + T2V_POSITIVE, "dogs" + T2V_NEGATIVE]
    assert raw["texts"] == ["a cat", "dogs"]
    assert (plain["raw_prompt"], raw["raw_prompt"]) == (False, True)
    one, two = (read_latents(Path(r["latents_file"])).latents for r in (plain, raw))
    assert not torch.equal(one, two)


def test_what_is_rounded_or_unusual_is_said(tmp_path: Path, solostep: Run) -> None:
    model = Path(shutil.copytree(TI2V, tmp_path / "model"))
    index = model / "model_index.json"
    section = {"solostep": {"defaults": {"max_frames": 17}, "note": "Mind this."}}
    index.write_text(json.dumps(json.loads(index.read_text()) | section))
    Image.new("RGB", (64, 48), "red").save("first.png")
    options = [*SMALL, "--frames", 40, "--height", 40, "--width", 50, "--steps", 1, "--motion-score", 30]
    done = solostep("generate", "a cat", "-m", model, "--image", "first.png", "-o", "out.mp4", "--json", *options)
    expected = ["num_frames 40 rounded down to 34", "height 40 rounded down to 32", "width 50 rounded down to 48"]
    expected += ["34 frames are more than the 17 ", "motion_score 30 is outside 2 to 20", "Mind this."]
    assert len(done.notes) == len(done.record["notes"]) == len(expected)
    for words, note, kept in zip(expected, done.notes, done.record["notes"], strict=True):
        assert words in note
        assert words in kept
    assert read_frames("out.mp4").shape == (34, 32, 48, 3)
    assert done.record["image_sha256"]


def test_several_videos_of_a_prompt(solostep: Run) -> None:
    options = [*SMALL, "--frames", 18]
    several = solostep("generate", "a cat", "-m", T2V, "--num-videos", 2, "--seed", 5, "-o", "out.mp4", *options)
    assert several.lines == ["out-1.mp4", "out-2.mp4"]
    assert several.loaded.count("transformer") == 1
    assert "[2/2] denoise: 2/2" in several.err
    assert [note for note in several.notes if "rounded" in note] == several.notes[:1], "said once"
    kept = [read_metadata(name) for name in several.lines]
    assert [k and k["seed"] for k in kept] == [5, 6]
    solostep("generate", "a cat", "-m", T2V, "--seed", 6, "-o", "alone.mp4", *SMALL)
    assert Path("alone.mp4").read_bytes() == Path("out-2.mp4").read_bytes() != Path("out-1.mp4").read_bytes()


def test_overwriting(solostep: Run) -> None:
    command = ["generate", "a cat", "-m", T2V, "-o", "out.mp4", *SMALL]
    solostep(*command)
    first = read_latents(Path("out.latents.safetensors"))
    assert solostep(*command).loaded == []
    assert solostep(*command, "--overwrite").out == "out.mp4\n"
    second = read_latents(Path("out.latents.safetensors"))
    assert second.seed != first.seed
    # Another generation in its place, too; but nothing goes before all of the command was found good.
    kept = {name: Path(name).read_bytes() for name in names()}
    solostep(*command, "--overwrite", "--negative", "dogs " * 9000, code=2)
    assert {name: Path(name).read_bytes() for name in names()} == kept
    solostep("generate", "a dog", *command[2:], "--overwrite")
    assert (read_metadata("out.mp4") or {})["prompt"] == "a dog"


# --- files of prompts ---------------------------------------------------------------------------------------------


def test_prompts_from_a_file(solostep: Run) -> None:
    lines = ["A red panda", "", '{"prompt": "a dog", "width": 48, "seed": 3, "output": "dog.mp4"}', "一只猫", ""]
    Path("list.txt").write_text("\n".join(lines), encoding="utf-8")
    command = ["generate", "--prompts", "list.txt", "-o", "films", "-m", T2V, *SMALL]
    first = solostep(*command, "--json")
    records = [json.loads(line) for line in first.lines]
    outputs = ["films/0001-a-red-panda.mp4", "films/dog.mp4", "films/0003-一只猫.mp4"]
    assert [Path(r["output"]).as_posix() for r in records] == outputs
    assert [r["prompt"] for r in records] == ["A red panda", "a dog", "一只猫"]
    assert [r["settings"]["width"] for r in records] == [32, 48, 32]
    assert records[1]["seed"] == 3
    assert first.loaded == ["step_llm", "hunyuan_clip", "transformer", "vae"], "once for all of them"
    assert [read_frames(name).shape for name in outputs] == [(17, 16, w, 3) for w in (32, 48, 32)]
    made = {name: (Path(name).stat().st_mtime_ns, Path(name).read_bytes()) for name in outputs}

    # Finished ones are passed over.
    again = solostep(*command)
    assert (again.lines, again.loaded) == (outputs, [])
    assert sum("already finished" in note for note in again.notes) == 3

    # One that is gone is made again, from its latents where they are left.
    Path("films/dog.mp4").unlink()
    again = solostep(*command)
    assert (sorted(again.lines), again.loaded) == (sorted(outputs), ["vae"])
    assert sum("already finished" in note for note in again.notes) == 2
    Path("films/dog.mp4").unlink()
    Path("films/dog.latents.safetensors").unlink()
    again = solostep(*command)
    assert again.loaded == ["transformer", "vae"]
    assert Path("films/dog.mp4").read_bytes() == made["films/dog.mp4"][1]
    for name in (outputs[0], outputs[2]):
        assert (Path(name).stat().st_mtime_ns, Path(name).read_bytes()) == made[name]


def test_options_hold_for_lines_that_do_not_say_otherwise(solostep: Run) -> None:
    Path("in").mkdir()
    Image.new("RGB", (64, 48), "red").save("in/first.png")
    Path("in/list.txt").write_text('{"prompt": "a", "image": "first.png", "motion_score": 3, "raw_prompt": true}\n')
    options = ["--motion-score", 9, "--seed", 4, "--negative", "dogs", *SMALL]
    record = solostep("generate", "--prompts", "in/list.txt", "-m", TI2V, "--json", *options).record
    assert (record["settings"]["motion_score"], record["seed"], record["negative_prompt"]) == (3, 4, "dogs")
    assert record["texts"] == ["a"]
    assert record["image_sha256"]
    assert names("videos") == ["0001-a.latents.safetensors", "0001-a.mp4"]


# --- interruptions ------------------------------------------------------------------------------------------------

STUCK = """
import sys, time
from solostep.engine import stages
from solostep.engine.interfaces.cli import main

left, real = int(sys.argv.pop(1)), stages.euler_step

def step(*args):
    global left
    left -= 1
    if left < 0:
        time.sleep(600)
    return real(*args)

stages.euler_step = step
main()
"""


def run_until(steps: int, path: Path, command: list[object]) -> subprocess.Popen[str]:
    """The command line in a process of its own, after ``steps`` steps: in the middle of the next one."""
    arguments = [sys.executable, "-c", STUCK, str(steps), *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and read_latents(path).step == steps:
            return process
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"it did not come to step {steps}: {process.communicate()}")


@posix
def test_a_killed_run_goes_on_bit_by_bit(solostep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9, then Ctrl-C, then to the end: as if nothing had happened. The seed is drawn, and kept."""
    latents = Path("out.latents.safetensors")
    options = [*SMALL, "--guidance", 2, "--steps", 7]
    command = ["generate", "a cat", "-m", T2V, "-o", "out.mp4", *options]
    killed = run_until(3, latents, command)
    killed.kill()
    assert (killed.wait(), names()) == (-signal.SIGKILL, [latents.name])

    left, real = iter(range(2)), stages_module.euler_step

    def step(*args: Any) -> torch.Tensor:
        if next(left, None) is None:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "euler_step", step)
        stopped = solostep(*command, code=1)
    assert stopped.out == ""
    assert stopped.err.splitlines()[-1] == "note: Stopped. Finished steps are kept: the same command goes on from them."
    assert (names(), read_latents(latents).step) == ([latents.name], 5)

    resumed = solostep(*command, "--json")
    assert [n for n in resumed.notes if "step" in n] == [f"note: Going on from step 5 of 7 in {latents}."]
    record = resumed.record
    assert (record["resumed_from_step"], record["steps_done"]) == (5, 7)
    whole = solostep("generate", "a cat", "-m", T2V, "-o", "whole.mp4", "--seed", record["seed"], "--json", *options)
    assert (whole.record["resumed_from_step"], whole.record["seed"]) == (None, record["seed"])
    assert not any("step" in n for n in whole.notes)
    one, two = (read_latents(Path(name)) for name in ("out.latents.safetensors", "whole.latents.safetensors"))
    assert torch.equal(one.latents, two.latents)
    assert Path("out.mp4").read_bytes() == Path("whole.mp4").read_bytes()


def test_interrupted_while_decoding(solostep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stages_module.decode_chunks

    def interrupted(*args: Any, **more: Any) -> Iterator[torch.Tensor]:
        yield next(real(*args, **more))
        raise KeyboardInterrupt

    command = ["generate", "a cat", "-m", T2V, "-o", "out.mp4", "--seed", 1, *SMALL, "--frames", 34]
    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "decode_chunks", interrupted)
        stopped = solostep(*command, code=1)
    assert stopped.out == ""
    assert "the same command goes on" in stopped.notes[-1]
    assert "decode: 34/34" not in stopped.err
    assert names() == ["out.latents.safetensors"]
    done = solostep(*command, "--json")
    assert done.loaded == ["vae"]
    assert done.record["resumed_from_step"] == done.record["steps_done"] == 2
    assert "note: All steps are done already: 2 of 2 in out.latents.safetensors." in done.notes
    assert len(read_frames("out.mp4")) == 34


def test_a_name_from_the_prompt_is_found_again(solostep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside another run's, whether that is finished or not."""
    solostep("generate", "a cat", "-m", T2V, *SMALL, "--seed", 1)
    command = ["generate", "a cat", "-m", T2V, *SMALL, "--seed", 2]
    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "decode_chunks", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        solostep(*command, code=1)
    assert names() == ["a-cat-2.latents.safetensors", "a-cat.latents.safetensors", "a-cat.mp4"]
    again = solostep(*command)
    assert (again.out, again.loaded) == ("a-cat-2.mp4\n", ["vae"])


# --- decode -------------------------------------------------------------------------------------------------------


def test_decode(solostep: Run) -> None:
    solostep("generate", "a cat", "-m", T2V, "-o", "out.mp4", "--seed", 1, *SMALL)
    made = Path("out.mp4").read_bytes()
    Path("out.mp4").unlink()
    done = solostep("decode", "out.latents.safetensors")
    assert (done.out, done.loaded, done.notes) == ("out.mp4\n", ["vae"], [])
    assert Path("out.mp4").read_bytes() == made
    done = solostep("decode", "out.latents.safetensors", "-o", "pictures", "--codec", "png", "--json")
    assert set(done.record) == RECORD
    assert (done.record["output"], done.record["prompt"], done.record["seed"]) == ("pictures", "a cat", 1)
    pictures = read_frames("pictures")
    assert pictures.shape == (17, 16, 32, 3)
    assert np.corrcoef(read_frames("out.mp4").ravel(), pictures.ravel())[0, 1] > 0.8

    saved = read_latents(Path("out.latents.safetensors"))
    saved.step = 1
    save_latents(Path("half.latents.safetensors"), saved)
    half = solostep("decode", "half.latents.safetensors", "--fps", 12, "--json")
    assert (fps_of("out.mp4"), fps_of("half.mp4")) == (25, 12)
    assert (half.record["steps_done"], half.record["output"]) == (1, "half.mp4")
    assert any("step 1 of 2" in note and "noisy" in note for note in half.notes)
    assert len(read_frames("half.mp4")) == 17
    before = Path("half.mp4").read_bytes()
    solostep("decode", "out.latents.safetensors", "-o", "half.mp4", code=2)
    assert Path("half.mp4").read_bytes() == before
    solostep("decode", "out.latents.safetensors", "-o", "half.mp4", "--overwrite")
    assert Path("half.mp4").read_bytes() == made


# --- info ---------------------------------------------------------------------------------------------------------


def test_info(solostep: Run) -> None:
    shown = solostep("info", T2V)
    assert shown.err == ""
    assert shown.lines[0] == str(T2V)
    for words in ("preset t2v: 204 frames 544x992, 50 steps, guidance 9, time shift 13", "BF16", "F32"):
        assert words in shown.out
    assert sum("complete" in line for line in shown.lines) == 4
    found = solostep("info", T2V, "--json").record
    assert found["problems"] == []
    assert (found["preset"]["name"], found["preset"]["num_frames"]) == ("t2v", 204)
    components = {c["name"]: c for c in found["components"]}
    files = (T2V / "transformer").glob("*.safetensors")
    assert components["transformer"]["parameters"] == sum(t.numel() for f in files for t in load_file(f).values())
    assert components["transformer"]["files"] == 2
    assert components["vae"]["dtypes"] == ["BF16"]
    assert components["vae"]["stored_bytes"] == (T2V / "vae/vae_v2.safetensors").stat().st_size
    assert "bert.pooler.dense.weight" in components["hunyuan_clip"]["ignored"]


def test_info_of_the_demo_model(solostep: Run) -> None:
    shown = solostep("info")
    assert "preset demo: 17 frames 96x96, 24 steps" in shown.out
    assert solostep("info", "--json").record["problems"] == []


def test_info_of_a_damaged_model(tmp_path: Path, solostep: Run) -> None:
    """Every problem at once, and the networks that are whole."""
    model = Path(shutil.copytree(T2V, tmp_path / "model"))
    (model / "vae/vae_v2.safetensors").write_bytes(b"short")
    (model / "step_llm/config.json").unlink()
    shown = solostep("info", model, code=1)
    problems = [line for line in shown.lines if line.startswith("problem: ")]
    assert len(problems) == 2
    assert str(model / "vae/vae_v2.safetensors") in shown.out
    assert str(model / "step_llm/config.json") in shown.out
    rows = {line.split()[0]: line for line in shown.lines if line and line.split()[0] in ("transformer", "vae")}
    assert "complete" in rows["transformer"]
    assert "see below" in rows["vae"]
    found = solostep("info", model, "--json", code=1).record
    assert len(found["problems"]) == 2
    state = {c["name"]: c["problem"] is None for c in found["components"]}
    assert state == {"transformer": True, "vae": False, "step_llm": False, "hunyuan_clip": True}
    assert found["preset"] is None


# --- verify -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cases(work: Path) -> Path:
    """Three small golden cases."""
    folder = work / "cases"
    folder.mkdir()
    for name in ("rms_norm_128", "feed_forward", "kv_mask_lengths"):
        shutil.copy(GOLDEN / f"{name}.safetensors", folder)
    return folder


def rewrite(path: Path, tensor: str | None = None, added: float = 1, **metadata: str) -> None:
    """Changes one number of a golden case, or its metadata."""
    with safe_open(path, framework="pt") as file:
        described = file.metadata() | metadata
    tensors = load_file(path)
    if tensor is not None:
        tensors[tensor].view(-1)[-1] += added
    save_file(tensors, path, metadata=described)


def test_verify(cases: Path, solostep: Run) -> None:
    shown = solostep("verify", cases)
    assert shown.err == ""
    for name in ("rms_norm_128", "feed_forward", "kv_mask_lengths"):
        assert name in shown.out
    assert shown.lines[-1].endswith("of 3 cases: all within their limits")
    results = solostep("verify", cases, "--json").record
    assert all(r["passed"] and not r["error"] for r in results)
    assert {r["dtype"] for r in results} == {"fp32", "bf16"}
    assert {r["case"] for r in results} == {"rms_norm_128", "feed_forward", "kv_mask_lengths"}
    only = solostep("verify", cases, "--dtype", "fp32", "--json").record
    assert {r["dtype"] for r in only} == {"fp32"}
    assert len(only) < len(results)


def test_verify_finds_one_wrong_number(cases: Path, solostep: Run) -> None:
    rewrite(cases / "feed_forward.safetensors", "outputs.out")
    shown = solostep("verify", cases, "--dtype", "fp32", code=1)
    over = [line for line in shown.lines if "OVER" in line]
    assert [line.replace("│", " ").split()[:2] for line in over] == [["feed_forward", "out"]]
    assert "1 NOT within their limits" in shown.lines[-1]
    results = solostep("verify", cases, "--dtype", "fp32", "--json", code=1).record
    assert {r["case"] for r in results if not r["passed"]} == {"feed_forward"}
    assert len({r["case"] for r in results}) == 3
    rewrite(cases / "feed_forward.safetensors", "outputs.out", float("nan"))
    results = solostep("verify", cases, "--dtype", "fp32", "--json", code=1).record
    assert [(r["case"], r["max_abs"]) for r in results if not r["passed"]] == [("feed_forward", None)]


def test_verify_reports_what_it_cannot_run(cases: Path, solostep: Run) -> None:
    """An unknown component, a file that is no case: failed, by name, and the others still run."""
    rewrite(cases / "feed_forward.safetensors", component="flux_capacitor")
    (cases / "broken.safetensors").write_bytes(b"nothing")
    shown = solostep("verify", cases, code=1)
    assert "flux_capacitor" in shown.out
    assert "broken.safetensors is not a golden case" in shown.out
    results = solostep("verify", cases, "--json", code=1).record
    assert {r["case"] for r in results if r["error"]} == {"feed_forward", "broken"}
    assert {r["case"] for r in results if r["passed"]} == {"rms_norm_128", "kv_mask_lengths"}
    assert all(r["max_abs"] is None for r in results if r["error"])


def test_verify_needs_cases(work: Path, solostep: Run) -> None:
    (work / "empty").mkdir()
    for folder, words in (("empty", "holds no golden cases"), ("gone", "is not a folder")):
        refused = solostep("verify", folder, code=2)
        assert refused.out == ""
        assert refused.err.startswith(f"error: {folder} {words}")
    for option in (["--dtype", "fp8"], ["--device", "toaster"]):
        refused = solostep("verify", GOLDEN, *option, code=2)
        assert refused.err.startswith(f"error: {option[0]} {option[1]}")


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_of_every_command(solostep: Run) -> None:
    """Options that cost something say so."""
    top = solostep("--help").out
    costs = {
        "generate": [
            "--steps", "time grows with them", "--frames", "Cost grows faster", "--guidance", "half the time",
            "--precision", "twice the memory", "--codec", "lossless (large)", "--quality", "larger",
            "--official-postprocess", "Loses detail", "--keep-loaded", "if it is there",
        ],
        "decode": ["LATENTS", "--codec", "--overwrite"],
        "info": ["MODEL", "--json", "missing or damaged"],
        "verify": ["FOLDER", "--dtype", "Exit code 1"],
    }  # fmt: skip
    for command, expected in costs.items():
        assert command in top
        shown = solostep(command, "--help").out
        flat = " ".join(shown.split()).lower()
        assert [words for words in expected if words.lower() not in flat] == []


def test_version(solostep: Run) -> None:
    assert solostep("--version").out.strip() == version("solostep")


@pytest.mark.parametrize("command", ["generate", "decode", "info", "verify", "make-coffee", "--no-such"])
def test_unknown_options_and_commands(command: str, solostep: Run) -> None:
    refused = solostep(command, "x", "--no-such-option", code=2)
    assert refused.out == ""
    assert "Traceback" not in refused.err


def test_usage_errors_are_value_errors() -> None:
    """So that a program that calls the Python interface can catch them without knowing us."""
    assert issubclass(UsageError, ValueError)
    assert UsageError.exit_code == 2
