"""refengine verify: check that an implementation computes what the specification defines."""

from __future__ import annotations

import json

import click

from refengine.backend import NAMES
from refengine.cli import options
from refengine.spec.config import InputError


@click.command(
    cls=options.Command, short_help="Check that a backend computes what the specification defines."
)
@click.option(
    "--backend",
    default="numpy",
    show_default=True,
    metavar="NAME",
    help=f"{', '.join(NAMES)}, or MODULE[:ATTRIBUTE] of your own.",
)
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or auto.")
@click.option(
    "--dtype", type=options.Dtype(), default="auto", help="Dtype of the computation; auto: float32."
)
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Check only this (repeatable).")
@click.option("--max-examples", type=click.IntRange(1), metavar="N", help="Drawn cases for each check.  [12]")
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Seed of the drawn cases.")
@click.option("--case", metavar="CASE", help="Run one case, as a report prints it.")
@click.option(
    "--limit", type=options.Finite(0, min_open=True), default=60.0, metavar="SECONDS",
    help="A case that takes longer is wrong.  [60]",
)  # fmt: skip
@click.option("--list", "listed", is_flag=True, help="Print the names and sentences of all checks.")
@click.option("--prefill-decode", metavar="MODEL", help="Only compare prefill with decode on a checkpoint.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=128,
    metavar="N",
    help="Tokens that --prefill-decode compares.  [128]",
)
@options.as_json
@options.debug
@click.pass_context
def verify(
    context,
    backend,
    device,
    dtype,
    ops,
    max_examples,
    seed,
    case,
    limit,
    listed,
    prefill_decode,
    tokens,
    as_json,
):
    """Check a backend, or functions of your own, against the specification; exit code 1 if one is wrong.

    Recorded cases come first, then operations, layers, laws, whole models, sampling and text. A function
    replaces that of the NumPy backend with its name; docs/verify.md has examples.
    """
    dtype = None if dtype == "auto" else dtype
    if prefill_decode:
        for flag, given in (
            ("--op", ops),
            ("--max-examples", max_examples),
            ("--case", case),
            ("--list", listed),
        ):
            if given:
                raise click.UsageError(
                    f"{flag} does not apply to --prefill-decode, which compares whole models."
                )
        compare(prefill_decode, backend, device, dtype, tokens, seed, as_json)
        return
    from importlib.util import find_spec

    if find_spec("hypothesis") is None:
        raise InputError("verify needs Hypothesis: pip install 'refengine[verify]'")
    from refengine.conformance import report

    names = report.rows(ops)
    if listed:
        say_list(report, names, as_json)
        return
    plan = report.Plan(max_examples or report.Plan.examples, seed, case or "")
    if case:
        names = [report.operation_of(case)]
    wrong = run(report, names, plan, dict(name=backend, dtype=dtype, device=device), limit, as_json)
    if wrong:
        context.exit(1)


def run(report, names: list[str], plan, how: dict, limit: float, as_json: bool) -> bool:
    """Print the rows as they come; return whether any is wrong."""
    from refengine.conformance.watchdog import Watchdog
    from refengine.progress import progress

    dog, results = Watchdog(how, limit), []
    try:
        dog.start()
        for text in dog.notes:
            options.note(text)
        if not as_json:
            yours = f"; yours: {', '.join(dog.brought)}" if dog.brought else ""
            click.echo(f"{how['name']}, {dog.dtype}{yours}\n\n{report.HEADER}")
        with progress("verify", len(names), "operation", as_json) as bar:
            for result in report.report(None, names, plan, dog.judge):
                results.append(result)
                bar.update()
                if as_json:
                    again = (
                        {"reproduce": report.command(result, plan, **how)}
                        if result.verdict == "wrong"
                        else {}
                    )
                    click.echo(json.dumps(result.as_json() | again))
                elif result.verdict in ("pass", "wrong"):
                    bar.clear()
                    click.echo(report.line(result, brief=True))
    finally:
        dog.close()
    if not as_json:
        say_end(report, results, plan, how)
    return not report.passed(results)


def say_end(report, results: list, plan, how: dict) -> None:
    """Print what was left out, what is wrong and how to see it again, and what the columns mean."""
    for text in report.left_out(results):
        click.echo(text)
    click.echo(f"\n{report.LEGEND}")
    wrong = [result for result in results if result.verdict == "wrong"]
    seconds = sum(result.seconds for result in results)
    if not wrong:
        cases = sum(result.recorded + result.drawn for result in results)
        click.echo(f"\nno difference in {cases} cases ({seconds:.0f} s)")
    for result in wrong:
        click.echo(f"\n{result.operation} is wrong: {result.why}")
        if result.as_if:
            click.echo(f"    as if: {', or '.join(result.as_if)}")
        click.echo(f"    {report.command(result, plan, **how)}")


def say_list(report, names: list[str], as_json: bool) -> None:
    """Print the operations, and the sentences that are checked of each."""
    for name in names:
        sentences = [check.sentence for check in report.CHECKS if check.operation == name]
        recorded = [vector.name for vector in report.recorded(name)]
        if as_json:
            click.echo(json.dumps({"operation": name, "recorded": recorded, "checks": sentences}))
            continue
        click.echo(f"{name}   ({len(recorded)} recorded)" if recorded else name)
        for sentence in sentences:
            click.echo(f"    {sentence}")


def compare(model, backend, device, dtype, tokens, seed, as_json) -> None:
    """Print how far prefill and decode of a checkpoint are apart."""
    from dataclasses import asdict

    import refengine
    from refengine.conformance import prefill_decode

    chosen = backend
    if backend in NAMES:
        dtype = dtype or options.dtype_of(model, backend)
    else:
        from refengine.conformance.candidate import resolve

        chosen = resolve(backend, dtype, device)
    how = {"backend": backend, "dtype": dtype or "float32"}
    try:
        with refengine.load(
            model, chosen, dtype=how["dtype"], device=device, deterministic=backend in NAMES
        ) as engine:
            found = prefill_decode.compare(engine, tokens, seed, silent=as_json)
    except InputError:
        raise
    except Exception as error:
        if backend in NAMES:
            raise
        text = " ".join(str(error).split())
        raise InputError(f"{backend} fails: {type(error).__name__}: {text}") from error
    named = ", ".join(how.values())
    click.echo(json.dumps(how | asdict(found)) if as_json else prefill_decode.text(model, found, named))
