"""Write what the embedded model prints into README.md: its story, its answer, and its size.

    python -m tools.tiny.readme --stories 12    print the stories of the seeds 0 to 11, with their faults
    python -m tools.tiny.readme --seed 4        write the story of seed 4, the answer and the size

Everything is printed in float64, where no rounding turns one token into another; the tests do the same.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from refengine.checkpoint import Checkpoint
from refengine.spec.tensors import parameters, table
from tools.tiny import second_reading
from tools.tiny.stories import check

README = Path(__file__).resolve().parents[2] / "README.md"
STORY = re.compile(r'(refengine generate "[^\n]*" --seed )(\d+)(\n```\n\n)((?:>.*\n)+)')
TALK = re.compile(r"(```sh\nrefengine )(chat [^\n]*)(\n```\n\n)((?:>.*\n)+)")
SIZE = re.compile(r"(It has )([\d.]+)( million parameters)")


def printed(command: str) -> str:
    """Return what a command prints in float64."""
    words = [*shlex.split(command), "--dtype", "float64", "--backend", "numpy"]
    done = subprocess.run(
        [sys.executable, "-m", "refengine", *words], check=True, capture_output=True, text=True
    )
    return done.stdout


def told(seed: int) -> str:
    """Return the story of a seed."""
    return printed(f'generate "Once upon a time" --seed {seed}')


def quoted(text: str) -> str:
    """Return a text as a quotation in Markdown."""
    return "".join(f"> {line}\n" if line else ">\n" for line in text.splitlines())


def updated(readme: str, seed: int, story: str, answer: str, size: int) -> str:
    """Return the README with another story, answer and number of parameters."""
    readme = STORY.sub(lambda m: f"{m[1]}{seed}{m[3]}{quoted(story)}", readme)
    readme = TALK.sub(lambda m: f"{m[1]}{m[2]}{m[3]}{quoted(answer)}", readme)
    return SIZE.sub(lambda m: f"{m[1]}{size / 1e6:.1f}{m[3]}", readme)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=0, help="print the stories of so many seeds")
    parser.add_argument("--seed", type=int, help="of the story to write")
    args = parser.parse_args()
    for seed in range(args.stories):
        story = told(seed).strip()
        faults = [check(story).why, *map(": ".join, second_reading.read(story).faults)]
        print(f"--seed {seed}: {'; '.join(filter(None, faults)) or 'no fault'}\n\n{story}\n", flush=True)
    if args.seed is not None:
        readme = README.read_text(encoding="utf-8")
        with Checkpoint.open("tiny") as checkpoint:
            size = parameters(table(checkpoint.config))
        answer = printed(TALK.search(readme)[2])
        if not answer.strip():
            sys.exit("the answer of the chat is empty: README.md is left as it is")
        README.write_text(updated(readme, args.seed, told(args.seed), answer, size), encoding="utf-8")


if __name__ == "__main__":
    main()
