"""Links in the documentation have targets, cited sections exist, and the code in it runs."""

import contextlib
import io
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *ROOT.glob("README.md"), ROOT / "backends" / "README.md"]
CODE = [path for top in ("spec", "backends", "refengine", "tools") for path in (ROOT / top).rglob("*.py")]
BLOCKS = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.S | re.M)


def of(pages):
    return {"argvalues": pages, "ids": [str(page.relative_to(ROOT)) for page in pages]}


def links(page):
    """Return (file, section) of each link to one of our files; brackets in code are not links."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"\w+:", target):
            path, _, section = target.partition("#")
            yield (page.parent / path).resolve() if path else page, section


def headings(page):
    return re.findall(r"^#+ (.*)$", page.read_text(), re.M)


def anchors(page):
    """Return the anchors of a page: its headings in GitHub's spelling, and explicit ones."""
    spelled = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}
    return spelled | set(re.findall(r'<a id="([^"]+)">', page.read_text()))


@pytest.mark.parametrize("page", **of(PAGES))
def test_links_lead_somewhere(page):
    for target, section in links(page):
        assert target.exists(), f"a link to {target}, which is not there"
        assert not section or section in anchors(target), f"a link to {target}, which has no {section}"


def test_every_page_can_be_reached_from_the_index():
    reached, ahead = set(), [DOCS / "index.md"]
    while ahead:
        page = ahead.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            ahead += [target for target, _ in links(page)]
    assert not set(DOCS.rglob("*.md")) - reached


def test_pages_and_sections_that_code_cites_exist():
    citation = re.compile(r'docs/([\w-]+)\.md(?:,\s+"([^"]+)")?')
    cited = [(source, *found) for source in CODE for found in citation.findall(source.read_text())]
    for source, name, section in cited:
        page = DOCS / f"{name}.md"
        assert page.exists(), f"{source} cites {page}"
        assert not section or section in headings(page), f'{source} cites a section "{section}" of {page}'
    assert sum(bool(section) for _, _, section in cited) >= 8


@pytest.mark.parametrize("page", **of([p for p in sorted(DOCS.glob("*.md")) if BLOCKS.search(p.read_text())]))
def test_code_in_the_documentation_runs(page, monkeypatch):
    """`python` blocks run in order, in one namespace; a `text` block after one is its output."""
    monkeypatch.chdir(ROOT)
    namespace = {"__name__": page.stem}
    for code, printed in BLOCKS.findall(page.read_text()):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, str(page), "exec"), namespace)
        assert not printed or out.getvalue() == printed
