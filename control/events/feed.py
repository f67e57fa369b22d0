"""Carries call records from the store to a sink, in the order of their commits.

The store is the queue: a feed remembers how far its sink has come, in the store, and reads on from there whenever it is
woken. So it holds no records that a crash could cost, and a sink that is slow or broken delays nobody and fills no
memory. A sink gets each record at least once, with its call_id to know it by; one that marks its place may make that
exactly once (control.events.cdr_file).
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

import structlog

from control.metrics import ControlMetrics
from control.pbx.records import CallRecord
from control.store.database import StoreError
from control.store.records import RecordStore
from control.store.sinks import SinkPosition, SinkPositions

BATCH_RECORDS: Final = 128
# How long records may gather, so that those of a busy second share a read, an fsync and a commit.
GATHER_S: Final = 0.1

_RETRY_FIRST_S: Final = 0.1
_RETRY_MOST_S: Final = 5.0
_HOUR_S: Final = 3600.0
# So that the hour is over when a timer for its end fires a little early.
_PAST_THE_HOUR_S: Final = 1.0

NumberedRecord = tuple[int, CallRecord | None]
"""A record with its id in the store; None for one that cannot be read."""

_log = structlog.get_logger(__name__)


class Sink(Protocol):
    """Somewhere that call records go."""

    @property
    def name(self) -> str:
        """Its name in the store and in metrics; stays the same for as long as the sink is the same."""

    def write(self, position: SinkPosition, records: Sequence[NumberedRecord]) -> SinkPosition:
        """Write records, the next ones behind `position`, and tell how far that came, once it is durable.

        It may be called again with the same position, in this process or the next, whatever became of the first time.
        It need not write all records; what it tells is committed before it is called again. With no records it is
        called every hour. Runs in a thread.

        Raises: OSError, to be called again later.
        """


def _utc_now() -> datetime:
    return datetime.now(UTC)


class SinkFeed:
    """Feeds one sink from a task of its own."""

    def __init__(
        self,
        sink: Sink,
        *,
        records: RecordStore,
        positions: SinkPositions,
        metrics: ControlMetrics,
        utc_now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._sink = sink
        self._records = records
        self._positions = positions
        self._metrics = metrics
        self._utc_now = utc_now
        self._position: SinkPosition | None = None
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"cdr-feed-{sink.name}")

    def wake(self) -> None:
        """Hear that a record was committed."""
        self._wake.set()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Write what was submitted to the store so far, for at most `timeout_s`.

        What cannot be written is left to the next process.
        """
        self._closing.set()
        self._wake.set()
        done, _ = await asyncio.wait({self._task}, timeout=timeout_s)
        if not done:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            _log.warning("cdr.feed_unfinished", sink=self._sink.name, advice="the rest is written at the next start")

    async def _run(self) -> None:
        retry_s = _RETRY_FIRST_S
        while True:
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                if closing:
                    await self._positions.settled()
                await self._write_what_is_there()
                if closing:
                    return
                if await self._is_woken():
                    await self._pause(GATHER_S)
                else:
                    await self._write(())
            except (OSError, StoreError) as error:
                self._metrics.error("events", "cdr_write_failed")
                _log.error("cdr.write_failed", sink=self._sink.name, error=str(error), retry_s=retry_s)
            except Exception:  # noqa: BLE001 - the boundary
                # The boundary of the feed's task: a bug of a sink must not cost the records behind the one it met.
                self._metrics.error("events", "internal")
                _log.exception("cdr.feed_failed", sink=self._sink.name, retry_s=retry_s)
            else:
                retry_s = _RETRY_FIRST_S
                continue
            if closing:
                return
            await self._pause(retry_s)
            retry_s = min(2 * retry_s, _RETRY_MOST_S)

    async def _is_woken(self) -> bool:
        """Wait for records; False when the hour ended before any came."""
        now = self._utc_now().timestamp()
        try:
            async with asyncio.timeout(_HOUR_S - now % _HOUR_S + _PAST_THE_HOUR_S):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    async def _pause(self, seconds: float) -> None:
        """Wait, unless it is time to close."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    async def _write_what_is_there(self) -> None:
        if self._position is None:
            await self._positions.hold()
            self._position = await self._positions.load(self._sink.name)
        while records := await self._records.after(self._position.record_id, BATCH_RECORDS):
            await self._write(records)
            if len(records) < BATCH_RECORDS and self._position.record_id == records[-1][0]:
                break  # those that came meanwhile have woken us

    async def _write(self, records: Sequence[NumberedRecord]) -> None:
        if self._position is None:
            return
        reached = await asyncio.to_thread(self._sink.write, self._position, records)
        if reached == self._position:
            return
        await self._positions.save(self._sink.name, reached)
        self._position = reached
        passed = [record for record_id, record in records if record_id <= reached.record_id]
        unreadable = passed.count(None)
        self._metrics.cdrs_written(self._sink.name, len(passed) - unreadable)
        if unreadable:
            self._metrics.cdr_failed(self._sink.name, unreadable)
