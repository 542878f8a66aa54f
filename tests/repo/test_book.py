"""The pages in docs/book are made from the chapters in spec/ and are up to date."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOOK = runpy.run_path(str(ROOT / "tools" / "write" / "book.py"))
CHAPTERS = BOOK["CHAPTERS"]


def module(name):
    return ast.parse((ROOT / "spec" / f"{name}.py").read_text())


def test_the_book_is_woven_from_the_spec_as_it_is():
    """After an edit of spec/: python -m tools.write.book"""
    command = [sys.executable, ROOT / "tools" / "write" / "book.py", "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_figures_are_drawn_from_the_configurations_as_they_are():
    """After an edit of tools/write/figures.py: python -m tools.write.figures"""
    command = [sys.executable, "-m", "tools.write.figures", "--check"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_opens_with_its_number_and_title(name):
    number, opening = CHAPTERS.index(name) + 1, ast.get_docstring(module(name))
    assert re.match(rf"Chapter {number}\. [A-Z][^:\n]*: \w", opening)


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_page_has_all_of_its_chapter_but_the_imports(name):
    text = BOOK["chapter"](CHAPTERS.index(name), (ROOT / "spec" / f"{name}.py").read_text())
    shown = ast.parse("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)))
    written = [node for node in module(name).body[1:] if not isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [code(node) for node in shown.body] == [code(node) for node in written]
    for docstring in filter(None, map(docstring_of, module(name).body)):
        assert set(words(docstring)) <= set(words(text))


def docstring_of(node):
    return ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None


def code(node):
    """Return a statement without its docstring, unless nothing else would be left."""
    if docstring_of(node) and len(node.body) > 1:
        node.body = node.body[1:]
    return ast.unparse(node)


def words(text):
    """Return the words of a text, without the targets of links."""
    return re.findall(r"\w+", re.sub(r"\]\([^)]*\)", "", text))
