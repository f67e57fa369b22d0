"""The control plane's hold on the data plane: one gRPC connection, kept up for ever (sippbx.media.v1).

Commands travel on one bidirectional stream, all that were queued in one iteration of the loop in one message. Whenever
it has connected, the client acquires the data plane and makes it hold what is wanted, be it the same process as before
or another, and be the wishes its own or those that an earlier process of the control plane left in its journal: see
MediaLedger. A data plane that was restarted is given every session again on its old ports with the sources that it had
locked. Calls outlive that, and the data plane goes on counting where it had been. A session that it gives up is
reported as lost.

Once another control plane has acquired the data plane, this one is fenced: it sends nothing more and says so, once.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import structlog

from control.media import wire
from control.media.ledger import Action, Command, MediaLedger, Purpose
from control.metrics import ControlMetrics
from control.pbx.media import MediaFailure, MediaInput, MediaLost, MediaSpec, RestoredSession
from control.pbx.records import ErrorEvent
from sippbx.media.v1 import event_pb2, media_service_pb2, media_service_pb2_grpc, node_pb2

MAX_BATCH = 256
MAX_PENDING = 4_096
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_RPC_TIMEOUT_S = 2.0
_PROBE_INTERVAL_S = 1.0
_BACKOFF_FIRST_S = 0.05
# A restarted data plane is to have its sessions back at once; asking a socket of this host costs nothing.
_BACKOFF_MOST_S = 0.1
_CHANNEL_OPTIONS = [
    # With a pool of its own, a new channel tries at once instead of sharing another's back-off.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

if TYPE_CHECKING:
    from sippbx.media.v1.media_service_pb2_grpc import MediaServiceAsyncStub

_log = structlog.get_logger(__name__)


class _ConnectionLostError(Exception):
    """The connection is of no more use; the message says why."""


class _FencedError(Exception):
    """Another control plane owns the data plane."""


class MediaClient:
    """A MediaPort over gRPC. Wishes return at once; their answers are delivered later, each exactly once.

    `target` is a gRPC name such as `unix:///run/sippbx/media.sock`; `incarnation` grows with each start of the control
    plane, so that a process that wakes up late is told from its successor; `fenced` is called once when ownership is
    lost for good; `publish` hears of it when the data plane is lost.
    """

    def __init__(
        self,
        *,
        target: str,
        owner_id: str,
        command_timeout_s: float,
        lost_timeout_s: float,
        metrics: ControlMetrics,
        fenced: Callable[[], None],
        publish: Callable[[ErrorEvent], None],
        incarnation: int = 0,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._target = target
        self._claim = media_service_pb2.AcquireRequest(owner_id=owner_id, incarnation=incarnation)
        self._metrics = metrics
        self._tell_fenced = fenced
        self._publish = publish
        self._ledger = MediaLedger(
            command_timeout_s=command_timeout_s, lost_timeout_s=lost_timeout_s, max_pending=max_pending
        )
        self._take: Callable[[MediaInput], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None
        self._unsent = asyncio.Event()
        self._suspect = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._instance_id = ""
        self._last_sequence = 0
        self._history_until = 0
        self._capacity = node_pb2.Capacity()
        self._free_blocks = 0
        self._trouble: str | None = f"the data plane at {target} has not been reached yet"
        self._reached = asyncio.Event()

    def restore(self, sessions: Sequence[RestoredSession]) -> None:
        """Take over the sessions of an earlier process of this control plane; to be called before `start`.

        Their calls may wish at once for what they want of them. A session that cannot be had again in time is answered
        with MediaLost.
        """
        self._ledger.restore(sessions, self._loop.time())
        self._arm()

    def start(self, deliver: Callable[[MediaInput], None]) -> None:
        """Begin to connect; answers and losses go to `deliver`."""
        self._take = deliver
        self._task = asyncio.create_task(self._run(), name="media-client")

    async def stop(self) -> None:
        """Disconnect; what has no answer yet gets one now."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._deliver(self._ledger.abandon("the control plane stops", self._loop.time()))
        self._take = None

    async def reached(self) -> None:
        """Wait until the data plane was acquired for the first time."""
        await self._reached.wait()

    @property
    def trouble(self) -> str | None:
        """Why no session could be made now, for people; None when one could."""
        if self._trouble is None and not self._capacity.accepting:
            return self._capacity.not_accepting_reason or "the data plane takes no new sessions"
        return self._trouble

    def unavailable(self) -> MediaFailure | None:
        """Why no session could be made now; None when one could."""
        if self._trouble is not None:
            return MediaFailure.UNAVAILABLE
        if self._free_blocks <= 0:
            return MediaFailure.PORTS_EXHAUSTED
        return None if self._capacity.accepting else MediaFailure.UNAVAILABLE

    def open(self, spec: MediaSpec) -> None:
        """Make a session: MediaOpened or MediaFailed follows."""
        self._free_blocks -= 1
        self._wished(self._ledger.open(spec, self._loop.time()))

    def update(self, spec: MediaSpec) -> None:
        """Change a session: MediaUpdated or MediaFailed follows."""
        self._wished(self._ledger.update(spec, self._loop.time()))

    def close(self, session_id: str) -> None:
        """End a session: MediaClosed follows."""
        self._wished(self._ledger.close(session_id, self._loop.time()))

    def _wished(self, answers: list[MediaInput]) -> None:
        if answers:
            # Never from within the wish: whoever wished is not done with what it is doing.
            self._loop.call_soon(self._deliver, answers)
        self._unsent.set()
        self._arm()

    def _deliver(self, answers: list[MediaInput]) -> None:
        for answer in answers:
            if isinstance(answer, MediaLost):
                _log.warning("media.session_lost", session_id=answer.session_id, detail=answer.detail)
            if self._take is None:
                continue
            try:
                self._take(answer)
            except Exception:  # noqa: BLE001 - the boundary
                # The boundary between this task and the calls: a bug in one must not cost the others their data plane.
                self._metrics.error("media", "answer_failed")
                _log.exception("media.answer_failed", session_id=answer.session_id)

    def _arm(self) -> None:
        deadline = self._ledger.next_deadline()
        if self._alarm is not None:
            if deadline is not None and self._alarm.when() <= deadline:
                return
            self._alarm.cancel()
        self._alarm = None if deadline is None else self._loop.call_at(deadline, self._ring, deadline)

    def _ring(self, deadline: float) -> None:
        self._alarm = None
        unanswered, answers = self._ledger.handle_timer(max(deadline, self._loop.time()))
        if unanswered:
            self._suspect.set()
        self._unsent.set()
        self._arm()
        self._deliver(answers)

    async def _run(self) -> None:
        backoff_s = _BACKOFF_FIRST_S
        while True:
            was_connected = False
            try:
                async with grpc.aio.insecure_channel(self._target, options=_CHANNEL_OPTIONS) as channel:
                    stub: MediaServiceAsyncStub = media_service_pb2_grpc.MediaServiceStub(channel)
                    epoch = await self._acquire(stub)
                    was_connected = True
                    await self._serve(stub, epoch)
            except _FencedError as error:
                self._fenced(str(error))
                return
            except _ConnectionLostError as error:
                self._disconnected(str(error), was_connected)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    self._fenced(error.details() or "fenced")
                    return
                self._disconnected(f"{error.code().name.lower()}: {error.details()}", was_connected)
            except Exception:  # noqa: BLE001 - the boundary
                # The boundary of this task: whatever went wrong, the data plane is acquired anew.
                self._metrics.error("media", "internal")
                _log.exception("media.connection_failed", target=self._target)
                self._disconnected("internal error", was_connected)
            backoff_s = _BACKOFF_FIRST_S if was_connected else min(2 * backoff_s, _BACKOFF_MOST_S)
            await asyncio.sleep(backoff_s)

    async def _acquire(self, stub: "MediaServiceAsyncStub") -> int:
        """Become the owner and bring what is held and what is wanted together; return the epoch."""
        acquired = await stub.Acquire(self._claim, timeout=_RPC_TIMEOUT_S)
        node = acquired.node
        same_instance = node.instance_id == self._instance_id
        if not same_instance:
            self._instance_id, self._last_sequence = node.instance_id, 0
            self._history_until = acquired.last_sequence
        held = await self._held(stub)
        self._note_capacity(node.capacity)
        self._suspect.clear()
        self._trouble = None
        self._metrics.media_connected(True)
        _log.info(
            "media.connected",
            target=self._target,
            instance_id=node.instance_id,
            version=node.version,
            engine=node.engine,
            epoch=acquired.epoch,
            same_instance=same_instance,
            sessions=len(held),
        )
        self._ledger.connected(held, same_instance=same_instance, now=self._loop.time())
        self._reached.set()
        self._arm()
        return acquired.epoch

    async def _held(self, stub: "MediaServiceAsyncStub") -> dict[str, wire.HeldSession]:
        held: dict[str, wire.HeldSession] = {}
        token = ""
        while True:
            request = media_service_pb2.ListSessionsRequest(page_token=token)
            page = await stub.ListSessions(request, timeout=_RPC_TIMEOUT_S)
            held |= {session.session_id: wire.held_from_wire(session) for session in page.sessions}
            token = page.next_page_token
            if not token:
                return held

    async def _serve(self, stub: "MediaServiceAsyncStub", epoch: int) -> None:
        """Run the streams until one of them ends, which is never a normal end."""
        commands = stub.Command()
        events = stub.Watch(media_service_pb2.WatchRequest(epoch=epoch, resume_after=self._last_sequence))
        tasks = [
            asyncio.create_task(self._send(commands, epoch), name="media-send"),
            asyncio.create_task(self._receive(commands), name="media-receive"),
            asyncio.create_task(self._watch(stub, events), name="media-watch"),
            asyncio.create_task(self._probe(stub), name="media-probe"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            commands.cancel()
            events.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # An exception holds this frame, and the frame the task that has it: without these the circle would keep
            # the connection open until the collector comes by.
            tasks.clear()
            done = set()
            del task
        raise _ConnectionLostError("the data plane ended a stream")

    async def _send(
        self,
        commands: "grpc.aio.StreamStreamCall[media_service_pb2.CommandRequest, media_service_pb2.CommandResponse]",
        epoch: int,
    ) -> None:
        # Empty at first: the stream is the sign of life of the owner.
        await commands.write(media_service_pb2.CommandRequest(epoch=epoch))
        while True:
            self._unsent.clear()
            while batch := self._ledger.take(MAX_BATCH):
                now = self._loop.time()
                await commands.write(
                    media_service_pb2.CommandRequest(
                        epoch=epoch, commands=[_to_wire(command, now) for command in batch]
                    )
                )
            await self._unsent.wait()

    async def _receive(
        self, commands: "grpc.aio.StreamStreamCall[media_service_pb2.CommandRequest, media_service_pb2.CommandResponse]"
    ) -> None:
        async for response in commands:
            for result in response.results:
                self._settle(result)

    def _settle(self, result: media_service_pb2.CommandResult) -> None:
        outcome = wire.outcome_from_wire(result)
        failed = isinstance(outcome, wire.CommandError)
        if isinstance(outcome, wire.CommandError) and outcome.fenced:
            raise _FencedError(outcome.detail)
        now = self._loop.time()
        command, answers = self._ledger.settle(result.command_id, outcome, now)
        if command is None:
            return
        code = outcome.code if isinstance(outcome, wire.CommandError) else "ok"
        self._metrics.media_command(command.purpose.action.value, code, now - command.queued_at)
        if isinstance(outcome, wire.CommandError):
            if outcome.failure is MediaFailure.PORTS_EXHAUSTED:
                self._free_blocks = 0
            _log.warning(
                "media.command_failed",
                session_id=command.session_id,
                action=command.purpose.action.value,
                reason=code,
                detail=outcome.detail,
            )
        if command.purpose is Purpose.RESTORE and (not failed or answers):
            self._metrics.media_restored("lost" if failed else "ok")
            if not failed:
                _log.info("media.session_restored", session_id=command.session_id)
        self._arm()
        self._deliver(answers)

    async def _watch(
        self,
        stub: "MediaServiceAsyncStub",
        events: "grpc.aio.UnaryStreamCall[media_service_pb2.WatchRequest, media_service_pb2.WatchResponse]",
    ) -> None:
        async for response in events:
            for event in response.events:
                self._last_sequence = event.sequence
                if event.WhichOneof("event") == "events_lost":
                    await self._catch_up(stub)
                else:
                    self._heard(event)

    async def _catch_up(self, stub: "MediaServiceAsyncStub") -> None:
        """Events were lost: look for sessions that ended meanwhile."""
        standing = self._ledger.standing()
        held = await self._held(stub)
        _log.warning("media.events_lost", sessions=len(held))
        for session_id in sorted(standing - held.keys()):
            self._deliver(self._ledger.session_ended(session_id, "the data plane gave it up", self._loop.time()))

    def _heard(self, event: event_pb2.MediaEvent) -> None:
        match event.WhichOneof("event"):
            case "capacity_changed":
                self._note_capacity(event.capacity_changed.capacity)
            case "session_closed":
                reason = event.session_closed.reason
                _log.debug("media.session_closed", session_id=event.session_id, reason=wire.close_reason_name(reason))
                if reason in {event_pb2.CLOSE_REASON_WORKER_LOST, event_pb2.CLOSE_REASON_OWNER_LOST}:
                    detail = f"the data plane gave it up: {wire.close_reason_name(reason)}"
                    self._deliver(self._ledger.session_ended(event.session_id, detail, self._loop.time()))
            case "source_latched":
                source = wire.learned_from_wire(event.source_latched)
                if source is not None:
                    self._deliver(self._ledger.latched(event.session_id, source))
            case "relay_interrupted" if event.sequence > self._history_until:
                gap_s = event.relay_interrupted.gap.ToTimedelta().total_seconds()
                _log.warning("media.relay_interrupted", gap_s=gap_s, sessions=len(self._ledger))
                self._deliver(self._ledger.interrupted(gap_s))
            case "silence":
                leg = wire.leg_name(event.silence.leg)
                _log.info("media.far_end_silent", session_id=event.session_id, leg=leg, line=event.silence.line)
            case "resumed":
                leg = wire.leg_name(event.resumed.leg)
                _log.info("media.far_end_resumed", session_id=event.session_id, leg=leg, line=event.resumed.line)
            case other:
                _log.debug("media.event_received", session_id=event.session_id, event_kind=other)

    async def _probe(self, stub: "MediaServiceAsyncStub") -> None:
        """Ask how much room there is, which also tells a data plane that hangs from one that has nothing to do."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_INTERVAL_S):
                    await self._suspect.wait()
                raise _ConnectionLostError("the data plane did not answer a command in time")
            answer = await stub.GetNode(media_service_pb2.GetNodeRequest(), timeout=_RPC_TIMEOUT_S)
            if answer.node.instance_id != self._instance_id:
                raise _ConnectionLostError("the data plane was restarted")
            self._note_capacity(answer.node.capacity)

    def _note_capacity(self, capacity: node_pb2.Capacity) -> None:
        self._capacity = capacity
        self._free_blocks = capacity.blocks_free

    def _disconnected(self, reason: str, was_connected: bool) -> None:
        if was_connected:
            _log.warning("media.connection_lost", target=self._target, reason=reason, sessions=len(self._ledger))
            self._publish(ErrorEvent(datetime.now(UTC), "media", "data-plane-lost", reason))
        elif reason != self._trouble:
            _log.warning("media.waiting_for_data_plane", target=self._target, reason=reason)
        self._trouble = reason
        self._metrics.media_connected(False)
        self._ledger.disconnected(self._loop.time())
        self._arm()

    def _fenced(self, detail: str) -> None:
        _log.error("media.fenced", target=self._target, detail=detail)
        self._trouble = "another control plane owns the data plane"
        self._metrics.media_connected(False)
        self._tell_fenced()


def _to_wire(command: Command, now: float) -> media_service_pb2.Command:
    message = media_service_pb2.Command(
        command_id=command.command_id, timeout=wire.duration_to_wire(command.deadline - now)
    )
    match command.purpose.action:
        case Action.CREATE if command.spec is not None:
            message.create.spec.CopyFrom(wire.spec_to_wire(command.spec))
            message.create.spec.generation = command.generation
            message.create.first_port = command.first_port
            message.create.learned_sources.extend(wire.learned_to_wire(source) for source in command.learned)
        case Action.UPDATE if command.spec is not None:
            message.update.spec.CopyFrom(wire.spec_to_wire(command.spec))
            message.update.spec.generation = command.generation
        case _:
            message.delete.session_id = command.session_id
    return message
