"""Where the rows of a table come from: what differs between the environments of their results, and in which rows.

Cards, sizes and models never stand in one table; drivers, versions and commits may, and then it is said. Nothing is
measured here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STEADY = ("driver", "cuda", "torch", "triton", "commit")
"""What one table's rows may differ in, beside the power limit."""
MANY = 3
"""Rows that are named one by one, even where most are alike."""


def facts(environment: Mapping[str, Any]) -> dict[str, str]:
    """Of one environment, by name, what times and numbers may depend on; nothing of what is not known."""
    found = {name: str(environment[name]) for name in STEADY if environment.get(name)}
    power = (environment.get("clocks") or {}).get("power_limit_w")
    return found | ({"power limit": f"{power:g} W"} if isinstance(power, (int, float)) and power else {})


def mixed(rows: Sequence[tuple[str, Iterable[Mapping[str, Any]]]]) -> str | None:
    """A sentence on rows, each with the environments of its results, that were not all measured alike; None: they were.

    A row of several results stands with each of them.
    """
    told = [(name, [facts(environment) for environment in environments]) for name, environments in rows]
    known = [name for name in (*STEADY, "power limit") if len({f.get(name) for _, all_ in told for f in all_}) > 1]
    if not known:
        return None
    found: dict[str, list[str]] = {}
    for name, environments in told:
        for each in environments:
            where = ", ".join(f"{key} {each.get(key, 'unknown')}" for key in known)
            if name not in found.setdefault(where, []):
                found[where].append(name)
    most = next((where for where, names in found.items() if len(names) > max(MANY, len(told) / 2)), None)
    several = [name for name, _ in told if sum(name in names for names in found.values()) > 1]

    def shown(where: str) -> str:
        if where == most:
            return "all others"
        return "; ".join(name + " (in part)" * (name in several) for name in found[where])

    ordered = sorted(found, key=lambda where: where == most)  # "all others" last
    return "These rows were not all measured alike, and differences between them may come from that. " + " ".join(
        f"With {where}: {shown(where)}." for where in ordered
    )
