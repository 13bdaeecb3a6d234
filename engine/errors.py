"""Errors that a user can act on. Each message is one sentence that names the file, tensor or option and what to do."""

from __future__ import annotations


class SolostepError(Exception):
    """Base of every error raised on purpose. The command line ends with exit code 1."""

    exit_code = 1


class UsageError(SolostepError, ValueError):
    """A wrong option, prompt, image or path: nothing was started. Exit code 2."""

    exit_code = 2


class CheckpointError(SolostepError):
    """A model folder is missing a file, or a file or tensor in it is not what it has to be."""


class OutputError(SolostepError):
    """A result could not be written. What was computed before it is kept, and the message says where."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to quote it in one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
