"""`--vram`, `--host-ram` and `solostep plan`: no budget changes a bit, plans are told before, failures are survived."""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_command import plan_command

from solostep import StepVideoPipeline
from solostep.engine import decoding, machine, memory, rates, runtime, stages, streaming
from solostep.engine import latents as storage
from solostep.engine import plan as plan_of
from solostep.engine.asked import ask
from solostep.engine.checkpoint import open_model
from solostep.engine.config import VAEConfig
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.forecast import described
from solostep.engine.interfaces import cli
from solostep.engine.latents import SavedLatents
from solostep.engine.models import vae
from solostep.engine.plan import CONTEXT, FIRST_STEP, MOST, Limits, Plan, Rated, smallest
from solostep.engine.request import Collect, Job, Request
from solostep.engine.sampling import GuidedVelocity
from solostep.engine.streaming import more_of
from solostep.engine.units import parse_size
from solostep.offload import pinned as host_side
from solostep.offload import planner
from solostep.offload.planner import BlockPlan, Rates
from solostep.quant.recipe import Recipe

pytestmark = pytest.mark.usefixtures("fast")

GOLDEN = Path(__file__).parents[1] / "golden"
T2V, TI2V = GOLDEN / "tiny-stepvideo-t2v", GOLDEN / "tiny-stepvideo-ti2v"
SMALL: dict[str, Any] = {"num_frames": 17, "height": 32, "width": 48, "num_inference_steps": 2, "progress": False}
PROMPT = "a red circle moving right"
SETTINGS = {k: v for k, v in SMALL.items() if k != "progress"}
GB = 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def small_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """What libraries take of a card is more than the whole demo model; and budgets are not cut to what is free here."""
    monkeypatch.setattr(planner, "CPU_MARGIN", 40_000_000)
    monkeypatch.setattr(memory, "PATIENCE", 0.0)
    monkeypatch.setattr(stages, "PATIENCE", 0.0)
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * GB)


def make(vram: int | None = None, host: int | None = None, **more: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents and record of a run of the demo model within a budget."""
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram=vram, host_ram=host, **more)
    request = pipe.request(PROMPT, seed=7, **SETTINGS)
    ((record, latents),) = pipe.generate([request], None)
    return latents, record


@pytest.fixture(scope="module")
def unlimited(fast: None, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Latents of a run without a budget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLOSTEP_CACHE", str(tmp_path_factory.mktemp("unlimited")))
        return make()[0]


def budgets(**more: Any) -> list[int]:
    """From all that a run wants down to a quarter of the blocks."""
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram="40GB", **more)
    request = pipe.request(PROMPT, seed=7, **SETTINGS)
    plan = pipe.memory.plan(request.settings, texts=request.texts)
    whole = plan.blocks.device
    assert max(stage.device for stage in plan.stages) == whole
    return [40 * GB, whole - 1, whole - 4 * plan.network.block]


@pytest.mark.parametrize(
    "more", [{}, pytest.param({"precision": "int8"}, marks=pytest.mark.more), {"precision": "fp8", "attention": "int8"}]
)
def test_no_budget_changes_a_bit(more: dict[str, Any]) -> None:
    want, record = make(**more)
    assert record["plan"] is None and record["events"] == []
    spared = []
    for vram in budgets(**more):
        found, record = make(vram, **more)
        assert torch.equal(found, want)
        assert record["plan"]["budget_bytes"] == vram >= record["plan"]["device_bytes"]
        spared.append((record["plan"]["streamed_blocks"], not record["plan"]["keep_text"]))
    assert spared[0] == (0, False) < spared[1] <= spared[2]


def test_blocks_come_from_their_files_where_host_memory_is_short(unlimited: torch.Tensor) -> None:
    vram = budgets()[2]
    plan = StepVideoPipeline.from_pretrained(device="cpu", vram=vram).plan(**SETTINGS)
    assert plan.blocks.disk == 0 and plan.blocks.host > 3 * plan.network.block
    found, record = make(vram, 3 * plan.network.block)
    assert record["plan"]["blocks_from_disk"] > 0 and torch.equal(found, unlimited)
    read = {stage["stage"]: stage["read_bytes"] for stage in record["stages"]}
    planned = {stage["name"]: stage["disk"] for stage in record["plan"]["stages"]}
    if read["denoise"] is not None:  # the system tells; behind the last step, blocks of a next one were under way
        assert planned["load transformer"] <= read["load transformer"] < 1.1 * planned["load transformer"]
        assert planned["denoise"] <= read["denoise"] < planned["denoise"] + 4 * plan.network.block
    with pytest.raises(SolostepError, match=r"of host memory are needed.* GB of memory \(--vram\); "):
        # Quantized on load, it is in no file.
        make(budgets(precision="int8")[2], 10**6, precision="int8")


def test_an_impossible_budget_says_what_would_do() -> None:
    with pytest.raises(SolostepError, match=r"takes 0\.04\d+ GB at least for 17 frames of 32x48.*give --vram more"):
        make(20_000_000)


def test_the_environment_s_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLOSTEP_VRAM", "12GB")
    monkeypatch.setenv("SOLOSTEP_HOST_RAM", "3GiB")
    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu")
    assert (pipe.vram, pipe.host_ram) == (12 * GB, 3 * 2**30)
    assert StepVideoPipeline.from_pretrained(T2V, device="cpu", vram="20GB").vram == 20 * GB
    monkeypatch.setenv("SOLOSTEP_VRAM", "much")
    with pytest.raises(UsageError, match=r"\$SOLOSTEP_VRAM much is no size; write it with its unit, as in 24GB"):
        StepVideoPipeline.from_pretrained(T2V, device="cpu")


def test_sizes() -> None:
    for text, count in {"24GB": 24 * GB, "24 gb": 24 * GB, "1.5GiB": 3 * 2**29, "500MB": 5 * 10**8}.items():
        assert parse_size(text, "--vram") == count
    for text, count in {
        "24G": 24 * GB,
        "512m": 512 * 10**6,
        "0.5 T": GB * 500,
        "9000K": 9 * 10**6,
        "2 Gib": 2**31,
        "1TiB": 2**40,
        "2TB": 2 * 10**12,
    }.items():
        assert parse_size(text, "--vram") == count
    assert parse_size(24 * GB, "--vram") == 24 * GB
    for wrong in ("24", "GB", "24 apples", "", "24GIG", "24Gi", 24, 0):
        with pytest.raises(UsageError, match="--vram .*is no size"):
            parse_size(wrong, "--vram")
    for wrong in ("0GB", "-4GB", "0", "999K", "0.9MB", "1000T"):
        said = "is no size" if wrong == "0" else "it has to be at least 1MB, and less than 1000TB"
        with pytest.raises(UsageError, match=f"--vram {wrong}:? {said}"):
            parse_size(wrong, "--vram")


# --- failures -----------------------------------------------------------------------------------------------------


OUT_OF_MEMORY = torch.OutOfMemoryError("simulated")


def test_decoding_beside_the_transformer_may_take_a_tenth_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PLACES", {(None, 1): 1.0, (8, 8): 1.09, (4, 8): 1.15})
    assert not decoding.slower((None, 1), (None, 1)) and not decoding.slower((8, 8), (None, 1))
    assert decoding.slower((4, 8), (None, 1)) and not decoding.slower((4, 8), (8, 8))
    assert decoding.slower((2, 1), (None, 1)) and not decoding.slower((2, 1), (2, 1))


def fail_at(
    monkeypatch: pytest.MonkeyPatch, calls: set[int], error: Exception = OUT_OF_MEMORY
) -> None:  # fmt: skip
    """Some calls of the model run out of memory."""
    real, count = GuidedVelocity.__call__, 0

    def call(self: GuidedVelocity, *args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count in calls:
            raise error
        return real(self, *args)

    monkeypatch.setattr(GuidedVelocity, "__call__", call)


@pytest.mark.parametrize(
    "error", [OUT_OF_MEMORY, MemoryError("no 8 bytes. If reserved, not"), RuntimeError("CUDA error: out of memory"),
              RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")]
)  # fmt: skip
def test_a_step_that_ran_out_of_memory_is_repeated_with_less(
    error: Exception, unlimited: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = budgets()[1] + 1
    fail_at(monkeypatch, {2}, error)
    found, record = make(whole)
    assert torch.equal(found, unlimited) and len(record["events"]) == 1
    assert "Out of memory at step 2" in record["events"][0] and "the step is repeated" in record["events"][0]
    assert "blocks stay in memory, where 6 did" in record["events"][0]
    assert f"Step 2: {str(error).partition(' If')[0]}" in caplog.messages
    assert record["plan"]["streamed_blocks"] > 0 and record["plan"]["budget_bytes"] <= 0.9 * whole


def least_budget() -> int:
    """The smallest that a run of the demo model can be made in."""
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram="40GB")
    limits = Limits(MOST, None, context=0, program=0)
    return smallest(pipe.memory.sizes, pipe.request(PROMPT, **SETTINGS).settings, pipe.memory.modes()[2], 2, limits)


def test_a_step_is_repeated_on_the_smallest_plan_where_a_tenth_less_is_too_little(
    unlimited: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just above the least: first the smallest plan, then, as nothing is smaller, once more with the same."""
    least = least_budget()
    fail_at(monkeypatch, {2, 3})
    found, record = make(int(1.05 * least))
    assert torch.equal(found, unlimited) and len(record["events"]) == 2
    assert "blocks stay" in record["events"][0] and "repeated as it is" in record["events"][1]
    assert record["plan"]["budget_bytes"] <= least


def test_a_step_that_runs_out_twice_on_the_smallest_plan_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, {2, 3})
    with pytest.raises(SolostepError, match="Out of memory twice at step 2, with the smallest plan there is"):
        make(least_budget())
    fail_at(monkeypatch, {2, 4})  # not of the same step
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram=least_budget())
    request = pipe.request(PROMPT, seed=8, **SETTINGS | {"num_inference_steps": 3})
    ((record, _),) = pipe.generate([request], None)
    assert ["repeated as it is" in event for event in record["events"]] == [True, True]


def fail_once(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: Exception = OUT_OF_MEMORY) -> None:
    real, left = getattr(module, name), [error]

    def call(*args: Any, **kwargs: Any) -> Any:
        if left:
            raise left.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("name", ["encode_prompts", "first_frame_condition"])
def test_stages_before_the_transformer_are_tried_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(3, 64, 96) if name == "first_frame_condition" else None
    pipe = StepVideoPipeline.from_pretrained(TI2V if image is not None else T2V, device="cpu", cache=False)

    def call() -> tuple[torch.Tensor, list[str]]:
        request = pipe.request("a red panda", image=image, seed=7, **SETTINGS)
        ((record, latents),) = pipe.generate([request], None)
        return latents, record["events"]

    want, said = call()
    assert said == []
    fail_once(monkeypatch, stages, name, RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    found, said = call()
    assert torch.equal(found, want) and len(said) == 1 and "Out of memory" in said[0] and "alone" in said[0]
    real, left = getattr(stages, name), [OUT_OF_MEMORY] * 4

    def full(*args: Any, **kwargs: Any) -> Any:
        if left:
            raise left.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(stages, name, full)
    with pytest.raises(SolostepError, match="ran out of memory"):  # four times are enough
        call()
    left += [OUT_OF_MEMORY] * 3
    found, said = call()
    assert torch.equal(found, want) and len(said) == 3 and not left
    fail_once(monkeypatch, stages, name, RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        call()


def test_a_first_frame_is_encoded_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that runs out of memory over the whole frame, and in a budget that has no room for it."""

    def with_image(vram: int | None) -> tuple[torch.Tensor, dict[str, Any]]:
        pipe = StepVideoPipeline.from_pretrained(TI2V, device="cpu", vram=vram, precision="fp32", cache=False)
        image = torch.linspace(-1, 1, 3 * 64 * 96).view(3, 64, 96)
        request = pipe.request("a red panda", image=image, seed=7, **{**SETTINGS, "num_inference_steps": 1})
        ((record, latents),) = pipe.generate([request], None)
        return latents, record

    want, record = with_image(None)
    assert record["events"] == []
    fail_once(monkeypatch, vae.Encoder, "forward")
    found, record = with_image(None)
    assert record["events"] == ["Out of memory while the first frame was encoded; going on in 4 strips."]
    assert float((found - want).abs().max()) <= 1e-4
    real = decoding.encode_bytes
    monkeypatch.setattr(decoding, "encode_bytes", lambda *of: 9 * GB if of[3] == 1 else real(*of))
    found, record = with_image(8 * GB)
    assert record["events"] == ["The first frame is encoded in 4 strips, for want of memory."]
    assert record["plan"]["frame_strips"] == 4 and float((found - want).abs().max()) <= 1e-4
    assert "the first frame encoded in 4 strips" in described(record["plan"])
    found, record = with_image(10 * GB)
    assert record["events"] == [] and record["plan"]["frame_strips"] == 1 and torch.equal(found, want)


def test_a_first_frame_is_encoded_alike_in_a_batch() -> None:
    """A transformer that is left makes way, where the first frame has no room as a whole beside it."""
    pipe = StepVideoPipeline.from_pretrained(Path(plan_of.__file__).parent / "demo/ti2v", device="cpu", vram="40GB")
    settings = SETTINGS | {"height": 192, "width": 192}
    image = torch.zeros(192, 192, 3, dtype=torch.uint8).numpy()
    requests = [pipe.request(PROMPT, image=image, seed=seed, **settings) for seed in (1, 2)]
    plan = pipe.memory.plan(requests[0].settings, texts=requests[0].texts)
    pipe.vram = plan.stage("denoise").device
    assert plan.stage("first frame").device + plan.stage("load transformer").device > pipe.vram
    records = [record for record, _ in pipe.generate(requests, None)]
    assert [record["plan"]["frame_strips"] for record in records] == [1, 1]
    assert not any("first frame" in event for record in records for event in record["events"])


def test_what_cannot_be_pinned_comes_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose files hold what is computed with: half of what was refused is tried."""
    want, record = make(budgets()[2])
    pinned = record["plan"]["host_bytes"]
    real, asked = memory.place, []

    def place(component: Any, mode: Any, device: Any, plan: Any, *more: Any) -> Any:
        asked.append(plan.host)
        if plan.host >= pinned:
            raise streaming.NotPinned("no more can be pinned")
        return real(component, mode, device, plan, *more)

    monkeypatch.setattr(memory, "place", place)
    found, record = make(budgets()[2])
    assert torch.equal(found, want)
    assert len(asked) == 2 and asked[0] >= pinned >= 2 * asked[1] > 0
    assert record["plan"]["blocks_from_disk"] > 0
    assert len(record["events"]) == 1 and "from their files" in record["events"][0]
    monkeypatch.setattr(memory, "place", lambda *_: (_ for _ in ()).throw(streaming.NotPinned("nothing can be pinned")))
    with pytest.raises(SolostepError, match="nothing can be pinned"):
        make(budgets()[2])


def test_host_memory_that_cannot_be_had_comes_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses the first slab; quantized on load, blocks are in no file, and the error says what to do."""
    want, _ = make(budgets()[2])
    no_more = OSError(errno.ENOMEM, "Cannot allocate memory")
    fail_once(monkeypatch, host_side.mmap, "mmap", no_more)
    found, record = make(budgets()[2])
    assert torch.equal(found, want) and record["plan"]["blocks_from_disk"] > 0
    assert len(record["events"]) == 1 and "from their files" in record["events"][0]
    vram = budgets(precision="int8")[2]
    fail_once(monkeypatch, host_side.mmap, "mmap", no_more)
    with pytest.raises(SolostepError, match=r"could not be had \(Cannot allocate memory\); .*convert the model first"):
        make(vram, precision="int8")


def test_what_cannot_be_pinned_while_a_step_is_repeated_is_loaded_anew(
    unlimited: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step ran out of the card's memory, and the host had none for what had to leave it."""
    fail_at(monkeypatch, {2})
    fail_once(monkeypatch, streaming.PlacedTransformer, "move", streaming.NotPinned("no more can be pinned"))
    found, record = make(budgets()[1] + 1)
    assert torch.equal(found, unlimited)
    assert [len(re.findall("from their files|is repeated", event)) for event in record["events"]] == [1, 1]
    assert record["plan"]["blocks_from_disk"] > 0


def test_a_move_that_ran_out_of_memory_is_a_load_of_less(
    unlimited: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots of what left the card found no place on it: other programs were faster."""
    fail_at(monkeypatch, {2})
    fail_once(monkeypatch, streaming, "BlockStreamer")
    whole = budgets()[1] + 1
    found, record = make(whole)
    assert torch.equal(found, unlimited)
    assert [len(re.findall("loaded anew|is repeated", event)) for event in record["events"]] == [1, 1]
    assert record["plan"]["streamed_blocks"] > 0 and record["plan"]["budget_bytes"] <= 0.9 * 0.9 * whole


def test_loads_of_less_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram=budgets()[1] + 1)
    fail_at(monkeypatch, {2})
    calls: list[int] = []

    def full(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise OUT_OF_MEMORY

    monkeypatch.setattr(streaming, "BlockStreamer", full)
    with pytest.raises(SolostepError, match="at least for 17 frames"):
        pipe("a red panda", seed=7, output_type="latent", **SMALL)
    assert len(calls) > 1 and "transformer" not in pipe._networks


def fail_to(monkeypatch: pytest.MonkeyPatch, *where: Any) -> None:
    """The next time that latents go to a device, as the type that is given, it has no memory for them."""
    real, left = torch.Tensor.to, [OUT_OF_MEMORY]

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if left and self.ndim == 5 and args == where:
            raise left.pop()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)


@pytest.mark.parametrize("what", ["velocity", pytest.param("latents", marks=pytest.mark.more)])
def test_what_the_first_step_needs_may_run_out_of_memory(
    what: str, unlimited: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = budgets()[1] + 1
    if what == "velocity":
        fail_once(monkeypatch, stages, "GuidedVelocity")
    else:
        fail_to(monkeypatch, torch.device("cpu"))
    found, record = make(whole)
    assert torch.equal(found, unlimited) and len(record["events"]) == 1
    assert "Out of memory at step 1" in record["events"][0] and record["plan"]["streamed_blocks"] > 0


def test_the_cache_of_loading_goes_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def note(module: Any, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: order.append(name) or real(*args, **more))

    for module, name in ((memory, "place"), (memory, "release_memory"), (stages, "euler_step")):
        note(module, name)
    make(precision="int8")
    begun = order.index("place")
    assert order[begun : begun + 4] == ["place", "release_memory", "euler_step", "euler_step"]


@pytest.mark.parametrize("what", ["vae", *(pytest.param(x, marks=pytest.mark.more) for x in ("latents", "pieces"))])
def test_decoding_gives_a_kept_transformer_up(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu", keep_loaded=True)
    small = SMALL | {"num_inference_steps": 1}
    want = pipe("a red panda", seed=7, **small)
    assert want.record["events"] == []
    if what == "vae":
        pipe.memory.free("vae", always=True)
        fail_once(monkeypatch, stages, "load")
        fail_once(monkeypatch, stages, "to_uint8")
    elif what == "latents":
        fail_to(monkeypatch, torch.device("cpu"), torch.bfloat16)
    else:
        real = vae._ChunkDecoder._pieces

        def pieces(self: Any, z: torch.Tensor) -> Any:
            if "transformer" in pipe._networks:
                raise OUT_OF_MEMORY
            return real(self, z)

        monkeypatch.setattr(vae._ChunkDecoder, "_pieces", pieces)
        monkeypatch.setattr(vae, "SMALLER", ((1, 1),))
    found = pipe("a red panda", seed=7, **small)
    assert abs(found.frames.astype(int) - want.frames.astype(int)).max() <= (2 if what == "pieces" else 0)
    assert "transformer" not in pipe._networks
    said = {
        "vae": ["loaded again alone", "the host makes them"],
        "latents": ["loaded again alone"],
        "pieces": ["going on frame by frame", "without the kept transformer"],
    }[what]
    assert len(found.record["events"]) == len(said)
    assert all(words in event for words, event in zip(said, found.record["events"], strict=True))


@pytest.mark.parametrize("version", [1, 2])
def test_what_control_groups_leave(version: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An outer group may allow less than its own; a cache of files makes way, files in memory do not."""
    root = tmp_path if version == 2 else tmp_path / "memory"
    names = ("memory.max", "memory.current", "") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")  # fmt: skip
    for group, limit, used in (
        ("a/b", "9000" if version == 1 else "max", 700),
        ("a", "2000", 1500),
        (".", "9000", 1600),
    ):
        (root / group).mkdir(parents=True, exist_ok=True)
        (root / group / names[0]).write_text(limit + "\n")
        (root / group / names[1]).write_text(f"{used}\n")
        stat = f"{names[2]}inactive_file 300\n{names[2]}active_file 100\n"
        (root / group / "memory.stat").write_text(stat + "shmem 50\n")
    (tmp_path / "own").write_text("0::/a/b\n" if version == 2 else "4:cpu,memory:/a/b\n3:pids:/c\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    assert machine.cgroup_limit() == 2000
    assert machine.cgroup_room() == 2000 - 1500 + 400
    assert runtime.host_room() == 900 * 9 // 10 and runtime.free_memory(torch.device("cpu")) == 900
    (tmp_path / "own").write_text("0::/../elsewhere\n")  # as seen from inside a container
    assert machine.cgroup_limit() == 9000
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "none")
    assert machine.cgroup_limit() is None and machine.cgroup_room() is None


def test_another_error_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, {2}, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make(budgets()[1])


def test_it_gives_up_when_nothing_is_left_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram=budgets()[1] + 1)
    fail_at(monkeypatch, set(range(2, 1000)))
    kept = tmp_path / "kept.latents.safetensors"
    with pytest.raises(SolostepError, match="Out of memory twice at step 2") as given_up:
        pipe("a red panda", seed=7, latents_path=kept, **SMALL)
    assert kept.exists() and f"; step 1 of 2 is kept in {kept}, and the same command" in str(given_up.value)


def test_decoding_goes_on_in_smaller_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu")
    want = pipe("a red panda", seed=7, **SMALL)
    monkeypatch.setattr(memory.Memory, "decoding", lambda self, *_: ((1, 2), 0))
    found = StepVideoPipeline.from_pretrained(T2V, device="cpu")("a red panda", seed=7, **SMALL)
    assert torch.equal(found.latents, want.latents)
    assert abs(found.frames.astype(int) - want.frames.astype(int)).max() <= 2
    assert "frame by frame in 2 strips" in found.record["events"][0]


def test_a_second_video_counts_what_the_first_one_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram=budgets()[2])
    need = pipe.plan(**SETTINGS).blocks.host
    monkeypatch.setattr(memory, "host_room", lambda: 0 if "transformer" in pipe._networks else need)
    requests = [pipe.request("a red circle", seed=seed, **SETTINGS) for seed in (1, 2)]
    records = [record for record, _ in pipe.generate(requests, None)]
    loads = [stage["stage"] for record in records for stage in record["stages"] if "transformer" in stage["stage"]]
    assert len(records) == 2 and len(loads) == 1


@pytest.mark.parametrize("keep", [False, True])
def test_a_vae_that_is_left_makes_way_for_a_plan(keep: bool) -> None:
    """Of a batch in the least memory; and of a call after the other, where all is kept that there is room for."""
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram="40GB", keep_loaded=keep)
    requests = [pipe.request(PROMPT, seed=seed, **SETTINGS) for seed in (1, 2)]
    texts = requests[0].texts
    whole = pipe.memory.plan(requests[0].settings, texts=texts)
    pipe.vram = next(
        budget for budget in range(whole.device // 2, whole.device, 10**5) if planned(pipe, budget, requests[0])
    )
    assert not planned(pipe, pipe.vram - whole.stage("load vae").device, requests[0])

    def sink(*_: Any) -> Any:
        return contextlib.nullcontext(Collect())

    assert len(list(pipe.generate(requests, sink))) == 2
    assert len(list(pipe.generate(requests[:1], sink))) == 1


def planned(pipe: StepVideoPipeline, budget: int, request: Request) -> bool:
    """Whether there is a plan for a request within a budget."""
    try:
        pipe.memory.plan(request.settings, budget, texts=request.texts)
    except SolostepError:
        return False
    return True


def test_a_kept_transformer_moves_on() -> None:
    """What streams goes on doing so; more of it leaves, to files too; and the numbers stay."""
    vram = budgets()[2]
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram=vram, keep_loaded=True)
    want = pipe("a red circle", seed=1, output_type="latent", **SMALL)
    placed = pipe._networks["transformer"]
    streamed = placed.streamed
    pipe.vram = 40 * GB
    assert torch.equal(pipe("a red circle", seed=1, output_type="latent", **SMALL), want)
    before = {item.index: item.slab for item in placed.streamer.streamed}
    placed.move(BlockPlan(6, 0, 0, 0))
    assert placed.streamed == streamed and placed.plan.slots == 1 and placed.plan.resident == 6 - len(streamed)
    placed.move(BlockPlan(0, 2, 0, 0, disk=4))
    after = {item.index: item.slab for item in placed.streamer.streamed}
    # Nothing is copied that is there already; what comes from files now gives its memory back.
    assert all(slab is None if i in placed.from_files else slab is before.get(i, slab) for i, slab in after.items())
    assert len(placed.streamed) == 6 and len(placed.from_files) == placed.plan.disk == 4
    assert torch.equal(pipe("a red circle", seed=1, output_type="latent", **SMALL), want)


def test_what_is_kept_is_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU, where torch does not count it; and where less is free than a budget allows, that is said."""
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram=budgets()[0], keep_loaded=True)
    pipe.memory.networks["vae"] = torch.nn.Linear(1000, 1000, bias=False)
    assert pipe.memory.room() == 40 * GB - 4_000_000
    with pytest.raises(SolostepError, match="there are 40 GB; give --vram more"):  # nor without it
        pipe.plan(**SETTINGS | {"num_frames": 17 * 400, "height": 1600, "width": 1600})
    monkeypatch.setattr(memory, "free_memory", lambda device: 30_000_000)
    assert pipe.memory.room() == 30_000_000
    with pytest.raises(SolostepError, match="0.03 GB are free; close other programs"):
        pipe.plan(**SETTINGS)


def test_one_memory_is_counted_once_whatever_the_host_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    free = budgets()[2]
    pipe = StepVideoPipeline.from_pretrained(device="cpu", host_ram="1GB")  # which counts beside a budget only
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    with pytest.raises(SolostepError, match="GB are free; close other programs"):
        pipe.plan(**SETTINGS)


def test_decoding_beyond_a_budget_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that the VAE alone is over nothing is left, and no less than nothing."""
    _, record = make()
    said: list[str] = []
    monkeypatch.setattr(stages.log, "warning", lambda text, *of: said.append(text % of))
    saved = storage.read_latents(Path(record["latents_file"]))
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram="1MB")
    pipe.decode(saved, lambda *_: contextlib.nullcontext(Collect()))
    assert len(said) == 1
    assert re.fullmatch(r"Decoding may .*: beside the VAE it takes 0\.0\d+ GB at least, and 0 GB are left\.", said[0])


def test_half_of_a_transformer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram=budgets()[1] + 1, keep_loaded=True)
    pipe("a red circle", seed=1, output_type="latent", **SMALL)
    placed = pipe._networks["transformer"]
    monkeypatch.setattr(placed, "attach", lambda *_: (_ for _ in ()).throw(SolostepError("not pinned")))
    fail_at(monkeypatch, {1})
    with pytest.raises(SolostepError, match="not pinned"):
        pipe("a red circle", seed=2, output_type="latent", **SMALL)
    assert "transformer" not in pipe._networks


def test_other_packages_formats_are_counted_as_they_are() -> None:
    pytest.importorskip("bitsandbytes")
    sizes = ask("t2v", "bnb:nf4").sizes
    assert 48 * sizes.network.block == pytest.approx(16.5e9, rel=0.1) and not sizes.streams


def test_more_blocks_leave_and_none_comes_back() -> None:
    for old in ((), (3, 9), (0, 1, 2, 3)):
        for wanted in range(len(old), 13):
            found = more_of(12, old, wanted)
            assert len(found) == wanted == len(set(found)) and set(old) <= set(found) <= set(range(12))
            assert list(found) == sorted(found)


def test_the_report_is_beside_the_plan() -> None:
    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu", vram="40GB")
    assert pipe.memory_report() == []
    request = pipe.request("a red panda", seed=7, **SETTINGS)
    shown: list[Plan] = []
    ((record, _),) = pipe.generate([request], lambda *_: contextlib.nullcontext(Collect()), planned=shown.append)
    assert [plan.as_dict() for plan in shown] == [record["plan"]]  # told before, and kept to
    lines = {line["stage"]: line for line in pipe.memory_report()}
    assert all(line["planned_gpu_bytes"] is not None for line in lines.values())
    for name, line in lines.items():
        said = shown[0].stage(name)
        assert (line["planned_host_bytes"], line["planned_disk_bytes"]) == (said.host, said.disk)
    assert lines["load vae"]["planned_disk_bytes"] > 0 == lines["decode and write"]["planned_disk_bytes"]
    assert {"text", "load transformer", "denoise", "load vae", "decode and write"} <= set(lines)
    assert {line["planned_context_bytes"] for line in lines.values()} == {0}  # on a CPU
    assert lines["denoise"]["planned_gpu_bytes"] > 0 and lines["denoise"]["seconds"] > 0
    pipe.decode(storage.read_latents(Path(record["latents_file"])), lambda *_: contextlib.nullcontext(Collect()))
    assert [line["stage"] for line in pipe.memory_report()] == ["load vae", "decode and write"]


def test_plans_count_what_a_run_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a file, as the command does; a call that gives its frames back writes none meanwhile."""
    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu", vram="40GB")
    # With rates, on a CPU: what writing adds is seen in the time of decoding.
    monkeypatch.setattr(pipe.memory, "_rated", lambda measure: Rated(Rates(), 1e9))
    pixels, seen = 17 * 32 * 48, []
    for more in ({}, {"to_file": False}):
        request, shown = pipe.request("a red panda", seed=7, **SETTINGS), []
        ((record, _),) = pipe.generate([request], None, planned=shown.append, **more)
        seconds = shown[0].stage("decode and write").seconds
        assert record["plan"] == shown[0].as_dict()  # as when the transformer is loaded
        seen.append(seconds)
    assert seen[0] - seen[1] == pytest.approx(pixels * decoding.WRITING)
    pipe("a red panda", seed=7, **SMALL)
    said = {line["stage"]: line["planned_seconds"] for line in pipe.memory_report()}
    assert said["decode and write"] == seen[1]


def test_what_fails_while_a_run_is_planned_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are measured then, on a new card, and the card's memory is looked at."""
    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu", vram="40GB")

    def full(measure: bool) -> None:
        raise OUT_OF_MEMORY

    monkeypatch.setattr(pipe.memory, "_rated", full)
    for call in (lambda: pipe.plan(**SETTINGS), lambda: pipe("a red panda", seed=7, **SMALL)):
        with pytest.raises(SolostepError, match=r"cpu .* ran out of memory; close other programs"):
            call()


def test_the_line_before_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu", vram="40GB")
    show = cli._show_plan(pipe)
    for _ in range(2):
        show(pipe.plan(**SETTINGS))
    said = capsys.readouterr().err
    assert said.startswith("plan: memory ") and " of 40.0 GB, " in said and len(said.splitlines()) == 1
    assert ", the program itself not counted" in said
    assert "blocks stay in memory" in said


def test_a_plan_is_for_the_steps_that_are_left() -> None:
    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu")
    request = pipe.request("a red panda", seed=7, **SETTINGS | {"num_inference_steps": 5})
    saved = SavedLatents(torch.zeros(1), 3, 5, 7, True, {}, {})
    assert Job(request, Path(), saved).left == replace(request.settings, num_inference_steps=2)


# --- plans --------------------------------------------------------------------------------------------------------


def test_sizes_of_the_release_are_those_of_its_files() -> None:
    bf16 = ask("t2v", "bf16").sizes
    assert bf16.on_disk["transformer"] == pytest.approx(58.6e9, rel=0.01)
    assert bf16.on_disk["text"] == pytest.approx(39.2e9 + 1.4e9, rel=0.01)
    assert bf16.network.blocks == 48 and bf16.network.block == pytest.approx(1.208e9, rel=0.01)
    fp8 = ask("t2v", "fp8").sizes
    assert fp8.network.block == pytest.approx(0.604e9, rel=0.01) and not fp8.from_files
    assert ask("stepfun-ai/stepvideo-ti2v").settings.num_frames == 102


@pytest.mark.parametrize("frames", [51, 204])
def test_more_memory_is_never_slower(frames: int) -> None:
    asked = ask("turbo", "fp8", num_frames=frames, like="h200")
    least = asked.smallest()
    assert 2 * GB < least < 7 * GB
    with pytest.raises(SolostepError, match="at least"):
        asked.plan(least - 2 * 10**8)
    last, before = 49, float("inf")
    for budget in range(least, 60 * GB, 3 * GB):
        plan = asked.plan(budget)
        assert plan.device + CONTEXT <= budget
        streamed = plan.network.blocks - plan.blocks.resident
        assert streamed <= last
        assert plan.seconds is not None and plan.seconds <= before
        last, before = streamed, plan.seconds
    assert last == 0 and plan.decode == decoding.first_choice(fast=True)


def test_the_fastest_way_to_decode_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card by what was timed; on a CPU, where nothing was, as the official code does."""
    ways, config = decoding.PLACES | dict.fromkeys(decoding.UNTIMED, float("inf")), VAEConfig()
    taken = []
    for room in range(10**8, 30 * GB, 10**8):
        way, needed = decoding.choose_decoding(config, 544, 992, room, 2)
        if needed <= room:
            taken.append(ways[way])
    assert taken == sorted(taken, reverse=True)
    assert taken[0] == max(decoding.PLACES.values()) and taken[-1] == min(ways.values())
    assert not set(decoding.UNTIMED) & set(decoding.PLACES)
    # Where strips find little host memory, what nobody timed is taken where nothing else fits.
    little = decoding.host_bytes(config, 544, 992, 2, 2)
    assert decoding.choose_decoding(config, 544, 992, 5 * GB, 2, host=little)[0] in decoding.UNTIMED
    assert decoding.choose_decoding(config, 544, 992, 30 * GB, 2, fast=False)[0] == decoding.WHOLE
    assert decoding.first_choice(fast=False) == decoding.WHOLE
    assert decoding.by_speed(True, "int8") and not decoding.by_speed(True, "official")
    assert not decoding.by_speed(False, "int8")
    monkeypatch.setattr(decoding, "PLACES", {(None, 1): 1.0, (8, 8): 1.0, (4, 1): 1.0})  # as fast: the smallest
    assert decoding.choose_decoding(config, 544, 992, 30 * GB, 2)[0] == (8, 8)
    assert decoding.choose_decoding(config, 544, 992, 30 * GB, 2, host=GB)[0] == (4, 1)


def test_a_run_plans_with_its_own_prompts() -> None:
    """The plan before it, for what the encoders read at most, takes more."""
    pipe = StepVideoPipeline.from_pretrained(device="cpu", vram="40GB", attention="int8")
    longest = pipe.plan(**SETTINGS)
    tokens = pipe.memory.text_tokens(pipe.request(PROMPT, **SETTINGS).texts)
    _, record = make(40 * GB, attention="int8")
    assert 77 < tokens == record["plan"]["text_tokens"] < longest.text_tokens == plan_of.LONGEST_TEXT
    saved = longest.stage("denoise").device - record["plan"]["stages"][2]["device"]
    width, blocks = pipe.model.transformer_config.inner_dim, longest.network.blocks
    assert saved == 2 * 2 * (longest.text_tokens - tokens) * width * blocks * 2
    assert "Counted for the longest prompt" in str(longest)
    assert "the program itself is not counted" in str(longest), "on a CPU"
    assert "longest" not in str(pipe.memory.plan(pipe.request("a", **SETTINGS).settings, texts=["a", "b"]))


def test_a_budget_of_the_host_holds_the_program_on_a_card() -> None:
    folder = open_model(T2V)
    held = partial(memory.Memory, folder, torch.device("cuda"), torch.bfloat16, None, keep_loaded=False, modes=None)
    for small in ("1MB", plan_of.PROGRAM - 1):
        with pytest.raises(UsageError, match=r"--host-ram \(or \$SOLOSTEP_HOST_RAM\) is .*give 1\.79GB at least"):
            held(small)
    assert held("1.79GB").host_ram == 1_790_000_000
    assert StepVideoPipeline.from_pretrained(T2V, device="cpu", host_ram="1MB").host_ram == 10**6


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`solostep plan` in this process: exit code, stdout, stderr."""
    return plan_command(capsys)


def test_the_command(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("t2v", "--vram", "24GB", "--precision", "fp8", "--frames", "204")
    assert code == 0, err
    assert "within 24.0 GB of the card: 204 frames of 544x992, 50 steps, fp8, attention int8" in out
    assert "blocks stay on the card" in out and "denoise" in out
    found = json.loads(run("t2v", "--vram", "24GB", "--precision", "fp8", "--json")[1])
    assert found["resident_blocks"] + found["streamed_blocks"] == 48 and found["device_bytes"] < 24e9
    default, named = (run(*name, "--vram", "2G", "--frames", "17", "--json") for name in ((), ("demo",)))
    assert default[0] == 0 and default == named and json.loads(default[1])["resident_blocks"] == 6
    rows = json.loads(run(str(T2V), "--sweep", "--json")[1])
    assert rows and rows[-1]["streamed_blocks"] == 0
    assert [row["vram_bytes"] for row in rows] == sorted(row["vram_bytes"] for row in rows)


HUGE = ["--frames", "1000000", "--height", "2000", "--width", "2000"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["t2v"], "say with --vram which memory to plan for"),
        (["t2v", "--vram", "24"], "--vram 24 is no size"),
        (["nothing-here", "--vram", "24GB", "--host-ram", "1MB"], "give 1.79GB at least"),  # before it is looked for
        (["t2v", "--vram", "2GB"], "at least for 204 frames of 544x992"),
        (["t2v", "--vram", "12GB", *HUGE], "takes 111000 GB at least for 999991 frames of 2000x2000"),
        (["demo", "--vram", "12GB", "--device", "cpu", *HUGE], "of memory are needed beside the program itself"),
        (["nothing-here"], "neither a folder nor a Hugging Face id"),
        (["t2v", "--vram", "24GB", "--precision", "fp5"], "--precision fp5 is unknown"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], words: str, run: Callable[..., tuple[int, str, str]]
) -> None:  # fmt: skip
    if "--vram" not in arguments and torch.cuda.is_available():
        pytest.skip("a card is here")
    code, _, err = run(*arguments)
    assert code in (1, 2) and words in " ".join(err.split())


# --- rates --------------------------------------------------------------------------------------------------------


def test_rates_are_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    device, mode = torch.device("cpu"), ask("t2v", "int8").mode
    made = Rated(Rates(800e12, 1200e12, 55e9, 2e9), 1.1e7)
    calls: list[str] = []
    monkeypatch.setattr(rates, "measured_apart", lambda *_, **more: None)
    monkeypatch.setattr(rates, "measure", lambda *_: calls.append("measured") or made)
    assert rates.known_rates(device, mode, "int8") is None
    assert rates.measured_rates(device, mode, "int8") == rates.measured_rates(device, mode, "int8") == made
    assert calls == ["measured"] and rates.known_rates(device, mode, "int8-fp8") is None
    file = rates.rates_file(device, mode, "int8")
    for damaged in ("", "{}", '{"attention": 0, "linears": 1, "bus": 1, "disk": 1, "decode": 1}'):
        file.write_text(damaged)
        assert rates.known_rates(device, mode, "int8") is None


def test_rates_of_another_process_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Rated(Rates(800e12, 1200e12, 55e9, 2e9), 1.1e7)
    asked: list[object] = []

    def apart(what: str, device: torch.device, **arguments: object) -> dict[str, float]:
        asked.append((what, json.loads(json.dumps(arguments))))
        return {**vars(made.blocks), "decode": made.decode}

    monkeypatch.setattr(rates, "measured_apart", apart)
    monkeypatch.setattr(rates, "measure", lambda *_: pytest.fail("measured here too"))
    mode = ask("t2v", "int8").mode
    assert mode.recipe is not None
    assert rates.measured_rates(torch.device("cpu"), mode, "int8") == made
    assert asked == [("rates", {"recipe": mode.recipe.as_dict(), "attention": "int8"})]
    assert Recipe.from_dict(mode.recipe.as_dict(), "it") == mode.recipe


def test_rates_make_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an H200 with int8 attention and fp8 linears, where a step took 23.6 s and decoding 10.8 s."""
    asked = ask("t2v", "fp8", num_inference_steps=2)
    assert asked.plan(48 * GB).seconds is None
    timed = replace(asked, rated=Rated(Rates(835e12, 1120e12, 55e9, 2e9), 11.5e6)).plan(48 * GB)
    assert timed.step_seconds == pytest.approx(23.6, rel=0.1)
    assert timed.stage("denoise").seconds == pytest.approx(2 * (timed.step_seconds or 0) + FIRST_STEP)
    assert timed.stage("decode and write").seconds == pytest.approx(10.8, rel=0.2)
    assert timed.seconds == pytest.approx(sum(s.seconds or 0 for s in timed.stages))
