"""The report of `refengine diff`: a chart of the error by layer, the first wrong step, the cause."""

from __future__ import annotations

import math
from collections.abc import Iterable

from refengine.conformance.mistakes import Mistake
from refengine.conformance.traces import Trace
from refengine.conformance.traces.diff import LIMIT, Finding, Step

KINDS = {"M": "Mamba", "*": "attention", "E": "experts", "-": "MLP", "outer": "", "mtp": "head",
         "stream": "stream"}  # fmt: skip
WIDTH = 32  # columns of a bar; each factor of ten beyond one rounding is 4 of them


def trace_line(trace: Trace) -> str:
    """Return what a trace was recorded from, in a line."""
    rows, tokens = len(trace.token_ids), sum(map(len, trace.token_ids))
    many = f"{rows} sequences" if rows > 1 else "a sequence"
    calls = f"{len(trace.calls)} calls" if len(trace.calls) > 1 else "one call"
    return f"{trace.name}: {tokens} tokens of {many} in {calls}, {trace.dtype}, by {trace.engine}"


def bar(roundings: float) -> str:
    """Return the bar of an error in roundings; a `|` marks the limit."""
    size = math.log10(max(roundings, 1.0)) if math.isfinite(roundings) else 99
    length, mark = min(WIDTH, round(4 * size)), round(4 * math.log10(LIMIT))
    return "".join("#" if i < length else "|" if i == mark else " " for i in range(WIDTH)).rstrip()


def layer_line(finding: Finding) -> str:
    """Return the line of a unit in the chart."""
    shown = f"{finding.worst:9.1f}" if finding.worst < 1e6 else f"{finding.worst:9.0e}"
    ties = f"  {finding.ties} near-tie{'s' if finding.ties > 1 else ''} of the router" if finding.ties else ""
    wrong = "  departs" if finding.wrong else ""
    name, kind = finding.unit.name, KINDS[finding.unit.kind]
    if finding.unit.kind == "stream":
        name = f"to {finding.steps[0].name.removesuffix('.input')}"
    return f"{name:14}{kind:10}{shown}  {bar(finding.worst):{WIDTH}}{wrong}{ties}".rstrip()


def verdict(findings: Iterable[Finding], trace: Trace) -> list[str]:
    """Return the lines after the chart: the first wrong layer, the step, the cause, and other causes."""
    findings = list(findings)
    wrong = [finding for finding in findings if finding.wrong]
    ties = sum(finding.ties for finding in findings)
    lines = []
    if not wrong:
        lines.append(f"agrees        every layer is within {LIMIT:.0f} roundings of {trace.dtype}")
        if ties:
            lines.append(f"near-ties     {ties} choices of experts could go either way, and are no errors")
        return lines
    first = wrong[0]
    lines += [f"first wrong   {where(first)}", f"step          {step_line(first.first, trace)}"]
    if first.unit.kind == "stream":
        lines.append(
            "cause         the two arrays were not recorded of one value, or it was changed between them"
        )
    elif first.causes:
        lines.append(f"cause         {cause_lines(first.causes)}")
        same = [finding for finding in wrong if set(finding.causes) & set(first.causes)]
        names = "all that depart" if len(same) == len(wrong) else f"of {len(wrong)} that depart"
        lines.append(f"              reproduces {len(same)} layer{'s' if len(same) > 1 else ''}, {names}")
    else:
        lines.append("cause         none of the known mistakes reproduces it")
    for finding in wrong[1:]:
        if set(finding.causes) & set(first.causes):
            continue
        what = cause_lines(finding.causes) if finding.causes else f"{step_line(finding.first, trace)}"
        lines.append(f"also          {where(finding)}: {what}")
    return lines


def where(finding: Finding) -> str:
    """Return the name and the kind of a unit."""
    kind = "" if finding.unit.kind == "stream" else KINDS[finding.unit.kind]
    return f"{finding.unit.name} ({kind})" if kind else finding.unit.name


def step_line(step: Step | None, trace: Trace) -> str:
    """Return a step's error against what its dtype allows."""
    if step is None:
        return ""
    at = ""
    if len(step.at) == 2 and step.name.rpartition(".")[2] not in ("S", "tail"):
        at = f", largest at position {step.at[1]}"
        if len(trace.token_ids) > 1:
            at += f" of sequence {step.at[0]}"
    allowed = LIMIT * step.rounding
    if step.of:
        what = f"{step.name} is not {step.of}: they are apart by {step.error:.2g}"
        return f"{what}, where {trace.dtype} allows {allowed:.2g}{at}"
    return f"{step.name} is off by {step.error:.2g}, where {trace.dtype} allows {allowed:.2g}{at}"


def cause_lines(causes: list[Mistake]) -> str:
    """Return the names of causes; several reproduce the trace alike."""
    return ", or ".join(map(str, causes))


def mistakes_lines(shown: dict[Mistake, float], dtype: str) -> list[str]:
    """Return a line for each known mistake: whether the trace would show it."""
    lines = []
    for mistake, roundings in shown.items():
        if roundings > LIMIT:
            what = "would show"
        elif roundings > 1e-6:
            what = f"indistinguishable in {dtype}"
        else:
            what = "not exercised by these tokens"
        lines.append(f"{what:32}{mistake}")
    return lines


def steps_lines(steps: list[Step], a: Trace, b: Trace) -> list[str]:
    """Return the comparison of two traces: a chart, and the first array beyond rounding."""
    lines = [f"{step.name:26}{step.roundings:10.1f}  {bar(step.roundings)}".rstrip() for step in steps]
    wrong = next((step for step in steps if step.wrong), None)
    if wrong is None:
        return [*lines, f"agree         all {len(steps)} arrays are within {LIMIT:.0f} roundings"]
    if wrong.not_finite:
        holding = " and ".join(dict.fromkeys(wrong.not_finite))
        return [*lines, f"first apart   {wrong.name}: {holding} holds a number that is not finite"]
    return [
        *lines,
        f"first apart   {wrong.name}: by {wrong.error:.2g}, where a rounding is {wrong.rounding:.2g}",
        "              errors add up from layer to layer; --against MODEL recomputes each layer from its",
        "              own input, and names the cause",
    ]
