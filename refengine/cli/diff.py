"""refengine diff: find the first wrong layer of a trace, and the likely mistake."""

from __future__ import annotations

import json
import math

import click

from refengine.cli import options
from refengine.spec.config import InputError
from refengine.untrusted import shown as shown_name


@click.command(cls=options.Command, short_help="Find the first wrong layer of a trace, and why.")
@click.argument("trace")
@click.argument("other", required=False)
@click.option("--against", metavar="MODEL", help="Recompute each layer of TRACE with this model.")
@click.option("--mistakes", is_flag=True, help="Print which known mistakes the trace would show.")
@options.as_json
@options.debug
def diff(trace, other, against, mistakes, as_json):
    """Compare TRACE with the model it was recorded from, or with another trace.

    With --against each layer is recomputed in float64 from the trace's own input. Exit code 1 when a layer
    differs by more than the rounding of the trace's dtype.
    """
    from refengine.conformance.traces import load, text
    from refengine.conformance.traces.diff import compare, diagnosed, exercised
    from refengine.conformance.traces.recompute import Recomputation, half_routings, unread

    if other is not None and against is not None:
        raise click.UsageError("give another trace, or --against MODEL, not both.")
    if other is None and against is None:
        raise click.UsageError("give another trace, or --against MODEL.")
    a = load(trace)
    if other is not None:
        if mistakes:
            raise click.UsageError("--mistakes needs --against MODEL.")
        b = load(other)
        steps = compare(a, b)
        for one, two in ((a, b), (b, a)):
            if missing := sorted(set(one.arrays) - set(two.arrays)):
                options.note(f"{one.name} holds {first_of(missing)}, which {two.name} lacks: not compared")
        if as_json:
            rows = [
                {"name": s.name, "error": finite(s.error), "roundings": finite(s.roundings)}
                | ({"not_finite": list(s.not_finite)} if s.not_finite else {})
                for s in steps
            ]
            click.echo(json.dumps({"arrays": rows, "agree": not any(s.wrong for s in steps)}))
        else:
            click.echo(f"{text.trace_line(a)}\n{text.trace_line(b)}\n")
            click.echo("\n".join(text.steps_lines(steps, a, b)))
        raise click.exceptions.Exit(int(any(step.wrong for step in steps)))
    checkpoint = model(against, a)
    if strange := unread(a, checkpoint.config):
        what = "which is no activation of this model: not read"
        options.note(f"{a.name} holds {first_of(strange)}, {what}")
    if halves := half_routings(a):
        options.note(f"{a.name} holds {first_of(halves)} without the other half of the routing: not read")
    if coarser := a.coarser():
        what = f"stored with a larger rounding than that of {a.dtype}, the dtype in the header"
        options.note(f"{a.name} holds {first_of(coarser)}, {what}; it may depart by that alone")
    of = Recomputation(a, checkpoint.config, checkpoint.read)
    if not as_json:
        click.echo(f"{text.trace_line(a)}\nagainst {against} in float64; errors in roundings of {a.dtype}\n")
    findings, shown, stopped = [], {}, None
    try:
        for finding in diagnosed(of):
            findings.append(finding)
            if not as_json:
                click.echo(text.layer_line(finding))
        if mistakes:
            shown = exercised(of)
    except InputError as error:  # a later layer cannot be judged; what was found before it counts
        stopped = error
    wrong = any(finding.wrong for finding in findings)
    if as_json and (wrong or stopped is None):
        more = {} if stopped is None else {"stopped": str(stopped)}
        click.echo(json.dumps(as_object(findings, shown) | more))
    elif not as_json and (wrong or stopped is None):
        lines = text.verdict(findings, a)
        click.echo("\n".join(["", *lines, *([""] if shown else []), *text.mistakes_lines(shown, a.dtype)]))
    if stopped is not None:
        raise stopped
    raise click.exceptions.Exit(int(wrong))


def first_of(names: list[str]) -> str:
    """Return the first of some names, and how many more there are."""
    return shown_name(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def finite(value: float) -> float | None:
    """Return a number for JSON, which has no infinity: None."""
    return value if math.isfinite(value) else None


def model(name: str, trace):
    """Return the checkpoint that a trace is held against; InputError when the trace is of another model."""
    from refengine.checkpoint import Checkpoint
    from refengine.checkpoint.fingerprint import fingerprint

    checkpoint = Checkpoint.open(name)
    if trace.fingerprint:
        ours = fingerprint(checkpoint.config, checkpoint.read)
        if ours != trace.fingerprint:
            what = f"was recorded from another model: its fingerprint is {trace.fingerprint}"
            raise InputError(f"{trace.name} {what}, that of {name} is {ours}")
    return checkpoint


def as_object(findings, shown) -> dict:
    """Return the findings as values for JSON."""
    layers = [
        {
            "name": f.unit.name, "kind": f.unit.kind, "departs": f.wrong, "roundings": finite(f.worst),
            "near_ties": f.ties, "causes": [{"name": c.name, "trap": c.trap} for c in f.causes],
            "steps": [
                {
                    "name": s.name, "error": finite(s.error), "rounding": s.rounding,
                    "roundings": finite(s.roundings),
                }
                for s in f.steps
            ],
        }
        for f in findings
    ]  # fmt: skip
    first = next((f for f in findings if f.wrong), None)
    out = {"agrees": first is None, "first_wrong": first and first.unit.name, "layers": layers}
    return out | ({"mistakes": {m.name: roundings for m, roundings in shown.items()}} if shown else {})
