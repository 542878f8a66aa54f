"""refengine trace: record the activations of a model on given tokens."""

from __future__ import annotations

import functools
from dataclasses import replace

import click
from click.core import ParameterSource

from refengine.cli import options
from refengine.cli.generate import check_place
from refengine.cli.tokenize import ids_of
from refengine.ranks.comm import TIMEOUT
from refengine.spec.config import InputError
from refengine.units import bytes_text

SOURCES = ("refengine", "transformers", "transformers-unclamped")


def model_argument(command):
    """Return the command with an argument MODEL, which goes before --model.

    For transformers, --dtype auto means float32: what it rounds hides what it does.
    """

    @click.argument("given", required=False, metavar="[MODEL]")
    @functools.wraps(command)
    def call(given, **how):
        if given is not None:
            how["model"] = given
        if how["source"] != SOURCES[0] and how["dtype"] == "auto":
            how["dtype"] = "float32"
        return command(**how)

    return call


@click.command(cls=options.Command, short_help="Record the activations of a model in a file.")
@click.option("--output", "-o", required=True, metavar="FILE", help="The safetensors file to write.")
@click.option("--prompt", "-p", "prompts", multiple=True, metavar="TEXT", help="A prompt (repeatable).")
@click.option("--ids", multiple=True, metavar="IDS", help='Token ids, as in "10 25 99" (repeatable).')
@click.option("--cut", type=click.IntRange(1), metavar="N", help="Read prompts in pieces of N tokens.")
@click.option(
    "--steps", type=click.IntRange(0), default=0, metavar="N", help="After the prompts, decode N tokens."
)
@click.option(
    "--from", "source", type=click.Choice(SOURCES), default="refengine", metavar="ENGINE",
    help="refengine, transformers, transformers-unclamped.",
)  # fmt: skip
@model_argument
@options.engine
@options.debug
def trace(output, prompts, ids, cut, steps, source, **how):
    """Record what every layer of MODEL computes on a batch of prompts; `refengine diff` reads the file."""
    from refengine.checkpoint.fingerprint import fingerprint

    if not prompts and not ids:
        raise click.UsageError("give a --prompt or --ids.")
    check_place(output)
    if how["packed_inputs"]:
        raise InputError("a trace records inputs before they are packed: leave out --packed-inputs")
    if source != "refengine":
        made = of_transformers(prompts, ids, cut, steps, source == SOURCES[1], **how)
    else:
        from refengine import __version__
        from refengine.checkpoint import Checkpoint
        from refengine.conformance.traces.record import record

        if how["backend"] == "cpu":  # a trace shows what is computed, not how it is stored
            how["kv_dtype"] = how["kv_dtype"] or "float32"
            if not asked("dtype") and Checkpoint.open(how["model"]).packed:
                how["dtype"] = "float32"  # other dtypes round what packed weights are multiplied by
        engine = options.load(tp=1, ep=1, pp=1, timeout=TIMEOUT, **how)
        rows = [engine.ids(options.checked_text(text)) for text in prompts]
        rows += [engine.ids(ids_of(text)) for text in ids]
        check_room(rows, steps, engine.config)
        made = record(
            engine.model, rows, cut, steps,
            engine=f"refengine {__version__} {engine.model.backend.name}",
            fingerprint=fingerprint(engine.config, engine.checkpoint.read),
            weights_dtype=how["dtype"],
            packed_dtype=packed_dtype(engine),
        )  # fmt: skip
        engine.close()
        if how["backend"] == "cpu" and engine.checkpoint.packed and how["dtype"] in ("bfloat16", "float16"):
            made = replace(made, dtype=how["dtype"])  # of the inputs of products, at least
        if made.dtype != how["dtype"] and asked("dtype"):
            what = f"computes in {made.dtype}: the activations have that dtype, the weights {how['dtype']}"
            options.note(f"the {engine.model.backend.name} backend {what}")
    made.save(output)
    options.note(
        f"{output}: {len(made.arrays)} arrays of {sum(map(len, made.token_ids))} tokens, "
        f"{bytes_text(sum(made.array(name).nbytes for name in made.arrays))}"
    )


def asked(name: str) -> bool:
    """Return whether a parameter was given to the command, and is not its default."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def packed_dtype(engine) -> str:
    """Return the dtype that the backend dequantizes packed weights to; "" for a model without them."""
    if not engine.checkpoint.packed:
        return ""
    return "float32" if engine.model.backend.packed else "bfloat16"


def of_transformers(prompts, ids, cut, steps, clamp: bool, model: str, dtype: str, **how):
    """Return the trace of transformers' own model."""
    from refengine.checkpoint import Checkpoint
    from refengine.checkpoint.fingerprint import fingerprint
    from refengine.conformance.traces.hooks import trace_of_transformers
    from refengine.text.tokenizer import Tokenizer

    checkpoint = Checkpoint.open(model)
    cfg, tokenizer = checkpoint.config, None
    if prompts:
        tokenizer = Tokenizer.load(checkpoint.directory, cfg)
    rows = [tokenizer.encode(options.checked_text(text)) for text in prompts] if tokenizer else []
    rows += [ids_of(text) for text in ids]
    for row in rows:
        if not row:
            raise InputError("the prompt is empty")
        if wrong := [token for token in row if token >= cfg.vocab_size]:
            raise InputError(f"token id {wrong[0]} is not in the vocabulary of {cfg.vocab_size}")
    check_room(rows, steps, cfg)
    return trace_of_transformers(
        checkpoint.directory, cfg, rows, cut, steps, dtype, clamp,
        fingerprint=fingerprint(cfg, checkpoint.read),
    )  # fmt: skip


def check_room(rows: list[list[int]], steps: int, cfg) -> None:
    """Raise InputError where prompts and steps are longer than the model's context."""
    if (longest := max(map(len, rows)) + steps) > cfg.max_position_embeddings:
        raise InputError(
            f"{longest} tokens are more than the model's context of {cfg.max_position_embeddings}"
        )
