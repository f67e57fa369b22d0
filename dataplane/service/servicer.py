"""The gRPC face of the media node: sippbx.media.v1.MediaService.

Turns messages into verbs of the node and refusals into outcomes or status codes. A command stream is bounded by the
commands that it has under way; one that was fenced is ended at once, and so are its owner's watches.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, NoReturn

import grpc
import grpc.aio
import structlog

from dataplane.service.messages import (
    Utc,
    capacity_to,
    error_to,
    event_to,
    events_lost_to,
    session_to,
    spec_from,
    timeout_of,
)
from dataplane.service.node import MediaNode, Ownership, Refusal, RefusedError, SessionView
from sippbx.media.v1 import media_service_pb2, media_service_pb2_grpc, node_pb2

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]

log = structlog.get_logger(__name__)

MOST_COMMANDS_A_MESSAGE: Final = 256
_MOST_COMMANDS_UNDER_WAY: Final = 1024
_EVENTS_A_MESSAGE: Final = 64
_LARGEST_PAGE: Final = 1000
_ERROR_METADATA: Final = "sippbx-error-bin"
_STATUS: Final[Mapping[Refusal, grpc.StatusCode]] = {
    Refusal.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Refusal.FENCED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.INTERNAL: grpc.StatusCode.UNAVAILABLE,
}


class MediaServicer(media_service_pb2_grpc.MediaServiceServicer):
    """See the contract. `instance_id` names this run of the data plane; `utc` dates monotonic times."""

    def __init__(
        self,
        node: MediaNode,
        *,
        instance_id: str,
        version: str,
        utc: Utc,
        clock: Callable[[], float],
        shut_down: Callable[[], None],
        heartbeat_s: float = 5.0,
    ) -> None:
        self._node = node
        self._instance_id = instance_id
        self._version = version
        self._utc = utc
        self._clock = clock
        self._shut_down = shut_down
        self._heartbeat_s = heartbeat_s

    async def Acquire(  # noqa: N802
        self, request: media_service_pb2.AcquireRequest, context: "Context"
    ) -> media_service_pb2.AcquireResponse:
        """Make the caller the owner."""
        owner_id = request.owner_id
        if not 1 <= len(owner_id) <= 64 or not all(" " <= character <= "~" for character in owner_id):
            refused = RefusedError(Refusal.INVALID_ARGUMENT, "owner_id: must be 1 to 64 printable ASCII characters")
            await _abort(context, refused)
        ownership = self._node.acquire(owner_id)
        return media_service_pb2.AcquireResponse(epoch=ownership.epoch, node=self._describe())

    async def GetNode(  # noqa: N802
        self, _request: media_service_pb2.GetNodeRequest, _context: "Context"
    ) -> media_service_pb2.GetNodeResponse:
        """Describe the data plane."""
        return media_service_pb2.GetNodeResponse(node=self._describe())

    async def ListSessions(  # noqa: N802
        self, request: media_service_pb2.ListSessionsRequest, context: "Context"
    ) -> media_service_pb2.ListSessionsResponse:
        """List sessions; a page token is the id of the last session of the page before."""
        size = request.page_size if 0 < request.page_size <= _LARGEST_PAGE else _LARGEST_PAGE
        if len(request.page_token) > 64:
            await _abort(context, RefusedError(Refusal.INVALID_ARGUMENT, "page_token: not one of ours"))
        try:
            views = await self._node.list(
                request.page_token,
                size + 1,
                with_streams=request.include_statistics,
                session_id=request.session_id,
            )
        except RefusedError as error:
            await _abort(context, error)
        page = views[:size]
        return media_service_pb2.ListSessionsResponse(
            sessions=[session_to(view, self._utc) for view in page],
            next_page_token=page[-1].spec.session_id if len(views) > size else "",
        )

    async def Shutdown(  # noqa: N802
        self, request: media_service_pb2.ShutdownRequest, context: "Context"
    ) -> media_service_pb2.ShutdownResponse:
        """Stop the data plane once its sessions are gone."""
        await self._owner(request.epoch, context)
        self._shut_down()
        return media_service_pb2.ShutdownResponse()

    async def Command(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[media_service_pb2.CommandRequest], context: "Context"
    ) -> AsyncIterator[media_service_pb2.CommandResponse]:
        """Carry out commands, each session's in order, and return the results as they come about."""
        try:
            first = await anext(request_iterator)
        except StopAsyncIteration:
            return
        owner = await self._owner(first.epoch, context)
        stream = _CommandStream(self._node, owner, self._utc, self._clock)
        with owner.stream(self._clock):
            log.info("command_stream.opened", owner_id=owner.owner_id, epoch=owner.epoch)
            try:
                async for response in stream.run(first, request_iterator):
                    yield response
            except RefusedError as error:
                await _abort(context, error)
            finally:
                log.info("command_stream.closed", owner_id=owner.owner_id, epoch=owner.epoch)

    async def Watch(  # type: ignore[override]  # noqa: N802
        self, request: media_service_pb2.WatchRequest, context: "Context"
    ) -> AsyncIterator[media_service_pb2.WatchResponse]:
        """Stream events from a place in their order, with a heartbeat while there are none."""
        owner = await self._owner(request.epoch, context)
        log_of_events = self._node.events
        after = request.resume_after
        if after > log_of_events.last:
            after = -1  # a place in another instance's order
        fenced = asyncio.create_task(owner.fenced.wait())
        try:
            while not owner.fenced.is_set():
                if after < log_of_events.first_kept - 1 and request.resume_after | (after + 1):
                    after = log_of_events.first_kept - 1
                    yield media_service_pb2.WatchResponse(events=[events_lost_to(after + 1, self._utc(self._clock()))])
                    continue
                records = log_of_events.read(after, _EVENTS_A_MESSAGE)
                if records:
                    after = records[-1].sequence
                    yield media_service_pb2.WatchResponse(events=[event_to(record, self._utc) for record in records])
                    continue
                news = asyncio.create_task(log_of_events.wait(after))
                try:
                    done, _ = await asyncio.wait(
                        {news, fenced}, timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    news.cancel()
                if not done:
                    yield media_service_pb2.WatchResponse()
        finally:
            fenced.cancel()
        await _abort(context, _fenced(owner))

    async def _owner(self, epoch: int, context: "Context") -> Ownership:
        try:
            return self._node.owner_of(epoch)
        except RefusedError as error:
            await _abort(context, error)

    def _describe(self) -> node_pb2.Node:
        return node_pb2.Node(
            instance_id=self._instance_id,
            version=self._version,
            engine=self._node.engine.name,
            features=[node_pb2.FEATURE_NAT_AWARE_LATCHING, node_pb2.FEATURE_BRANCHES],
            capacity=capacity_to(self._node.capacity()),
        )


class _CommandStream:
    """One command stream at work: a reader takes commands in, a task for each carries it out, results queue up."""

    def __init__(self, node: MediaNode, owner: Ownership, utc: Utc, clock: Callable[[], float]) -> None:
        self._node = node
        self._owner = owner
        self._utc = utc
        self._clock = clock
        self._room = asyncio.Semaphore(_MOST_COMMANDS_UNDER_WAY)
        self._results: asyncio.Queue[media_service_pb2.CommandResult] = asyncio.Queue(_MOST_COMMANDS_UNDER_WAY)
        self._commands: set[asyncio.Task[None]] = set()

    async def run(
        self, first: media_service_pb2.CommandRequest, rest: AsyncIterator[media_service_pb2.CommandRequest]
    ) -> AsyncIterator[media_service_pb2.CommandResponse]:
        """Yield results until the requests have ended and all are answered. Raises RefusedError."""
        reader = asyncio.create_task(self._read(first, rest))
        fenced = asyncio.create_task(self._owner.fenced.wait())
        getter: asyncio.Task[media_service_pb2.CommandResult] | None = None
        try:
            while True:
                getter = getter or asyncio.create_task(self._results.get())
                ended = [] if reader.done() and not reader.exception() else [reader]
                waiting_for = {getter, fenced, *(ended or self._commands)}
                await asyncio.wait(waiting_for, return_when=asyncio.FIRST_COMPLETED)
                if fenced.done():
                    raise _fenced(self._owner)
                if getter.done():
                    results = [getter.result()]
                    getter = None
                    while len(results) < MOST_COMMANDS_A_MESSAGE and not self._results.empty():
                        results.append(self._results.get_nowait())
                    self._release(results)
                    yield media_service_pb2.CommandResponse(results=results)
                elif reader.done():
                    reader.result()
                    if not self._commands and self._results.empty():
                        return
        finally:
            tasks = [task for task in (reader, fenced, getter, *self._commands) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _release(self, results: Iterable[media_service_pb2.CommandResult]) -> None:
        for _ in results:
            self._room.release()

    async def _read(
        self, first: media_service_pb2.CommandRequest, rest: AsyncIterator[media_service_pb2.CommandRequest]
    ) -> None:
        request: media_service_pb2.CommandRequest | None = first
        while request is not None:
            self._node.owner_of(request.epoch)
            if len(request.commands) > MOST_COMMANDS_A_MESSAGE:
                raise RefusedError(
                    Refusal.INVALID_ARGUMENT, f"commands: {len(request.commands)} are above {MOST_COMMANDS_A_MESSAGE}"
                )
            for command in request.commands:
                await self._room.acquire()
                task = asyncio.create_task(self._answer(command, self._clock() + timeout_of(command)))
                self._commands.add(task)
                task.add_done_callback(self._commands.discard)
            request = await anext(rest, None)

    async def _answer(self, command: media_service_pb2.Command, deadline: float) -> None:
        result = media_service_pb2.CommandResult(command_id=command.command_id)
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock())):
                view = await self._carry_out(command)
            result.session.CopyFrom(session_to(view, self._utc))
        except TimeoutError:
            late = RefusedError(Refusal.DEADLINE_EXCEEDED, "the command was not carried out in time")
            result.error.CopyFrom(error_to(late))
        except RefusedError as error:
            result.error.CopyFrom(error_to(error))
        except Exception as error:
            log.exception("command.failed", command_id=command.command_id, action=command.WhichOneof("action"))
            wrong = RefusedError(Refusal.INTERNAL, f"{type(error).__name__}; the data plane's log says more")
            result.error.CopyFrom(error_to(wrong))
        self._results.put_nowait(result)

    async def _carry_out(self, command: media_service_pb2.Command) -> SessionView:
        match command.WhichOneof("action"):
            case "create":
                return await self._node.create(spec_from(command.create.spec), command.create.first_port)
            case "update":
                return await self._node.update(spec_from(command.update.spec))
            case "delete":
                return await self._node.delete(command.delete.session_id)
            case _:
                raise RefusedError(Refusal.INVALID_ARGUMENT, "action: is required")


def _fenced(owner: Ownership) -> RefusedError:
    return RefusedError(Refusal.FENCED, f"epoch {owner.epoch} is not in force any more: another owner has acquired")


async def _abort(context: "Context", error: RefusedError) -> NoReturn:
    metadata = ((_ERROR_METADATA, error_to(error).SerializeToString()),)
    code = _STATUS.get(error.refusal, grpc.StatusCode.UNKNOWN)
    await context.abort(code, error.message, trailing_metadata=metadata)
