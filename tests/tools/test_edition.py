"""Tables and consoles that `tools.write.edition` replaces are in the pages, and are replaced as a whole."""

import pytest

from tools.write.edition import CONSOLES, ROOT, TABLES, with_console, with_rows


@pytest.mark.parametrize(("name", "head"), TABLES)
def test_a_table_of_a_page_takes_the_rows_of_another_edition(name, head):
    page = (ROOT / name).read_text()
    columns = next(line for line in page.splitlines() if line.startswith(head)).count("|") - 1
    row = "| new " * columns + "|\n"
    made = with_rows(page, head, f"first\n\n{'| head ' * columns}|\n{'|---' * columns}|\n{row}\nlast\n")
    assert row in made and made.count(head) == 1
    before, _, after = page.partition(head)
    assert made.startswith(before) and made.endswith(after.partition("\n\n")[2])
    with pytest.raises(ValueError, match="do not fit"):
        with_rows(page, head, "| a |\n|---|\n| 1 |\n")
    with pytest.raises(ValueError, match="do not fit"):
        with_rows(page, "| no such head |", made)


@pytest.mark.parametrize(("command", "name"), CONSOLES.items())
def test_a_console_of_a_page_takes_another_output(command, name):
    page = (ROOT / name).read_text()
    output = "".join(f"line {i}\n" for i in range(9))
    made = with_console(page, command, output)
    shown = made.partition(f"$ {command}\n")[2].partition("```")[0].splitlines()
    assert shown[0] == "line 0" and shown[-1] == "line 8"
    old = page.partition(f"$ {command}\n")[2].partition("```")[0].splitlines()
    assert len(shown) == (len(old) if "..." in old else 9)
    with pytest.raises(ValueError, match="0 times"):
        with_console(page, "refengine nothing", output)
