"""refengine inspect: show the parts of a checkpoint, and the memory of a sequence."""

from __future__ import annotations

import json

import click
from click.core import ParameterSource

from refengine.cli import options
from refengine.machine import available_memory, processors
from refengine.units import bytes_text, count_text


class Bandwidth(options.Bytes):
    """Reads bytes a second, or `measure`."""

    name = "BYTES|measure"

    def convert(self, value, param, ctx):
        """Return the number, more than 0, or "measure"; a usage error for anything else."""
        found = value if value == "measure" else super().convert(str(value).removesuffix("/s"), param, ctx)
        if not found:
            self.fail("memory that reads 0 bytes a second computes nothing.", param, ctx)
        return found


@click.command(short_help="Show what a model is made of.")
@click.argument("model", required=False, type=options.ModelName())
@click.option(
    "--model",
    "-m",
    "named",
    type=options.ModelName(),
    default="tiny",
    metavar="MODEL",
    help="The same as the argument MODEL.",
)
@click.option(
    "--backend",
    type=click.Choice(("cpu", "numpy", "torch", "cuda")),
    metavar="NAME",
    help="Print the memory of a sequence on this backend.  [default: cuda with a GPU, else cpu]",
)
@click.option("--dtype", type=options.Dtype(), default="auto", help="Dtype of the weights on that backend.")
@options.storage
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help="Number of tokens of that sequence.  [default: the model's context]",
)
@click.option("--recipe", metavar="NAME", help="Show a copy that `quantize --recipe NAME` would write.")
@click.option(
    "--memory",
    type=options.Bytes(),
    metavar="BYTES",
    help="Memory that model and sequence have to fit into.  [default: what is free here]",
)
@click.option(
    "--bandwidth",
    type=Bandwidth(),
    metavar="BYTES",
    help="Bytes a second that it reads (3.35TB), or measure: here. Bounds the tokens a second.",
)
@click.option("--layers", is_flag=True, help="Print bytes and precision of each layer too.")
@options.as_json
@options.quiet
@options.debug
@click.pass_context
def inspect(
    click_context, model, named, backend, dtype, kv_dtype, ssm_dtype, context, recipe, memory, bandwidth,
    layers, as_json,
):  # fmt: skip
    """Show the layers and sizes of MODEL, bytes by role, active parameters, and the state of a sequence.

    MODEL may be a config.json, or a directory without weights: then sizes follow from the configuration.
    """
    from refengine.anatomy import anatomy, room
    from refengine.backend import cuda_devices
    from refengine.checkpoint.planned import opened
    from refengine.storage import bytes_on, storage

    if model and click_context.get_parameter_source("named") is ParameterSource.COMMANDLINE:
        raise click.UsageError("give the model once: as an argument or with -m.")
    checkpoint = opened(model or named)
    if recipe:
        from refengine.quantize.recipes import recipe_of
        from refengine.quantize.write import copied

        checkpoint = copied(checkpoint, recipe_of(recipe))
    backend = backend or ("cuda" if cuda_devices() else "cpu")
    dtype = checkpoint.auto_dtype(backend) if dtype == "auto" else dtype
    kept = storage(checkpoint, kv_dtype, ssm_dtype)
    tokens = context or checkpoint.config.max_position_embeddings
    state = bytes_on(backend, checkpoint.config, dtype, kept.kv, kept.ssm)
    needed = room(checkpoint, backend, state, tokens)
    memory = memory if memory is not None or backend == "cuda" else available_memory()
    needed |= {"memory": memory, "bandwidth": measured() if bandwidth == "measure" else bandwidth}
    found = anatomy(checkpoint) | {
        "state": state | {"backend": backend, "context": tokens, "context_bytes": needed["context_bytes"]},
        "room": needed,
    }
    click.echo(json.dumps(found) if as_json else text(found, layers))


def measured() -> float:
    """Return the bytes a second that all processors of this process read from memory together."""
    from refengine.bench import read_bandwidth

    return read_bandwidth(processors())


def fit(room: dict) -> list[str]:
    """Return lines on whether weights and sequence fit into the memory, and how fast a token can be."""
    need, memory, bandwidth = room["weights_bytes"] + room["context_bytes"], room["memory"], room["bandwidth"]
    lines = []
    if memory is not None:
        verdict = "fits" if need <= memory else "does not fit"
        lines += [
            f"memory        {bytes_text(room['weights_bytes'])} of weights and that context are "
            f"{bytes_text(need)}: {verdict} into {bytes_text(memory)}"
        ]
    if bandwidth:
        rate = bandwidth / room["step_bytes"]
        most = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        lines += [
            f"speed         after that context a token reads {bytes_text(room['step_bytes'])}: "
            f"at {bytes_text(bandwidth)}/s at most {most} tokens/s, one sequence alone"
        ]
    return lines


def table(title: str, parts: dict[str, dict], whole: int) -> list[str]:
    """Return a line for each part: tensors, parameters, bytes, share of them all, bits an element, dtypes."""
    head = f"{title:22}{'tensors':>9}{'parameters':>18}{'bytes':>12}{'share':>9}{'bits':>7}  dtypes"
    return [head] + [
        f"{name:22}{part['tensors']:9,}{part['parameters']:18,}{bytes_text(part['bytes']):>12}"
        f"{part['bytes'] / whole:9.1%}{8 * part['bytes'] / part['parameters']:7.2f}  "
        + ", ".join(f"{count} {dtype}" for dtype, count in part["dtypes"].items())
        for name, part in parts.items()
    ]


def text(a: dict, layers: bool = False) -> str:
    """Return one screen that shows what `anatomy` found; with `layers` also a line for each layer."""
    c, s, head = a["config"], a["state"], a["mtp_pattern"]
    lines = [
        a["path"],
        f"pattern       {a['pattern']}" + (f"   prediction head {head}" if head else ""),
        f"layers        {len(a['pattern'])}: " + ", ".join(f"{n} {kind}" for kind, n in a["layers"].items()),
        f"sizes         hidden {c['hidden_size']}, vocabulary {c['vocab_size']}, "
        f"context {c['max_position_embeddings']}",
    ]
    if "mamba_num_heads" in c:
        lines += [
            f"mamba         {c['mamba_num_heads']} heads x {c['mamba_head_dim']}, "
            f"state {c['ssm_state_size']}, {c['n_groups']} groups, "
            f"convolution {c['conv_kernel']}, chunk {c['chunk_size']}"
        ]
    if "num_attention_heads" in c:
        lines += [
            f"attention     {c['num_attention_heads']} query heads, "
            f"{c['num_key_value_heads']} key/value heads x {c['head_dim']}, no positions"
        ]
    if "n_routed_experts" in c:
        latent = f", latent {c['moe_latent_size']}" if c["moe_latent_size"] else ""
        lines += [
            f"experts       {c['num_experts_per_tok']} of {c['n_routed_experts']}, "
            f"width {c['moe_intermediate_size']}{latent}, "
            f"shared {c['moe_shared_expert_intermediate_size']}"
        ]
    if "intermediate_size" in c:
        lines += [f"mlp           width {c['intermediate_size']}"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in a["dtypes"].items())
    lines += [
        f"parameters    {a['parameters']:,} ({count_text(a['parameters'])})"
        + (f", {a['parameters_without_head']:,} without the prediction head" if head else ""),
        f"active        {count_text(a['active_parameters'])} a token, "
        f"{count_text(a['active_parameters_with_lm_head'])} with the output layer",
        f"tensors       {a['tensors']:,} ({dtypes}), {bytes_text(a['bytes'])}",
        f"precision     {8 * a['bytes'] / a['parameters']:.2f} bits an element; "
        f"a token reads {bytes_text(a['bytes_of_a_token'])}",
        "",
    ]
    by_size = dict(sorted(a["roles"].items(), key=lambda item: -item[1]["bytes"]))
    lines += table("role", by_size, a["bytes"])
    if layers:
        named = {f"{name}  {part['kind'] or ''}".strip(): part for name, part in a["blocks"].items()}
        lines += ["", *table("layer", named, a["bytes"])]
    fixed = s["ssm_bytes"] + s["conv_bytes"]
    lines += [
        "",
        f"a sequence    {bytes_text(fixed)} of state whatever its length "
        f"(S {bytes_text(s['ssm_bytes'])} in {s['ssm_dtype']}, "
        f"convolution {bytes_text(s['conv_bytes'])} in {s['dtype']})",
        f"a token       {bytes_text(s['kv_bytes_per_token'])} of keys and values in {s['kv_dtype']}"
        + (f", and {bytes_text(s['mtp_kv_bytes_per_token'])} for the prediction head" if head else ""),
        f"a context     of {s['context']:,} tokens takes {bytes_text(s['context_bytes'])} "
        f"on the {s['backend']} backend",
        *fit(a["room"]),
    ]
    notes = [] if options.flag("quiet") else [f"note          {note}" for note in a["notes"]]
    return "\n".join(lines + notes)
