"""Put an edition of the embedded model into the package, and write again what depends on its weights.

    python -m tools.write.edition DIR            every step, in order; DIR as tools.tiny.train left it
    python -m tools.write.edition DIR STEP ...   some: files, texts, vectors, tables, consoles

Tables and consoles of the pages are replaced by what their commands print, which takes a few minutes on a
quiet machine. Sentences that quote them, the story in README.md, modelopt's calibration and the times
remain: docs/contributing.md lists them.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.tiny.checkpoint import PACKAGED

ROOT = Path(__file__).resolve().parents[2]
TABLES = {  # the page and the head of a table: the command that prints its rows
    ("docs/packed.md", "| recipe | MB |"): "tools.bench.packed 20",
    ("docs/storage.md", "| stored | loss |"): "tools.bench.state_dtypes --texts 32 --most 400",
    ("docs/speculation.md", "| text | temperature |"): (
        "tools.bench.speculation acceptance --count 10 --tokens 64 --drafts 5"
    ),
}
CONSOLES = {  # a command that a page shows after a prompt, and its page
    "refengine verify --prefill-decode tiny --tokens 64": "docs/verify.md",
    "refengine quantize tiny OUT --recipe nvfp4": "docs/packed.md",
}
STEPS = ("files", "texts", "vectors", "tables", "consoles")


def printed(module: str, folder: str | None = None) -> str:
    """Return what `python -m MODULE ARGUMENTS` prints, run in the folder."""
    command = [sys.executable, "-m", *shlex.split(module)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder or ROOT)
    return done.stdout


def with_rows(page: str, head: str, output: str) -> str:
    """Return a page whose table that begins with `head` has the rows of the first table of the output.

    ValueError unless the page has one such table and the output one with as many columns.
    """
    tables = re.findall(r"(?:^\|.*\n)+", output, re.M)
    rows = [line for line in tables[0].splitlines() if line][2:] if tables else []
    found = re.findall(rf"^{re.escape(head)}.*\n\|[-| ]+\n(?:\|.*\n)*", page, re.M)
    if not rows or len(found) != 1 or rows[0].count("|") != found[0].splitlines()[0].count("|"):
        raise ValueError(f"the table {head!r} of the page and the printed one do not fit")
    rows = [re.sub(r"(?<=\d)%", " %", row) if " % " in found[0] else row for row in rows]
    top = found[0].splitlines()[:2]
    return page.replace(found[0], "\n".join([*top, *rows]) + "\n")


def with_console(page: str, command: str, output: str) -> str:
    """Return a page that shows the output after the command; a line "..." stays, for the lines it stood for.

    ValueError unless the page shows the command once, in a block of its own.
    """
    found = re.findall(rf"^\$ {re.escape(command)}\n((?:.*\n)*?)```", page, re.M)
    if len(found) != 1:
        raise ValueError(f"the page shows {command!r} {len(found)} times")
    old, new = found[0].splitlines(), output.strip().splitlines()
    if "..." in old:
        before = old.index("...")
        new = [*new[:before], "...", *new[len(new) - len(old) + before + 1 :]]
    return page.replace(f"$ {command}\n{found[0]}", f"$ {command}\n" + "\n".join(new) + "\n")


def copy(folder: Path) -> None:
    """Copy all files of an edition into the package, but those of its run."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            shutil.copy(path, PACKAGED)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}: there are {', '.join(STEPS)}")
    if not (args.folder / "model.safetensors").is_file():
        parser.error(f"{args.folder} has no model.safetensors")
    steps = args.steps or STEPS
    if "files" in steps:
        copy(args.folder)
    for step, module in (("texts", "tools.write.quantize_texts"), ("vectors", "tools.vectors.record")):
        if step in steps:
            print(step, printed(module).strip(), flush=True)
    for (name, head), module in TABLES.items() if "tables" in steps else ():
        page = ROOT / name
        page.write_text(with_rows(page.read_text(), head, printed(module)))
        print("table", name, flush=True)
    for command, name in CONSOLES.items() if "consoles" in steps else ():
        page = ROOT / name
        with tempfile.TemporaryDirectory() as folder:
            page.write_text(with_console(page.read_text(), command, printed(command, folder)))
        print("console", name, flush=True)


if __name__ == "__main__":
    main()
