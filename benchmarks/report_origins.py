"""Where the rows of a table come from: what differs between the environments of their results, and in which rows.

Cards, sizes and models never stand in one table; drivers, versions and commits may, and then it is said. Nothing is
measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solostep.benchmarks.results import Result

STEADY = ("driver", "cuda", "torch", "triton", "commit")
"""What one table's rows may differ in, beside the power limit."""
MANY = 3
"""Rows that are named one by one, even where most are alike."""
PARTS = ("speed", "drift", "score")
"""What a row may take from each of its results; memory is shown of those alone that have a speed."""


def facts(environment: Mapping[str, Any]) -> dict[str, str]:
    """Of one environment, by name, what times and numbers may depend on; nothing of what is not known."""
    found = {name: str(environment[name]) for name in STEADY if environment.get(name)}
    power = (environment.get("clocks") or {}).get("power_limit_w")
    return found | ({"power limit": f"{power:g} W"} if isinstance(power, (int, float)) and power else {})


def mixed(rows: Sequence[tuple[str, Sequence[Result]]]) -> str | None:
    """A sentence on rows, each with its results, that were not all measured alike; None: they were.

    A row of several results stands with each of them, and which of its numbers came so is said where it can be told.
    """
    told = [(name, [(facts(result.environment), parts_of(result)) for result in results]) for name, results in rows]
    known = [n for n in (*STEADY, "power limit") if len({f.get(n) for _, own in told for f, _ in own}) > 1]
    if not known:
        return None
    found: dict[str, dict[str, set[str]]] = {}  # which parts of which rows, by where they were measured
    for name, own in told:
        for each, parts in own:
            where = ", ".join(f"{key} {each.get(key, 'unknown')}" for key in known)
            found.setdefault(where, {}).setdefault(name, set()).update(parts)
    most = next((where for where, names in found.items() if len(names) > max(MANY, len(told) / 2)), None)

    def shown(where: str) -> str:
        return "everything else" if where == most else "; ".join(n + _in_part(n, where, found) for n in found[where])

    ordered = sorted(found, key=lambda where: where == most)  # "everything else" last
    return "These rows were not all measured alike, and differences between them may come from that. " + " ".join(
        f"With {where}: {shown(where)}." for where in ordered
    )


def parts_of(result: Result) -> set[str]:
    """What a result has of :data:`PARTS`."""
    return {part for part in PARTS if getattr(result, part)}


def _in_part(name: str, where: str, found: Mapping[str, Mapping[str, set[str]]]) -> str:
    """Which numbers of a row were measured there, in brackets; nothing where all were."""
    places = [parts[name] for parts in found.values() if name in parts]
    if len(places) < 2:
        return ""
    if not all(places) or sum(map(len, places)) > len(set().union(*places)):  # one part from two places: which, is open
        return " (in part)"
    return f" ({', '.join(part for part in PARTS if part in found[where][name])})"
