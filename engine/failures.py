"""What failed, in one sentence that says where the work is and what to do; and what is kept of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..kernels.cards import ran_out
from ..offload.reader import ReadError
from .errors import CheckpointError, SolostepError
from .request import Job, describe_device


@contextlib.contextmanager
def readable_errors(device: torch.device, job: Job | None = None) -> Iterator[None]:
    """An allocation that failed becomes one sentence that says where the work is and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        kept = what_is_kept(job)
        raise SolostepError(
            f"{describe_device(device)} ran out of memory; close other programs, give --vram more if it was given, or "
            f"make a smaller or shorter clip (--height, --width, --frames){kept}."
        ) from error
    except ReadError as error:
        raise CheckpointError(f"{error}; if nothing else writes it, download it again{what_is_kept(job)}.") from None


def what_is_kept(job: Job | None) -> str:
    """The end of a message about a run that failed between two steps."""
    if job is None or not job.saved.step:
        return ""
    step = f"step {job.saved.step} of {job.saved.steps}"
    return f"; {step} is kept in {job.path}, and the same command goes on from it"


@contextlib.contextmanager
def steps_are_kept(job: Job) -> Iterator[None]:
    """A run for whose next step nothing smaller is possible says which steps it leaves."""
    try:
        yield
    except SolostepError as error:
        if not job.saved.step:
            raise
        raise type(error)(f"{str(error).removesuffix('.')}{what_is_kept(job)}.") from error


@contextlib.contextmanager
def latents_are_kept(job: Job) -> Iterator[None]:
    """A video that cannot be written loses nothing, and the error says so."""
    try:
        yield
    except SolostepError as error:
        if job.saved_at is None:
            raise
        raise type(error)(
            f"{str(error).removesuffix('.')}; the latents are kept in {job.saved_at} and "
            f"`solostep decode {job.saved_at}` goes on from there."
        ) from error


@contextlib.contextmanager
def nothing_left_of(job: Job | None) -> Iterator[None]:
    """A run that failed before its first step leaves no latents behind: noise is nothing to go on from."""
    try:
        yield
    except SolostepError:
        if job is not None and not job.saved.step:
            job.path.unlink(missing_ok=True)
        raise
