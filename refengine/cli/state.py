"""refengine state: saved states of texts and conversations."""

from __future__ import annotations

import json
from pathlib import Path

import click

from refengine.cli import options, with_variables
from refengine.units import bytes_text


@click.group(short_help="Show a saved state.")
def state():
    """States that generate --save-state and chat --state have saved; docs/states.md describes them."""


@state.command(short_help="Show what a saved state holds.")
@click.argument("file", type=options.FileName())
@options.as_json
@options.debug
def show(file, as_json):
    """Check FILE, and show the model, the tokens and the memory of the state in it."""
    found = contents(file)
    click.echo(json.dumps(found, ensure_ascii=False) if as_json else text(found))


def contents(file: str) -> dict:
    """Return what a saved state holds, ready for JSON; InputError where it is none, or damaged."""
    from refengine.states.arrays import is_key
    from refengine.states.file import VERSION
    from refengine.states.state import State

    found = State.load(file)
    sizes: dict[str, dict] = {}
    for name, a in found.arrays.items():
        kind = "keys and values" if is_key(name) else "convolution and S"
        part = sizes.setdefault(kind, {"bytes": 0, "dtypes": []})
        part["bytes"] += a.nbytes
        part["dtypes"] = sorted({*part["dtypes"], a.dtype.name})
    return {
        "file": file,
        "bytes": Path(file).stat().st_size,
        "layout_version": VERSION,
        "model": found.name,
        "fingerprint": found.model,
        "tokens": len(found.ids),
        "position": found.position,
        "arrays": sizes,
        "sampling": found.sampling,
        "generator": found.generator is not None,
        "talk": bool(found.talk),
    }


def text(found: dict) -> str:
    """Return one screen that shows what `contents` found."""
    sampling = ", ".join(f"{name} {value}" for name, value in found["sampling"].items())
    lines = [
        f"{found['file']}: {bytes_text(found['bytes'])}, layout version {found['layout_version']}",
        f"model        {found['model'] or 'without a name'}, fingerprint {found['fingerprint']}",
        f"tokens       {found['tokens']}, of which the first {found['position']} have been read",
    ]
    for kind, part in found["arrays"].items():
        lines.append(f"memory       {bytes_text(part['bytes'])} {kind}, {', '.join(part['dtypes'])}")
    goes_on = "; its random generator goes on" if found["generator"] else ""
    lines.append(f"sampling     {sampling or 'as the checkpoint recommends'}{goes_on}")
    lines += ["talk         the messages of a conversation"] * found["talk"]
    return "\n".join(lines)


for command in state.commands.values():
    with_variables(command)
