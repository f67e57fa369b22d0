"""The userspace engine: relays in a worker process of its own, which it starts, watches and starts again.

The engine remembers what each session's plan is, which sources were locked and which figures it heard last. When the
worker dies, another one is started at once and told all that; requests without a reply are sent again. What the dead
worker counted since the figures were last collected is lost, no session is.
"""

import asyncio
import itertools
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from dataplane.engine.engine import (
    BindFailedError,
    EngineChanged,
    EngineObserver,
    EngineUnavailableError,
    SessionLost,
)
from dataplane.engine.wire import (
    Applied,
    Apply,
    Collect,
    Collected,
    FrameBuffer,
    Message,
    Refused,
    Remove,
    Removed,
    Reply,
    Request,
    decode,
    encode,
)
from dataplane.session.relay import LearnedSource, SourceLatched, StreamSnapshot
from dataplane.session.spec import Leg, RelayPlan

log = structlog.get_logger(__name__)

_READ_BYTES: Final = 1 << 16
_QUICK_DEATH_S: Final = 5.0
_FIRST_DELAY_S: Final = 0.05
_LONGEST_DELAY_S: Final = 1.0
_MOST_PENDING: Final = 4096


@dataclass(slots=True)
class _Known:
    """What is to be told to a new worker about a session."""

    plan: RelayPlan
    learned: dict[tuple[Leg, int], LearnedSource] = field(default_factory=dict)
    streams: tuple[StreamSnapshot, ...] = ()

    def revise(self, plan: RelayPlan) -> None:
        """Take note of a plan; what was learned of a far end goes when that moves, also should it move back."""
        self.plan = plan
        signalled = {(port.leg, port.line): port.remote_rtp for port in plan.ports}
        self.learned = {
            key: source
            for key, source in self.learned.items()
            if signalled.get(key, source.signalled) == source.signalled
        }


@dataclass(slots=True)
class _Pending:
    request: Request
    reply: asyncio.Future[Reply]
    collected: dict[str, tuple[StreamSnapshot, ...]] = field(default_factory=dict)
    is_restoration: bool = False


class UserspaceEngine:
    """The engine of that name; see RelayEngine.

    `silence_s` is how long a far end may be silent before that is reported, `timeout_s` the deadline of each request.
    """

    name = "userspace"

    def __init__(
        self,
        observer: EngineObserver,
        *,
        silence_s: float,
        receive_buffer_bytes: int,
        clock: Callable[[], float],
        timeout_s: float = 5.0,
    ) -> None:
        self._observer = observer
        self._arguments = (str(silence_s), str(receive_buffer_bytes))
        self._clock = clock
        self._timeout_s = timeout_s
        self._known: dict[str, _Known] = {}
        self._pending: dict[int, _Pending] = {}
        self._request_ids = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._restarts = 0

    @property
    def ready(self) -> bool:
        """A worker is running and has answered."""
        return self._ready.is_set()

    @property
    def restarts(self) -> int:
        """How often a worker was started after one had died."""
        return self._restarts

    @property
    def worker_pid(self) -> int | None:
        """The process id of the worker, for whoever measures it; None while there is none."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the worker and wait for it."""
        self._supervision = asyncio.create_task(self._supervise(), name="relay worker")
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise EngineUnavailableError("the relay worker did not start") from None

    async def apply(
        self, plan: RelayPlan, learned: tuple[LearnedSource, ...] = (), carried: tuple[StreamSnapshot, ...] = ()
    ) -> None:
        """See RelayEngine."""
        reply = (await self._ask(Apply(next(self._request_ids), plan, learned, carried))).reply.result()
        if isinstance(reply, Refused):
            raise BindFailedError(reply.address, reply.port, reply.errno)

    async def remove(self, session_id: str) -> tuple[StreamSnapshot, ...]:
        """See RelayEngine."""
        reply = (await self._ask(Remove(next(self._request_ids), session_id))).reply.result()
        return reply.streams if isinstance(reply, Removed) else ()

    async def collect(self, session_ids: Sequence[str] | None = None) -> Mapping[str, tuple[StreamSnapshot, ...]]:
        """See RelayEngine."""
        names = None if session_ids is None else tuple(session_ids)
        return (await self._ask(Collect(next(self._request_ids), names))).collected

    async def close(self) -> None:
        """See RelayEngine."""
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
        for pending in self._pending.values():
            pending.reply.cancel()

    async def _ask(self, request: Request) -> _Pending:
        """Send a request and wait for its reply, through the death of a worker if need be."""
        if len(self._pending) >= _MOST_PENDING:
            raise EngineUnavailableError(f"{_MOST_PENDING} requests are waiting for the relay worker")
        pending = _Pending(request, asyncio.get_running_loop().create_future())
        self._pending[request.request_id] = pending
        if self._writer is not None:
            self._writer.write(encode(request))
        try:
            async with asyncio.timeout(self._timeout_s):
                await pending.reply
        except TimeoutError:
            # It stays pending: should the reply come, it still is to be noted.
            raise EngineUnavailableError(f"no answer from the relay worker within {self._timeout_s:g} s") from None
        return pending

    async def _supervise(self) -> None:
        delay_s = 0.0
        while True:
            started_at = self._clock()
            try:
                await self._run_worker()
            except (OSError, ValueError) as error:
                log.error("worker.failed", error=str(error))
            if self._ready.is_set():
                self._ready.clear()
                self._observer(EngineChanged(ready=False))
            lived_s = self._clock() - started_at
            delay_s = 0.0 if lived_s >= _QUICK_DEATH_S else min(2 * delay_s or _FIRST_DELAY_S, _LONGEST_DELAY_S)
            log.error("worker.died", lived_s=round(lived_s, 3), sessions=len(self._known), restart_in_s=delay_s)
            await asyncio.sleep(delay_s)
            self._restarts += 1

    async def _run_worker(self) -> None:
        """Start a worker, tell it what is known and read what it says, until it ends."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "dataplane.engine.worker",
                    str(theirs.fileno()),
                    *self._arguments,
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            except OSError:
                ours.close()
                raise
        self._process = process
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            self._writer = writer
            for message in self._restoration():
                writer.write(encode(message))
            frames = FrameBuffer()
            while data := await reader.read(_READ_BYTES):
                for body in frames.feed(data):
                    self._receive(decode(body))
        except ConnectionError:
            pass  # as good as the end of the stream
        finally:
            self._writer = None
            writer.close()
            if process.returncode is None:
                process.kill()
            await process.wait()

    def _restoration(self) -> list[Request]:
        """What a new worker is told: each session, a greeting that it answers then, every request without a reply."""
        loop = asyncio.get_running_loop()
        still_wanted = (
            item for item in self._pending.items() if not item[1].is_restoration and not item[1].reply.done()
        )
        self._pending = dict(still_wanted)
        unanswered = [pending.request for pending in self._pending.values()]
        told: list[Request] = [
            Apply(next(self._request_ids), known.plan, tuple(known.learned.values()), known.streams)
            for known in self._known.values()
        ]
        told.append(Collect(next(self._request_ids), ()))
        for request in told:
            self._pending[request.request_id] = _Pending(request, loop.create_future(), is_restoration=True)
        return told + unanswered

    def _receive(self, message: Message) -> None:
        match message:
            case Applied() | Refused() | Removed() | Collected():
                self._settle(message)
            case SourceLatched(session_id, _, leg, line, signalled, rtp, rtcp):
                known = self._known.get(session_id)
                if known is not None:
                    known.learned[leg, line] = LearnedSource(leg, line, signalled, rtp, rtcp)
                self._observer(message)
            case Apply() | Remove() | Collect():
                raise ValueError(f"an engine is not told {type(message).__name__}")
            case _:
                self._observer(message)

    def _settle(self, reply: Reply) -> None:
        """Take note of a reply, and hand it to who waits for it, if somebody still does."""
        pending = self._pending.get(reply.request_id)
        if isinstance(reply, Collected):
            for entry in reply.sessions:
                if entry.session_id in self._known:
                    self._known[entry.session_id].streams = entry.streams
            if pending is not None:
                pending.collected.update({entry.session_id: entry.streams for entry in reply.sessions})
            if not reply.last:
                return
        if pending is None:
            return
        del self._pending[reply.request_id]
        self._note(pending, reply)
        if not pending.reply.done():
            pending.reply.set_result(reply)

    def _note(self, pending: _Pending, reply: Reply) -> None:
        match pending.request, reply:
            case Apply(plan=plan, learned=learned, carried=carried), Applied():
                known = self._known.get(plan.session_id)
                if known is None:
                    by_port = {(source.leg, source.line): source for source in learned}
                    self._known[plan.session_id] = _Known(plan, by_port, carried)
                else:
                    known.revise(plan)
            case Apply(plan=plan), Refused(address=address, port=port, errno=errno) if pending.is_restoration:
                lost = self._known.pop(plan.session_id)
                problem = f"{address} port {port}: {os.strerror(errno)}"
                self._observer(SessionLost(plan.session_id, problem, lost.streams))
            case Remove(session_id=session_id), Removed():
                self._known.pop(session_id, None)
            case Collect(), Collected() if pending.is_restoration:
                self._ready.set()
                self._observer(EngineChanged(ready=True))
            case _:
                pass
