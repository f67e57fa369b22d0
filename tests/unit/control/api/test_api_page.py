"""docs/api.md tells every reason for a refusal with its code, and every type of event."""

import re
from collections.abc import Iterator
from pathlib import Path

from control.api import service
from control.pbx.records import EVENT_TYPES, Reason

ROOT = Path(__file__).resolve().parents[4]
PAGE = (ROOT / "docs" / "api.md").read_text()
RAISED = re.compile(r'(?:ApiErrorKind|StatusCode)\.([A-Z_]+),\s*f?"([a-z{}-]+)"')
REFUSED_FOR_THE_PARTIES = {Reason.NOT_REGISTERED, Reason.UNKNOWN_NUMBER, Reason.NOT_ALLOWED}


def told() -> dict[str, str]:
    """Codes by reason, as the page has them."""
    rows = re.findall(r"^\| (`[^|]+`) \| ([A-Z_]+) \| \S", PAGE, re.MULTILINE)
    return {reason: code for reasons, code in rows for reason in re.findall(r"`([a-z-]+)`", reasons)}


def raised() -> Iterator[tuple[str, str]]:
    """Reasons and codes, as the code has them."""
    for path in (ROOT / "control" / "api").glob("*.py"):
        for kind, reason in RAISED.findall(path.read_text()):
            names = ("caller", "callee", "user") if "{name}" in reason else ("",)
            yield from ((reason.replace("{name}", name), kind) for name in names)
    for refused, kind in service._KIND_OF_REFUSAL.items():
        yield refused.value, kind.name
    for refused in REFUSED_FOR_THE_PARTIES:
        yield refused.value, "FAILED_PRECONDITION"


def test_page_tells_each_reason_with_its_code() -> None:
    expected = dict(raised())
    assert len(expected) > 20
    assert told() == expected


def test_page_tells_each_type_of_event() -> None:
    for event_type in EVENT_TYPES:
        assert f"`{event_type}`" in PAGE
