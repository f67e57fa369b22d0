"""A control plane's core on a real store, in a process that kills itself at a point that was chosen for it.

B2bua, Journal, EventStore, RecordStore and Database are those of the product. Time is the parent's: while nothing is
left to do here, the loop asks it what happens next. The store's threads are replaced by a disk that takes a while of
that time, so that every run is the same up to the point where it is killed.
"""

import asyncio
import itertools
import os
import secrets
import selectors
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from control.b2bua.b2bua import B2bua
from control.b2bua.saved_calls import Instant, brought_back
from control.events.codec import call_id_of, encode, event_id, event_type
from control.metrics import ControlMetrics
from control.pbx.admission import Admission
from control.pbx.media import MediaFailure, MediaInput, MediaSpec, RestoredSession
from control.pbx.records import CallEvent, CallId, Event
from control.pbx.registrar import Registrar
from control.pbx.routing import Refusal, Router
from control.pbx.trunks import Trunks
from control.settings.settings import Settings
from control.sip.address import Address, Flow
from control.sip.digest import DigestAuthenticator
from control.sip.stack import SipStack
from control.sip.transaction import Timers
from control.store import database as database_module
from control.store.database import Database
from control.store.events import EventStore
from control.store.journal import Journal
from control.store.records import RecordStore

CALLER_HOST, CALLEE_HOST, PBX_HOST = "192.0.2.50", "192.0.2.60", "198.51.100.1"
DISK_S = 0.004
UTC_NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Occasion(StrEnum):
    """Where a process may be killed."""

    BEFORE_WRITE = "before a write is carried out"
    AFTER_COMMIT = "after a commit, before anybody hears of it"
    BEFORE_SEND = "before a message is sent"
    AFTER_SEND = "after a message was sent"


@dataclass(frozen=True, slots=True)
class Point:
    """The `number`-th occasion of a kind, from 1 on."""

    occasion: Occasion
    number: int

    def __str__(self) -> str:
        return f"{self.occasion} ({self.number})"


@dataclass(frozen=True, slots=True)
class Life:
    """One process: its clock is `origin_s` ahead of the parent's, which shows `began`, and counts from `boot_id`."""

    number: int
    path: Path
    began: float
    origin_s: float
    boot_id: str
    kill_at: Point | None = None


# What a process tells its parent.


@dataclass(frozen=True, slots=True)
class Sent:
    """A datagram for a far end."""

    data: bytes
    remote: Address


@dataclass(frozen=True, slots=True)
class Wished:
    """A call wishes for a media session, for another state of it, or (its id alone) for its end."""

    wish: MediaSpec | str


@dataclass(frozen=True, slots=True)
class Restored:
    """All sessions that the data plane is to hold."""

    sessions: tuple[RestoredSession, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing is left to do until that time of the parent's, unless something comes."""

    until: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The process has come to its end; how often each occasion came by."""

    occasions: Counter[Occasion]


# What the parent answers to Waiting: the time, and what has come.


@dataclass(frozen=True, slots=True)
class Datagram:
    """A datagram of a far end."""

    data: bytes
    flow: Flow


@dataclass(frozen=True, slots=True)
class Originate:
    """A program asks for a call."""

    call_id: str
    caller: str
    callee: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing will come any more."""


Input = Datagram | MediaInput | Originate | Finish


class Fuse:
    """Counts occasions, and kills the process at the one that it is for."""

    def __init__(self, kill_at: Point | None) -> None:
        self._kill_at = kill_at
        self.occasions: Counter[Occasion] = Counter()

    def reach(self, occasion: Occasion) -> None:
        self.occasions[occasion] += 1
        if self._kill_at == Point(occasion, self.occasions[occasion]):
            os.kill(os.getpid(), signal.SIGKILL)


class BorrowedTime(selectors.EpollSelector):
    """Asks the parent what comes next instead of waiting."""

    def __init__(self, parent: Connection, life: Life) -> None:
        super().__init__()
        self._parent = parent
        self._origin_s = life.origin_s
        self.now = life.began + life.origin_s
        self.take: Callable[[Input], None] = lambda _: None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        until = float("inf") if timeout is None else self.now + timeout - self._origin_s
        self._parent.send(Waiting(until))
        now, inputs = self._parent.recv()
        self.now = max(self.now, now + self._origin_s)
        for each in inputs:
            asyncio.get_running_loop().call_soon(self.take, each)
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop in borrowed time."""

    def __init__(self, selector: BorrowedTime) -> None:
        self._borrowed = selector
        super().__init__(selector)

    def time(self) -> float:
        return self._borrowed.now


class Disk(Executor):
    """Stands for a thread of the store: commits take DISK_S, everything else is done at once."""

    fuse: Fuse

    def __init__(self, max_workers: int, thread_name_prefix: str) -> None:
        """As ThreadPoolExecutor is made."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **_: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        if work is database_module._commit:
            asyncio.get_running_loop().call_later(DISK_S / 2, self._commit, future, arguments)
        else:
            _settle(future, work, arguments)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """There is nothing to stop."""

    def _commit(self, future: "Future[Any]", arguments: Sequence[Any]) -> None:
        self.fuse.reach(Occasion.BEFORE_WRITE)
        done: Future[Any] = Future()
        _settle(done, database_module._commit, arguments)
        self.fuse.reach(Occasion.AFTER_COMMIT)
        asyncio.get_running_loop().call_later(DISK_S / 2, _settle, future, done.result, ())


def _settle(future: "Future[Any]", work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        future.set_result(work(*arguments))
    except Exception as error:  # noqa: BLE001 - told to whoever waits, as a thread pool does
        future.set_exception(error)


class DataPlane:
    """The data plane's client: the parent holds the sessions."""

    def __init__(self, parent: Connection) -> None:
        self._parent = parent

    def open(self, spec: MediaSpec) -> None:
        self._parent.send(Wished(spec))

    def update(self, spec: MediaSpec) -> None:
        self._parent.send(Wished(spec))

    def close(self, session_id: str) -> None:
        self._parent.send(Wished(session_id))

    def unavailable(self) -> MediaFailure | None:
        return None


SETTINGS = Settings.model_validate(
    {
        "sip": {"listeners": [{"name": "main", "bind": PBX_HOST, "advertise": PBX_HOST}]},
        "media": {"addresses": [{"bind": PBX_HOST, "advertise": PBX_HOST}]},
        "trunks": [
            {"name": "near", "destination": f"{CALLER_HOST}:5060"},
            {"name": "far", "destination": f"{CALLEE_HOST}:5060"},
        ],
        "routes": [
            {"prefix": "9", "trunk": "far", "from": ["near"]},
            {"prefix": "8", "trunk": "near"},
            {"prefix": "7", "trunk": "far"},
        ],
    }
)


class Core:
    """What app.py ties together, as far as calls and their journal are concerned."""

    def __init__(self, life: Life, parent: Connection, fuse: Fuse) -> None:
        self._life = life
        self._parent = parent
        self._fuse = fuse
        self._metrics = ControlMetrics()
        self._finished = asyncio.Event()
        tokens = (f"p{life.number}t{number}" for number in itertools.count(1))
        self._new_token = tokens.__next__
        self._clock = asyncio.get_running_loop().time

    async def run(self) -> None:
        """Live until the parent has nothing more.

        Raises:
            SnapshotError: a call that was saved cannot be read.
        """
        database = await Database.open(self._life.path, metrics=self._metrics)
        self._journal = Journal(database, boot_id=self._life.boot_id, clock=self._clock)
        self._events = await EventStore.open(
            database,
            RecordStore(database),
            metrics=self._metrics,
            keep=timedelta(days=36_500),
            keep_events=1000,
            also=self._journal.statements_for,
            committed=lambda event, record: None,
        )
        self._b2bua = self._make_b2bua()
        await self._take_up_calls()
        self._b2bua.resume()
        await self._finished.wait()
        assert self._b2bua.calls() == [], f"left over: {self._b2bua.calls()}"
        await self._events.close()
        await database.close()

    def take(self, given: Input) -> None:
        """Take what has come."""
        match given:
            case Datagram():
                self._b2bua.receive(given.data, given.flow)
            case Originate():
                started = self._b2bua.originate(CallId(given.call_id), given.caller, given.callee)
                assert not isinstance(started, Refusal), started
            case Finish():
                self._finished.set()
            case _:
                self._b2bua.media_input(given)

    def _make_b2bua(self) -> B2bua:
        registrar = Registrar(
            is_user=lambda _: False, min_expires_s=60, max_expires_s=3600, default_expires_s=600, max_bindings=1
        )
        trunks = Trunks(SETTINGS.trunk_values())
        return B2bua(
            settings=SETTINGS,
            stack=SipStack(
                advertised=lambda _: Address(PBX_HOST, 5060),
                new_token=self._new_token,
                timers=Timers(),
                server_name="sippbx",
            ),
            registrar=registrar,
            router=Router(users={}, bindings_of=registrar.lookup, trunks=trunks, rules=SETTINGS.route_rules()),
            trunks=trunks,
            admission=Admission(max_calls=100, calls_per_second=50, retry_after_s=7),
            authenticator=DigestAuthenticator(SETTINGS.realm, b"secret", algorithms=["MD5"]),
            media=DataPlane(self._parent),
            transmit=self._transmit,
            publish=self._publish,
            metrics=self._metrics,
            new_token=self._new_token,
            clock=self._clock,
            utc_now=lambda: UTC_NOW,
            journal=self._journal,
        )

    async def _take_up_calls(self) -> None:
        here = Instant(self._clock(), self._life.boot_id, datetime.now(UTC))
        sessions = []
        for entry in await self._journal.load():
            then = Instant(entry.saved_now, entry.boot_id, entry.saved_at)
            call = brought_back(
                entry.snapshot, then=then, here=here, new_token=self._new_token, random=secrets.SystemRandom().random
            )
            if (session := self._b2bua.take_up(call)) is not None:
                sessions.append(session)
        self._parent.send(Restored(tuple(sessions)))

    def _transmit(self, data: bytes, flow: Flow) -> None:
        self._fuse.reach(Occasion.BEFORE_SEND)
        self._parent.send(Sent(data, flow.remote))
        self._fuse.reach(Occasion.AFTER_SEND)

    def _publish(self, event: Event) -> None:
        if (kind := event_type(event)) is not None:
            self._events.append(
                id=event_id(event, self._new_token),
                type=kind,
                at=event.at,
                call_id=call_id_of(event),
                data=encode(event),
                record=event.record if isinstance(event, CallEvent) else None,
            )


def live(life: Life, parent: Connection) -> None:
    """Run a process of that life to its end, or to the point where it kills itself."""
    fuse = Disk.fuse = Fuse(life.kill_at)
    vars(database_module)["ThreadPoolExecutor"] = Disk
    selector = BorrowedTime(parent, life)

    async def run() -> None:
        core = Core(life, parent, fuse)
        selector.take = core.take
        await core.run()

    with asyncio.Runner(loop_factory=lambda: Loop(selector)) as runner:
        runner.run(run())
    parent.send(Finished(fuse.occasions))
