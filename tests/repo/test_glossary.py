"""Each name in docs/glossary.md exists: in the chapters, in the configuration, or in the tensor table."""

import ast
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from refengine.spec.config import Config
from refengine.spec.tensors import table
from tools.releases import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
SYMBOLS, WORDS = (ROOT / "docs" / "glossary.md").read_text().split("\n## ")[1:]


def rows(section):
    """Return the cells of each row of a section's table."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def spelled(path):
    """Return the names that a module uses."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return {
        name for node in nodes for part in ("id", "arg", "attr", "name") if (name := getattr(node, part, ""))
    }


def test_symbols_have_the_names_of_the_code_and_of_a_checkpoint():
    code = set().union(*map(spelled, (ROOT / "spec").glob("*.py")))
    tensors = {row.key for row in table(replace(CONFIGS["super"], n_routed_experts=1))}
    fields = set(Config.__dataclass_fields__)
    named = {name for *_, cell, _ in rows(SYMBOLS) for name in re.findall("`([^`]+)`", cell)}
    kept = {name for *_, cell in rows(SYMBOLS) for name in re.findall("`([^`]+)`", cell)}
    assert len(named) > 25 and not named - code - fields
    assert len(kept) > 25 and not kept - tensors - fields


@pytest.mark.parametrize("dotted", re.findall(r"`(refengine\.[\w.]+)`", WORDS))
def test_words_lead_to_code(dotted):
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for name in parts[size:]:
            fields = getattr(found, "__dataclass_fields__", {})
            found = fields[name] if name in fields else getattr(found, name)
        return
    raise AssertionError(dotted)
