"""The file that the figures of sessions outlive a process in."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dataplane.ports import PortBlock
from dataplane.service import statistics
from dataplane.service.node import SessionView
from dataplane.service.statistics import StatisticsFile
from dataplane.session.relay import DropReason, StreamSnapshot
from dataplane.session.spec import (
    Direction,
    Endpoint,
    LatchPolicy,
    Leg,
    MediaKind,
    MediaMode,
    PayloadType,
    SessionSpec,
)

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
ENDPOINT = Endpoint(
    leg=Leg.CALLER,
    line=0,
    branch="b",
    kind=MediaKind.AUDIO,
    local_address="127.0.0.1",
    remote_rtp=("127.0.0.2", 4000),
    remote_rtcp=None,
    rtcp_mux=False,
    direction=Direction.SENDRECV,
    latch_policy=LatchPolicy.STRICT,
    signalling_address="",
    payload_types=(PayloadType(0, "PCMU", 8000),),
)
STREAM = StreamSnapshot(
    Leg.CALLER,
    0,
    packets=5,
    octets=860,
    lost=-1,
    reordered=2,
    jitter_s=0.0125,
    rtcp_packets=3,
    rtcp_octets=84,
    relayed_rtp=4,
    relayed_rtp_octets=700,
    relayed_rtcp=3,
    relayed_rtcp_octets=84,
    first_at=50.0,
    last_at=99.0,
    ssrc=7,
    drops=((DropReason.TOO_BIG, 2),),
    source=("127.0.0.2", 4001),
)


def view(session_id: str = "s", *streams: StreamSnapshot) -> SessionView:
    spec = SessionSpec(session_id, 3, MediaMode.BYPASS, (ENDPOINT,), "b")
    return SessionView(spec, PortBlock(21_008, 8), NOON, streams or (STREAM,))


class Process:
    """A process with a file at `path`, whose monotonic clock shows `monotonic` when it is `utc`."""

    def __init__(self, path: Path, monotonic: float = 100.0, utc: datetime = NOON) -> None:
        self.path = path
        self.utc = utc
        self.file = StatisticsFile(path, clock=lambda: monotonic, utc_now=lambda: self.utc)

    def keep(self, *views: SessionView) -> None:
        asyncio.run(self.file.keep(views))

    def read(self) -> Sequence[SessionView]:
        return self.file.read()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "statistics.jsonl"


def test_what_is_kept_is_read_by_the_next_process(path: Path) -> None:
    sessions = [view("s1"), view("s2", STREAM, replace(STREAM, leg=Leg.CALLEE, first_at=None, last_at=None))]
    Process(path).keep(*sessions)
    assert Process(path).read() == sessions
    assert repr(Process(path).read()) == repr(sessions), "enums and tuples are restored, not only what equals them"


def test_the_last_content_counts(path: Path) -> None:
    process = Process(path)
    process.keep(view("s1"), view("s2"))
    changed = replace(view("s1"), spec=replace(view("s1").spec, generation=4))
    process.keep(changed)
    assert Process(path).read() == [changed]
    process.keep()
    assert Process(path).read() == []


def test_times_are_those_of_the_clock_that_the_next_process_has(path: Path) -> None:
    Process(path, monotonic=100.0).keep(view())
    [moved] = Process(path, monotonic=1000.0, utc=NOON + timedelta(seconds=10)).read()
    assert (moved.streams[0].first_at, moved.streams[0].last_at) == (940.0, 989.0)


def test_a_clock_that_was_set_back_puts_nothing_into_the_future(path: Path) -> None:
    Process(path, monotonic=100.0).keep(view())
    [moved] = Process(path, monotonic=110.0, utc=NOON - timedelta(hours=1)).read()
    assert (moved.streams[0].first_at, moved.streams[0].last_at) == (110.0, 110.0)


def test_nothing_is_read_where_nothing_was_kept(path: Path) -> None:
    assert Process(path).read() == []


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b"\xff\x00", b'{"format": "other"}\n', b"[1, 2]\n", b"7"])
def test_a_file_of_another_kind_is_passed_over(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert Process(path).read() == []


def test_a_folder_in_its_place_is_passed_over(path: Path) -> None:
    path.mkdir()
    assert Process(path).read() == []


def test_a_file_of_another_version_is_passed_over(path: Path) -> None:
    Process(path).keep(view())
    path.write_bytes(path.read_bytes().replace(b'"reordered"', b'"unordered"', 1))
    assert Process(path).read() == []


def test_lines_that_are_damaged_or_cut_cost_their_sessions_alone(path: Path) -> None:
    Process(path).keep(view("s1"), view("s2"), view("s3"))
    damaged = path.read_bytes().replace(b'"s2"', b'"x2"').removesuffix(b"\n")[:-5]
    path.write_bytes(damaged + b"\nnonsense\n")
    assert Process(path).read() == [view("s1")]


def test_a_file_beyond_all_measure_is_passed_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Process(path).keep(view())
    monkeypatch.setattr(statistics, "MAX_FILE_BYTES", path.stat().st_size - 1)
    assert Process(path).read() == []


def test_the_file_is_nobody_elses_business_and_leaves_no_other_behind(path: Path) -> None:
    Process(path).keep(view())
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_told_once_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = Process(tmp_path / "missing" / "statistics.jsonl")
    process.keep(view())
    process.keep(view())
    (tmp_path / "missing").mkdir()
    process.keep(view())
    assert process.read() == [view()]
    told = capsys.readouterr().out
    assert (told.count("statistics.not_kept"), told.count("statistics.kept_again")) == (1, 1)


def test_nothing_is_written_while_there_is_nothing_to_keep(path: Path) -> None:
    process = Process(path)
    process.keep()
    path.unlink()
    process.keep()
    assert not path.exists()
    process.keep(view())
    assert path.exists()
