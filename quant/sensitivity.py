"""Which format each linear gets under an error budget: arithmetic on measured errors, without a tensor.

Errors. A linear i in format f moves its block's output by e(i, f), relative to the residual stream. Roundings of
different linears are independent, so their squares add up to that of a mix, sum e^2 (sqrt(sum e^2) is its raw error).
What this is in the network's output, measurements of whole mixes tell.

Cost. Time and memory of the quantized linears, both as parts of what they take in bf16: time + 0.25 x bytes. Time is
the number of multiplications, times 0.5 for 8-bit products, 1.02 for 8-bit weights expanded to bf16, 1.05 for 4-bit
ones. Weights alone thus save memory where 8-bit products would cost too much accuracy, and never win over them.

Choice. Each linear's formats on the lower convex hull of (cost, squared error) give steps from bf16 to ever cheaper
ones; the steps of all linears, in the order of added squared error by saved cost, are the greedy solution of this
multiple-choice knapsack (Sinha and Zoltners 1979). It is optimal wherever it stops between two steps, and at most one
step short of optimal elsewhere. A mix is a number of steps, so a larger budget never gives a costlier one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .formats import FORMATS, UNQUANTIZED, stored
from .recipe import BLOCKS, Rules

CANDIDATES = ("int8", "int8-plain", "fp8", "int8-weight")
"""What a budget is spent on, beside bf16. 4-bit weights only where they are asked for: they save memory, not time."""

TIME = {"int8": 0.5, "int8-plain": 0.5, "fp8": 0.5, "int8-weight": 1.02, "fp8-weight": 1.02}
TIME_4_BIT = 1.05
MEMORY = 0.25
"""What all bytes count against all time."""


@dataclass(frozen=True)
class Errors:
    """What one linear in one format does; root mean squares over the samples.

    Attributes:
        output: of the linear's own output, relative to its fp32 product.
        update: of the block's output with only this linear quantized, relative to what the block adds.
        stream: the same, relative to the residual stream behind the block.
    """

    output: float
    update: float
    stream: float


@dataclass(frozen=True)
class Linear:
    """One linear and its measured errors, by format. ``tokens`` is the mean number of rows of its input.

    The errors under bf16 are those of rounding its output, in a network that is not quantized: a floor to read the
    others against.
    """

    path: str
    in_features: int
    out_features: int
    tokens: float
    errors: Mapping[str, Errors] = field(default_factory=dict)

    @property
    def block(self) -> int:
        return _split(self.path)[0]

    @property
    def kind(self) -> str:
        """Its name within its block, such as ``attn1.wqkv``."""
        return _split(self.path)[1]

    def bytes_in(self, name: str) -> int:
        """Bytes of its weight in a format, scales included."""
        if name in FORMATS:
            tensors = stored(name, self.in_features, self.out_features).values()
            return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)
        if name == UNQUANTIZED:
            return 2 * self.in_features * self.out_features
        # A format of another package, with its scales, about.
        return int(self.in_features * self.out_features * (4.5 if "4" in name.partition(":")[2] else 8) / 8)

    def saved(self, name: str) -> int:
        """Bytes saved against bf16."""
        return self.bytes_in(UNQUANTIZED) - self.bytes_in(name)


def _split(path: str) -> tuple[int, str]:
    match = re.search(r"\.(\d+)\.(.+)$", path)
    if match is None:
        raise ValueError(f"{path} is not the path of a linear inside a block.")
    return int(match[1]), match[2]


@dataclass(frozen=True)
class Table:
    """Measured errors of a network's linears, in the order of the network.

    ``floors`` is what bf16 does to the output of each block, relative to what the block adds.
    """

    network: str
    linears: tuple[Linear, ...]
    floors: Mapping[int, float] = field(default_factory=dict)

    @property
    def formats(self) -> list[str]:
        """Formats that every linear was measured in, in the order of the first one's."""
        names = [set(linear.errors) for linear in self.linears]
        return [n for n in (self.linears[0].errors if names else ()) if all(n in known for known in names)]

    def merged(self, other: Table) -> Table:
        """With the formats of another table of the same linears beside its own."""
        if [x.path for x in self.linears] != [x.path for x in other.linears]:
            raise ValueError("Two tables of different linears cannot be put together.")
        both = zip(self.linears, other.linears, strict=True)
        linears = tuple(replace(a, errors={**a.errors, **b.errors}) for a, b in both)
        return replace(self, linears=linears, floors={**other.floors, **self.floors})

    def ranked(self, name: str) -> list[Linear]:
        """Linears by their error in a format, the most sensitive first."""
        return sorted(self.linears, key=lambda x: (-x.errors[name].update, x.path))

    def by_kind(self, name: str) -> dict[str, Errors]:
        """Root mean squares over the blocks, by kind of linear, in the order of a block."""
        kinds: dict[str, list[Errors]] = {}
        for linear in self.linears:
            kinds.setdefault(linear.kind, []).append(linear.errors[name])
        return {kind: Errors(*(_rms([asdict(e)[f] for e in errors]) for f in ("output", "update", "stream")))
                for kind, errors in kinds.items()}  # fmt: skip

    def as_dict(self, digits: int | None = None) -> dict[str, Any]:
        """In JSON's types; numbers with ``digits`` significant digits, or as they are."""
        short = (lambda x: x) if digits is None else (lambda x: float(f"{x:.{digits}g}"))
        return {
            "network": self.network,
            "floors": {str(i): short(x) for i, x in self.floors.items()},
            "linears": [
                {
                    "path": x.path, "in_features": x.in_features, "out_features": x.out_features,
                    "tokens": short(x.tokens),
                    "errors": {n: {k: short(v) for k, v in asdict(e).items()} for n, e in x.errors.items()},
                }
                for x in self.linears
            ],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Table:
        """Raises KeyError, TypeError or ValueError for what is no table."""
        linears = tuple(
            Linear(**{**x, "errors": {n: Errors(**e) for n, e in x["errors"].items()}}) for x in values["linears"]
        )
        return cls(str(values["network"]), linears, {int(i): float(x) for i, x in values["floors"].items()})


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in values) / len(values))


# --- cost ---------------------------------------------------------------------------------------------------------


def time_factor(name: str) -> float:
    """Time of a product against bf16's."""
    return 1.0 if name == UNQUANTIZED else TIME.get(name, TIME_4_BIT)


def cost(linears: Sequence[Linear], mix: Mapping[str, str]) -> dict[str, float]:
    """Time, bytes and cost of a mix (path -> format; what it lacks is bf16), each 1, 1 and 1.25 for bf16 alone."""
    time = sum(_products(x) * time_factor(mix.get(x.path, UNQUANTIZED)) for x in linears)
    size = sum(x.bytes_in(mix.get(x.path, UNQUANTIZED)) for x in linears)
    time /= sum(_products(x) for x in linears)
    part = size / sum(x.bytes_in(UNQUANTIZED) for x in linears)
    return {"time": time, "bytes": part, "cost": time + MEMORY * part}


def _products(linear: Linear) -> float:
    return linear.tokens * linear.in_features * linear.out_features


# --- choice -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One linear goes to a cheaper format; ``error`` is the squared error that this adds."""

    path: str
    format: str
    saving: float
    error: float


Point = tuple[float, float, str]
"""Cost, squared error, format."""


def _hull(points: Sequence[Point]) -> list[Point]:
    """Lower convex hull from the first point (bf16, without error) to the cheapest one that is on it."""
    hull = [points[0]]
    for point in sorted(points[1:], key=lambda p: (-p[0], p[1], p[2])):
        if point[0] >= points[0][0]:
            continue  # no cheaper than bf16
        while len(hull) > 1 and (point[1] <= hull[-1][1] or _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point)):
            hull.pop()
        if point[0] < hull[-1][0]:
            hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    """Squared error that a unit of saved cost adds."""
    return (b[1] - a[1]) / (a[0] - b[0])


class Frontier:
    """All mixes worth choosing, from bf16 alone (position 0) to the cheapest (position ``len``)."""

    def __init__(self, table: Table, formats: Iterable[str] = CANDIDATES) -> None:
        """Raises ValueError for a format that was not measured."""
        self.linears = table.linears
        names = [n for n in formats if n != UNQUANTIZED]
        for name in names:
            if name not in table.formats:
                raise ValueError(f"The format {name!r} was not measured; measured are {', '.join(table.formats)}.")
        time = sum(_products(x) for x in self.linears)
        size = sum(x.bytes_in(UNQUANTIZED) for x in self.linears)

        def price(x: Linear, name: str) -> float:
            return _products(x) / time * time_factor(name) + MEMORY * x.bytes_in(name) / size

        ordered: list[tuple[float, str, int, Step]] = []
        for x in self.linears:
            errors = {name: x.errors[name].stream ** 2 for name in names}
            points = [(price(x, name), e, name) for name, e in errors.items() if math.isfinite(e)]
            hull = _hull([(price(x, UNQUANTIZED), 0.0, UNQUANTIZED), *points])
            for i, (a, b) in enumerate(itertools.pairwise(hull)):
                ordered.append((_slope(a, b), x.path, i, Step(x.path, b[2], a[0] - b[0], b[1] - a[1])))
        self.steps = [step for *_, step in sorted(ordered, key=lambda entry: entry[:3])]

    def __len__(self) -> int:
        return len(self.steps)

    def mix(self, position: int) -> dict[str, str]:
        """Format of every quantized linear after ``position`` steps."""
        return {step.path: step.format for step in self.steps[:position]}

    def error(self, position: int) -> float:
        """The raw error of its mix."""
        return math.sqrt(max(0.0, sum(step.error for step in self.steps[:position])))

    def furthest(self, limit: float) -> int:
        """The last position before the first step that brings the raw error above a limit."""
        total = 0.0
        for position, step in enumerate(self.steps):
            total += step.error
            if total > limit**2:
                return position
        return len(self.steps)


def settled(table: Table, mix: Mapping[str, str], part: float = 0.02) -> dict[str, str]:
    """A mix with what is usual for a kind of linear where a linear of its own format costs as much and gains little.

    All changes together add at most ``part`` of the squared error. Formats of one cost differ by less than what was
    measured can tell, and a recipe of few rules says more.
    """
    made = dict(mix)
    left = part * raw_error(table, mix) ** 2
    for kind in dict.fromkeys(x.kind for x in table.linears):
        own = [x for x in table.linears if x.kind == kind]
        usual = _majority([mix.get(x.path, UNQUANTIZED) for x in own])
        added = []
        for x in own:
            name = mix.get(x.path, UNQUANTIZED)
            same = name != usual and UNQUANTIZED not in (name, usual) and time_factor(name) == time_factor(usual)
            if same and x.bytes_in(name) == x.bytes_in(usual):
                added.append((x.errors[usual].stream ** 2 - x.errors[name].stream ** 2, x.path))
        for error, path in sorted(added):
            if error > left:
                break
            left -= max(error, 0.0)
            made[path] = usual
    return made


def raw_error(table: Table, mix: Mapping[str, str]) -> float:
    """sqrt(sum e^2) of any mix; infinite if a linear was not measured in its format."""
    unknown = Errors(math.inf, math.inf, math.inf)
    chosen = [(x, mix.get(x.path, UNQUANTIZED)) for x in table.linears]
    return math.sqrt(sum(x.errors.get(n, unknown).stream ** 2 for x, n in chosen if n != UNQUANTIZED))


@dataclass(frozen=True)
class Found:
    """What a search ended with: a position, its measured error, and the least that was measured of any but bf16."""

    position: int
    error: float
    reachable: float


def search(frontier: Frontier, budget: float, measure: Callable[[int], float], attempts: int = 10) -> Found:
    """A position far along the frontier whose measured error is within the budget, above 0.95 of it if one is found.

    Squares of errors are taken to lie on a line over the sum of e^2: what every mix adds by rounding otherwise than
    bf16 alone, and a gain times what was measured of single linears. Positions known to be within the budget and beyond
    it close in on the answer; position 0 is bf16 itself, with an error of zero. After ``attempts`` measurements the
    best so far is taken, unless that is bf16.

    Args:
        measure: a position -> the error of its mix in the whole network. The last position is asked first.
    """
    if not len(frontier):
        return Found(0, 0.0, math.inf)
    good, bad = 0, len(frontier)
    known = {0: 0.0, bad: measure(bad)}
    if known[bad] <= budget:
        return Found(bad, known[bad], known[bad])
    older = 0  # beside which the line is drawn while nothing but bf16 is within the budget
    while bad - good > 1 and (attempts > 1 or good == 0) and known[good] <= 0.95 * budget:
        position = _crossing(frontier, budget, known, good or older, bad)
        margin = (bad - good) // 8 if good else 0  # so that the rest shrinks, however the line lies
        position = min(max(position, good + 1 + margin), bad - 1 - margin) if position else (good + bad) // 2
        known[position] = measure(position)
        attempts -= 1
        if known[position] <= budget:
            good = position
        else:
            older, bad = bad, position
    return Found(good, known[good], min(error for position, error in known.items() if position))


def _crossing(frontier: Frontier, budget: float, known: Mapping[int, float], a: int, b: int) -> int:
    """Where the line through two measured positions meets the budget; 0 if it does not."""
    (x, y), (x2, y2) = ((frontier.error(p) ** 2, known[p] ** 2) for p in (a, b))
    if x == x2 or (y2 - y) / (x2 - x) <= 0:
        return 0
    slope = (y2 - y) / (x2 - x)
    target = x + (budget**2 - y) / slope
    return frontier.furthest(math.sqrt(target)) if target > 0 else 0


# --- as rules -----------------------------------------------------------------------------------------------------


def compress(mix: Mapping[str, str], paths: Sequence[str], network: str) -> Rules:
    """Rules that give every one of ``paths`` its format of ``mix`` (bf16 where it has none), few of them.

    What most linears have comes last, as one rule for all; before it what most of a kind have, where that differs;
    before that single blocks or linears.
    """
    wanted = {path: mix.get(path, UNQUANTIZED) for path in paths}
    if all(name == UNQUANTIZED for name in wanted.values()):
        return ()
    blocks = BLOCKS[network]
    usual = {kind: _majority([wanted[p] for p in paths if _split(p)[1] == kind])
             for kind in dict.fromkeys(_split(p)[1] for p in paths)}  # fmt: skip
    base = _majority(list(usual.values()))
    singles: list[tuple[str, str]] = []
    for block in dict.fromkeys(_split(p)[0] for p in paths):
        mine = [p for p in paths if _split(p)[0] == block]
        odd = [p for p in mine if wanted[p] != usual[_split(p)[1]]]
        name = _majority([wanted[p] for p in mine])
        rest = [p for p in mine if wanted[p] != name]
        if len(rest) + 1 < len(odd):  # one rule for the block and its own exceptions are fewer
            singles += [(p, wanted[p]) for p in rest] + [(blocks.replace("*", f"{block}.*"), name)]
        else:
            singles += [(p, wanted[p]) for p in odd]
    kinds = [(f"{blocks}.{kind}", name) for kind, name in usual.items() if name != base]
    last = [(blocks, base)] if base != UNQUANTIZED else []
    return (*singles, *kinds, *last)


def _majority(names: Sequence[str]) -> str:
    counts = Counter(names)
    return max(counts, key=lambda name: (counts[name], -names.index(name)))
