"""A data plane without media: sippbx.media.v1 over a Unix socket, made to misbehave by the test."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from sippbx.media.v1 import event_pb2, media_service_pb2, media_service_pb2_grpc, node_pb2, session_pb2

FIRST_PORT = 10_000
BLOCK_SIZE = 8


class ScriptedMediaServer(media_service_pb2_grpc.MediaServiceServicer):
    """Holds sessions as a data plane does.

    `batches` are the non-empty command messages in the order of arrival. Before a command is carried out, `errors` is
    asked for a reason to refuse one of its kind ("create", "update", "delete"). While `answering` is not set, commands
    and probes wait.
    """

    def __init__(self, socket_path: Path, *, blocks: int = 100) -> None:
        self.target = f"unix://{socket_path}"
        self.blocks = blocks
        self.accepting = True
        self.not_accepting_reason = ""
        self.epoch = 0
        self.instance_id = ""
        self.sessions: dict[str, session_pb2.Session] = {}
        self.batches: list[list[media_service_pb2.Command]] = []
        self.errors: dict[str, list[node_pb2.ErrorReason.ValueType]] = {}
        self.answering = asyncio.Event()
        self.answering.set()
        self.watch_requests: list[media_service_pb2.WatchRequest] = []
        self.acquired = asyncio.Event()
        self._instances = itertools.count(1)
        self._tombstones: dict[str, session_pb2.Session] = {}
        self._events: list[event_pb2.MediaEvent] = []
        self._watchers: list[asyncio.Queue[event_pb2.MediaEvent]] = []
        self._server: grpc.aio.Server | None = None

    async def start(self, *, new_instance: bool = True) -> None:
        """Serves; a new instance has no sessions."""
        if new_instance:
            self.instance_id = f"instance-{next(self._instances)}"
            self.epoch = 0
            self.sessions.clear()
            self._tombstones.clear()
            self._events.clear()
        self.acquired.clear()
        self._server = grpc.aio.server()
        media_service_pb2_grpc.add_MediaServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.target)
        await self._server.start()

    async def stop(self) -> None:
        """Cuts every stream and is not there any more."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def restart(self, *, new_instance: bool = True) -> None:
        """Goes away and comes back."""
        await self.stop()
        await self.start(new_instance=new_instance)

    def emit(self, session_id: str = "", **event: Any) -> None:
        """Sends an event to the watchers, `event` being one field of MediaEvent."""
        message = event_pb2.MediaEvent(sequence=len(self._events) + 1, session_id=session_id, **event)
        self._events.append(message)
        for watcher in self._watchers:
            watcher.put_nowait(message)

    def commands(self) -> list[str]:
        """What was asked so far, such as "create s1 1"; a delete has no generation."""
        return [_describe(command) for batch in self.batches for command in batch]

    def node(self) -> node_pb2.Node:
        """Self-description."""
        in_use = len(self.sessions)
        return node_pb2.Node(
            instance_id=self.instance_id,
            version="test",
            engine="none",
            capacity=node_pb2.Capacity(
                blocks_total=self.blocks,
                blocks_in_use=in_use,
                blocks_free=max(0, self.blocks - in_use),
                block_size=BLOCK_SIZE,
                first_port=FIRST_PORT,
                last_port=FIRST_PORT + BLOCK_SIZE * self.blocks - 1,
                accepting=self.accepting,
                not_accepting_reason=self.not_accepting_reason,
            ),
        )

    async def Acquire(  # noqa: N802
        self, request: media_service_pb2.AcquireRequest, context: Any
    ) -> media_service_pb2.AcquireResponse:
        self.epoch += 1
        self.acquired.set()
        return media_service_pb2.AcquireResponse(epoch=self.epoch, node=self.node(), last_sequence=len(self._events))

    async def GetNode(  # noqa: N802
        self, request: media_service_pb2.GetNodeRequest, context: Any
    ) -> media_service_pb2.GetNodeResponse:
        await self.answering.wait()
        return media_service_pb2.GetNodeResponse(node=self.node())

    async def ListSessions(  # noqa: N802
        self, request: media_service_pb2.ListSessionsRequest, context: Any
    ) -> media_service_pb2.ListSessionsResponse:
        """Pages of one, so that a client that reads only the first is found out."""
        ids = sorted(session_id for session_id in self.sessions if session_id > request.page_token)
        page = [self.sessions[session_id] for session_id in ids[:1]]
        token = ids[0] if len(ids) > 1 else ""
        return media_service_pb2.ListSessionsResponse(sessions=page, next_page_token=token)

    async def Shutdown(  # noqa: N802
        self, request: media_service_pb2.ShutdownRequest, context: Any
    ) -> media_service_pb2.ShutdownResponse:
        return media_service_pb2.ShutdownResponse()

    async def Watch(  # noqa: N802
        self, request: media_service_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[media_service_pb2.WatchResponse]:
        self.watch_requests.append(request)
        events: asyncio.Queue[event_pb2.MediaEvent] = asyncio.Queue()
        self._watchers.append(events)
        try:
            yield media_service_pb2.WatchResponse(events=self._events[request.resume_after :])
            while True:
                yield media_service_pb2.WatchResponse(events=[await events.get()])
        finally:
            self._watchers.remove(events)

    async def Command(self, request_iterator: Any, context: Any) -> AsyncIterator[media_service_pb2.CommandResponse]:  # noqa: N802
        async for request in request_iterator:
            if request.epoch != self.epoch:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "fenced")
            if request.commands:
                self.batches.append(list(request.commands))
            await self.answering.wait()
            yield media_service_pb2.CommandResponse(results=[self._carry_out(command) for command in request.commands])

    def _carry_out(self, command: media_service_pb2.Command) -> media_service_pb2.CommandResult:
        action = command.WhichOneof("action") or ""
        with contextlib.suppress(KeyError, IndexError):
            return _refused(command, self.errors[action].pop(0))
        match action:
            case "create":
                return self._create(command)
            case "update":
                spec = command.update.spec
                session = self.sessions.get(spec.session_id)
                if session is None:
                    return _refused(command, node_pb2.ERROR_REASON_UNKNOWN_SESSION)
                if spec.generation < session.generation:
                    return _refused(command, node_pb2.ERROR_REASON_STALE_GENERATION)
                session.spec.CopyFrom(spec)
                session.generation = spec.generation
                return media_service_pb2.CommandResult(command_id=command.command_id, session=session)
            case _:
                return self._delete(command)

    def _create(self, command: media_service_pb2.Command) -> media_service_pb2.CommandResult:
        spec = command.create.spec
        session = self.sessions.get(spec.session_id)
        if session is None:
            taken = {held.first_port for held in self.sessions.values()}
            ports = range(FIRST_PORT, FIRST_PORT + BLOCK_SIZE * self.blocks, BLOCK_SIZE)
            first_port = command.create.first_port or next((port for port in ports if port not in taken), 0)
            if not first_port:
                return _refused(command, node_pb2.ERROR_REASON_PORTS_EXHAUSTED)
            if first_port in taken:
                return _refused(command, node_pb2.ERROR_REASON_BLOCK_UNAVAILABLE)
            session = session_pb2.Session(
                session_id=spec.session_id,
                first_port=first_port,
                block_size=BLOCK_SIZE,
                spec=spec,
                generation=spec.generation,
            )
            for endpoint in spec.endpoints:
                offset = (BLOCK_SIZE // 2 if endpoint.leg == session_pb2.LEG_CALLEE else 0) + 2 * endpoint.line
                session.local_endpoints.add(
                    leg=endpoint.leg,
                    line=endpoint.line,
                    address=endpoint.local_address,
                    rtp_port=first_port + offset,
                    rtcp_port=first_port + offset + 1,
                )
            self.sessions[spec.session_id] = session
        return media_service_pb2.CommandResult(command_id=command.command_id, session=session)

    def _delete(self, command: media_service_pb2.Command) -> media_service_pb2.CommandResult:
        session_id = command.delete.session_id
        session = self.sessions.pop(session_id, None) or self._tombstones.get(session_id)
        if session is None:
            return _refused(command, node_pb2.ERROR_REASON_UNKNOWN_SESSION)
        if session_id not in self._tombstones:
            session.statistics.add(leg=session_pb2.LEG_CALLER, line=0, packets=250, octets=43_000)
        self._tombstones[session_id] = session
        return media_service_pb2.CommandResult(command_id=command.command_id, session=session)


def _refused(
    command: media_service_pb2.Command, reason: node_pb2.ErrorReason.ValueType
) -> media_service_pb2.CommandResult:
    return media_service_pb2.CommandResult(
        command_id=command.command_id, error=node_pb2.Error(reason=reason, message="as the test wants it")
    )


def _describe(command: media_service_pb2.Command) -> str:
    match command.WhichOneof("action"):
        case "create":
            at = f" at {command.create.first_port}" if command.create.first_port else ""
            return f"create {command.create.spec.session_id} {command.create.spec.generation}{at}"
        case "update":
            return f"update {command.update.spec.session_id} {command.update.spec.generation}"
        case _:
            return f"delete {command.delete.session_id}"
