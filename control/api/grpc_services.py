"""The services of sippbx.control.v1 that answer at once: messages to verbs, and what the service says to messages."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from control.api import wire
from control.api.grpc_border import client_name
from control.api.paging import Page
from control.api.service import ControlService
from sippbx.control.v1 import (
    call_service_pb2,
    call_service_pb2_grpc,
    cdr_service_pb2,
    cdr_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    registration_service_pb2,
    registration_service_pb2_grpc,
)

# A page ends early rather than be longer, as clients take 4 MiB unless told otherwise.
MAX_PAGE_BYTES = 1024 * 1024

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")
M = TypeVar("M", bound=Message)


class CallServicer(call_service_pb2_grpc.CallServiceServicer):
    """Calls."""

    def __init__(self, service: ControlService) -> None:
        self._service = service

    async def OriginateCall(  # noqa: N802 - the contract's names
        self, request: call_service_pb2.OriginateCallRequest, _context: Context
    ) -> call_service_pb2.OriginateCallResponse:
        """Start a call between two parties."""
        client = client_name.get()
        call = await self._service.originate(request.call_id, request.caller, request.callee, client=client)
        return call_service_pb2.OriginateCallResponse(call=wire.call_to_wire(call))

    async def GetCall(  # noqa: N802
        self, request: call_service_pb2.GetCallRequest, _context: Context
    ) -> call_service_pb2.GetCallResponse:
        """One call."""
        return call_service_pb2.GetCallResponse(call=wire.call_to_wire(await self._service.get_call(request.call_id)))

    async def ListCalls(  # noqa: N802
        self, request: call_service_pb2.ListCallsRequest, _context: Context
    ) -> call_service_pb2.ListCallsResponse:
        """The calls that have not ended."""

        async def page(size: int) -> Page[Any]:
            return self._service.list_calls(size, request.page_token)

        calls, token = await _fitting(page, request.page_size, wire.call_to_wire)
        return call_service_pb2.ListCallsResponse(calls=calls, next_page_token=token)

    async def HangupCall(  # noqa: N802
        self, request: call_service_pb2.HangupCallRequest, _context: Context
    ) -> call_service_pb2.HangupCallResponse:
        """End a call."""
        call = await self._service.hang_up(request.call_id, client=client_name.get())
        return call_service_pb2.HangupCallResponse(call=wire.call_to_wire(call))


class RegistrationServicer(registration_service_pb2_grpc.RegistrationServiceServicer):
    """Registrations."""

    def __init__(self, service: ControlService) -> None:
        self._service = service

    async def ListRegistrations(  # noqa: N802
        self, request: registration_service_pb2.ListRegistrationsRequest, _context: Context
    ) -> registration_service_pb2.ListRegistrationsResponse:
        """What is registered now."""

        async def page(size: int) -> Page[Any]:
            return self._service.list_registrations(request.user, size, request.page_token)

        registrations, token = await _fitting(page, request.page_size, wire.registration_to_wire)
        return registration_service_pb2.ListRegistrationsResponse(registrations=registrations, next_page_token=token)


class CdrServicer(cdr_service_pb2_grpc.CdrServiceServicer):
    """Call detail records."""

    def __init__(self, service: ControlService) -> None:
        self._service = service

    async def ListCallRecords(  # noqa: N802
        self, request: cdr_service_pb2.ListCallRecordsRequest, _context: Context
    ) -> cdr_service_pb2.ListCallRecordsResponse:
        """The records that are on the disk."""

        async def page(size: int) -> Page[Any]:
            return await self._service.list_records(size, request.page_token)

        records, token = await _fitting(page, request.page_size, wire.record_to_wire)
        return cdr_service_pb2.ListCallRecordsResponse(records=records, next_page_token=token)


class NodeServicer(node_service_pb2_grpc.NodeServiceServicer):
    """The node."""

    def __init__(self, service: ControlService) -> None:
        self._service = service

    async def GetNode(  # noqa: N802
        self, _request: node_service_pb2.GetNodeRequest, _context: Context
    ) -> node_service_pb2.GetNodeResponse:
        """How it is."""
        return node_service_pb2.GetNodeResponse(node=wire.node_to_wire(self._service.node()))

    async def Drain(  # noqa: N802
        self, _request: node_service_pb2.DrainRequest, _context: Context
    ) -> node_service_pb2.DrainResponse:
        """No new calls from now on."""
        node = self._service.drain(client=client_name.get())
        return node_service_pb2.DrainResponse(node=wire.node_to_wire(node))


def fitting(messages: Sequence[Message], most: int) -> int:
    """How many of the messages, at least one and at most `most`, go together into one."""
    room = MAX_PAGE_BYTES
    for count, message in enumerate(messages[:most]):
        room -= message.ByteSize()
        if room < 0:
            return max(1, count)
    return min(len(messages), most)


async def _fitting(
    page_of: Callable[[int], Awaitable[Page[T]]], page_size: int, to_wire: Callable[[T], M]
) -> tuple[list[M], str]:
    """A page, asked for anew with fewer items when they are too much for one message."""
    while True:
        page = await page_of(page_size)
        messages = [to_wire(item) for item in page.items]
        page_size = fitting(messages, len(messages))
        if page_size == len(messages):
            return messages, page.next_page_token
