"""Plain values (sippbx.plain) as tables and lines for people.

Text that came over the wire is shown as text: nothing in it is markup, and nothing reaches the terminal that is not
printable. Into a pipe goes one line a row, however long.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 100_000

Document = dict[str, Any]
Column = tuple[str, Callable[[Document], Any]]

CALLS: Sequence[Column] = (
    ("call", lambda call: call["call_id"]),
    ("state", lambda call: call["state"]),
    ("direction", lambda call: call["direction"]),
    ("caller", lambda call: call["caller"]),
    ("callee", lambda call: call["callee"]),
    ("invited", lambda call: _second(call["invited_at"])),
    ("answered", lambda call: _second(call["answered_at"])),
)
REGISTRATIONS: Sequence[Column] = (
    ("user", lambda phone: phone["user"]),
    ("contact", lambda phone: phone["contact"]),
    ("source", lambda phone: phone["source"]),
    ("phone", lambda phone: phone["user_agent"]),
    ("until", lambda phone: _second(phone["expires_at"])),
)
RECORDS: Sequence[Column] = (
    ("call", lambda record: record["call_id"]),
    ("invited", lambda record: _second(record["invited_at"])),
    ("direction", lambda record: record["direction"]),
    ("caller", lambda record: record["caller"]),
    ("callee", lambda record: record["callee"]),
    ("seconds", lambda record: f"{record['duration_s']:.1f}"),
    ("result", lambda record: record["termination"]["result"]),
    ("reason", lambda record: record["termination"]["reason"]),
)
STREAMS: Sequence[Column] = (
    ("from", lambda stream: stream["leg"]),
    ("kind", lambda stream: stream["kind"]),
    ("packets", lambda stream: stream["packets"]),
    ("lost", lambda stream: stream["lost"]),
    ("reordered", lambda stream: stream["reordered"]),
    ("jitter ms", lambda stream: None if stream["jitter_ms"] is None else f"{stream['jitter_ms']:.2f}"),
    ("relayed", lambda stream: stream["relayed_packets"]),
)


def console() -> Console:
    """The standard output."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, markup=False, emoji=False, highlight=False, soft_wrap=False, width=width)


def table(columns: Sequence[Column], documents: Iterable[Document]) -> Table:
    """A row for each document, "-" for what is not there."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, _ in columns:
        made.add_column(name, overflow="fold")
    for document in documents:
        made.add_row(*(_cell(value(document)) for _, value in columns))
    return made


def call_details(call: Document) -> list[Table]:
    """One call: what is known of it, and what was heard once it has ended."""
    record = call["record"]
    facts = {key: value for key, value in call.items() if key != "record"}
    if record is not None:
        facts |= {"ended_at": record["ended_at"], "duration_s": record["duration_s"], **record["termination"]}
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for key, value in facts.items():
        if value not in {None, ""}:
            made.add_row(_cell(key), _cell(value))
    streams = [table(STREAMS, record["streams"])] if record is not None and record["streams"] else []
    return [made, *streams]


def event_line(event: Document) -> Text:
    """One event: when, what, and to whom."""
    data = event["data"]
    words = [_second(event["at"]) or "-", f"{event['type'] or 'unknown':17}"]
    if data.get("call_id"):
        words.append(data["call_id"])
    if "caller" in data:
        words.append(f"{data['caller']} -> {data['callee']}")
    if "termination" in data:
        end = data["termination"]
        words.append(f"{end['result']} ({end['reason']}), {data['duration_s']:.1f} s")
    words += [
        str(data[key]) for key in ("leg", "user", "contact", "cause", "component", "kind", "detail") if data.get(key)
    ]
    return _cell("  ".join(words))


def _second(at: str | None) -> str | None:
    """To the second, without the T that programs want."""
    return None if at is None else f"{at[:19].replace('T', ' ')}Z"


def _cell(value: Any) -> Text:
    return Text("-" if value is None or value == "" else printable(str(value)))


def printable(text: str) -> str:
    """The text without what a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
