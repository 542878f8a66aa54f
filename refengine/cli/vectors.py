"""refengine vectors: write vectors for programs in any language, and check the outputs of such a program."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from refengine.backend import NAMES
from refengine.cli import options, with_variables
from refengine.spec.config import InputError

some = click.option(
    "--op",
    "ops",
    multiple=True,
    metavar="NAME",
    help="Only these: an operation, a folder, mixers, states, sampling, packed, texts, or a name pattern.",
)


@click.group(short_help="Write vectors for any language; check outputs.")
def vectors():
    """Write and check vectors: inputs, parameters and right outputs of operations, for any language.

    docs/vectors.md describes the format.
    """


@vectors.command(short_help="Write vectors into a directory.")
@click.argument("directory", type=click.Path(path_type=Path))
@some
@click.option(
    "--cases", type=click.IntRange(min=0, max=9999), default=0, metavar="N", show_default=True,
    help="Draw N more cases of each operation.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0, max=2**31 - 1), default=0, metavar="N", show_default=True,
    help="Seed of the drawn cases.",
)  # fmt: skip
@options.as_json
@options.debug
def write(directory, ops, cases, seed, as_json):
    """Write the shipped vectors into DIRECTORY, and --cases N more of each operation, drawn from --seed.

    Cases that DIRECTORY already holds under other names stay there and in its manifest.
    """
    from refengine.conformance.vectors.files import SHIPPED, holds_a_set, manifest, selected
    from refengine.conformance.vectors.files import write as write_set

    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is not a directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "manifest.json").exists():
        raise InputError(f"{directory} is not empty, and holds no vectors: choose another directory")
    chosen = selected(manifest(SHIPPED), ops)
    there = manifest(directory) if holds_a_set(directory) else []
    count = write_set(directory, _all(chosen, cases, seed), there)
    kept = len(manifest(directory)) - count
    size = sum(path.stat().st_size for path in directory.rglob("*.*"))
    if as_json:
        click.echo(json.dumps({"directory": str(directory), "cases": count, "kept": kept, "bytes": size}))
    else:
        more = f", and {kept} that were there before" if kept else ""
        click.echo(f"{count} cases{more}, {size / 1e6:.2f} MB, in {directory}; manifest.json lists them")


def _all(chosen: list[dict], cases: int, seed: int):
    """Yield the chosen cases of the shipped set, and `cases` new ones of each of their operations."""
    from refengine.conformance.vectors.files import shipped_vector
    from refengine.conformance.vectors.make import PLANS, drawn
    from refengine.conformance.vectors.text import SAMPLINGS, sampling
    from refengine.progress import progress

    operations = list(dict.fromkeys(e["operation"] for e in chosen))
    for e in chosen:
        yield shipped_vector(e["name"])
    drawable = [op for op in operations if op in PLANS or op == "sample"]
    with progress("vectors", cases * len(drawable), "case") as bar:
        for op in drawable:
            for number in range(cases):
                if op == "sample":
                    given, why = list(SAMPLINGS.values())[number % len(SAMPLINGS)]
                    yield sampling(f"sample/seed-{seed}-{number}", given, why, 1000 + 9999 * seed + number)
                else:
                    yield drawn(op, seed, number)
                bar.update()


@vectors.command(short_help="Compute the outputs with a backend of refengine.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--outputs", required=True, type=click.Path(path_type=Path), metavar="DIR2", help="Directory to write."
)
@some
@click.option("--backend", type=click.Choice(NAMES), default="numpy", show_default=True)
@click.option(
    "--dtype", default="float32", type=options.Dtype(), show_default=True, help="Dtype of activations."
)
@options.debug
def compute(directory, outputs, ops, backend, dtype):
    """Write to DIR2 the outputs that a backend computes for the vectors in DIRECTORY, as float64.

    The backend is one of refengine; functions in a file of your own are checked by `refengine verify`.
    """
    from refengine.backend import make
    from refengine.conformance.vectors.files import holds_a_set, one_case, save
    from refengine.conformance.vectors.files import vectors as read_set
    from refengine.conformance.vectors.replay import REPLAY, replay
    from refengine.conformance.vectors.text import HOST, write_answers

    if holds_a_set(outputs):
        raise InputError(f"{outputs} holds vectors, which outputs would overwrite: choose another directory")
    if outputs.exists() and not outputs.is_dir():
        raise InputError(f"{outputs} is not a directory")
    dtype, count = "float32" if dtype == "auto" else dtype, 0
    for vector in read_set(directory, ops):
        known = ("tokenizer", "chat") if vector.texts else (*REPLAY, *HOST)
        if vector.operation not in known:
            what = f"is of {vector.operation!r}, which is no operation that refengine computes"
            raise InputError(f"{directory}: the case {vector.name!r} {what}")
        with one_case(vector, directory, "computed"):
            cfg = vector.cfg if vector.operation in REPLAY else None
        engine = make(backend, cfg, dtype) if cfg is not None else None
        with one_case(vector, directory, "computed"):
            if vector.texts:
                write_answers(outputs, vector)
            else:
                if engine is not None:
                    answers = replay(vector, engine, dtype)
                else:
                    answers = HOST[vector.operation](vector)
                wide = {key: a if a.dtype.kind in "iu" else a.astype("float64") for key, a in answers.items()}
                save(outputs / f"{vector.name}.safetensors", wide, {"engine": f"{backend}, {dtype}"})
        count += 1
    click.echo(f"outputs of {count} cases in {outputs}")


@vectors.command(short_help="Check outputs that another program wrote.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--outputs", required=True, type=click.Path(path_type=Path), metavar="DIR2", help="Their directory."
)
@some
@click.option(
    "--dtype",
    default="float32",
    type=options.Dtype(),
    show_default=True,
    help="Dtype in which the outputs were computed.",
)
@click.option("--complete", is_flag=True, help="Fail cases without a file of outputs too.")
@options.as_json
@options.debug
def check(directory, outputs, ops, dtype, complete, as_json):
    """Compare the outputs in DIR2 with the vectors in DIRECTORY; exit code 1 if one is wrong.

    DIR2 holds files of the same names; each holds the outputs of its case by their names.
    """
    from refengine.conformance.vectors.files import check_outputs
    from refengine.conformance.vectors.text import judge_text_file

    dtype = "float32" if dtype == "auto" else dtype
    rows = check_outputs(directory, outputs, ops, dtype, judge_text_file)
    given = [row for row in rows if row.note != "no file"]
    wrong = [row for row in (rows if complete else given) if not row.passed]
    if as_json:
        click.echo(json.dumps([_as_object(row) for row in (rows if complete else given)]))
    else:
        for row in rows if complete else given:
            click.echo(_line(row))
        left = len(rows) - len(given)
        click.echo(
            f"{len(given) - len([r for r in wrong if r in given])} of {len(given)} cases right in {dtype}"
        )
        if left:
            click.echo(f"{left} cases without a file in {outputs}")
    if wrong:
        raise click.exceptions.Exit(1)


def _as_object(row) -> dict:
    """Return a row for JSON, which has no infinity: null."""
    error = row.error if math.isfinite(row.error) else None
    return row._asdict() | {"error": error, "passed": row.passed}


def _line(row) -> str:
    """Return a row as a line: the case, its error as a part of what is allowed, and its note."""
    verdict = "pass" if row.passed else "FAIL"
    error = f"{row.error:8.1e} of {row.allowed:.1e}" if math.isfinite(row.error) else ""
    return f"{verdict}  {row.case:34} {error:20} {row.note}".rstrip()


for _command in vectors.commands.values():
    with_variables(_command)
