"""The house rules that a machine can hold: import directions, packaging, a light import, the README's commands."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest itself depends on it below 3.11

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = ("engine", "kernels", "quant", "offload", "benchmarks")
NO_INIT = ("kernels", "quant", "offload", "benchmarks", "tests")
MAY_IMPORT = {
    "": {"engine"},  # the root's own files: the public API
    "benchmarks": {"benchmarks", "engine", "quant", "offload", "kernels"},
    "engine": {"engine", "quant", "offload", "kernels"},
    "quant": {"quant", "kernels"},
    "offload": {"offload"},
    "kernels": {"kernels"},
}
MAY_IMPORT_OUTSIDE = {"offload": {"torch"}, "kernels": {"torch", "triton"}}  # beside the standard library
TRANSFORMERS_USERS = {"engine/models/clip.py", "engine/text.py"}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill"}


# ---------------------------------------------------------------- files


def _walk(root: Path) -> Iterator[Path]:
    """Every file of the project: no environments, builds, caches, or hidden folders but CI's."""
    for folder, names, files in os.walk(root):
        here = Path(folder)
        names[:] = [
            name
            for name in names
            if (not name.startswith(".") or name in (".ci", ".github"))
            and name not in ("__pycache__", "build", "dist", "node_modules")
            and not name.endswith(".egg-info")
            and not (here / name / "pyvenv.cfg").exists()
        ]
        for name in files:
            yield here / name


def _python_files(root: Path) -> list[Path]:
    return sorted(path for path in _walk(root) if path.suffix == ".py")


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


# ---------------------------------------------------------------- imports


def _imports(tree: ast.Module, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import at any depth; a relative one is made absolute within `package`.

    `from a import b` gives `a.b`: whether b is a module or a name in one, the first parts are what the rules look at.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1] or ["<above the package>"]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str) and not name.startswith("."):
                yield node.lineno, name


def _inside_engine(importer: str, target: str) -> str | None:
    """The order inside engine; both are the file's or folder's name right under engine/."""
    if importer in ("config", "errors") and target not in ("", "errors"):
        return f"engine/{importer}.py imports nothing of engine but errors"
    if target == "interfaces" and importer != "interfaces":
        return "only interfaces import interfaces"
    if target == "pipeline" and importer not in ("pipeline", "interfaces", "demo"):
        return "the pipeline imports its parts, not the other way round"
    return None


def _why_not(file: str, imported: str) -> str | None:
    """The rule that `file` (posix path below the root) breaks by importing `imported`, if any."""
    parts = file.removesuffix(".py").split("/")
    folder = parts[0] if len(parts) > 1 else ""
    top, *below = imported.split(".")
    if top in PICKLES:
        return "nothing imports pickle"
    if top == "transformers" and file not in TRANSFORMERS_USERS:
        return "only the text encoders import transformers"
    if top in FOLDERS:
        return "our own folders are imported as solostep.*: the bare name is another package, or none"
    if top == "solostep":
        target = below[0] if below else ""
        if target == "__version__" and folder in ("engine", "quant", "benchmarks"):
            return None
        if target not in FOLDERS and target != "tests":
            # A name of the public API: it comes from the engine, and from its pipeline's side.
            target, below = "engine", ["engine", "pipeline"]
        if target not in MAY_IMPORT[folder]:
            return f"{folder or 'the root'} imports only {', '.join(sorted(MAY_IMPORT[folder]))} of solostep"
        if folder == target == "engine":
            return _inside_engine(parts[1], below[1] if len(below) > 1 else "")
        return None
    allowed = MAY_IMPORT_OUTSIDE.get(folder)
    if allowed is not None and top not in allowed and top not in sys.stdlib_module_names:
        return f"{folder} imports only {', '.join(sorted(allowed))} and the standard library"
    return None


def import_violations(root: Path) -> list[str]:
    """`file:line: imports X: rule` for every import under `root` that the house does not allow."""
    files = [path for folder in FOLDERS for path in _python_files(root / folder)]
    found = []
    for path in [*sorted(root.glob("*.py")), *files]:
        file = path.relative_to(root).as_posix()
        package = ["solostep", *file.split("/")[:-1]]
        for line, imported in _imports(_parse(path), package):
            rule = _why_not(file, imported)
            if rule:
                found.append(f"{file}:{line}: imports {imported}: {rule}")
    return found


def test_the_environment_is_read_in_one_place():
    """Rule 2 of the house: what the environment sets stands in engine/config.py."""
    files = [path for folder in ("engine", "kernels", "quant", "offload") for path in _python_files(ROOT / folder)]
    read = [path for path in files if re.search(r"\b(environb?|getenv)\b", path.read_text(encoding="utf-8"))]
    assert [path.relative_to(ROOT).as_posix() for path in read] == ["engine/config.py"]


def test_import_directions():
    assert not import_violations(ROOT)


# One violation of each kind; each comes with the words by which its rule is known.
BAD = {
    "engine/config.py": ("from .scheduler import make_sigmas", "nothing of engine but errors"),
    "engine/errors.py": ("from .config import cache_dir", "nothing of engine but errors"),
    "engine/models/vae.py": ("from ..pipeline import StepVideoPipeline", "not the other way round"),
    "engine/scheduler.py": ("from solostep.engine import pipeline", "not the other way round"),
    "engine/checkpoint.py": ("from solostep import StepVideoPipeline", "not the other way round"),
    "engine/text.py": ("import solostep.engine.interfaces.cli", "only interfaces"),
    "engine/video.py": ("from . import interfaces", "only interfaces"),
    "engine/pipeline.py": ("def f():\n    from .interfaces.cli import main", "only interfaces"),
    "engine/models/transformer.py": ("from transformers import BertModel", "only the text encoders"),
    "engine/interfaces/cli.py": ("from solostep.benchmarks import drift", "engine imports only"),
    "engine/interfaces/server.py": ("import pickle", "nothing imports pickle"),
    "engine/demo/train.py": ("from kernels.attention import attention", "another package, or none"),
    "quant/fp8.py": ("from solostep.engine.config import EngineConfig", "quant imports only"),
    "quant/int8.py": ("from ..offload import planner", "quant imports only"),
    "quant/nf4.py": ("import importlib\nimportlib.import_module('solostep.engine.text')", "quant imports only"),
    "offload/planner.py": ("import numpy as np", "offload imports only torch"),
    "offload/streamer.py": ("from solostep.quant import fp8", "offload imports only offload"),
    "offload/stages.py": ("from solostep import __version__", "offload imports only offload"),
    "kernels/adaln.py": ("from safetensors import safe_open", "kernels imports only torch, triton"),
    "kernels/attention.py": ("from solostep.engine import config", "kernels imports only kernels"),
    "kernels/quantize.py": ("from ...elsewhere import x", "kernels imports only torch, triton"),
    "benchmarks/drift.py": ("from solostep.tests import helpers", "benchmarks imports only"),
    "setup.py": ("from solostep.quant import fp8", "the root imports only engine"),
}
GOOD = {
    "engine/config.py": "import os\nfrom .errors import UsageError\nfrom solostep.quant.recipe import Recipe",
    "engine/models/clip.py": "from transformers import BertModel\nfrom ..config import x\nfrom .vae import y",
    "engine/models/__init__.py": "from .vae import y",
    "engine/video.py": "from solostep import __version__\nimport numpy, imageio_ffmpeg",
    "engine/pipeline.py": "from . import scheduler\nfrom solostep.offload import streamer\nfrom ..kernels import adaln",
    "engine/interfaces/cli.py": "import typer\nfrom ..pipeline import Video\nfrom .server import serve",
    "quant/fp8.py": "import torch, numpy\nfrom solostep.kernels import scaled_mm\nfrom .recipe import Recipe",
    "offload/streamer.py": "import threading, torch\nfrom .pinned import Slab",
    "kernels/attention.py": "import math, torch, triton\nimport triton.language as tl\nfrom .quantize import quantize",
    "benchmarks/drift.py": "from solostep import StepVideoPipeline\nfrom solostep.quant import fp8\nimport numpy",
    "__init__.py": "from .engine.pipeline import Video",
}


def _grow(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_import_checker_finds_each_kind(tmp_path: Path):
    _grow(tmp_path, {name: text for name, (text, _) in BAD.items()})
    found = import_violations(tmp_path)
    for name, (_, words) in BAD.items():
        hits = [line for line in found if line.startswith(f"{name}:")]
        assert len(hits) == 1 and words in hits[0], (name, hits)
    assert len(found) == len(BAD)


def test_import_checker_lets_the_allowed_pass(tmp_path: Path):
    _grow(tmp_path, GOOD)
    assert import_violations(tmp_path) == []


# ---------------------------------------------------------------- torch.load


def unsafe_loads(root: Path) -> list[str]:
    """`file:line` of every `torch.load` that is not called with a literal `weights_only=True`."""
    found = []
    for path in _python_files(root):
        tree = _parse(path)
        torches, loads = {"torch"}, set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                torches |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
            elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
                loads |= {alias.asname or alias.name for alias in node.names if alias.name == "load"}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            is_load = called in loads or called in {f"{t}.{f}" for t in torches for f in ("load", "serialization.load")}
            safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
            if is_load and not safe:
                found.append(f"{path.relative_to(root).as_posix()}:{node.lineno}")
    return found


def test_no_unsafe_torch_load(tmp_path: Path):
    """A .pt file is a program unless it is loaded with weights_only=True."""
    assert not unsafe_loads(ROOT)
    _grow(
        tmp_path,
        {
            "a.py": "import torch\ntorch.load('x')",
            "b.py": "import torch as t\nt.load('x', weights_only=False)",
            "c.py": "from torch import load\nload('x')",
            "d.py": "import torch, json\ntorch.load('x', weights_only=True)\njson.load('x')",
        },
    )
    assert unsafe_loads(tmp_path) == ["a.py:2", "b.py:2", "c.py:2"]


# ---------------------------------------------------------------- folders and packaging


def test_init_files():
    """`kernels/__init__.py` would shadow the PyPI package of this name wherever the root is on sys.path."""
    folders = {path.parent.relative_to(ROOT) for path in _python_files(ROOT)}
    for folder in sorted(folders):
        has_init = (ROOT / folder / "__init__.py").exists()
        assert has_init == (folder.parts[:1] not in [(name,) for name in NO_INIT]), folder


def test_package_list():
    """setuptools leaves out an unlisted folder without a word, and fails on a listed one that is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent.relative_to(ROOT) for path in _python_files(ROOT)}
    packages = {".".join(("solostep", *folder.parts)) for folder in folders if folder.parts[:1] != ("tests",)}
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages)


def test_no_machine_paths():
    """A path of a developer's machine works on that machine only."""
    pattern = re.compile(rb"(?<!\w)/(?:work|root|home)/")
    names = [path for path in _walk(ROOT) if path.suffix != ".mp4"]
    assert [str(path.relative_to(ROOT)) for path in names if pattern.search(path.read_bytes())] == []


# ---------------------------------------------------------------- fresh interpreters


def _python(*arguments: str, cwd: Path, timeout: float = 120) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_is_light(tmp_path: Path):
    heavy = ("torch", "numpy", "transformers", "typer", "importlib.metadata")
    code = "import sys; before = set(sys.modules); import solostep; print(*sorted(set(sys.modules) - before))"
    assert not set(heavy) & set(_python("-c", code, cwd=tmp_path).split())


def test_import_is_fast(tmp_path: Path):
    """Under 0.2 s more than a bare interpreter; torch alone takes over a second."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        _python("-c", code, cwd=tmp_path)
        return time.perf_counter() - start

    # Bare and importing runs alternate, and a machine busy with something else gets another try.
    for _ in range(3):
        pairs = [(seconds("pass"), seconds("import solostep")) for _ in range(7)]
        bare, importing = (statistics.median(column) for column in zip(*pairs, strict=True))
        if importing - bare < 0.2:
            return
    pytest.fail(f"import solostep takes {importing - bare:.2f} s more than a bare interpreter ({bare:.2f} s)")


def test_public_names(tmp_path: Path):
    """Every name of __all__ is found where __init__.py says, dir() shows it, and another one raises AttributeError."""
    code = (
        "import solostep\n"
        "assert set(solostep.__all__) <= set(dir(solostep))\n"
        "assert set(solostep._HOMES) | {'__version__'} == set(solostep.__all__)\n"
        "print(all(getattr(solostep, name) is not None for name in solostep.__all__), hasattr(solostep, 'nothing'))"
    )
    assert _python("-c", code, cwd=tmp_path).split() == ["True", "False"]


@pytest.mark.skipif(not (ROOT / "engine/interfaces/cli.py").exists(), reason="engine/interfaces/cli.py: not there yet")
def test_runs_as_a_module(tmp_path: Path):
    assert "generate" in _python("-m", "solostep", "--help", cwd=tmp_path)


def test_the_command_line_is_there_before_torch_is(tmp_path: Path):
    """Help, wrong options and Ctrl-C do not wait for a second of imports."""
    code = "import sys, solostep.engine.interfaces.cli as cli; print({'torch', 'numpy'} & set(sys.modules), cli.main)"
    assert _python("-c", code, cwd=tmp_path).startswith("set() ")


def _found_kernels(tmp_path: Path, first: Path) -> str:
    """Which package `import kernels` takes with `first` at the start of sys.path and an installed one further down."""
    site = tmp_path / "site"
    _grow(site, {"kernels/__init__.py": ""})
    code = f"import sys; sys.path[:0] = [{str(first)!r}, {str(site)!r}]; import kernels; print(kernels.__file__)"
    found = Path(_python("-c", code, cwd=tmp_path).strip())
    return "installed" if found.is_relative_to(site) else "ours"


def test_our_kernels_folder_does_not_shadow_the_package(tmp_path: Path):
    """transformers and diffusers look for a PyPI package called `kernels`, and import names from it if they find it."""
    assert _found_kernels(tmp_path, ROOT) == "installed"
    ours = tmp_path / "ours"
    _grow(ours, {"kernels/attention.py": ""})
    assert _found_kernels(tmp_path, ours) == "installed"
    _grow(ours, {"kernels/__init__.py": ""})
    assert _found_kernels(tmp_path, ours) == "ours"  # so the lines above can fail


@pytest.mark.more
def test_transformers_imports_in_the_checkout():
    code = "import sys; sys.path.insert(0, ''); from transformers import BertConfig, BertModel; print('imported')"
    assert _python("-c", code, cwd=ROOT, timeout=300).split() == ["imported"]


# ---------------------------------------------------------------- the README's commands and CI


def _readme_command(name: str) -> str:
    block = re.compile(rf"^<!-- command: {name} -->\n+```\w*\n(.+)\n```$", re.MULTILINE)
    found = block.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) == 1, f"README.md needs one block of one line under <!-- command: {name} -->"
    return found[0]


def test_readme_has_the_commands():
    assert "solostep generate" in _readme_command("run")
    assert "pytest" in _readme_command("test")
    assert "torch==" in _readme_command("cpu-torch")


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_links_of_pages_lead_somewhere(page: str):
    """To files that are there, and to headings of pages, as GitHub names them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        if path.startswith("http"):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, link


def _run_ci(root: Path, readme: str) -> subprocess.CompletedProcess[str]:
    """.ci/run in a made-up checkout, with a python3 whose environments hold commands that only say their name."""
    _grow(
        root,
        {
            "README.md": readme,
            ".venv/stale": "",
            "bin/python3": "#!/bin/sh\nmkdir -p .venv/bin\n"
            "for name in pip ruff; do\n"
            "  printf '#!/bin/sh\\necho ran '$name' $*\\n' > .venv/bin/$name; chmod +x .venv/bin/$name\n"
            "done\n",
        },
    )
    (root / "bin/python3").chmod(0o755)
    (root / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", root / ".ci" / "run")
    environment = {**os.environ, "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(root / ".ci" / "run")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_ci_runs_the_readme_test_command(tmp_path: Path):
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR
    done = _run_ci(tmp_path, '# x\n\n<!-- command: test -->\n```sh\necho "from the README" && ls .venv\n```\n')
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "from the README" in lines and "ran ruff check ." in lines and "ran ruff format --check ." in lines
    assert "stale" not in lines  # the environment was made anew


def test_ci_fails_with_the_command(tmp_path: Path):
    done = _run_ci(tmp_path, "<!-- command: test -->\n```sh\nexit 3\n```\n")
    assert done.returncode == 3


@pytest.mark.parametrize(
    "readme",
    [
        "# no marker\n```sh\necho hello\n```\n",
        "<!-- command: test -->\nwords\n```sh\necho hello\n```\n",
        "<!-- command: test -->\n```sh\n```\n",
        "<!-- command: test -->\n```sh\necho a\necho b\n```\n",
        "<!-- command: test -->\n```sh\necho never closed\n",
    ],
)
def test_ci_fails_without_the_command(tmp_path: Path, readme: str):
    done = _run_ci(tmp_path, readme)
    assert done.returncode != 0 and "command: test" in done.stderr
    assert (tmp_path / ".venv" / "stale").exists()  # nothing was begun
