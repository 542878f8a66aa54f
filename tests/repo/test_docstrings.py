"""Every public name of the package has a docstring, which begins without a riddle."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("refengine", "spec", "backends")


def sources() -> list[Path]:
    """Return the modules of the package, each once: refengine/spec and refengine/backends are links."""
    links = [ROOT / "refengine" / name for name in ("spec", "backends")]
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not any(link in path.parents for link in links)]


def public(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Yield names and docstrings of the public classes, methods and functions of a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name.startswith("_"):
                continue
            yield prefix + node.name, ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


def test_every_public_name_has_a_docstring(record_property):
    without, count = [], 0
    for path in sources():
        tree, where = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT)
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            without.append(f"{where}")
        for name, text in public(tree):
            count += 1
            if not text:
                without.append(f"{where}: {name}")
    record_property("docstrings of public names", count)
    assert count > 700 and not without, "\n".join(without)


def test_docstrings_begin_without_a_riddle():
    riddles = ("What ", "Who ", "Nobody ", "Whoever ", "Whatever ")
    found = [
        f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0]}"
        for path in sources()
        for name, text in public(ast.parse(path.read_text(encoding="utf-8")))
        if text and text.startswith(riddles)
    ]
    assert not found, "\n".join(found)
