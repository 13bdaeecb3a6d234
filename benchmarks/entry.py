"""What modules share that are called as `python -m solostep.benchmarks.NAME`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from solostep.engine.errors import SolostepError


def exit_code(run: Callable[[], object]) -> int:
    """Runs it: 0, or an error's own code with its sentence on stderr. Errors that nobody raised on purpose go on."""
    try:
        run()
    except SolostepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
