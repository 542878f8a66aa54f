"""The prose is plain: docstrings begin with a verb or a noun, and code has no persons."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PERSONS = re.compile(r"\b(whoever|nobody|whom|whosoever)\b", re.IGNORECASE)
QUESTIONS = {"What", "Where", "How", "Who", "Whose", "When", "Which", "Why"}
FOLDERS = ("spec", "backends", "refengine", "tools", "tests", "docs")
# Persons in texts and data, and a kernel and a user called "nobody".
STORIES = (
    "tools/tiny/stories/", "refengine/models/", "refengine/quantize/texts.py", "tests/tools/", "tests/repo/"
)  # fmt: skip
NAMES = ("tests/backends/cuda/test_language.py", "tests/engine/test_bad_inputs.py")
LINKS = ("refengine/spec/", "refengine/backends/")


def files(*endings):
    """Return the names of the files with these endings, each once."""
    found = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    names = sorted(path.relative_to(ROOT).as_posix() for path in found if path.suffix in endings)
    return [name for name in names if not name.startswith(LINKS)]


def test_docstrings_begin_with_no_question():
    found = []
    for name in files(".py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                words = (ast.get_docstring(node) or "").split()
                if words and words[0].strip(",.:;") in QUESTIONS:
                    found.append(f"{name}: {getattr(node, 'name', 'module')}: {' '.join(words[:9])}")
    assert not found, "\n".join(found)


def test_code_and_documentation_have_no_persons():
    found = []
    for name in files(".py", ".md", ".cu", ".cuh", ".cpp", ".h", ".c", ".mjs"):
        if not name.startswith(STORIES + NAMES):
            lines = enumerate((ROOT / name).read_text().splitlines(), 1)
            found += [f"{name}:{number}: {line.strip()}" for number, line in lines if PERSONS.search(line)]
    assert not found, "\n".join(found)
