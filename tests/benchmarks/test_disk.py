"""The disk that references still take: what lies there counts where this code uses it, or goes on with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from solostep.benchmarks import disk
from solostep.benchmarks import reference as reference_module
from solostep.benchmarks.disk import bytes_to_come
from solostep.benchmarks.matrix import Matrix, Options, build
from solostep.benchmarks.reference import References
from solostep.engine.latents import SavedLatents, save_latents
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.request import Request
from solostep.engine.sampling import initial_noise

pytestmark = pytest.mark.usefixtures("fast")
STEPS = 2


@pytest.fixture(scope="module")
def matrix(fast: None) -> Matrix:
    roles = "reference", "mode"
    return build(Options(device="cpu", precision=("int8",), n=2, steps=(STEPS,), frames=(17,), roles=roles))


@pytest.fixture(scope="module")
def pipe(matrix: Matrix) -> StepVideoPipeline:
    return StepVideoPipeline(matrix.folder, "bf16", attention="official", cache=False, device="cpu")


def requests(matrix: Matrix, pipe: StepVideoPipeline) -> list[Request]:
    cell = matrix.planned[0].cell
    names = "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "time_shift"
    return [pipe.request(p, seed=seed, **{n: getattr(cell, n) for n in names}) for p, seed in cell.pairs]


def record(pipe: StepVideoPipeline, work: Path, request: Request, steps: int = STEPS) -> None:
    """As a cell does, but without networks; fewer ``steps`` than all are an interrupted run."""
    s, noise = request.settings, initial_noise(request.settings, pipe.model.transformer_config.in_channels, 1)[0]
    with References(work, pipe).making(request) as recorder:
        assert recorder is not None
        for step in range(steps + 1):
            recorder.step(step, noise)
        assert request.seed is not None
        saved = SavedLatents(noise, steps, STEPS, request.seed, True, pipe._identity(request), {"texts": request.texts})
        save_latents(recorder.run, saved)
        if steps < STEPS:
            raise KeyboardInterrupt
        recorder.write(torch.zeros(s.num_frames, s.height, s.width, 3, dtype=torch.uint8).numpy())


def test_references_count_once_and_only_ours(
    matrix: Matrix, pipe: StepVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = requests(matrix, pipe)
    every = matrix.reference_bytes
    assert (
        bytes_to_come(matrix, matrix.planned, tmp_path) == every == bytes_to_come(matrix, matrix.planned[1:], tmp_path)
    )
    assert bytes_to_come(matrix, (), tmp_path) == 0

    with monkeypatch.context() as patch:  # by another version of the code, both
        for module in (reference_module, disk):
            patch.setattr(module, "official_code", lambda: "of before")
        record(pipe, tmp_path, first)
        with pytest.raises(KeyboardInterrupt):
            record(pipe, tmp_path, second, 1)
        assert bytes_to_come(matrix, matrix.planned, tmp_path) < every / 2 + 1e5
    assert bytes_to_come(matrix, matrix.planned, tmp_path) == every

    record(pipe, tmp_path, pipe.request("another prompt", seed=1, num_frames=17, num_inference_steps=STEPS))
    assert bytes_to_come(matrix, matrix.planned, tmp_path) == every

    record(pipe, tmp_path, first)
    assert bytes_to_come(matrix, matrix.planned, tmp_path) == every / 2
    with pytest.raises(KeyboardInterrupt):
        record(pipe, tmp_path, second, 1)
    left = bytes_to_come(matrix, matrix.planned, tmp_path)
    latents = next((tmp_path / "references").glob(".*.part/latents/00001*")).stat().st_size
    assert left == every / 2 - 2 * latents > 0
