"""Give each file outside docs/ that a page links to a page of its own in the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<!`)\]\(((?:\.\./)+[^)#\s]+)((?:#[^)\s]*)?)\)")
MATH = re.compile(r"^```math\n(.*?)^```$|\$`([^`]+)`\$", re.S | re.M)
LANGUAGES = {".py": "python", ".c": "c", ".mjs": "javascript", ".cpp": "cpp"}


def outside(page: str, target: str) -> Path | None:
    """Return the file outside docs/ to which a link of a page leads, or None."""
    path = (DOCS / page).parent.joinpath(target).resolve()
    return path if path.is_file() and ROOT in path.parents and DOCS not in path.parents else None


def page_of(path: Path) -> str:
    """Return the name of the page that shows a file."""
    name = path.relative_to(ROOT).as_posix()
    return f"source/{name}" if path.suffix == ".md" else f"source/{name}.md"


def rewritten(markdown: str, page: str, base: Path) -> str:
    """Return the text of a page of the site, whose links start from `base` in the repository."""

    def link(match: re.Match) -> str:
        target = base.joinpath(match[1]).resolve()
        if DOCS in target.parents:
            to = target.relative_to(DOCS).as_posix()
        elif target.is_file() and ROOT in target.parents:
            to = page_of(target)
        else:
            return match[0]
        return f"]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{match[2]})"

    return LINK.sub(link, markdown)


def on_files(files, config):
    """Add the style sheet, and the pages of linked files."""
    style = Path(__file__).with_name("style.css")
    files.append(File.generated(config, style.name, abs_src_path=str(style)))
    linked: set[Path] = set()
    for file in files.documentation_pages():
        text = Path(file.abs_src_path).read_text()
        linked |= {found for match in LINK.finditer(text) if (found := outside(file.src_path, match[1]))}
    for path in sorted(linked):
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        if path.suffix == ".md":
            content = relinked(text, page_of(path), path.parent, linked)
        else:
            content = f"# {name}\n\n```{LANGUAGES.get(path.suffix, 'text')}\n{text}\n```\n"
        files.append(File.generated(config, page_of(path), content=content))
    return files


def relinked(markdown: str, page: str, base: Path, linked: set[Path]) -> str:
    """Return a README with its figures, and links that lead within the site; others become plain words."""

    def link(match: re.Match) -> str:
        image, words, target, anchor = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        path = base.joinpath(target).resolve()
        if DOCS in path.parents and path.is_file():
            to = path.relative_to(DOCS).as_posix()
        elif path in linked:
            to = page_of(path)
        elif image and path.suffix == ".svg" and path.is_file():
            return path.read_text()
        else:
            return words
        return f"{image}[{words}]({posixpath.relpath(to, posixpath.dirname(page))}{anchor})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#\s]+)((?:#[^)\s]*)?)\)", link, markdown)


def with_equations(markdown: str) -> str:
    """Return a page with its equations, in TeX as GitHub shows them, as MathML, which needs no script."""

    def equation(match: re.Match) -> str:
        if match[1]:
            return f'<div class="equation">{convert(match[1].strip(), display="block")}</div>'
        return convert(match[2])

    return MATH.sub(equation, markdown)


def on_page_markdown(markdown, page, config, files):
    """Lead links to files outside docs/ to their pages, and draw the equations."""
    if page.file.src_path.startswith("source/"):
        return markdown
    base = (DOCS / page.file.src_path).parent
    return with_equations(rewritten(markdown, page.file.src_path, base))
