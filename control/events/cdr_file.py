"""A file of call detail records that has each record once, whatever crashes.

With its position in the store the file's mark is committed: which file (its inode) and how long it is. What is found
behind the mark was written by a process that died before it could commit: whole lines of the next records count as
written, and the beginning of a line is cut off. So no line is missing and none is there twice, wherever the process was
killed. In a file without a mark nothing is cut: it is somebody else's, or an earlier version's. Device numbers are no
part of the mark: they change with a reboot, and no file has moved by that.

The file may be renamed at any time, by this program when it is full or its hour or day is over, and by others: the next
line then opens a new one. After a crash the renamed file is looked for by its inode in the same folder, to see how far
it came; a new file is therefore committed before it has its first line. Where that cannot be told, because the file was
moved elsewhere, compressed or deleted, or emptied after a copy was made of it, the records that were written and not
yet committed are written again rather than lost: at most one batch.

Renamed by this program, cdr.jsonl becomes cdr.YYYYMMDDTHHMMSS.ffffffZ.jsonl, with the time of that (UTC). Only a file
whose end is committed is renamed.
"""

import contextlib
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Protocol

import structlog

from control.events.feed import NumberedRecord
from control.pbx.records import CallRecord
from control.settings.sections import RotationPeriod
from control.store.sinks import SinkPosition

_FILE_MODE: Final = 0o640
_STAMP: Final = "%Y%m%dT%H%M%S.%fZ"
_STAMP_PATTERN: Final = r"(\d{8}T\d{6}\.\d{6}Z)"

_log = structlog.get_logger(__name__)


class LineFormat(Protocol):
    """How records look in a file of lines."""

    @property
    def name(self) -> str:
        """The name of the sink."""

    @property
    def header(self) -> bytes:
        """The first line of a file, empty when there is none."""

    def line(self, record: CallRecord) -> bytes:
        """The record as one line, its end included."""

    def key(self, line: bytes) -> str | None:
        """What tells a record's line from another's; None when this is no line of a record."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """When a file is renamed to begin a new one, and how many old ones are kept; 0 keeps all."""

    max_bytes: int | None = None
    every: RotationPeriod | None = None
    keep_files: int = 0


@dataclass(frozen=True, slots=True)
class FileMark:
    """Which file, and how long it is."""

    inode: int
    size: int

    @classmethod
    def parse(cls, text: str) -> "FileMark | None":
        """The mark that was committed; None when there is none."""
        match = re.fullmatch(r"inode (\d+) size (\d+)", text)
        return None if match is None else cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, status: os.stat_result) -> "FileMark":
        """A file as it is now."""
        return cls(status.st_ino, status.st_size)

    def __str__(self) -> str:
        return f"inode {self.inode} size {self.size}"


class CdrFile:
    """Writes records as lines of a file; see control.events.feed.Sink."""

    def __init__(self, path: Path, lines: LineFormat, *, rotation: Rotation, utc_now: Callable[[], datetime]) -> None:
        self.name = lines.name
        # What a link points to, so that renaming moves the file and not the link.
        self._path = path.resolve()
        self._lines = lines
        self._rotation = rotation
        self._utc_now = utc_now
        self._rotated_name = re.compile(
            rf"{re.escape(self._path.stem)}\.{_STAMP_PATTERN}{re.escape(self._path.suffix)}"
        )
        self._inode_with_header: int | None = None

    def write(self, position: SinkPosition, records: Sequence[NumberedRecord]) -> SinkPosition:
        """Find out what is written already, or rotate, or begin a file, or write: one of these, to be committed.

        Raises: OSError.
        """
        if records:
            settled = self._settle(position, records)
            if settled != position:
                return settled
        self._rotate_if_due(FileMark.parse(position.mark))
        lines = [self._lines.line(record) for _, record in records if record is not None]
        if not records:
            return position
        if not lines:
            return SinkPosition(records[-1][0], position.mark)
        if _status(self._path) is None:
            return SinkPosition(position.record_id, str(self._begin()))
        mark = self._append(lines, FileMark.parse(position.mark))
        return position if mark is None else SinkPosition(records[-1][0], str(mark))

    def _settle(self, position: SinkPosition, records: Sequence[NumberedRecord]) -> SinkPosition:
        """The position with all that was written behind it."""
        mark = FileMark.parse(position.mark)
        status = _status(self._path)
        if status is not None and FileMark.of(status) == mark:
            return position
        awaited = _Awaited(position.record_id, records, self._lines)
        if mark is not None and (status is None or status.st_ino != mark.inode):
            renamed = _with_inode(self._path.parent, mark.inode)
            if renamed is not None:
                mark = awaited.find_in(renamed, mark)
        if status is not None:
            mark = awaited.find_in(self._path, mark)
        return SinkPosition(awaited.found_through, "" if mark is None else str(mark))

    def _begin(self) -> FileMark:
        """Make an empty file, so that it is known by its mark before it has lines."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
        try:
            mark = FileMark.of(os.fstat(descriptor))
        finally:
            os.close(descriptor)
        _sync_folder(self._path.parent)
        return mark

    def _append(self, lines: Sequence[bytes], mark: FileMark | None) -> FileMark | None:
        """The mark behind the lines; None when the file is no longer the one that was looked at."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if FileMark.of(os.fstat(descriptor)) != mark:
                return None
            data = b"".join(lines) if mark.size else self._lines.header + b"".join(lines)
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return FileMark(mark.inode, mark.size + len(data))

    def _rotate_if_due(self, mark: FileMark | None) -> None:
        status = _status(self._path)
        if status is None or FileMark.of(status) != mark or not status.st_size or not self._is_due(status):
            return
        stamps = sorted(self._rotated())
        now = self._utc_now()
        if stamps:
            # In order of their names, although clocks are set back.
            newest = datetime.strptime(stamps[-1], _STAMP).replace(tzinfo=UTC)
            now = max(now, newest + timedelta(microseconds=1))
        stamp = f"{now:{_STAMP}}"
        self._path.rename(self._rotated_path(stamp))
        _sync_folder(self._path.parent)
        _log.info("cdr.file_rotated", path=str(self._rotated_path(stamp)), bytes=status.st_size)
        if self._rotation.keep_files:
            for old in [*stamps, stamp][: -self._rotation.keep_files]:
                self._rotated_path(old).unlink(missing_ok=True)
                _log.info("cdr.file_deleted", path=str(self._rotated_path(old)))

    def _is_due(self, status: os.stat_result) -> bool:
        if self._rotation.max_bytes is not None and status.st_size >= self._rotation.max_bytes:
            return True
        if self._rotation.every is not None:
            written_at = datetime.fromtimestamp(status.st_mtime, UTC)
            if _begin(self._rotation.every, written_at) < _begin(self._rotation.every, self._utc_now()):
                return True
        return not self._has_header(status.st_ino)

    def _has_header(self, inode: int) -> bool:
        header = self._lines.header
        if header and inode != self._inode_with_header:
            with self._path.open("rb") as file:
                if file.read(len(header)) != header:
                    return False
            self._inode_with_header = inode
        return True

    def _rotated(self) -> list[str]:
        """The stamps of the files that this program has renamed."""
        names = (self._rotated_name.fullmatch(name) for name in os.listdir(self._path.parent))  # noqa: PTH208 - names
        return [match[1] for match in names if match]

    def _rotated_path(self, stamp: str) -> Path:
        return self._path.with_name(f"{self._path.stem}.{stamp}{self._path.suffix}")


class _Awaited:
    """The records that are to be written next, looked for in files where they may be already."""

    def __init__(self, record_id: int, records: Sequence[NumberedRecord], lines: LineFormat) -> None:
        self.found_through = record_id
        self._lines = lines
        self._next = deque(
            (record_id, line, lines.key(line))
            for record_id, record in records
            if record is not None
            for line in (lines.line(record),)
        )

    def find_in(self, path: Path, mark: FileMark | None) -> FileMark:
        """Look behind the mark, or from the start of a file that has none, and tell how far the file is known now.

        Raises: OSError.
        """
        with path.open("r+b") as file:
            whole = FileMark.of(os.fstat(file.fileno()))
            is_marked = mark is not None and mark.inode == whole.inode and mark.size <= whole.size
            end = mark.size if mark is not None and is_marked else 0
            if end == whole.size:
                return whole
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):
                    if is_marked:
                        file.truncate(end)
                    else:
                        file.seek(end + len(line))
                        file.write(b"\n")
                        end += len(line) + 1
                    break
                end += len(line)
                if self._next and self._lines.key(line) == self._next[0][2]:
                    self.found_through = self._next.popleft()[0]
                    if not self._next:
                        break  # what comes next is not known here
            file.flush()
            os.fsync(file.fileno())
        return FileMark(whole.inode, end)


def _begin(period: RotationPeriod, time: datetime) -> datetime:
    hour = time.replace(minute=0, second=0, microsecond=0)
    return hour if period is RotationPeriod.HOUR else hour.replace(hour=0)


def _status(path: Path) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat()
    return None


def _with_inode(folder: Path, inode: int) -> Path | None:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.inode() == inode and entry.is_file(follow_symlinks=False):
                return Path(entry.path)
    return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
