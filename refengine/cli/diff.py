"""refengine diff: the first wrong layer of a trace, and why."""

from __future__ import annotations

import json

import click

from refengine.cli import options
from refengine.spec.config import InputError


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
    departs by more than the rounding of the trace's dtype.
    """
    from refengine.conformance.traces import load, text
    from refengine.conformance.traces.diff import compare, diagnosed, exercised
    from refengine.conformance.traces.recompute import Recomputation

    if (other is None) == (against is None):
        raise click.UsageError("give another trace, or --against MODEL.")
    a = load(trace)
    if other is not None:
        if mistakes:
            raise click.UsageError("--mistakes needs --against MODEL.")
        b = load(other)
        steps = compare(a, b)
        if as_json:
            rows = [{"name": s.name, "error": s.error, "roundings": s.roundings} for s in steps]
            click.echo(json.dumps({"arrays": rows, "agree": not any(s.wrong for s in steps)}))
        else:
            click.echo(f"{text.trace_line(a)}\n{text.trace_line(b)}\n")
            click.echo("\n".join(text.steps_lines(steps, a, b)))
        raise click.exceptions.Exit(int(any(step.wrong for step in steps)))
    checkpoint = model(against, a)
    of = Recomputation(a, checkpoint.config, checkpoint.read)
    if unread := of.unread():
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        options.note(f"{a.name} holds {unread[0]!r}{more}, which is no activation of this model: not read")
    if not as_json:
        click.echo(f"{text.trace_line(a)}\nagainst {against} in float64; errors in roundings of {a.dtype}\n")
    findings = []
    for finding in diagnosed(of):
        findings.append(finding)
        if not as_json:
            click.echo(text.layer_line(finding))
    shown = {}
    if mistakes:
        shown = exercised(of)
    if as_json:
        click.echo(json.dumps(as_object(findings, shown)))
    else:
        lines = text.verdict(findings, a)
        click.echo("\n".join(["", *lines, *([""] if shown else []), *text.mistakes_lines(shown, a.dtype)]))
    raise click.exceptions.Exit(int(any(finding.wrong for finding in findings)))


def model(name: str, trace):
    """Return the checkpoint that a trace is held against; InputError when the trace is of another model."""
    from refengine.checkpoint import Checkpoint
    from refengine.conformance.fingerprint import fingerprint

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
            "name": f.unit.name, "kind": f.unit.kind, "departs": f.wrong, "roundings": f.worst,
            "near_ties": f.ties, "causes": [{"name": c.name, "trap": c.trap} for c in f.causes],
            "steps": [
                {"name": s.name, "error": s.error, "rounding": s.rounding, "roundings": s.roundings}
                for s in f.steps
            ],
        }
        for f in findings
    ]  # fmt: skip
    first = next((f for f in findings if f.wrong), None)
    out = {"agrees": first is None, "first_wrong": first and first.unit.name, "layers": layers}
    return out | ({"mistakes": {m.name: roundings for m, roundings in shown.items()}} if shown else {})
