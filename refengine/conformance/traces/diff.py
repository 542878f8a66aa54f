"""Finding the first wrong layer of a trace, the step within it, and the known mistake that explains it.

Each layer is recomputed in float64 from the trace's own input (recompute.py), and once more as the trace's
dtype rounds. The distance of these two is one *rounding* of that step: an error of at most LIMIT roundings
is right. A layer with a larger one is recomputed with each mistake of mistakes.py; those that reproduce the
trace, to within LIMIT roundings too, are its causes.

A router may choose either of two experts whose scores differ by no more than rounding: such a position is
counted as a near-tie and is no error, if the layer with the other choice is what the trace holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from refengine.conformance.mistakes import MISTAKES, Mistake
from refengine.conformance.traces import Trace, real_positions
from refengine.conformance.traces.recompute import Found, Recomputation, Unit, dense, margin, roundoff
from refengine.spec.config import Config, InputError
from refengine.spec.moe import Routing

LIMIT = 8.0  # roundings
CLOSE = 4.0  # roundings of the scores within which a choice of experts is a near-tie
CAUSES = 3  # named at most
MOST_EXPERTS = 1 << 16
SEARCHES = 4  # layers that are recomputed with all mistakes; the others only with those found by then


@dataclass(frozen=True)
class Step:
    """Holds the error of one value of a layer, in the value's own units and in roundings."""

    name: str
    error: float
    rounding: float
    at: tuple[int, ...] = ()  # where the error is largest: sequence, position
    of: str = ""  # the array that should hold the same, of a border between layers
    not_finite: tuple[str, ...] = ()  # the traces that hold a number that is not finite here

    @property
    def roundings(self) -> float:
        """Return the error in roundings."""
        return self.error / self.rounding if self.error else 0.0

    @property
    def wrong(self) -> bool:
        """Return whether the error is more than rounding."""
        return not self.roundings <= LIMIT


@dataclass
class Finding:
    """Holds what was found of one layer: its steps, near-ties of its router, and causes of its error."""

    unit: Unit
    steps: list[Step]
    ties: int = 0
    causes: list[Mistake] = field(default_factory=list)
    searched: bool = False

    @property
    def wrong(self) -> bool:
        """Return whether a step is beyond rounding."""
        return any(step.wrong for step in self.steps)

    @property
    def worst(self) -> float:
        """Return the largest error, in roundings."""
        return max((step.roundings for step in self.steps), default=0.0)

    @property
    def first(self) -> Step | None:
        """Return the first step beyond rounding."""
        return next((step for step in self.steps if step.wrong), None)


def diagnose(trace: Trace, cfg: Config, read: Callable, mistakes=MISTAKES) -> Iterator[Finding]:
    """Return a Finding for each unit of the model, in order; InputError where the trace does not fit it."""
    return diagnosed(Recomputation(trace, cfg, read), mistakes)


def diagnosed(of: Recomputation, mistakes=MISTAKES) -> Iterator[Finding]:
    """Return a Finding for each unit of a recomputation, in order."""
    known: list[Mistake] = []
    searches = 0
    for unit in of.units():
        yield from broken(of, unit)
        try:
            finding, near = judged(of, unit)
        except InputError:
            yield from before_the_unreadable(of, unit, mistakes)
            raise
        if finding.wrong:
            finding.causes = causes(of, unit, finding, near, known)
            if not finding.causes and searches < SEARCHES:
                searches += 1
                finding.searched = True
                finding.causes = causes(of, unit, finding, near, mistakes)
            known += [mistake for mistake in finding.causes if mistake not in known]
        yield finding


def broken(of: Recomputation, unit: Unit) -> Iterator[Finding]:
    """Return a Finding for each border before a unit whose two sides differ by more than rounding.

    The input of a layer is the output of the layer before it, bit for bit or rounded once more; each position
    is held to the size of its own values.
    """
    for border, before, after in of.borders(unit):
        size = of.size("", "embeddings")
        a, b = (of.trace.rows(name, *size).astype(np.float64) for name in (before, after))
        real = of.real_of(after)
        error = np.where(real, np.abs(a - b).max(-1), 0.0)
        rounding = np.maximum(roundoff(of.trace.dtype) * np.abs(a).max(-1), 1e-300)
        at = np.unravel_index((error / rounding).argmax(), error.shape)
        where = tuple(int(i) for i in at)
        step = Step(after, float(error[at]), float(rounding[at]), where, before)
        if step.wrong:
            yield Finding(border, [step])


def before_the_unreadable(of: Recomputation, unit: Unit, mistakes) -> Iterator[Finding]:
    """Return the Finding of the steps of a unit before its first array that cannot be read, if it is wrong.

    Such an array holds a number that is not finite, or has another shape.
    """
    names = sorted((name for name in of.trace.arrays if name.startswith(f"{unit.name}.")), key=order)
    readable = []
    for name in names:
        try:
            of.given(name.rpartition(".")[0] if ".router." in name else name)
        except KeyError:  # a misspelt name, which is not read
            continue
        except InputError:
            break
        readable.append(name)
    dropped = set(names) - set(readable)
    seen = of.without(dropped, after=unit)
    try:
        finding, near = judged(seen, unit)
        if finding.wrong:
            finding.causes = causes(seen, unit, finding, near, mistakes)
    except InputError:
        return
    if finding.wrong:
        yield finding


class Near(NamedTuple):
    """Holds where a router's choice is a near-tie: within `noise` of its scores."""

    at: np.ndarray  # b l, bool
    noise: np.ndarray  # b l
    scores: np.ndarray  # b l E

    def explains(self, chosen: np.ndarray, cfg: Config) -> np.ndarray:
        """Return where all chosen experts [b l E] score, to within rounding, at least as the k-th best."""
        kth = -np.sort(-self.scores, axis=-1)[..., cfg.num_experts_per_tok - 1]
        least = np.where(chosen, self.scores, np.inf).min(-1)
        return self.at & ((least >= kth - self.noise) | (cfg.n_group > 1))


def judged(of: Recomputation, unit: Unit) -> tuple[Finding, Near | None]:
    """Return the finding of a unit without causes, and where its router's choice is a near-tie."""
    exact, rounded = of.run(unit), of.run(unit, rounds=True)
    near = near_ties(of, exact, rounded)
    other = None
    if near is not None and near.at.any() and not of.stored_as(f"{unit.name}.router"):
        other = of.run(unit, flip=near.at)
    steps, ties = compared(of, exact, rounded, near, other)
    return Finding(unit, steps, ties), near


def near_ties(of: Recomputation, exact: Found, rounded: Found) -> Near | None:
    """Return at which positions rounding may change the choice of experts; None without a router."""
    if exact.scores is None or rounded.scores is None:
        return None
    noise = CLOSE * np.maximum(np.abs(rounded.scores - exact.scores).max(-1), roundoff("float32"))
    return Near(margin(exact.scores, of.cfg) <= noise, noise, exact.scores)


def compared(
    of: Recomputation, exact: Found, rounded: Found, near: Near | None = None, other: Found | None = None
) -> tuple[list[Step], int]:
    """Return the errors of all values that the trace holds, and the number of near-ties.

    near: where the routing may differ; other: the values with the other choice there.
    """
    steps, ties = [], 0
    eps = max(roundoff(of.trace.dtype), roundoff("float64"))
    scale = roundoff("float64") / roundoff("float32") if of.trace.dtype == "float64" else 1.0
    for name, value in exact.values.items():
        if not of.stored_as(name):
            continue
        given = of.given(name).astype(np.float64)
        noise, error = np.abs(rounded.values[name] - value) * scale, np.abs(given - value)
        size = np.abs(value)
        if name.rpartition(".")[2] not in ("S", "tail"):
            real = of.real_of(name)
            axes = tuple(range(2, value.ndim))
            noise, error, size = (np.where(real, a.max(axes), 0.0) for a in (noise, error, size))
            if near is not None and name.endswith(".router"):
                changed = _chosen(given) != _chosen(value)
                tied = near.explains(_chosen(given), of.cfg) & changed.any(-1) & real
                ties += int(tied.sum())
                noise = np.where((_chosen(rounded.values[name]) != _chosen(value)).any(-1), 0.0, noise)
                error = np.where(tied, 0.0, error)
            elif near is not None and not of.stored_as(f"{name.rpartition('.')[0]}.router"):
                noise = np.where(near.at, 0.0, noise)
                limit = LIMIT * _rounding(noise, size, eps)
                second = np.full(error.shape, -1.0)
                if other is not None:
                    second = np.where(real, np.abs(given - other.values[name]).max(axes), 0.0)
                tied = near.at & (error > limit) & (second <= limit)
                ties = max(ties, int(tied.sum()))
                error = np.where(tied, np.maximum(second, 0.0), error)
        error = np.where(np.isnan(error), np.inf, error)
        at = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))[:2]
        steps.append(Step(name, float(error.max()), _rounding(noise, size, eps), at))
    return steps, ties


def _rounding(noise: np.ndarray, size: np.ndarray, eps: float) -> float:
    finite = noise[np.isfinite(noise)]
    largest = float(np.max(size[np.isfinite(size)], initial=0.0))
    return max(float(np.max(finite, initial=0.0)), eps * largest, 1e-300)


def _chosen(weights: np.ndarray) -> np.ndarray:
    return weights != 0


def causes(of: Recomputation, unit: Unit, finding: Finding, near, mistakes) -> list[Mistake]:
    """Return the mistakes, at most CAUSES, with which the unit is what the trace holds; the nearest first."""
    found = []
    clean = {step.name for step in finding.steps if not step.wrong}
    before = {step.name: step.error for step in finding.steps if step.wrong}
    for mistake in mistakes:
        if not possible(of, unit, mistake) or f"{unit.name}.{mistake.step}" in clean:
            continue
        steps = with_mistake(of, unit, mistake, near, before)
        if steps and not any(step.wrong for step in steps):
            found.append((max(step.roundings for step in steps), mistake))
    found.sort(key=lambda item: item[0])
    return [mistake for _, mistake in found[:CAUSES]]


def possible(of: Recomputation, unit: Unit, mistake: Mistake) -> bool:
    """Return whether a mistake can be made in a unit."""
    if mistake.step == "mixer" and not of.cfg.moe_latent_size:
        return False
    if mistake.kind == "outer":
        steps = {"embeddings": "embeddings", "final": "norm_f"}
        return steps.get(unit.name) == mistake.step
    if mistake.kind == "mtp":
        return unit.name == ("mtp.final" if mistake.step == "final_layernorm" else "mtp.input")
    return unit.kind in mistake.kind


def with_mistake(of: Recomputation, unit: Unit, mistake: Mistake, near, before: dict) -> list[Step]:
    """Return the errors of the trace against a unit computed with a mistake; [] where that fails.

    before: the errors without the mistake, of the wrong steps; [] too where one of them is not halved.
    """
    try:
        exact = of.run(unit, mistake)
        if any(
            step.error > before.get(step.name, np.inf) / 2 for step in compared(of, exact, exact, near)[0]
        ):
            return []
        rounded = of.run(unit, mistake, rounds=True)
    except (ValueError, IndexError, FloatingPointError):
        return []
    return compared(of, exact, rounded, near)[0]


def visible(of: Recomputation, unit: Unit, mistake: Mistake, clean: Found, rounded: Found) -> float:
    """Return by how many roundings a mistake would change the values that the trace holds of a unit.

    clean, rounded: the values without it, in float64 and as the trace's dtype rounds.
    """
    try:
        wrong = of.run(unit, mistake)
    except (ValueError, IndexError, FloatingPointError):
        return 0.0
    eps, worst = roundoff(of.trace.dtype), 0.0
    for name in wrong.values:
        if not of.stored_as(name):
            continue
        value = clean.values[name]
        change, noise, size = (
            np.abs(wrong.values[name] - value), np.abs(rounded.values[name] - value), np.abs(value)
        )  # fmt: skip
        if name.rpartition(".")[2] not in ("S", "tail"):
            axes = tuple(range(2, value.ndim))
            change, noise, size = (
                np.where(of.real_of(name), a.max(axes), 0.0) for a in (change, noise, size)
            )
        change = np.where(np.isnan(change), np.inf, change)
        worst = max(worst, float(change.max()) / _rounding(noise, size, eps))
    return worst


def exercised(of: Recomputation, mistakes=MISTAKES) -> dict[Mistake, float]:
    """Return for each mistake by how many roundings it would show in the first layer where it can be made."""
    found = dict.fromkeys(mistakes, 0.0)
    left = list(mistakes)
    for unit in of.units():
        here = [mistake for mistake in left if possible(of, unit, mistake)]
        if here:
            clean, rounded = of.run(unit), of.run(unit, rounds=True)
            found |= {mistake: visible(of, unit, mistake, clean, rounded) for mistake in here}
            left = [mistake for mistake in left if mistake not in here]
    return found


def compare(a: Trace, b: Trace) -> list[Step]:
    """Return the difference of every array that two traces share, in order; b is the measure.

    The rounding is that of the coarser dtype, at the size of the array. InputError if they differ in tokens.
    """
    if a.token_ids != b.token_ids or a.calls != b.calls:
        raise InputError(f"{a.name} and {b.name} are traces of different tokens, or of different calls")
    if a.fingerprint and b.fingerprint and a.fingerprint != b.fingerprint:
        raise InputError(f"{a.name} and {b.name} were recorded from different models")
    eps, steps = max(roundoff(a.dtype), roundoff(b.dtype)), []
    for name in sorted(set(a.arrays) & set(b.arrays), key=order):
        if name.endswith(".router.weights"):  # compared with the experts that they are of
            continue
        if name.endswith(".router.experts"):
            name = name.removesuffix(".experts")
            if any(f"{name}.weights" not in t for t in (a, b)):
                continue
            x, y = routings(a, b, name)
        else:
            x, y = alike(a, b, name)
        strange = tuple(t.name for t, v in ((a, x), (b, y)) if not np.isfinite(v).all())
        error = np.inf if strange else float(np.abs(x - y).max(initial=0.0))
        largest = float(np.abs(y[np.isfinite(y)]).max(initial=0.0))
        steps.append(Step(name, error, max(eps * largest, 1e-300), not_finite=strange))
    if not steps:
        raise InputError(f"{a.name} and {b.name} have no array in common")
    return steps


def alike(a: Trace, b: Trace, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of an array that count in each of two traces, in a row; InputError for two shapes."""
    x, y = (t.array(name) for t in (a, b))
    first, second = counted(a, name, x), counted(b, name, y)
    whole = first is None or second is None
    if x.shape != y.shape if whole else x.size != y.size:
        raise InputError(f"{name} has the shape {list(x.shape)} in {a.name}, {list(y.shape)} in {b.name}")
    if first is None or second is None:
        first, second = x, y
    return first.astype(np.float64).reshape(-1), second.astype(np.float64).reshape(-1)


def routings(a: Trace, b: Trace, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a routing of each of two traces as weights of all experts, whose order has no meaning."""
    experts = alike(a, b, f"{name}.experts")
    weights = alike(a, b, f"{name}.weights")
    if experts[0].size != weights[0].size or any(not (e == np.abs(np.rint(e))).all() for e in experts):
        raise InputError(f"{name} holds no experts with a weight each in {a.name} or {b.name}")
    k = a.array(f"{name}.experts").shape[-1]
    count = int(max(e.max(initial=0) for e in experts)) + 1
    if count > MOST_EXPERTS:
        raise InputError(f"{name}.experts names expert {count - 1}, in {a.name} or {b.name}")
    dense_of = [
        dense(Routing(e.astype(np.int64).reshape(-1, k), w.reshape(-1, k)), count)
        for e, w in zip(experts, weights, strict=True)
    ]
    return dense_of[0], dense_of[1]


def counted(trace: Trace, name: str, a: np.ndarray) -> np.ndarray | None:
    """Return the values of an array without those of padding; None where it has no axis of positions."""
    head = name.startswith("mtp.")
    if name.rpartition(".")[2] in ("S", "tail"):
        return a
    if head and min(trace.lengths) < 2:
        return None
    real = real_positions(trace.head_calls if head else trace.calls)
    rows, length = real.shape
    if rows == 1 and a.shape[:1] == (length,) and a.shape[:2] != real.shape:
        a = a[None]
    return a[real] if a.shape[:2] == real.shape else None


def order(name: str) -> tuple:
    """Return a key by which names of arrays sort in the order of the computation."""
    from refengine.conformance.traces.watch import STEPS

    steps = ["input", *dict.fromkeys(step for kind in STEPS.values() for step in kind)]
    block, _, step = name.replace(".router.", ".router").rpartition(".")
    head = name.startswith("mtp")
    outer = {
        "embeddings": -1,
        "final_hidden": 1 << 20,
        "logits": 1 << 21,
        "eh_proj": -1,
        "enorm": -3,
        "hnorm": -2,
    }
    known = "router" if step.startswith("router") else step
    if "layers" in block:
        return head, int(block.rpartition(".")[2]), steps.index(known) if known in steps else 99, name
    return head, outer.get(step or name, 0), 0, name
