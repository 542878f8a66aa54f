"""Imports run one way, spec <- backends <- refengine, and the book can be read in its order."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from refengine.spec import CHAPTERS

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("spec", "backends", "refengine")
SPEC_MAY = {"numpy", "ml_dtypes", "jaxtyping"}
CHOSEN_BY_THE_USER = {"torch", "cupy", "mpi4py", "gguf", "transformers"}
FILES = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]


def is_for_types_only(node) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(path: Path, at_import_time: bool = False):
    """Names of the modules a file imports: all of them, or those it cannot be imported without."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if at_import_time:
        later = [node for node in nodes if isinstance(node, ast.FunctionDef) or is_for_types_only(node)]
        inside = {id(inner) for node in later for inner in ast.walk(node)}
        nodes = [node for node in nodes if id(node) not in inside]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides where it goes"
            # `from refengine.spec import moe` names a chapter; `from refengine.spec.moe import experts` too
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (named if node.module in ORDER else [node.module])


def each(files):
    return pytest.mark.parametrize("path", files, ids=lambda path: str(path.relative_to(ROOT)))


@each(FILES)
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    later = ORDER[ORDER.index(package) + 1 :]
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in later, f"{package} may not know of {name}"
        assert top not in {"tests", "tools"}, f"{name} is not shipped"
        if package == "spec":
            assert top in {"spec"} | SPEC_MAY | sys.stdlib_module_names, f"spec may not import {name}"


@each([path for path in FILES if "backends" not in path.parts])
def test_what_the_user_may_choose_is_imported_only_when_chosen(path):
    found = {name.split(".")[0] for name in imports(path, at_import_time=True)}
    assert not found & CHOSEN_BY_THE_USER


def test_importing_refengine_brings_no_heavy_library():
    """In a process of its own, where nothing has been imported yet."""
    script = "import sys, spec, refengine, refengine.cli; print(*{m.split('.')[0] for m in sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & CHOSEN_BY_THE_USER


def test_every_file_of_the_book_is_a_chapter():
    files = {path.stem for path in (ROOT / "spec").glob("*.py")} - {"__init__"}
    assert sorted(CHAPTERS) == sorted(files)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_uses_only_earlier_ones(chapter):
    path = ROOT / "spec" / f"{chapter}.py"
    used = {name.split(".")[1] for name in imports(path) if name.startswith("spec.")}
    assert used <= set(CHAPTERS[: CHAPTERS.index(chapter)]), f"{chapter} uses {used}"
    title = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert title.strip(), f"{chapter} does not say what it is about"
