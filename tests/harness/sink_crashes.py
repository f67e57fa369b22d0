"""Kills a process that feeds a CDR file, at a line of its code or at a moment, again and again, until all is written.

`python -m tests.harness.sink_crashes FOLDER FORMAT SEED ROUNDS` prints what was wrong, one finding a line; silence is
good. It forks instead of starting anew, so that a round takes milliseconds.
"""

import asyncio
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from control.events import cdr_file, feed
from control.events.cdr import JsonLines
from control.events.cdr_csv import CsvLines
from control.events.cdr_file import CdrFile, LineFormat, Rotation
from control.events.feed import SinkFeed
from control.metrics import ControlMetrics
from control.store import sinks
from control.store.database import Database
from control.store.records import RecordStore
from control.store.sinks import SinkPositions
from sippbx.runtime.logging import configure_logging
from tests.harness.records import call_record

RECORDS = 12
WATCHED = {module.__file__ for module in (cdr_file, feed, sinks)}
FORMATS: dict[str, type[LineFormat]] = {"jsonl": JsonLines, "csv": CsvLines}


def call_ids() -> list[str]:
    return [f"call-{number}" for number in range(RECORDS)]


async def store_records(store: Path) -> None:
    database = await Database.open(store, metrics=ControlMetrics())
    records = RecordStore(database)
    for call_id in call_ids():
        await database.write([records.statement_for(call_record(call_id))])
    await database.close()


async def feed_all(folder: Path, lines: LineFormat) -> None:
    """Write what is in the store, as a control plane would that starts and stops."""
    metrics = ControlMetrics()
    database = await Database.open(folder / "store.sqlite", metrics=metrics)
    positions = SinkPositions(database, folder / "store.sqlite")
    sink = CdrFile(
        folder / f"cdr.{lines.name}",
        lines,
        rotation=Rotation(max_bytes=len(lines.line(call_record("call-1"))) * 3),
        utc_now=lambda: datetime.now(UTC),
    )
    fed = SinkFeed(sink, records=RecordStore(database), positions=positions, metrics=metrics)
    await fed.close(timeout_s=30)
    positions.close()
    await database.close()


def killer(lines_left: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that kills this process before it runs so many lines of what is watched."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines_left
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            lines_left -= 1
            if lines_left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def in_a_child(work: Callable[[], None], kill_at_line: int | None = None, kill_after_s: float | None = None) -> bool:
    """Whether the child came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            if kill_at_line is not None:
                trace = killer(kill_at_line)
                threading.settrace(trace)
                sys.settrace(trace)
            work()
        except BaseException as error:  # noqa: BLE001 - told to the parent by the exit code
            print("child failed:", repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def write_in_pieces(descriptor: int, data: memoryview, real_write: Callable[..., int] = os.write) -> int:
    """So that a kill may leave any part of a line."""
    return real_write(descriptor, data[: len(data) // 2 + 1])


def findings(folder: Path, lines: LineFormat) -> list[str]:
    """What is wrong with the files in it: each record must be in one of them once, in order, and every line whole."""
    wrong: list[str] = []
    files: list[list[str]] = []
    for path in folder.glob(f"cdr*.{lines.name}"):
        content = path.read_bytes().splitlines(keepends=True)
        if lines.header and (not content or content.pop(0) != lines.header):
            wrong.append(f"{path.name} does not begin with the header")
        keys = [lines.key(line) for line in content if line.endswith(b"\n")]
        files.append([key for key in keys if key is not None])
        if len(files[-1]) != len(content):
            wrong.append(f"{path.name} has a broken line")
    found = [key for keys in sorted(files, key=lambda keys: call_ids().index(keys[0]) if keys else -1) for key in keys]
    if found != call_ids():
        lost, double = Counter(call_ids()) - Counter(found), Counter(found) - Counter(call_ids())
        wrong.append(f"lost {list(lost)}, double {list(double)}, order {found}")
    return wrong


def one_round(folder: Path, lines: LineFormat, kills: list[dict[str, Any]], *, renamed: bool) -> list[str]:
    """Kill once for each of `kills`, then write the rest, and look; `renamed` moves the file away after each kill."""
    target = folder / "round"
    target.mkdir()
    shutil.copy(folder / "store.sqlite", target / "store.sqlite")

    def work() -> None:
        asyncio.run(feed_all(target, lines))

    current = target / f"cdr.{lines.name}"
    for number, kill in enumerate(kills):
        in_a_child(work, **kill)
        if renamed and current.exists() and current.stat().st_size:
            current.rename(target / f"cdr-{number}.{lines.name}")
    if not in_a_child(work):
        return ["the last process failed"]
    wrong = findings(target, lines)
    shutil.rmtree(target)
    return [f"{finding} after {kills}, renamed {renamed}" for finding in wrong]


def lines_of_a_whole_run(folder: Path, lines: LineFormat) -> int:
    """How many lines a process runs that is not killed, found by halving."""
    low, high = 0, 4096
    while low < high:
        middle = (low + high) // 2
        target = folder / "measure"
        target.mkdir()
        shutil.copy(folder / "store.sqlite", target / "store.sqlite")
        ended = in_a_child(lambda: asyncio.run(feed_all(target, lines)), kill_at_line=middle)  # noqa: B023 - used at once
        shutil.rmtree(target)
        low, high = (low, middle) if ended else (middle + 1, high)
    return low


def main(folder: Path, lines: LineFormat, seed: int, rounds: int) -> None:
    configure_logging("sink-crashes", level="error")
    chance = random.Random(seed)
    feed.BATCH_RECORDS = 4  # type: ignore[misc]
    os.write = write_in_pieces  # type: ignore[assignment]
    in_a_child(lambda: asyncio.run(store_records(folder / "store.sqlite")))
    whole = lines_of_a_whole_run(folder, lines)
    print(f"lines {whole}", file=sys.stderr)
    points = range(whole) if rounds >= whole else sorted(chance.sample(range(whole), rounds))
    for point in points:
        kills: list[dict[str, Any]] = [{"kill_at_line": point}]
        kills += chance.choice(
            ([], [{"kill_at_line": chance.randrange(whole)}], [{"kill_after_s": chance.random() / 20}])
        )
        for finding in one_round(folder, lines, kills, renamed=chance.random() < 0.5):
            print(finding, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), FORMATS[sys.argv[2]](), int(sys.argv[3]), int(sys.argv[4]))
