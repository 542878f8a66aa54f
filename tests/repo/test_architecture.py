"""Imports have one direction, refengine.spec <- refengine.backends <- the rest, in the order of the book."""

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
MODULES = {"refengine/*.py": 16, "tests/*.py": 6, "tools/*.py": 8}  # most files of a folder


def package_of(module: str) -> str:
    """Return the package of ORDER to which one of our modules belongs, or another module's top-level name."""
    top, *rest = module.split(".")
    return rest[0] if top == "refengine" and rest and rest[0] in ORDER[:2] else top


def module_of(path: Path) -> str:
    """Return the dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in ("refengine",) * (parts[0] in ORDER[:2]) + parts if part != "__init__")


def is_for_types_only(node) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(path: Path, at_import_time: bool = False):
    """Return the modules that a file imports: all of them, or only those that it needs to be imported."""
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
            yield from (name if name in NAMES else node.module for name in named)


NAMES = {module_of(path) for path in FILES}


def each(files):
    return pytest.mark.parametrize("path", files, ids=lambda path: str(path.relative_to(ROOT)))


@each(FILES)
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    later = ORDER[ORDER.index(package) + 1 :]
    for name in imports(path):
        top = package_of(name)
        assert name.split(".")[0] not in {"spec", "backends"}, f"{name} is found from this folder only"
        assert top not in later, f"{package} may not know of {name}"
        assert top not in {"tests", "tools"}, f"{name} is not shipped"
        if package == "spec":
            assert top in {"spec"} | SPEC_MAY | sys.stdlib_module_names, f"spec may not import {name}"


@each([path for path in FILES if "backends" not in path.parts])
def test_what_the_user_may_choose_is_imported_only_when_chosen(path):
    found = {name.split(".")[0] for name in imports(path, at_import_time=True)}
    assert not found & CHOSEN_BY_THE_USER


def test_importing_refengine_brings_no_heavy_library():
    """In a separate process, in which nothing has been imported yet."""
    script = (
        "import sys, refengine.spec, refengine, refengine.cli; print(*{m.split('.')[0] for m in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & CHOSEN_BY_THE_USER


def test_every_file_of_the_book_is_a_chapter():
    files = {path.stem for path in (ROOT / "spec").glob("*.py")} - {"__init__"}
    assert sorted(CHAPTERS) == sorted(files)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_uses_only_earlier_ones(chapter):
    path = ROOT / "spec" / f"{chapter}.py"
    used = {name.split(".")[2] for name in imports(path) if name.startswith("refengine.spec.")}
    assert used <= set(CHAPTERS[: CHAPTERS.index(chapter)]), f"{chapter} uses {used}"
    title = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert title.strip(), f"{chapter} does not say what it is about"


def test_no_import_circle():
    """Only imports at module level count; an import inside a function happens later."""
    arrows = {module_of(path): set(imports(path, at_import_time=True)) & NAMES for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in sorted(arrows[module]):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(arrows):
        visit(module, ())


def test_tools_never_import_tests():
    for path in sorted((ROOT / "tools").rglob("*.py")):
        tree = ast.parse(path.read_text())
        froms = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = [
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        ]
        assert not [name for name in froms + names if name.split(".")[0] == "tests"], path


@pytest.mark.parametrize("pattern, most", MODULES.items())
def test_a_folder_holds_few_modules(pattern, most):
    assert len(list(ROOT.glob(pattern))) <= most


def test_a_wrong_shape_goes_red():
    """The suite runs with --jaxtyping-packages: signatures of the spec are assertions here."""
    import numpy as np
    from jaxtyping import TypeCheckError

    from refengine.spec.norm import rms_norm

    x, weight = np.zeros((1, 2, 3), np.float32), np.zeros(3, np.float32)
    rms_norm(x, None, weight, 1e-5)
    with pytest.raises(TypeCheckError):
        rms_norm(x, None, np.zeros(4, np.float32), 1e-5)


def test_a_wrong_shape_goes_red_after_right_ones():
    """Each form of calls is checked once: the forms of arguments, and of results of the same arguments."""
    import numpy as np
    from beartype import beartype
    from jaxtyping import Float, TypeCheckError

    from tests.support.shapes import jaxtyped_once

    results = []

    @jaxtyped_once(typechecker=beartype)
    def pop(x: Float[np.ndarray, "l d"]) -> Float[np.ndarray, "l d"]:
        return results.pop()

    right = np.zeros((2, 3))
    for _ in range(2):
        results[:] = [right]
        assert pop(right) is right
        for wrong in (np.zeros((2, 4)), np.zeros((2, 3), int), np.zeros(3), None):
            for x, result in ((wrong, right), (right, wrong)):
                results[:] = [result]
                with pytest.raises(TypeCheckError):
                    pop(x)
