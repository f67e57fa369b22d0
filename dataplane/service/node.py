"""The media node: the sessions that there are, whose they are, and the ports they have.

Commands on one session are carried out one after the other, in the order in which they were given; once begun they are
finished, whoever waits for them. Every verb may be repeated. The node belongs to the control plane that acquired it
last: while that one's command stream is gone, sessions go on for `owner_grace_s` and are then closed.

A node may remember sessions of an earlier instance. One that is made again goes on with its figures; one that is
deleted without that has them for its final ones.
"""

import asyncio
import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from itertools import takewhile
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

import structlog

from dataplane.engine.engine import (
    BindFailedError,
    EngineChanged,
    EngineEvent,
    EngineUnavailableError,
    RelayEngine,
    SessionLost,
)
from dataplane.ports import BlockUnavailableError, PortBlock, PortPool, PortsExhaustedError
from dataplane.service.events import (
    Capacity,
    CapacityChanged,
    CloseReason,
    EventLog,
    NodeEvent,
    RelayInterrupted,
    SessionClosed,
)
from dataplane.session.relay import LearnedSource, StreamSnapshot
from dataplane.session.spec import InvalidSpecError, SessionSpec, plan, validate

log = structlog.get_logger(__name__)

T = TypeVar("T")

_BIND_ATTEMPTS: Final = 3
_MOST_TOMBSTONES: Final = 20_000
# An owner whose command stream has been gone for no longer is on its way back.
_ALIVE_S: Final = 1.0
# Within so many seconds of its end a session's final figures have been asked for, or the asking is under way.
_RECENT_S: Final = 10.0


class Refusal(StrEnum):
    """Why a command was not carried out."""

    INVALID_ARGUMENT = "invalid_argument"
    PORTS_EXHAUSTED = "ports_exhausted"
    BIND_FAILED = "bind_failed"
    ADDRESS_NOT_LOCAL = "address_not_local"
    BLOCK_UNAVAILABLE = "block_unavailable"
    STALE_GENERATION = "stale_generation"
    FENCED = "fenced"
    UNKNOWN_SESSION = "unknown_session"
    SESSION_DELETED = "session_deleted"
    DRAINING = "draining"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    UNSUPPORTED = "unsupported"
    INTERNAL = "internal"


class RefusedError(Exception):
    """A command was not carried out; nothing of it was."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.message = message


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as it stands, or as it stood when it ended; `streams` is filled where it was asked for.

    `carried` is what `streams` began with: the figures of an earlier instance.
    """

    spec: SessionSpec
    block: PortBlock
    created_at: datetime
    streams: tuple[StreamSnapshot, ...] = ()
    carried: tuple[StreamSnapshot, ...] = ()


class Ownership:
    """What a control plane is given when it acquires the node."""

    def __init__(self, epoch: int, owner_id: str, incarnation: int, now: float) -> None:
        self.epoch = epoch
        self.owner_id = owner_id
        self.incarnation = incarnation
        self.fenced = asyncio.Event()
        self._streams = 0
        self._seen_at = now

    @property
    def connected(self) -> bool:
        """It has a command stream."""
        return self._streams > 0

    @contextmanager
    def stream(self, clock: Callable[[], float]) -> Iterator[None]:
        """While it is open, the owner is alive."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
            self._seen_at = clock()

    def absent_s(self, now: float) -> float:
        """For how long it has had no command stream, in seconds."""
        return 0.0 if self.connected else now - self._seen_at


@dataclass(frozen=True, slots=True)
class _Tombstone:
    view: SessionView
    until: float


class MediaNode:
    """See the module. `first_epoch` is the first one to be granted; `utc_now` dates events and sessions.

    `remembered` are sessions of an earlier instance with their figures; they are forgotten after `tombstone_s`. The
    engine is given with `attach`, because it reports to `observe`.
    """

    def __init__(
        self,
        pool: PortPool,
        events: EventLog,
        *,
        owner_grace_s: float,
        tombstone_s: float,
        first_epoch: int,
        clock: Callable[[], float],
        utc_now: Callable[[], datetime],
        remembered: Iterable[SessionView] = (),
    ) -> None:
        self.events = events
        self.owner: Ownership | None = None
        self.sessions_created = 0
        self.sessions_closed = dict.fromkeys(CloseReason, 0)
        self.allocation_failures = dict.fromkeys((Refusal.PORTS_EXHAUSTED, Refusal.BIND_FAILED), 0)
        self._pool = pool
        self._owner_grace_s = owner_grace_s
        self._tombstone_s = tombstone_s
        self._next_epoch = first_epoch
        self._clock = clock
        self._utc_now = utc_now
        self._engine: RelayEngine | None = None
        self._sessions: dict[str, SessionView] = {}
        self._tombstones: OrderedDict[str, _Tombstone] = OrderedDict()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._operations: set[asyncio.Task[Any]] = set()
        self._draining = ""
        self._accepting: bool | None = None
        self._interrupted_at: float | None = None
        self._closed: list[SessionView] = []
        self._remembered = {view.spec.session_id: view for view in remembered}
        self._remembered_until = clock() + tombstone_s

    # ------------------------------------------------------------------------------------------------------- lifetime

    def attach(self, engine: RelayEngine) -> None:
        """Give it the engine that carries out its sessions."""
        self._engine = engine

    @property
    def engine(self) -> RelayEngine:
        """The engine."""
        if self._engine is None:
            raise RuntimeError("the node has no engine yet")
        return self._engine

    def observe(self, event: EngineEvent) -> None:
        """Take in what the engine reports."""
        match event:
            case SessionLost(session_id, problem, streams):
                view = self._sessions.get(session_id)
                if view is not None:
                    log.error("session.lost", session_id=session_id, problem=problem)
                    self._bury(view, CloseReason.WORKER_LOST, streams)
            case EngineChanged(ready):
                self._note_interruption(ready=ready)
                self._note_capacity()
            case _:
                self._publish(event)

    def drain(self, why: str) -> None:
        """Take no new sessions from now on; those that there are go on."""
        if not self._draining:
            self._draining = why
            log.info("node.draining", why=why, sessions=len(self._sessions))
            self._note_capacity()

    @property
    def draining(self) -> bool:
        """New sessions are not taken any more."""
        return bool(self._draining)

    async def close_all(self, reason: CloseReason) -> None:
        """End every session."""
        closing = [self._finish(session_id, self._close(session_id, reason)) for session_id in list(self._sessions)]
        await asyncio.gather(*closing, return_exceptions=True)

    async def tick(self) -> None:
        """Do what time demands; to be called about once a second."""
        now = self._clock()
        while self._tombstones and next(iter(self._tombstones.values())).until <= now:
            self._tombstones.popitem(last=False)
        if self._remembered and self._remembered_until <= now:
            self._remembered.clear()
        owner = self.owner
        if self._sessions and owner is not None and owner.absent_s(now) >= self._owner_grace_s:
            log.error("node.owner_lost", owner_id=owner.owner_id, sessions=len(self._sessions))
            await self.close_all(CloseReason.OWNER_LOST)
        self._note_capacity()

    # ------------------------------------------------------------------------------------------------------ ownership

    def acquire(self, owner_id: str, incarnation: int = 0) -> Ownership:
        """Make `owner_id` the owner and fence the one before.

        Raises: RefusedError(FENCED), where that one is alive and of a later incarnation.
        """
        now = self._clock()
        if self.owner is not None:
            if incarnation < self.owner.incarnation and self.owner.absent_s(now) < _ALIVE_S:
                newer = f"incarnation {self.owner.incarnation} owns this data plane"
                raise RefusedError(Refusal.FENCED, f"incarnation {incarnation} is not the newest: {newer}")
            self.owner.fenced.set()
        self.owner = Ownership(self._next_epoch, owner_id, incarnation, now)
        self._next_epoch += 1
        log.info("node.acquired", owner_id=owner_id, epoch=self.owner.epoch, sessions=len(self._sessions))
        return self.owner

    def owner_of(self, epoch: int) -> Ownership:
        """Return the owner if it has this epoch. Raises RefusedError(FENCED)."""
        if self.owner is None or self.owner.epoch != epoch:
            newest = (
                "nobody has acquired this data plane" if self.owner is None else f"the newest is {self.owner.epoch}"
            )
            raise RefusedError(Refusal.FENCED, f"epoch {epoch} is not in force: {newest}")
        return self.owner

    async def settled(self) -> None:
        """Wait until the operations that were begun by now have ended."""
        if self._operations:
            await asyncio.wait(set(self._operations))

    # ------------------------------------------------------------------------------------------------------- sessions

    async def create(
        self, spec: SessionSpec, first_port: int = 0, learned: tuple[LearnedSource, ...] = ()
    ) -> SessionView:
        """Make a session, on the block that begins with `first_port` unless that is 0. Raises RefusedError.

        `learned` are the sources that were locked for it before.
        """
        return await self._finish(spec.session_id, self._create(spec, first_port, learned))

    async def update(self, spec: SessionSpec) -> SessionView:
        """Replace the wanted state of a session. Raises RefusedError."""
        return await self._finish(spec.session_id, self._update(spec))

    async def delete(self, session_id: str) -> SessionView:
        """End a session and return its last state and final figures. Raises RefusedError."""
        return await self._finish(session_id, self._close(session_id, CloseReason.DELETED))

    async def list(self, after: str, limit: int, *, with_streams: bool, session_id: str = "") -> Sequence[SessionView]:
        """Return sessions in the order of their ids: up to `limit` of those that follow `after`, or the one named.

        Raises: RefusedError, when figures are wanted and the engine does not answer.
        """
        if session_id:
            views = [self._sessions[session_id]] if session_id in self._sessions else []
        else:
            views = [self._sessions[name] for name in sorted(name for name in self._sessions if name > after)[:limit]]
        if not with_streams:
            return views
        try:
            streams = await self.engine.collect([view.spec.session_id for view in views])
        except EngineUnavailableError as error:
            raise RefusedError(Refusal.INTERNAL, str(error)) from error
        return [replace(view, streams=streams.get(view.spec.session_id, ())) for view in views]

    def __len__(self) -> int:
        return len(self._sessions)

    def capacity(self) -> Capacity:
        """Return how much room there is."""
        counts = self._pool.counts(self._clock())
        why_not = self._draining
        if not why_not and not self.engine.ready:
            why_not = "the relay engine is not running"
        if not why_not and not counts.free:
            why_not = f"no port block is free: {counts.in_use} are in use, {counts.resting} are resting"
        return Capacity(
            blocks_total=counts.total,
            blocks_in_use=counts.in_use,
            blocks_resting=counts.resting,
            blocks_free=counts.free,
            block_size=self._pool.block_size,
            first_port=self._pool.first,
            last_port=self._pool.last,
            not_accepting_reason=why_not,
        )

    def take_closed(self) -> Sequence[SessionView]:
        """Return the sessions that ended since the last call, with their final figures."""
        closed, self._closed = self._closed, []
        return closed

    def live(self, figures: Mapping[str, tuple[StreamSnapshot, ...]]) -> Sequence[SessionView]:
        """Return all sessions with their `figures`, by session id, as the engine collected them."""
        return [
            replace(view, streams=figures.get(session_id, view.carried)) for session_id, view in self._sessions.items()
        ]

    def ended(self) -> Sequence[SessionView]:
        """Return the sessions that are over and whose figures somebody may still ask a later instance for."""
        recent = self._clock() - _RECENT_S + self._tombstone_s
        tombstones = takewhile(lambda tombstone: tombstone.until > recent, reversed(self._tombstones.values()))
        return [*self._remembered.values(), *(tombstone.view for tombstone in tombstones)]

    # ------------------------------------------------------------------------------------------------------- internal

    async def _finish(self, session_id: str, operation: Coroutine[object, object, T]) -> T:
        """Carry out an operation after those begun on the session before, to its end, whoever waits."""
        lock = self._locks.setdefault(session_id, asyncio.Lock())

        async def in_turn() -> T:
            async with lock:
                return await operation

        task = asyncio.create_task(in_turn())
        self._operations.add(task)
        task.add_done_callback(self._operation_ended)
        return await asyncio.shield(task)

    def _operation_ended(self, task: asyncio.Task[Any]) -> None:
        self._operations.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; where nobody does any more, that is no news

    async def _create(self, spec: SessionSpec, first_port: int, learned: tuple[LearnedSource, ...]) -> SessionView:
        self._check(spec)
        existing = self._sessions.get(spec.session_id)
        if existing is not None:
            if existing.spec == spec and first_port in (0, existing.block.first):
                return existing
            raise RefusedError(
                Refusal.STALE_GENERATION,
                f"session {spec.session_id} exists with generation {existing.spec.generation} and other content",
            )
        if spec.session_id in self._tombstones:
            raise RefusedError(Refusal.SESSION_DELETED, f"session {spec.session_id} was deleted")
        if self._draining:
            raise RefusedError(Refusal.DRAINING, self._draining)
        earlier = self._remembered.get(spec.session_id)
        carried = () if earlier is None else earlier.streams
        block = await self._bind_block(spec, first_port, learned, carried)
        created_at = self._utc_now() if earlier is None else earlier.created_at
        view = SessionView(spec, block, created_at, carried=carried)
        self._remembered.pop(spec.session_id, None)
        self._sessions[spec.session_id] = view
        self.sessions_created += 1
        self._note_capacity()
        log.info("session.created", session_id=spec.session_id, first_port=block.first, again=earlier is not None)
        return view

    async def _bind_block(
        self,
        spec: SessionSpec,
        first_port: int,
        learned: tuple[LearnedSource, ...],
        carried: tuple[StreamSnapshot, ...],
    ) -> PortBlock:
        """Take a block and bind what is needed of it; where a stranger has one of its ports, try a few others."""
        for attempt in range(1, _BIND_ATTEMPTS + 1):
            block = self._take_block(first_port)
            try:
                await self.engine.apply(plan(spec, block), learned, carried)
            except BindFailedError as error:
                refused = _bind_refusal(error)
                if refused.refusal is Refusal.ADDRESS_NOT_LOCAL:
                    self._pool.put_back(block)
                    raise refused from error
                self.allocation_failures[Refusal.BIND_FAILED] += 1
                log.warning("block.not_bound", session_id=spec.session_id, problem=refused.message)
                if first_port:
                    # Whoever names a block wants that one, and will ask for it again.
                    self._pool.put_back(block)
                    raise refused from error
                self._pool.release(block, self._clock())
                if attempt == _BIND_ATTEMPTS or error.errno != errno.EADDRINUSE:
                    raise refused from error
            except EngineUnavailableError as error:
                # Should it have been carried out after all, it is undone behind it.
                await self._remove_from_engine(spec.session_id)
                self._pool.release(block, self._clock())
                raise RefusedError(Refusal.INTERNAL, str(error)) from error
            else:
                return block
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _take_block(self, first_port: int) -> PortBlock:
        try:
            return self._pool.take(self._clock(), first_port or None)
        except PortsExhaustedError as error:
            self.allocation_failures[Refusal.PORTS_EXHAUSTED] += 1
            raise RefusedError(Refusal.PORTS_EXHAUSTED, str(error)) from error
        except BlockUnavailableError as error:
            raise RefusedError(Refusal.BLOCK_UNAVAILABLE, str(error)) from error

    async def _update(self, spec: SessionSpec) -> SessionView:
        self._check(spec)
        existing = self._sessions.get(spec.session_id)
        if existing is None:
            raise self._unknown(spec.session_id)
        if existing.spec == spec:
            return existing
        if spec.generation <= existing.spec.generation:
            what = "equal, with other content" if spec.generation == existing.spec.generation else "older"
            raise RefusedError(
                Refusal.STALE_GENERATION,
                f"generation {spec.generation} is {what}: {existing.spec.generation} is in force",
            )
        try:
            await self.engine.apply(plan(spec, existing.block))
        except BindFailedError as error:
            refused = _bind_refusal(error)
            if refused.refusal is Refusal.BIND_FAILED:
                self.allocation_failures[Refusal.BIND_FAILED] += 1
            raise refused from error
        except EngineUnavailableError as error:
            raise RefusedError(Refusal.INTERNAL, str(error)) from error
        if self._sessions.get(spec.session_id) is not existing:
            raise self._unknown(spec.session_id)  # the engine lost it meanwhile
        view = self._sessions[spec.session_id] = replace(existing, spec=spec)
        log.debug("session.updated", session_id=spec.session_id, generation=spec.generation)
        return view

    async def _close(self, session_id: str, reason: CloseReason) -> SessionView:
        view = self._sessions.get(session_id)
        if view is None:
            if session_id in self._tombstones:
                return self._tombstones[session_id].view
            if session_id in self._remembered:
                return self._remembered[session_id]
            raise self._unknown(session_id)
        streams = await self._remove_from_engine(session_id)
        if session_id not in self._sessions:
            return self._tombstones[session_id].view  # the engine lost it meanwhile
        return self._bury(view, reason, streams)

    async def _remove_from_engine(self, session_id: str) -> tuple[StreamSnapshot, ...]:
        try:
            return await self.engine.remove(session_id)
        except EngineUnavailableError as error:
            log.error("session.not_removed", session_id=session_id, problem=str(error))
            return ()

    def _bury(self, view: SessionView, reason: CloseReason, streams: tuple[StreamSnapshot, ...]) -> SessionView:
        """Note the end of a session: its block rests, its last state is kept for a while, watchers are told."""
        now = self._clock()
        session_id = view.spec.session_id
        del self._sessions[session_id]
        self._pool.release(view.block, now)
        final = replace(view, streams=streams)
        self._tombstones[session_id] = _Tombstone(final, now + self._tombstone_s)
        if len(self._tombstones) > _MOST_TOMBSTONES:
            self._tombstones.popitem(last=False)
        self.sessions_closed[reason] += 1
        self._closed.append(final)
        self._publish(SessionClosed(session_id, reason, streams))
        log.info("session.closed", session_id=session_id, reason=reason)
        self._note_capacity()
        return final

    def _check(self, spec: SessionSpec) -> None:
        try:
            validate(spec, self._pool.block_size // 4)
        except InvalidSpecError as error:
            raise RefusedError(Refusal.INVALID_ARGUMENT, f"spec.{error}") from error

    def _unknown(self, session_id: str) -> RefusedError:
        if session_id in self._tombstones:
            return RefusedError(Refusal.SESSION_DELETED, f"session {session_id} was deleted")
        return RefusedError(Refusal.UNKNOWN_SESSION, f"there is no session {session_id}")

    def _note_interruption(self, *, ready: bool) -> None:
        if not ready:
            self._interrupted_at = self._clock()
        elif self._interrupted_at is not None:
            gap_s, self._interrupted_at = self._clock() - self._interrupted_at, None
            log.warning("relay.interrupted", gap_s=round(gap_s, 3), sessions=len(self._sessions))
            self._publish(RelayInterrupted(gap_s))

    def _note_capacity(self) -> None:
        capacity = self.capacity()
        if capacity.accepting != self._accepting:
            self._accepting = capacity.accepting
            self._publish(CapacityChanged(capacity))

    def _publish(self, event: NodeEvent) -> None:
        self.events.append(event, self._utc_now())


def _bind_refusal(error: BindFailedError) -> RefusedError:
    problem = os.strerror(error.errno)
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return RefusedError(Refusal.ADDRESS_NOT_LOCAL, f"{error.address} is not an address of this host: {problem}")
    return RefusedError(Refusal.BIND_FAILED, f"{error.address} port {error.port} cannot be bound: {problem}")
