"""Render the chapters of spec/ to docs/book/ as Markdown: the docstrings as prose, then the code.

`python -m tools.write.book` writes the book and removes other files from docs/book/; with `--check` it writes
nothing and exits 1, naming the pages that are stale. The output depends on spec/ and on two files beside this
one: first_page.md, and equations.md, the equations of chapters in mathematical notation, with their papers.
"""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "docs" / "book"
CHAPTERS = runpy.run_path(str(ROOT / "spec" / "__init__.py"))["CHAPTERS"]
PAGES = [f"{number:02}-{name}.md" for number, name in enumerate(CHAPTERS, 1)]
FIRST = Path(__file__).with_name("first_page.md").read_text()
EQUATIONS = Path(__file__).with_name("equations.md").read_text()
IN_NOTATION = dict(re.findall(r"^# (\w+)\n\n(.*?)\n(?=\n# |\Z)", EQUATIONS, re.S | re.M))


def pages() -> dict[str, str]:
    """Return every file of the book, by name."""
    sources = [(ROOT / "spec" / f"{name}.py").read_text() for name in ("__init__", *CHAPTERS)]
    book = {page: chapter(i, source) for i, (page, source) in enumerate(zip(PAGES, sources[1:], strict=True))}
    opening, *openings = [ast.get_docstring(ast.parse(source)) for source in sources]
    titles = map(heading, openings)
    contents = [
        f"{int(page[:2])}. [{title}]({page}): {lead}"
        for page, (title, lead, _) in zip(PAGES, titles, strict=True)
    ]
    note = (
        "This is `spec/`, rendered by `python -m tools.write.book`; the code shown is the code that runs.\n"
    )
    first = FIRST.format_map({name: f"[{name}]({page})" for name, page in zip(CHAPTERS, PAGES, strict=True)})
    index = ["# The book", linked(opening), first + "\n" + "\n".join(contents), note]
    return book | {"index.md": "\n\n".join(index)}


def heading(text: str) -> tuple[str, str, str]:
    """Return title, sentence and rest of a chapter's docstring: "Chapter 3. Title: a sentence. The rest"."""
    title, text = re.sub(r"^Chapter \d+\. ", "", text).split(":", 1)
    lead, stop, rest = re.match(r"(.*?)([.?!]|$)(?:\n+| |$)(.*)", text.strip(), re.S).groups()
    return title, " ".join(lead.split()) + stop, rest


def chapter(i: int, source: str) -> str:
    """Return a page: navigation, title, prose, and a section for each definition."""
    module, name = ast.parse(source), CHAPTERS[i]
    title, lead, rest = heading(ast.get_docstring(module))
    used = [
        n
        for n in range(i)
        if re.search(rf"^from refengine\.spec(\.| import .*\b){CHAPTERS[n]}\b", source, re.M)
    ]
    uses = "; builds on " + ", ".join(f"[{CHAPTERS[n]}]({PAGES[n]})" for n in used) if used else ""
    out = [
        f"<!-- written by tools/write/book.py from spec/{name}.py -->",
        navigation(i),
        f"# {i + 1}. {title}",
        linked(lead[:1].upper() + lead[1:]),
        prose(rest),
        linked(IN_NOTATION.get(name, "")),
        f"Code: [spec/{name}.py](../../spec/{name}.py){uses}.",
    ]
    lines, end = source.splitlines(), module.body[0].end_lineno
    between: list[str] = []  # constants and comments between two definitions stay together
    for node in module.body[1:]:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        comments, code, end = lines[end:first], lines[first : node.end_lineno], node.end_lineno
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            out += [
                fenced(between),
                f'<a id="{node.name}"></a>',
                f"## `{node.name}`",
                prose(ast.get_docstring(node) or ""),
                fenced(comments + without_docstring(node, code, first)),
            ]
            between = []
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            between += comments + code
    return "\n\n".join(part for part in [*out, fenced(between), navigation(i)] if part) + "\n"


def without_docstring(node, code: list[str], first: int) -> list[str]:
    if ast.get_docstring(node) is None or len(node.body) == 1:  # a body that is only a docstring keeps it
        return code
    start, stop = node.body[0].lineno - 1 - first, node.body[0].end_lineno - first
    return code[:start] + code[stop + (not code[stop].strip()) :]


def prose(text: str) -> str:
    """Return a docstring as Markdown: indented lines and columns become blocks, references become links."""
    out: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        block = any(line.startswith("  ") or "   " in line for line in paragraph.splitlines())
        if block and out and out[-1].endswith("```"):  # a blank line within a block
            out[-1] = f"{out[-1].removesuffix('```')}\n{dedent(paragraph)}\n```"
        else:
            out.append(f"```text\n{dedent(paragraph)}\n```" if block else linked(paragraph))
    return "\n\n".join(out)


def linked(text: str) -> str:
    """Return the text with links to the chapters, pages and papers that it names."""

    def section(match) -> str:
        anchor = "#" + re.sub(r"[^\w-]", "", match[2].lower().replace(" ", "-")) if match[2] else ""
        return f"[{' '.join(match[0].split())}](../{match[1]}.md{anchor})"

    text = re.sub(r"\barXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r'docs/([\w-]+)\.md(?:,\s+"([^"]+)")?', section, text)
    return re.sub(r"\b[Cc]hapter\s(\d+)", lambda m: f"[{m[0]}]({PAGES[int(m[1]) - 1]})", text)


def fenced(lines: list[str]) -> str:
    code = "\n".join(lines).strip("\n").replace("  # fmt: skip", "")
    return f"```python\n{code}\n```" if code else ""


def navigation(i: int) -> str:
    before = f"[← {CHAPTERS[i - 1]}]({PAGES[i - 1]}) · " if i else ""
    after = f" · [{CHAPTERS[i + 1]} →]({PAGES[i + 1]})" if PAGES[i + 1 :] else ""
    return f"{before}[contents](index.md){after}"


def main(check: bool) -> None:
    book = pages()
    there = {path.name: path.read_text() for path in BOOK.glob("*")}
    stale = sorted(name for name in book.keys() | there.keys() if book.get(name) != there.get(name))
    if check:
        sys.exit(f"docs/book is stale ({', '.join(stale)}): run python -m tools.write.book" if stale else 0)
    BOOK.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (BOOK / name).write_text(book[name]) if name in book else (BOOK / name).unlink()
    print(f"{len(book)} pages in docs/book, {len(stale)} changed")


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
