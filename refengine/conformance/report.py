"""The rows of a report: each operation of a candidate, judged by recorded vectors and by drawn cases.

A row is computed by `judged`, in this process; `refengine.conformance.watchdog` runs rows in another process,
and ends one that does not answer.
"""

from __future__ import annotations

import ast
import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from typing import Any

import numpy as np

from refengine.conformance.candidate import VERBS, Bench, Wrong
from refengine.conformance.cases import MEASURED, Case
from refengine.conformance.causes import causes
from refengine.conformance.checks import (  # noqa: F401  (they fill CHECKS)
    CHECKS,
    Check,
    attention,
    experts,
    laws,
    layers,
    mamba,
    models,
    operations,
    packed,
    speculation,
    texts,
)
from refengine.conformance.vectors import Row as Recorded
from refengine.conformance.vectors import check_vector, eps
from refengine.spec.config import InputError

LETTERS = {
    "M": ("linear", "causal_conv", "ssd_scan", "gated_rms_norm", "all_reduce"),
    "*": ("linear", "attention", "all_reduce"),
    "E": ("route", "mlp", "linear", "experts", "all_reduce"),
    "-": ("mlp", "all_reduce"),
}
MIXERS = {"M": "mamba2-mixer", "*": "attention-mixer", "E": "experts-mixer", "-": "mlp-mixer"}
LAWS = ("resume", "padding", "batch", "states", "records", "stages")
MODELS = ("model", "prediction-head", "speculation", "step", "determinism")
TEXTS = ("sampling", "tokenizer", "chat")
PACKED = ("packed-weights",)
NAMES = (*VERBS, *MIXERS.values(), *PACKED, *LAWS, *MODELS, *TEXTS)
GROUPS = {
    "operations": VERBS,
    "layers": tuple(MIXERS.values()),
    "packed": PACKED,
    "laws": LAWS,
    "models": MODELS,
    "text": TEXTS,
}
RECORDED_AS = {"commit": "records", "slots": "states", "sample": "sampling"}  # by operation of a vector
SHRINKING = 5.0  # seconds to look for a smaller case that fails


@dataclass
class Result:
    """One row. `verdict` is "pass", "wrong", "not judged" or "not there"; `why` a sentence, or empty.

    recorded, drawn    cases that were tried
    worst              the largest error, in units of the rounding (eps) of the dtype it is judged in
    transformers       the same of transformers' own results, on the recorded cases
    again              the case that fails, as --case takes it
    as_if              known mistakes that give the same results
    """

    operation: str
    verdict: str = "pass"
    why: str = ""
    recorded: int = 0
    drawn: int = 0
    worst: float | None = None
    transformers: float | None = None
    again: str = ""
    as_if: list[str] = field(default_factory=list)
    verb: str = ""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """The settings of a report.

    examples   drawn cases for each check
    seed       of the drawing
    case       one call of one check, in place of all drawn cases
    """

    examples: int = 12
    seed: int = 0
    case: str = ""


TELL: list[Callable[[str], None]] = []  # called with each case before it is tried


def tell(what: str) -> None:
    """Call those of TELL."""
    for told in TELL:
        told(what)


class Enough(BaseException):
    """Ends the search for a smaller case that fails."""


@dataclass
class Attempts:
    """The cases of one check that were tried, and the smallest that failed."""

    check: Check
    backend: Bench
    tried: int = 0
    failed: dict[str, Any] | None = None
    first: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    until: float = field(default=float("inf"))

    def __call__(self, **drawn) -> None:
        """Run the check once, and keep what failed."""
        self.tried += 1
        if time.monotonic() > self.until:
            raise Enough
        tell(written(self.check, drawn))
        try:
            self.check(self.backend, **drawn)
        except Exception as error:
            if self.failed is None:
                self.until = time.monotonic() + SHRINKING
                self.first = drawn
            if self.failed is None or len(written(self.check, drawn)) <= len(
                written(self.check, self.failed)
            ):
                self.failed, self.error = drawn, error
            raise


def uses(operation: str) -> tuple[str, ...]:
    """Return the verbs without which a row says nothing: of a verb, itself."""
    if operation in VERBS:
        return (operation,)
    found: list[str] = []
    for check in CHECKS:
        if check.operation == operation:
            for name in check.uses:
                found += LETTERS.get(name, (name,))
    return tuple(dict.fromkeys(found))


def rows(names: Iterable[str] = ()) -> list[str]:
    """Return the operations of a report, in its order; InputError for a name that is none."""
    wanted = [name.replace(" ", "-") if name not in VERBS else name for name in names]
    for name in wanted:
        if name not in NAMES and name not in GROUPS:
            raise InputError(f"there is no operation {name!r}; there is {', '.join((*NAMES, *GROUPS))}")
    chosen = {n for name in wanted for n in GROUPS.get(name, (name,))} or set(NAMES)
    return [name for name in NAMES if name in chosen]


def judged(operation: str, backend: Bench, plan: Plan) -> Result:
    """Return the row of one operation: its recorded cases first, then its checks, until one fails."""
    began, result = time.monotonic(), Result(operation)
    checks = [check for check in CHECKS if check.operation == operation]
    if checks and not any(check.needs(backend) for check in checks):
        return replace(result, verdict="not there", why=f"the backend has no {operation}")
    with np.errstate(all="ignore"), measured() as errors:
        if not plan.case:
            by_vectors(result, backend, errors)
        for check in checks:  # one that fails has a smaller case than a recorded one
            if not result.again and check.needs(backend):
                by_check(result, check, backend, plan)
    units = [error / eps(dtype) for error, dtype in errors if np.isfinite(error)]
    result.worst = max(units, default=None)
    result.seconds = time.monotonic() - began
    return result


@contextmanager
def measured() -> Iterator[list]:
    """Collect (error, dtype) of each comparison by `agree`."""
    errors: list = []
    token = MEASURED.set(errors)
    try:
        yield errors
    finally:
        MEASURED.reset(token)


def by_vectors(result: Result, backend: Bench, errors: list) -> None:
    """Judge the recorded cases of an operation, and note the first that is wrong."""
    theirs = []
    for vector in recorded(result.operation):
        tell(f"recorded case {vector.name}")
        row = (
            text_row(vector, backend)
            if result.operation in TEXTS
            else check_vector(vector, backend, backend.dtype)
        )
        result.recorded += 1
        if result.operation not in TEXTS:
            errors.append((row.error, backend.dtype))
            theirs += witnessed(vector)
        if not row.passed and result.verdict == "pass":
            result.verdict, result.why = "wrong", said(row)
    if theirs:
        result.transformers = max(theirs) / eps(np.float32)


def recorded(operation: str) -> list:
    """Return the shipped vectors of an operation of the report."""
    from refengine.conformance.vectors.files import shipped

    name = operation if operation in VERBS else operation.replace("-", " ")
    return [v for v in shipped() if RECORDED_AS.get(v.operation, v.operation) == name]


def text_row(vector, backend: Bench) -> Recorded:
    """Return the row of a recorded case of sampling, tokenizer or chat, by the candidate's functions."""
    from refengine.conformance.vectors import judge, worst_of
    from refengine.conformance.vectors.text import answer, choose, judge_texts

    if vector.operation == "sample":
        if backend.functions.keys() & {"probabilities", "draw"}:
            return Recorded(vector.operation, vector.name, 0.0, 0.0)  # the checks call the candidate's own
        return worst_of(judge(vector, choose(vector), np.float64))
    return judge_texts(vector, answer(vector))


def said(row: Recorded) -> str:
    """Return in a sentence why a recorded case is wrong."""
    if row.note and not np.isfinite(row.error):
        return f"recorded case {row.case}: {row.note.removeprefix('Wrong: ')}"
    return f"recorded case {row.case}: off by {row.error:.3g}, where {row.allowed:.3g} is allowed"


def witnessed(vector) -> list[float]:
    """Return the errors of transformers' float32 results, as recorded with a case."""
    from refengine.conformance.vectors import judge

    theirs = vector.part("transformers")
    return [row.error for row in judge(vector, theirs, np.float32) if theirs and np.isfinite(row.error)]


def by_check(result: Result, check: Check, backend: Bench, plan: Plan) -> None:
    """Run a check on drawn cases, or on the one of the plan, and note how it fails."""
    attempts = Attempts(check, backend)
    if plan.case:
        name, arguments = parsed(plan.case)
        if name != check.name:
            return
        with suppress(Exception):  # kept by the attempts
            attempts(**arguments)
    else:
        drawn(attempts, check, plan)
    result.drawn += attempts.tried
    if attempts.error is not None and (attempts.failed or result.verdict == "pass"):
        result.verdict = "wrong"
        result.why = f"{check.sentence}: {explained(attempts.error)}"
        result.again = written(check, attempts.failed or {})
        result.verb = attempts.error.verb if isinstance(attempts.error, Wrong) else ""
        if check.operation in VERBS and not result.verb:
            result.as_if = causes(check, backend, attempts.first, check.operation)


def drawn(attempts: Attempts, check: Check, plan: Plan) -> None:
    """Run a check on cases that Hypothesis draws and shrinks; the attempts keep what failed."""
    from hypothesis import HealthCheck, Phase, Verbosity, example, given, seed, settings

    strategies = check.draws()
    if not strategies:
        with suppress(Exception):  # kept by the attempts
            attempts()
        return
    test: Callable[..., None] = given(**strategies)(lambda **values: attempts(**values))
    for arguments in check.examples:
        test = example(**arguments)(test)
    how = settings(
        max_examples=max(1, round(plan.examples * check.share)), database=None, deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink), report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet, print_blob=False,
    )  # fmt: skip
    try:
        seed(plan.seed)(how(test))()
    except (Exception, Enough) as error:
        if attempts.error is None:
            attempts.error = error if isinstance(error, Exception) else AssertionError(str(error))


def explained(error: Exception) -> str:
    """Return in one line what went wrong in a check."""
    text = " ".join(str(error).split())
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"


def written(check: Check, arguments: dict[str, Any]) -> str:
    """Return a call of a check as text, which `parsed` reads."""
    return f"{check.name}({', '.join(f'{name}={coded(value)}' for name, value in arguments.items())})"


def coded(value) -> str:
    """Return a value as a Python literal with double quotes, which a shell may put in single ones."""
    if isinstance(value, Case):
        return repr(value).replace("'", '"')
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{coded(key)}: {coded(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple, range)):
        return "[" + ", ".join(map(coded, value)) + "]"
    return repr(value)


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a check and its arguments, of a text by `written`; InputError if it is not one."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        arguments = {str(keyword.arg): literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError):
        raise InputError(f"--case {text!r} is not CHECK(name=value, ...) as a report prints it") from None
    found = next((check for check in CHECKS if check.name == call.func.id), None)
    if found is None:
        raise InputError(f"there is no check {call.func.id!r}")
    try:
        signature(found.run).bind(None, **arguments)
    except TypeError as error:
        raise InputError(f"--case {text!r} has not the arguments of its check: {error}") from None
    return found.name, arguments


def literal(node: ast.expr):
    """Return the value of a literal, or of Case(name=literal, ...)."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Case":
        return Case(**{str(k.arg): tuples(ast.literal_eval(k.value)) for k in node.keywords})
    return ast.literal_eval(node)


def tuples(value):
    """Return a list as a tuple, which a frozen case can hold."""
    return tuple(value) if isinstance(value, list) else value


def operation_of(case: str) -> str:
    """Return the operation that a case belongs to."""
    name, _ = parsed(case)
    return next(check.operation for check in CHECKS if check.name == name)


def report(
    candidate: Bench | None,
    names: Iterable[str] = (),
    plan: Plan | None = None,
    judge: Callable[[str, Plan], Result] | None = None,
) -> Iterator[Result]:
    """Yield a row for each operation, nearest first: what uses a wrong verb is not judged.

    judge: how a row is computed; `judged` in this process unless it is given.
    """
    plan, wrong = plan or Plan(), []
    if plan.case:
        names = [operation_of(plan.case)]
    for operation in rows(names):
        blocked = [verb for verb in uses(operation) if verb in wrong and verb != operation]
        if blocked:
            yield Result(operation, "not judged", f"{' and '.join(blocked)} is wrong")
            continue
        if judge is not None:
            result = judge(operation, plan)
        elif candidate is not None:
            result = judged(operation, candidate, plan)
        else:
            raise ValueError("give a candidate, or a way to judge one")
        if result.verdict == "wrong":
            if operation in VERBS:
                wrong.append(operation)
            elif result.verb and result.verb not in wrong:
                wrong.append(result.verb)
        yield result


def passed(results: Iterable[Result]) -> bool:
    """Return whether no row is wrong or left unjudged."""
    return all(result.verdict in ("pass", "not there") for result in results)


def line(result: Result, brief: bool = False) -> str:
    """Return a row as one line of text; with `brief` without the reason why it is wrong."""
    tried = f"{result.recorded} + {result.drawn}" if result.recorded or result.drawn else "-"
    ours, theirs = figure(result.worst), figure(result.transformers)
    return f"{result.operation:16} {tried:>10} {ours:>9} {theirs:>13}   {shown(result, brief)}".rstrip()


def figure(value: float | None) -> str:
    """Return an error in units of rounding, short; "-" without one."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def left_out(results: Iterable[Result]) -> list[str]:
    """Return a line for each reason why rows were not judged, with their names."""
    names: dict[str, list[str]] = {}
    for result in results:
        if result.verdict in ("not judged", "not there"):
            names.setdefault(f"{result.verdict} ({result.why})", []).append(result.operation)
    return [f"{why}: {', '.join(found)}" for why, found in names.items()]


def shown(result: Result, brief: bool = False) -> str:
    """Return the verdict, with its reason unless `brief`."""
    word = {"pass": "pass", "wrong": "WRONG"}.get(result.verdict, result.verdict)
    return f"{word}  {result.why}" if result.why and not brief else word


HEADER = f"{'operation':16} {'cases':>10} {'error':>9} {'transformers':>13}"
LEGEND = (
    "cases: recorded + drawn. error: the worst, against the float64 definition, over the largest value,\n"
    "in units of the dtype's rounding (eps). transformers: its float32 results, as recorded."
)


def command(
    result: Result, plan: Plan, name: str, dtype: str | None = None, device: str | None = None
) -> str:
    """Return the command that computes a wrong row of the candidate `name` again."""
    words = ["refengine verify --backend", name]
    words += ["--dtype", dtype] if dtype else []
    words += ["--device", device] if device else []
    words += ["--op", result.operation, "--seed", str(plan.seed)]
    if plan.examples != Plan.examples and not result.again:
        words += ["--max-examples", str(plan.examples)]
    return " ".join(words) + (f" --case {shlex.quote(result.again)}" if result.again else "")
