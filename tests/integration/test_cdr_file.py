"""control.events.cdr_file on real files: each record once, whatever happens to the file."""

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from control.events.cdr import JsonLines
from control.events.cdr_csv import CsvLines
from control.events.cdr_file import CdrFile, LineFormat, Rotation
from control.events.feed import NumberedRecord
from control.settings.sections import RotationPeriod
from control.store.sinks import SinkPosition
from tests.harness.records import call_record

pytestmark = pytest.mark.integration

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
LINE_BYTES = len(JsonLines().line(call_record("1")))


def records(*numbers: int) -> list[NumberedRecord]:
    return [(number, call_record(str(number))) for number in numbers]


def call_ids(path: Path, lines: LineFormat | None = None) -> list[str]:
    """Those of the file, each line of which must be whole."""
    lines = lines or JsonLines()
    found = path.read_bytes().splitlines(keepends=True)
    if lines.header:
        assert found.pop(0) == lines.header
    keys = [lines.key(line) for line in found if line.endswith(b"\n")]
    assert len(keys) == len(found), "the last line is torn"
    return [key or "?" for key in keys]


class Writer:
    """Writes to a file as the feed does: what was told is committed, unless the process is said to crash before."""

    def __init__(self, path: Path, lines: LineFormat | None = None, **rotation: object) -> None:
        self.path = path
        self.now = NOON
        self.position = SinkPosition()
        self._lines = lines or JsonLines()
        self._rotation = Rotation(**rotation)  # type: ignore[arg-type]
        self._restart()

    def _restart(self) -> None:
        self._file = CdrFile(self.path, self._lines, rotation=self._rotation, utc_now=lambda: self.now)

    def write(self, *numbers: int) -> None:
        """Write all records; those that were written already must be among those that come next."""
        while pending := records(*(number for number in numbers if number > self.position.record_id)):
            self.position = self._file.write(self.position, pending)

    def crash_before_the_commit_of(self, *numbers: int) -> None:
        """Write, and lose what was not committed."""
        committed = self.position
        while committed.record_id == self.position.record_id:
            committed = self.position
            self.position = self._file.write(self.position, records(*numbers))
        self.position = committed
        self._restart()

    def hour_ends(self) -> None:
        assert self._file.write(self.position, ()) == self.position

    def rotated(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.2*{self.path.suffix}"))

    def files(self) -> list[list[str]]:
        """The call_ids in each file, oldest first."""
        paths = [*self.rotated(), *([self.path] if self.path.exists() else [])]
        return [call_ids(path, self._lines) for path in paths]

    def last_written_at(self, time: datetime) -> None:
        os.utime(self.path, (time.timestamp(), time.timestamp()))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "cdr.jsonl"


@pytest.fixture
def writer(path: Path) -> Writer:
    return Writer(path)


# Crashes


def test_lines_follow_in_order_over_a_clean_restart(writer: Writer, path: Path) -> None:
    writer.write(1, 2)
    writer._restart()
    writer.write(3)
    assert call_ids(path) == ["1", "2", "3"]


def test_what_was_written_and_not_committed_is_not_written_again(writer: Writer, path: Path) -> None:
    writer.write(1)
    writer.crash_before_the_commit_of(2, 3)
    writer.write(2, 3, 4)
    assert call_ids(path) == ["1", "2", "3", "4"]


def test_a_torn_line_is_cut_off_and_written_whole(writer: Writer, path: Path) -> None:
    writer.write(1)
    writer.crash_before_the_commit_of(2, 3)
    os.truncate(path, path.stat().st_size - 10)
    writer.write(2, 3)
    assert call_ids(path) == ["1", "2", "3"]


def test_a_torn_line_in_the_form_of_another_version_is_cut_off(writer: Writer, path: Path) -> None:
    writer.write(1)
    with path.open("ab") as file:
        file.write(b'{"form":2,"call_id":"2","cal')
    writer.write(2)
    assert call_ids(path) == ["1", "2"]


def test_uncommitted_lines_beyond_the_records_at_hand_are_found_with_the_next_ones(writer: Writer, path: Path) -> None:
    writer.write(1)
    writer.crash_before_the_commit_of(2, 3, 4)
    writer.write(2)
    writer.write(3, 4, 5)
    assert call_ids(path) == ["1", "2", "3", "4", "5"]


def test_a_file_that_was_renamed_after_a_crash_is_looked_into(writer: Writer, path: Path) -> None:
    writer.write(1)
    writer.crash_before_the_commit_of(2, 3)
    os.truncate(path, path.stat().st_size - 10)
    renamed = path.rename(path.with_name("cdr.jsonl.1"))
    writer.write(2, 3)
    assert (call_ids(renamed), call_ids(path)) == (["1", "2"], ["3"])


def test_a_new_file_that_was_renamed_after_a_crash_is_looked_into(writer: Writer, path: Path) -> None:
    writer.crash_before_the_commit_of(1, 2)
    renamed = path.rename(path.with_name("cdr.jsonl.1"))
    writer.write(1, 2, 3)
    assert (call_ids(renamed), call_ids(path)) == (["1", "2"], ["3"])


@pytest.mark.parametrize("vanish", [Path.unlink, lambda path: path.rename(path.parent.parent / "elsewhere")])
def test_uncommitted_lines_in_a_file_that_is_gone_are_written_again_rather_than_lost(
    writer: Writer, path: Path, vanish: Callable[[Path], None]
) -> None:
    writer.write(1)
    writer.crash_before_the_commit_of(2)
    vanish(path)
    writer.write(2, 3)
    assert call_ids(path) == ["2", "3"]


def test_what_cannot_be_read_from_the_store_is_passed_over(writer: Writer, path: Path) -> None:
    writer.write(1)
    writer.position = writer._file.write(writer.position, [(2, None)])
    assert writer.position.record_id == 2
    writer.write(3)
    assert call_ids(path) == ["1", "3"]


# Others who have their hands on the file


def test_a_renamed_file_is_followed_by_a_new_one(writer: Writer, path: Path) -> None:
    writer.write(1)
    renamed = path.rename(path.with_name("cdr.jsonl.1"))
    writer.write(2)
    assert (call_ids(renamed), call_ids(path)) == (["1"], ["2"])


def test_an_empty_file_put_in_its_place_is_taken(writer: Writer, path: Path) -> None:
    writer.write(1)
    path.rename(path.with_name("cdr.jsonl.1"))
    path.touch(0o600)
    writer.write(2)
    assert call_ids(path) == ["2"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_was_copied_and_emptied_goes_on_from_its_start(writer: Writer, path: Path) -> None:
    writer.write(1, 2)
    os.truncate(path, 0)
    writer.write(3)
    writer.crash_before_the_commit_of(4)
    writer.write(4, 5)
    assert call_ids(path) == ["3", "4", "5"]


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_file_renamed_while_it_is_opened_is_followed_by_a_whole_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    writer = Writer(tmp_path / "cdr.csv", CsvLines())
    writer.write(1)
    renamed = tmp_path / "cdr.csv.1"
    real_open = os.open

    def renaming_open(name: Path, flags: int, *mode: int) -> int:
        monkeypatch.undo()
        writer.path.rename(renamed)
        if is_replaced:
            writer.path.touch()
        return real_open(name, flags, *mode)

    monkeypatch.setattr(os, "open", renaming_open)
    writer.write(2)
    assert call_ids(renamed, CsvLines()) == ["1"]
    assert call_ids(writer.path, CsvLines()) == ["2"]


def test_lines_of_others_stay_and_are_no_records(writer: Writer, path: Path) -> None:
    writer.write(1)
    with path.open("ab") as file:
        file.write(b"# checked\n")
    writer.write(2)
    assert call_ids(path) == ["1", "?", "2"]


def test_a_torn_line_of_others_is_ended_and_not_cut(writer: Writer, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"of somebody")
    writer.write(1)
    assert path.read_bytes().startswith(b"of somebody\n{")
    assert call_ids(path) == ["?", "1"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "disk.jsonl")
    writer = Writer(tmp_path / "link.jsonl", max_bytes=LINE_BYTES)
    writer.write(1)
    writer.write(2)
    assert (tmp_path / "link.jsonl").is_symlink()
    assert [call_ids(path) for path in sorted(tmp_path.glob("disk.2*"))] == [["1"]]
    assert call_ids(tmp_path / "disk.jsonl") == ["2"]


def test_a_write_that_fails_halfway_is_finished_later(
    writer: Writer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write(1)
    real_write = os.write
    outcomes = iter([LINE_BYTES + 10, OSError(errno.ENOSPC, "No space left on device")])

    def failing_write(descriptor: int, data: memoryview) -> int:
        match next(outcomes, None):
            case OSError() as error:
                raise error
            case int() as room:
                return real_write(descriptor, data[:room])
            case _:
                return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", failing_write)
    with pytest.raises(OSError, match="No space"):
        writer.write(2, 3)
    writer.write(2, 3, 4)
    assert call_ids(path) == ["1", "2", "3", "4"]


# Rotation


def test_a_full_file_is_renamed_with_the_time(path: Path) -> None:
    writer = Writer(path, max_bytes=2 * LINE_BYTES)
    for number in (1, 2, 3, 4, 5):
        writer.write(number)
    assert writer.files() == [["1", "2"], ["3", "4"], ["5"]]
    assert [file.name for file in writer.rotated()] == [
        "cdr.20260301T120000.000000Z.jsonl", "cdr.20260301T120000.000001Z.jsonl",
    ]  # fmt: skip


def test_names_keep_their_order_when_the_clock_is_set_back(path: Path) -> None:
    writer = Writer(path, max_bytes=1, keep_files=2)
    for number in (1, 2, 3, 4):
        writer.write(number)
        writer.now -= timedelta(hours=1)
    assert writer.files() == [["2"], ["3"], ["4"]]


def test_only_so_many_old_files_are_kept_and_no_others_are_touched(path: Path) -> None:
    writer = Writer(path, max_bytes=1, keep_files=1)
    path.parent.mkdir()
    (path.parent / "cdr.20200101T000000.000000Z.jsonl.gz").touch()
    (path.parent / "other.20200101T000000.000000Z.jsonl").touch()
    for number in (1, 2, 3):
        writer.write(number)
    assert writer.files() == [["2"], ["3"]]
    assert len(list(path.parent.iterdir())) == 4


@pytest.mark.parametrize(
    ("every", "last_line_at", "is_over"),
    [
        (RotationPeriod.HOUR, NOON - timedelta(seconds=1), True),
        (RotationPeriod.HOUR, NOON, False),
        (RotationPeriod.HOUR, NOON + timedelta(hours=2), False),
        (RotationPeriod.DAY, NOON - timedelta(hours=12), False),
        (RotationPeriod.DAY, NOON - timedelta(hours=12, seconds=1), True),
    ],
)
def test_a_file_ends_with_its_period_even_without_another_line(
    path: Path, every: RotationPeriod, last_line_at: datetime, is_over: bool
) -> None:
    writer = Writer(path, every=every)
    writer.write(1)
    writer.last_written_at(last_line_at)
    writer.hour_ends()
    assert (len(writer.rotated()), path.exists()) == ((1, False) if is_over else (0, True))
    writer.write(2)
    assert writer.files() == ([["1"], ["2"]] if is_over else [["1", "2"]])


def test_a_crash_after_the_renaming_leaves_neither_a_gap_nor_a_double_line(path: Path) -> None:
    writer = Writer(path, max_bytes=LINE_BYTES)
    writer.write(1)
    writer.crash_before_the_commit_of(2)
    writer.write(2, 3)
    writer.write(4)
    assert writer.files() == [["1"], ["2"], ["3"], ["4"]] or writer.files() == [["1"], ["2"], ["3", "4"]]


def test_a_full_file_whose_end_is_not_committed_is_settled_before_it_is_renamed(path: Path) -> None:
    writer = Writer(path, max_bytes=2 * LINE_BYTES)
    writer.write(1)
    writer.crash_before_the_commit_of(2)
    writer.hour_ends()
    assert writer.rotated() == []
    writer.write(2, 3)
    assert writer.files() == [["1", "2"], ["3"]]


# CSV


def test_each_csv_file_begins_with_the_header(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "cdr.csv", CsvLines(), max_bytes=1)
    writer.write(1, 2)
    writer.write(3)
    assert writer.files() == [["1", "2"], ["3"]]


def test_a_torn_header_is_written_whole(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "cdr.csv", CsvLines())
    writer.crash_before_the_commit_of(1)
    os.truncate(writer.path, 10)
    writer.write(1)
    assert writer.files() == [["1"]]


def test_a_file_with_the_columns_of_another_version_is_renamed(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "cdr.csv", CsvLines())
    writer.path.write_bytes(b"call_id,caller\r\n0,1001\r\n")
    writer.write(1)
    (old,) = writer.rotated()
    assert old.read_bytes() == b"call_id,caller\r\n0,1001\r\n"
    assert call_ids(writer.path, CsvLines()) == ["1"]


# A real process, a real store, and SIGKILL


def killed_again_and_again(folder: Path, name: str, rounds: int) -> subprocess.CompletedProcess[str]:
    seed = random.randrange(2**32)
    command = [sys.executable, "-m", "tests.harness.sink_crashes", str(folder), name, str(seed), str(rounds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_every_record_is_there_once_after_kills_at_any_line_of_the_code(tmp_path: Path, name: str) -> None:
    run = killed_again_and_again(tmp_path, name, rounds=40)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


@pytest.mark.soak
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_every_record_is_there_once_after_kills_at_every_line_of_the_code(tmp_path: Path, name: str) -> None:
    run = killed_again_and_again(tmp_path, name, rounds=1_000_000)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
