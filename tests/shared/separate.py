"""Code in processes of their own that start at once: Triton reads its environment when it is imported, and compiling
for other cards replaces its driver. Importing torch takes three seconds, so one process does it and then forks.

What the code changes, environment included, ends with its process. The server starts no threads before it forks.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1] / "kernels"


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends when its input does: with the process of the tests."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    atexit.register(server.communicate)
    return server


def run_separately(code: str, folder: Path, *args: str, **env: str) -> str:
    """What the code prints, in ``folder``, with ``sys.argv[1:]`` and further environment; fails where it raises."""
    env = {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONWARNINGS": "ignore"} | env
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps({"code": code, "folder": str(folder), "args": args, "env": env}) + "\n")
    server.stdin.flush()
    status = server.stdout.readline().strip()
    told = (folder / "stderr").read_text(errors="replace") if status else "the process that forks is gone"
    assert status == "0", f"status {status}: {told[-3000:]}"
    return (folder / "stdout").read_text()


def _run(job: dict[str, Any]) -> None:
    """In the forked process, which ends here: without what Python and Triton do at their end."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(job["folder"]) / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(job["env"])
        os.chdir(job["folder"])
        sys.argv[1:] = job["args"]
        sys.path.insert(0, str(KERNELS))
        exec(compile(job["code"], "<separate>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import gc
    import warnings

    import torch  # noqa: F401

    warnings.simplefilter("ignore")
    gc.collect()
    gc.freeze()  # half a second for each collection that would go through all of it
    while line := sys.stdin.readline():
        job = json.loads(line)
        child = os.fork()
        if not child:
            _run(job)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
