"""solostep: Step-Video text-to-video on one GPU.

The public API is loaded at first use (PEP 562): `import solostep` imports nothing but this file, and torch comes with
the first name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.config import GenerationSettings
    from .engine.errors import CheckpointError, OutputError, SolostepError, UsageError
    from .engine.pipeline import StepVideoPipeline, Video

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "GenerationSettings",
    "OutputError",
    "SolostepError",
    "StepVideoPipeline",
    "UsageError",
    "Video",
    "__version__",
]

_HOMES = {
    "CheckpointError": ".engine.errors",
    "GenerationSettings": ".engine.config",
    "OutputError": ".engine.errors",
    "SolostepError": ".engine.errors",
    "StepVideoPipeline": ".engine.pipeline",
    "UsageError": ".engine.errors",
    "Video": ".engine.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name where it lives, once: it then stays in this module's namespace."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
