"""What other programs may ask of this node, whatever they ask with: gRPC and HTTP are two faces of this service.

Every verb may be repeated: an originated call is known by the id that its client chose, running or ended, and hanging
up or draining twice changes nothing. Raises nothing but `ApiError`.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Protocol
from weakref import WeakValueDictionary

import structlog

from control.api.errors import ApiBindError, ApiError, ApiErrorKind
from control.api.paging import Page, page_limit, page_of, read_token, write_token
from control.pbx.records import CallId, CallRecord, CallView, Reason, RegistrationView
from control.pbx.routing import Refusal
from control.store.database import StoreError
from control.store.events import StoredEvent

__all__ = [
    "ApiBindError",
    "ApiError",
    "ApiErrorKind",
    "CallPort",
    "ControlService",
    "EventPort",
    "NodeView",
    "Page",
    "RecordPort",
]

MAX_PARTY_CHARACTERS = 64

_CALL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CALLS, _REGISTRATIONS, _RECORDS = "calls", "registrations", "records"
_CONTACT_DIGEST_BYTES = 8

# What is not listed is a fault of the parties: they cannot be called as they are.
_KIND_OF_REFUSAL = {
    Reason.CALL_LIMIT: ApiErrorKind.RESOURCE_EXHAUSTED,
    Reason.RATE_LIMIT: ApiErrorKind.RESOURCE_EXHAUSTED,
    Reason.PORTS_EXHAUSTED: ApiErrorKind.RESOURCE_EXHAUSTED,
    Reason.DRAINING: ApiErrorKind.UNAVAILABLE,
    Reason.MEDIA_UNAVAILABLE: ApiErrorKind.UNAVAILABLE,
    Reason.STORE_UNAVAILABLE: ApiErrorKind.UNAVAILABLE,
}

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NodeView:
    """How the node is; `not_ready_reasons` are for people."""

    name: str
    version: str
    started_at: datetime
    ready: bool
    not_ready_reasons: tuple[str, ...]
    draining: bool
    active_calls: int
    max_calls: int
    registrations: int


class CallPort(Protocol):
    """What the service needs of the transaction user (control.b2bua)."""

    def calls(self) -> list[CallView]:
        """The calls that have not ended."""

    def call(self, call_id: CallId) -> CallView | None:
        """One of them."""

    def registrations(self) -> list[RegistrationView]:
        """What is registered now."""

    def originate(self, call_id: CallId, caller: str, callee: str) -> CallView | Refusal:
        """Starts a call, or says why there is none."""

    def hang_up(self, call_id: CallId, detail: str) -> CallView | None:
        """Ends a call; None when no such call runs."""


class RecordPort(Protocol):
    """What the service needs of the store's call records. Raises StoreError."""

    async def get(self, call_id: CallId) -> CallRecord | None:
        """The record of a call that has ended, on the disk or on its way there."""

    async def newest(self, limit: int = ..., before: CallId | None = ...) -> list[CallRecord]:
        """The records committed last, the newest first, behind the one of `before`."""


class EventPort(Protocol):
    """What watchers need of the store's events. Raises StoreError and EventsGoneError."""

    @property
    def last_sequence(self) -> int:
        """Of the newest event that is on the disk; 0 when there is none."""

    async def read_after(self, sequence: int, limit: int = ...) -> Sequence[StoredEvent]:
        """The events behind `sequence`, at most `limit`."""

    async def wait_beyond(self, sequence: int) -> None:
        """Until there is one."""


class ControlService:
    """The verbs. `client` is the name of the API key that asks; `drain` begins to refuse new calls."""

    def __init__(
        self,
        *,
        calls: CallPort,
        records: RecordPort,
        events: EventPort,
        node: Callable[[], NodeView],
        drain: Callable[[], None],
    ) -> None:
        self._calls = calls
        self._records = records
        self._node = node
        self._drain = drain
        self._originating: WeakValueDictionary[CallId, asyncio.Lock] = WeakValueDictionary()
        self.events = events
        """What happened, for those who watch."""

    async def originate(self, call_id: str, caller: str, callee: str, *, client: str) -> CallView:
        """Start a call between two parties, or find the one that was started under this id before.

        Raises:
            ApiError: the id or a party is malformed, the id belongs to a call between others, or no call can be made.
        """
        wanted = _call_id(call_id)
        _check_party("caller", caller)
        _check_party("callee", callee)
        try:
            call, outcome = await self._originate(wanted, caller, callee)
        except ApiError as error:
            _log_request("call.originated_by", client, call_id, caller=caller, callee=callee, outcome=error.reason)
            raise
        _log_request("call.originated_by", client, call_id, caller=caller, callee=callee, outcome=outcome)
        return call

    async def _originate(self, call_id: CallId, caller: str, callee: str) -> tuple[CallView, str]:
        # While one request looks for a record, another of the same id must not start the call: it might be over, and
        # its record written, before the first has looked, which would then start it again.
        async with self._originating.setdefault(call_id, asyncio.Lock()):
            known = await self._find(call_id)
            if known is None:
                started = self._calls.originate(call_id, caller, callee)
                if isinstance(started, Refusal):
                    raise _error_of(started)
                return started, "started"
        if (known.caller, known.callee) != (caller, callee):
            # Those of a call from elsewhere may be of any length.
            parties = f"{known.caller[:MAX_PARTY_CHARACTERS]} to {known.callee[:MAX_PARTY_CHARACTERS]}"
            detail = f"call {call_id} is one from {parties}; choose another id for another call"
            raise ApiError(ApiErrorKind.ALREADY_EXISTS, "call-id-in-use", detail)
        return known, "repeated"

    async def get_call(self, call_id: str) -> CallView:
        """One call, running or ended.

        Raises:
            ApiError: the id is malformed, or there is no such call.
        """
        return await self._get(_call_id(call_id))

    def list_calls(self, page_size: int, page_token: str) -> Page[CallView]:
        """The calls that have not ended, the oldest first.

        Raises:
            ApiError: the token is not one of this list.
        """
        calls = (((_sortable(call.invited_at), call.call_id), call) for call in self._calls.calls())
        return page_of(_CALLS, calls, page_size, page_token)

    def running_calls(self) -> list[CallView]:
        """All calls that have not ended, the oldest first."""
        return self._calls.calls()

    async def hang_up(self, call_id: str, *, client: str) -> CallView:
        """End a call, whatever it is doing; one that has ended stays as it is.

        Raises:
            ApiError: the id is malformed, or there is no such call.
        """
        wanted = _call_id(call_id)
        call = self._calls.hang_up(wanted, f"hung up by API client {client}")
        if call is None:
            call = await self._get(wanted)
        _log_request("call.hung_up_by", client, call_id, state=call.state.value)
        return call

    def list_registrations(self, user: str, page_size: int, page_token: str) -> Page[RegistrationView]:
        """The phones of `user`, or of all users when that is empty, by user.

        Raises:
            ApiError: the user is malformed, or the token is not one of this list.
        """
        if user:
            _check_party("user", user)
        registrations = (
            ((registration.user, _digest(registration.contact)), registration)
            for registration in self._calls.registrations()
            if not user or registration.user == user
        )
        return page_of(f"{_REGISTRATIONS}:{user}", registrations, page_size, page_token)

    async def list_records(self, page_size: int, page_token: str) -> Page[CallRecord]:
        """The call detail records that are on the disk, the newest first.

        Raises:
            ApiError: the token is not one of this list, or the store cannot be read.
        """
        limit = page_limit(page_size)
        position = read_token(_RECORDS, page_token)
        try:
            found = await self._records.newest(limit + 1, CallId(position[0]) if position else None)
        except StoreError as error:
            raise _store_failed(error) from error
        token = write_token(_RECORDS, (found[limit - 1].call_id,)) if len(found) > limit else ""
        return Page(tuple(found[:limit]), token)

    def node(self) -> NodeView:
        """How the node is."""
        return self._node()

    def drain(self, *, client: str) -> NodeView:
        """Refuse new calls from now on."""
        _log.info("node.drained_by", client=client)
        self._drain()
        return self._node()

    async def _get(self, call_id: CallId) -> CallView:
        call = await self._find(call_id)
        if call is None:
            raise ApiError(ApiErrorKind.NOT_FOUND, "no-such-call", f"no call {call_id} runs, nor has it a record")
        return call

    async def _find(self, call_id: CallId) -> CallView | None:
        """Running calls first: one that ends later has its record by then."""
        running = self._calls.call(call_id)
        if running is not None:
            return running
        try:
            record = await self._records.get(call_id)
        except StoreError as error:
            raise _store_failed(error) from error
        return None if record is None else CallView.of_record(record)


def _call_id(text: str) -> CallId:
    if not _CALL_ID.fullmatch(text):
        raise ApiError(
            ApiErrorKind.INVALID_ARGUMENT, "bad-call-id", "call_id must be 1 to 64 letters, digits, '-' and '_'"
        )
    return CallId(text)


def _check_party(name: str, party: str) -> None:
    if not 1 <= len(party) <= MAX_PARTY_CHARACTERS or not party.isprintable() or " " in party:
        raise ApiError(
            ApiErrorKind.INVALID_ARGUMENT,
            f"bad-{name}",
            f"{name} must be 1 to {MAX_PARTY_CHARACTERS} printable characters without spaces",
        )


def _error_of(refused: Refusal) -> ApiError:
    kind = _KIND_OF_REFUSAL.get(refused.reason, ApiErrorKind.FAILED_PRECONDITION)
    return ApiError(kind, refused.reason.value, refused.detail, refused.retry_after_s)


def _store_failed(error: StoreError) -> ApiError:
    return ApiError(ApiErrorKind.UNAVAILABLE, "store-unavailable", f"the store cannot be read now: {error}")


def _sortable(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def _digest(contact: str) -> str:
    """In place of a contact, which may be too long for a token."""
    return blake2b(contact.encode("utf-8", "surrogatepass"), digest_size=_CONTACT_DIGEST_BYTES).hexdigest()


def _log_request(event: str, client: str, call_id: str, **data: str) -> None:
    _log.info(event, client=client, call_id=call_id, **data)
