"""Call detail records as JSON lines: one object a line for each call, in the order in which the store committed them.

    version       1; grows when a key changes its meaning or goes
    call_id       this PBX's id of the call
    direction     internal | inbound | outbound
    caller        who called: user or number
    callee        who was called: user or number
    invited_at, ringing_at, answered_at, ended_at
                  RFC 3339, UTC; null for what did not happen
    setup_s       from the INVITE to the answer, or to the end when there was none
    duration_s    from the answer to the end; 0 when there was no answer
    termination   result, reason (closed sets), sip_status (what the caller's INVITE got), ended_by (caller | callee |
                  null for the PBX), detail (for people)
    legs          for each side: name (caller | callee), sip_call_id, from_uri, to_uri, remote (host:port), trunk, user,
                  user_agent
    streams       what arrived from each side on each line: leg, line, kind (audio | video), packets, octets, lost,
                  reordered, jitter_ms, rtcp_packets, relayed_packets, dropped_packets, first_packet_at, last_packet_at
    media_complete
                  false when the data plane could not be asked for its final statistics
    media_interruptions, media_gap_s
                  how often, and for how long in all, the relay was interrupted because the data plane was lost

The file is opened anew for each group of lines, so it may be renamed at any time to rotate it. A group that fails
halfway is taken back and tried again. What has no room in the queue is counted and left out: the store has it.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import orjson
import structlog

from control.metrics import ControlMetrics
from control.pbx.records import CallRecord

CDR_VERSION = 1
MAX_PENDING = 100_000

_MAX_BATCH = 1_024
_RETRY_FIRST_S = 0.1
_RETRY_MOST_S = 5.0

_log = structlog.get_logger(__name__)


class CdrFile:
    """Appends records to a file from a task of its own."""

    def __init__(self, path: Path, *, metrics: ControlMetrics, max_pending: int = MAX_PENDING) -> None:
        self._path = path
        self._metrics = metrics
        self._max_pending = max_pending
        self._pending: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._writer = asyncio.create_task(self._write(), name="cdr-file-writer")

    def add(self, records: Sequence[CallRecord]) -> None:
        """Queue lines for records that are durable."""
        for record in records:
            if len(self._pending) >= self._max_pending or self._writer.done():
                self._metrics.cdr_failed("jsonl")
                continue
            self._pending.append(cdr_line(record))
        self._wake.set()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, for at most `timeout_s`."""
        self._closing = True
        self._wake.set()
        done, _ = await asyncio.wait({self._writer}, timeout=timeout_s)
        if not done:
            self._writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writer
        if self._pending:
            self._metrics.cdr_failed("jsonl", len(self._pending))
            _log.error("cdr.lines_unwritten", path=str(self._path), lines=len(self._pending))

    async def _write(self) -> None:
        retry_s = _RETRY_FIRST_S
        while True:
            if not self._pending:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            lines = [self._pending[index] for index in range(min(len(self._pending), _MAX_BATCH))]
            try:
                await asyncio.to_thread(_append, self._path, b"".join(lines))
            except OSError as error:
                self._metrics.error("events", "cdr_write_failed")
                _log.error("cdr.write_failed", path=str(self._path), error=str(error), pending=len(self._pending))
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _RETRY_MOST_S)
                continue
            retry_s = _RETRY_FIRST_S
            for _ in lines:
                self._pending.popleft()
            self._metrics.cdrs_written("jsonl", len(lines))


class JsonLines:
    """The form of a file of JSON lines."""

    name: Final = "jsonl"
    header: Final = b""

    def line(self, record: CallRecord) -> bytes:
        """The record as one line, newline included."""
        return cdr_line(record)

    def key(self, line: bytes) -> str | None:
        """The call_id in a line; None when this is no line of a record."""
        try:
            document = orjson.loads(line)
        except ValueError:
            return None
        call_id = document.get("call_id") if isinstance(document, dict) else None
        return call_id if isinstance(call_id, str) else None


def cdr_line(record: CallRecord) -> bytes:
    """The record as one line of the file, newline included."""
    return orjson.dumps(cdr_document(record), option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)


def cdr_document(record: CallRecord) -> dict[str, object]:
    """The record as a JSON object, with the keys that this module lists."""
    return {
        "version": CDR_VERSION,
        "call_id": record.call_id,
        "direction": record.direction,
        "caller": record.caller,
        "callee": record.callee,
        "invited_at": record.invited_at,
        "ringing_at": record.ringing_at,
        "answered_at": record.answered_at,
        "ended_at": record.ended_at,
        "setup_s": round(record.setup_s, 6),
        "duration_s": round(record.duration_s, 6),
        "termination": record.termination,
        "legs": record.legs,
        "streams": record.streams,
        "media_complete": record.media_complete,
        "media_interruptions": record.media_interruptions,
        "media_gap_s": round(record.media_gap_s, 6),
    }


def _append(path: Path, data: bytes) -> None:
    """Append all or nothing.

    Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            # A process died in the middle of a line; the next one must not be glued to it.
            data = b"\n" + data
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
