"""What must outlive this process: the figures of its sessions, in a small file that is replaced about once a second.

A first line says what the lines are; each that follows is one session, behind its CRC-32. The file is for the next
process on this host, so it is not forced to the disk: it survives the death of processes, not of the kernel. Whatever
in it cannot be read is passed over. Times are monotonic seconds; the first line has what turns them into Unix time.
"""

import asyncio
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import structlog

from dataplane.ports import PortBlock
from dataplane.service.node import SessionView
from dataplane.session.plain import decoder_of, plain
from dataplane.session.relay import StreamSnapshot
from dataplane.session.spec import SessionSpec

MAX_FILE_BYTES: Final = 64 * 1024 * 1024

_FORMAT: Final = "sippbx-media-statistics"
_VERSION: Final = 1
_FIELDS: Final = tuple(field.name for field in dataclasses.fields(StreamSnapshot))
# As `plain` would, at a tenth of its price: enums in here are strings to JSON, tuples are lists.
_stream_fields = attrgetter(*_FIELDS)
_spec_of = decoder_of(SessionSpec)
_stream_of = decoder_of(StreamSnapshot)

log = structlog.get_logger(__name__)


class StatisticsFile:
    """The file at `path`. `clock` gives monotonic seconds, `utc_now` the time that they are turned into."""

    def __init__(self, path: Path, *, clock: Callable[[], float], utc_now: Callable[[], datetime]) -> None:
        self._path = path
        self._clock = clock
        self._utc_now = utc_now
        self._heads: dict[str, tuple[SessionSpec, str]] = {}
        self._is_empty = False
        self._problem = ""

    def read(self) -> Sequence[SessionView]:
        """Return the sessions that the process before had, as far as they can be read; never raises for the content."""
        try:
            with self._path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("statistics.not_read", path=str(self._path), problem=os.strerror(error.errno or 0))
            return []
        if len(content) > MAX_FILE_BYTES:
            log.warning("statistics.not_read", path=str(self._path), problem=f"larger than {MAX_FILE_BYTES} octets")
            return []
        first, *lines = content.split(b"\n")
        try:
            offset_s = _offset_of(first)
        except (ValueError, TypeError, KeyError) as error:
            log.warning("statistics.not_read", path=str(self._path), problem=f"not a file of this version: {error!r}")
            return []
        now = self._clock()
        shift_s = offset_s - (self._utc_now().timestamp() - now)
        views: list[SessionView] = []
        damaged = 0
        for line in filter(None, lines):
            try:
                views.append(_view_of(line, shift_s, now))
            except (ValueError, TypeError, OverflowError):
                damaged += 1
        log.info("statistics.read", path=str(self._path), sessions=len(views), damaged=damaged)
        return views

    async def keep(self, views: Iterable[SessionView]) -> None:
        """Replace the content by these sessions, in a thread. A failure is logged once, and when it is over."""
        kept = list(views)
        if not kept and self._is_empty:
            return
        try:
            await asyncio.to_thread(self._write, kept)
        except OSError as error:
            problem = os.strerror(error.errno or 0)
            if problem != self._problem:
                advice = "sessions that a restart makes again would count from zero"
                log.warning("statistics.not_kept", path=str(self._path), problem=problem, advice=advice)
            self._problem = problem
            return
        self._is_empty = not kept
        if self._problem:
            self._problem = ""
            log.info("statistics.kept_again", path=str(self._path))

    def _write(self, views: Sequence[SessionView]) -> None:
        offset_s = self._utc_now().timestamp() - self._clock()
        header = {"format": _FORMAT, "version": _VERSION, "fields": _FIELDS, "monotonic_to_unix_s": offset_s}
        heads: dict[str, tuple[SessionSpec, str]] = {}
        new = self._path.with_name(f"{self._path.name}.new")
        with open(new, "wb", opener=_private) as file:
            file.write(json.dumps(header).encode() + b"\n")
            for view in views:
                spec = view.spec
                known = self._heads.get(spec.session_id)
                head = known[1] if known is not None and known[0] is spec else _head(view)
                heads[spec.session_id] = (spec, head)
                streams = json.dumps([_stream_fields(stream) for stream in view.streams], separators=(",", ":"))
                line = f"[{head},{streams}]".encode()
                file.write(b"%08x %b\n" % (zlib.crc32(line), line))
        new.replace(self._path)
        self._heads = heads


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _head(view: SessionView) -> str:
    """What does not change with each packet, without the brackets."""
    head = [view.block.first, view.block.size, view.created_at.timestamp(), plain(view.spec)]
    return json.dumps(head, separators=(",", ":"))[1:-1]


def _offset_of(line: bytes) -> float:
    header = json.loads(line)
    if (header["format"], header["version"], tuple(header["fields"])) != (_FORMAT, _VERSION, _FIELDS):
        raise ValueError("another format or version")
    return float(header["monotonic_to_unix_s"])


def _view_of(line: bytes, shift_s: float, now: float) -> SessionView:
    checksum, _, body = line.partition(b" ")
    if int(checksum, 16) != zlib.crc32(body):
        raise ValueError("damaged")
    first, size, created_at, spec, streams = json.loads(body)
    return SessionView(
        _spec_of(spec),
        PortBlock(first, size),
        datetime.fromtimestamp(created_at, UTC),
        tuple(_moved(_stream_of(stream), shift_s, now) for stream in streams),
    )


def _moved(stream: Any, shift_s: float, now: float) -> StreamSnapshot:
    """The stream with its times on this process's clock, none of them in the future."""
    moved: StreamSnapshot = replace(
        stream,
        first_at=None if stream.first_at is None else min(stream.first_at + shift_s, now),
        last_at=None if stream.last_at is None else min(stream.last_at + shift_s, now),
    )
    return moved
