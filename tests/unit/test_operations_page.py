"""docs/operations.md tells every way in which a call can end, and no other."""

import re
from pathlib import Path

import pytest

from control.pbx.records import Reason, Result

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()


def words_of_table(heading: str) -> list[str]:
    """The first column of the table whose first heading this is."""
    _, _, rest = PAGE.partition(f"| {heading} | ")
    rows = rest.split("\n\n", 1)[0].splitlines()[2:]
    return [match[1] for row in rows if (match := re.match(r"\| `([^`]+)` \| \S", row))]


@pytest.mark.parametrize(("heading", "words"), [("result", Result), ("reason", Reason)])
def test_page_explains_each_word_once_in_the_order_of_the_code(heading: str, words: type[Result | Reason]) -> None:
    assert words_of_table(heading) == [word.value for word in words]
