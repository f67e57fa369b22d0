"""The gRPC face of the node: sippbx.media.v1.MediaService."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog

from dataplane.service import wire
from dataplane.service.events import Record
from dataplane.service.node import MediaNode, Ownership, Refusal, RefusedError
from dataplane.service.wire import Translator
from sippbx.media.v1 import event_pb2, media_service_pb2, media_service_pb2_grpc, node_pb2

SERVICE_NAME = "sippbx.media.v1.MediaService"
ERROR_METADATA_KEY = "sippbx-error-bin"
MAX_COMMANDS = 256
MAX_UNDER_WAY = 1024
MAX_PAGE = 1000
MAX_EVENTS = 256
HEARTBEAT_S = 5.0
DEFAULT_TIMEOUT_S = 5.0
CLOCK_STEP_S = 0.1
# A new owner waits so long at most for what the one before had begun.
SETTLE_S = 1.0

_STATUS_CODES = {
    Refusal.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Refusal.FENCED: grpc.StatusCode.FAILED_PRECONDITION,
}

Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger(__name__)


class MediaServicer(media_service_pb2_grpc.MediaServiceServicer):
    """Turns messages into verbs of the node, and what it answers into messages.

    `observe` hears of each call: its method and status code, for metrics; `shut_down` is asked by Shutdown.
    """

    def __init__(
        self,
        node: MediaNode,
        *,
        instance_id: str,
        version: str,
        observe: Callable[[str, str], None],
        shut_down: Callable[[], None],
    ) -> None:
        self._node = node
        self._instance_id = instance_id
        self._version = version
        self._observe = observe
        self._shut_down = shut_down
        self._clocks = (time.monotonic(), datetime.now(UTC))

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve its methods on a server that has not been started."""
        media_service_pb2_grpc.add_MediaServiceServicer_to_server(self, server)

    async def Acquire(  # noqa: N802 -- the contract's names
        self,
        request: media_service_pb2.AcquireRequest,
        context: grpc.aio.ServicerContext[media_service_pb2.AcquireRequest, media_service_pb2.AcquireResponse],
    ) -> media_service_pb2.AcquireResponse:
        """Grant ownership."""
        owner_id = request.owner_id
        if not 1 <= len(owner_id) <= 64 or not all("!" <= character <= "~" for character in owner_id):
            refused = RefusedError(Refusal.INVALID_ARGUMENT, "owner_id: must be 1 to 64 printable ASCII characters")
            await self._abort("Acquire", refused, context)
        try:
            ownership = self._node.acquire(owner_id, request.incarnation)
        except RefusedError as error:
            await self._abort("Acquire", error, context)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._node.settled(), SETTLE_S)
        self._observe("Acquire", "OK")
        return media_service_pb2.AcquireResponse(
            epoch=ownership.epoch, node=self._describe(), last_sequence=self._node.events.last
        )

    async def Command(  # noqa: N802
        self,
        request_iterator: AsyncIterator[media_service_pb2.CommandRequest],
        context: grpc.aio.ServicerContext[media_service_pb2.CommandRequest, media_service_pb2.CommandResponse],
    ) -> AsyncIterator[media_service_pb2.CommandResponse]:
        """Carry out commands for as long as the owner is in force."""
        requests = aiter(request_iterator)
        try:
            first = await anext(requests)
        except StopAsyncIteration:
            return
        owner = await self._owner("Command", first.epoch, context)
        results: asyncio.Queue[media_service_pb2.CommandResult | RefusedError | None] = asyncio.Queue(MAX_UNDER_WAY)
        reader = asyncio.create_task(self._read(first, requests, owner, results), name="media commands")
        fenced = asyncio.create_task(owner.fenced.wait(), name="media fencing")
        try:
            with owner.stream(time.monotonic):
                while True:
                    batch = await self._next_batch(results, fenced)
                    if isinstance(batch, RefusedError):
                        await self._abort("Command", batch, context)
                    if not batch:
                        return
                    yield media_service_pb2.CommandResponse(results=batch)
        finally:
            for task in (reader, fenced):
                task.cancel()
            await asyncio.gather(reader, fenced, return_exceptions=True)
            self._observe("Command", "OK")

    async def _next_batch(
        self,
        results: asyncio.Queue[media_service_pb2.CommandResult | RefusedError | None],
        fenced: asyncio.Task[bool],
    ) -> list[media_service_pb2.CommandResult] | RefusedError:
        """The results that there are, at least one; none when the requests have ended."""
        waiting = asyncio.create_task(results.get(), name="media results")
        await asyncio.wait({waiting, fenced}, return_when=asyncio.FIRST_COMPLETED)
        if fenced.done():
            waiting.cancel()
            return RefusedError(Refusal.FENCED, "another control plane has acquired this data plane")
        batch: list[media_service_pb2.CommandResult] = []
        result = waiting.result()
        while True:
            if isinstance(result, RefusedError):
                return result
            if result is None:
                return batch
            batch.append(result)
            if len(batch) == MAX_COMMANDS or results.empty():
                return batch
            result = results.get_nowait()

    async def _read(
        self,
        first: media_service_pb2.CommandRequest,
        requests: AsyncIterator[media_service_pb2.CommandRequest],
        owner: Ownership,
        results: asyncio.Queue[media_service_pb2.CommandResult | RefusedError | None],
    ) -> None:
        """Begin each command as it comes; those of one session keep their order, as the node sees to it."""
        room = asyncio.Semaphore(MAX_UNDER_WAY)

        async def carry_out(command: media_service_pb2.Command) -> None:
            try:
                await results.put(await self._carry_out(command, owner))
            finally:
                room.release()

        request = first
        async with asyncio.TaskGroup() as commands:
            while True:
                problem = self._problem(request, owner)
                if problem is not None:
                    await results.put(problem)
                    return
                for command in request.commands:
                    await room.acquire()
                    commands.create_task(carry_out(command))
                try:
                    request = await anext(requests)
                except StopAsyncIteration:
                    break
        await results.put(None)

    @staticmethod
    def _problem(request: media_service_pb2.CommandRequest, owner: Ownership) -> RefusedError | None:
        if request.epoch != owner.epoch:
            return RefusedError(Refusal.FENCED, f"epoch {request.epoch} is not the one this stream began with")
        if len(request.commands) > MAX_COMMANDS:
            return RefusedError(Refusal.INVALID_ARGUMENT, f"commands: more than {MAX_COMMANDS} in one message")
        return None

    async def _carry_out(self, command: media_service_pb2.Command, owner: Ownership) -> media_service_pb2.CommandResult:
        timeout_s = command.timeout.ToTimedelta().total_seconds() if command.HasField("timeout") else DEFAULT_TIMEOUT_S
        method = command.WhichOneof("action") or "none"
        result = media_service_pb2.CommandResult(command_id=command.command_id)
        try:
            async with asyncio.timeout(timeout_s):
                self._node.owner_of(owner.epoch)
                match method:
                    case "create":
                        spec = wire.spec_from_wire(command.create.spec)
                        learned = wire.learned_from_wire(command.create.learned_sources)
                        view = await self._node.create(spec, command.create.first_port, learned)
                    case "update":
                        view = await self._node.update(wire.spec_from_wire(command.update.spec))
                    case "delete":
                        view = await self._node.delete(command.delete.session_id)
                    case _:
                        raise RefusedError(Refusal.INVALID_ARGUMENT, "action: not set or not known")
        except TimeoutError:
            refused = RefusedError(Refusal.DEADLINE_EXCEEDED, f"not carried out within {timeout_s:g} s")
        except RefusedError as error:
            refused = error
        except Exception:
            # The border of one command: a bug costs this command alone.
            log.exception("command.failed", method=method)
            refused = RefusedError(Refusal.INTERNAL, "the data plane erred; its log says how")
        else:
            self._observe(method, "OK")
            result.session.CopyFrom(self._translator().session(view))
            return result
        self._observe(method, refused.refusal.name)
        result.error.CopyFrom(wire.error(refused))
        return result

    async def Watch(  # noqa: N802
        self,
        request: media_service_pb2.WatchRequest,
        context: grpc.aio.ServicerContext[media_service_pb2.WatchRequest, media_service_pb2.WatchResponse],
    ) -> AsyncIterator[media_service_pb2.WatchResponse]:
        """Stream events from a place in the log on; a gap is told, silence is filled with heartbeats."""
        owner = await self._owner("Watch", request.epoch, context)
        events = self._node.events
        # 0 asks for what there is; a place beyond the last event is one in the order of another instance.
        after = request.resume_after or events.first_kept - 1
        if after > events.last:
            after = -1
        while not owner.fenced.is_set():
            if after + 1 < events.first_kept:
                lost = event_pb2.MediaEvent(sequence=events.first_kept - 1)
                lost.events_lost.CopyFrom(event_pb2.EventsLost(next_sequence=events.first_kept))
                after = events.first_kept - 1
                yield media_service_pb2.WatchResponse(events=[lost])
            records = events.read(after, MAX_EVENTS)
            if records:
                after = records[-1].sequence
                yield self._events(records)
                continue
            news = asyncio.create_task(events.wait(after), name="media news")
            fenced = asyncio.create_task(owner.fenced.wait(), name="media fencing")
            try:
                await asyncio.wait({news, fenced}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                idle = not news.done() and not fenced.done()
            finally:
                news.cancel()
                fenced.cancel()
            if idle:
                yield media_service_pb2.WatchResponse()
        refused = RefusedError(Refusal.FENCED, "another control plane has acquired this data plane")
        await self._abort("Watch", refused, context)

    def _events(self, records: list[Record]) -> media_service_pb2.WatchResponse:
        translator = self._translator()
        return media_service_pb2.WatchResponse(events=[translator.event(record) for record in records])

    async def ListSessions(  # noqa: N802
        self,
        request: media_service_pb2.ListSessionsRequest,
        context: grpc.aio.ServicerContext[
            media_service_pb2.ListSessionsRequest, media_service_pb2.ListSessionsResponse
        ],
    ) -> media_service_pb2.ListSessionsResponse:
        """List sessions in the order of their ids; a page token is the last id of the page before."""
        if len(request.page_token) > 64:
            refused = RefusedError(Refusal.INVALID_ARGUMENT, "page_token: not one of ours")
            await self._abort("ListSessions", refused, context)
        size = min(request.page_size or MAX_PAGE, MAX_PAGE)
        try:
            views = await self._node.list(
                request.page_token,
                size + 1,
                with_streams=request.include_statistics,
                session_id=request.session_id,
            )
        except RefusedError as error:
            await self._abort("ListSessions", error, context)
        translator = self._translator()
        more = len(views) > size
        self._observe("ListSessions", "OK")
        return media_service_pb2.ListSessionsResponse(
            sessions=[translator.session(view) for view in views[:size]],
            next_page_token=views[size - 1].spec.session_id if more else "",
        )

    async def GetNode(  # noqa: N802
        self,
        request: media_service_pb2.GetNodeRequest,
        context: grpc.aio.ServicerContext[media_service_pb2.GetNodeRequest, media_service_pb2.GetNodeResponse],
    ) -> media_service_pb2.GetNodeResponse:
        """Describe the node."""
        del request, context
        self._observe("GetNode", "OK")
        return media_service_pb2.GetNodeResponse(node=self._describe())

    async def Shutdown(  # noqa: N802
        self,
        request: media_service_pb2.ShutdownRequest,
        context: grpc.aio.ServicerContext[media_service_pb2.ShutdownRequest, media_service_pb2.ShutdownResponse],
    ) -> media_service_pb2.ShutdownResponse:
        """Stop once the sessions are gone."""
        await self._owner("Shutdown", request.epoch, context)
        self._shut_down()
        self._observe("Shutdown", "OK")
        return media_service_pb2.ShutdownResponse()

    def _describe(self) -> node_pb2.Node:
        return node_pb2.Node(
            instance_id=self._instance_id,
            version=self._version,
            engine=self._node.engine.name,
            features=[node_pb2.FEATURE_NAT_AWARE_LATCHING, node_pb2.FEATURE_BRANCHES],
            capacity=wire.capacity(self._node.capacity()),
        )

    def _translator(self) -> Translator:
        """One reading of both clocks serves until the wall clock is stepped, so that a repetition is the same."""
        monotonic, utc = time.monotonic(), datetime.now(UTC)
        passed_s = monotonic - self._clocks[0]
        if abs((utc - self._clocks[1]).total_seconds() - passed_s) > CLOCK_STEP_S:
            self._clocks = (monotonic, utc)
        return Translator(*self._clocks)

    async def _owner(self, method: str, epoch: int, context: Context) -> Ownership:
        try:
            return self._node.owner_of(epoch)
        except RefusedError as error:
            await self._abort(method, error, context)

    async def _abort(self, method: str, refused: RefusedError, context: Context) -> NoReturn:
        code = _STATUS_CODES.get(refused.refusal, grpc.StatusCode.UNAVAILABLE)
        self._observe(method, code.name)
        metadata = ((ERROR_METADATA_KEY, wire.error(refused).SerializeToString()),)
        await context.abort(code, refused.message, metadata)
        raise AssertionError("unreachable: abort raises")
