"""What is known of a call: how it ended, and the record that is kept of it.

One `Termination` feeds the CDR, the metric, the log line and every event, so that all of them tell the same story.
Both sets are closed: a new value is a change of the documented interface (docs/operations.md lists them).
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NewType

CallId = NewType("CallId", str)


class LegName(StrEnum):
    """The two sides of a call."""

    CALLER = "caller"
    CALLEE = "callee"

    @property
    def opposite(self) -> "LegName":
        """The other side."""
        return LegName.CALLEE if self is LegName.CALLER else LegName.CALLER


class CallDirection(StrEnum):
    """Where a call comes from and goes to, seen from this PBX."""

    INTERNAL = "internal"
    INBOUND = "inbound"
    OUTBOUND = "outbound"


class CallState(StrEnum):
    """Where a call stands."""

    RESERVING = "reserving"
    CALLING = "calling"
    INVITING = "inviting"
    RINGING = "ringing"
    ANSWERING = "answering"
    ESTABLISHED = "established"
    RELEASING = "releasing"
    ENDED = "ended"


class Result(StrEnum):
    """The outcome of a call in one word."""

    ANSWERED = "answered"
    BUSY = "busy"
    NO_ANSWER = "no_answer"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    FAILED = "failed"


class Reason(StrEnum):
    """Why a call ended or was not set up."""

    HANGUP = "hangup"
    CALLER_CANCELLED = "caller-cancelled"
    CALLEE_BUSY = "callee-busy"
    CALLEE_DECLINED = "callee-declined"
    CALLEE_UNAVAILABLE = "callee-unavailable"
    CALLEE_REJECTED = "callee-rejected"
    CALLEE_UNREACHABLE = "callee-unreachable"
    RING_TIMEOUT = "ring-timeout"
    UNKNOWN_NUMBER = "unknown-number"
    NOT_REGISTERED = "not-registered"
    WRONG_CREDENTIALS = "wrong-credentials"
    NOT_ALLOWED = "not-allowed"
    CALL_LIMIT = "call-limit"
    RATE_LIMIT = "rate-limit"
    DRAINING = "draining"
    PORTS_EXHAUSTED = "ports-exhausted"
    MEDIA_UNAVAILABLE = "media-unavailable"
    MEDIA_LOST = "media-lost"
    BAD_OFFER = "bad-offer"
    BAD_ANSWER = "bad-answer"
    NO_COMMON_MEDIA = "no-common-media"
    LOOP = "loop"
    ACK_TIMEOUT = "ack-timeout"
    DIALOG_LOST = "dialog-lost"
    MAX_DURATION = "max-duration"
    BAD_REQUEST = "bad-request"
    INTERNAL_ERROR = "internal-error"
    API_HANGUP = "api-hangup"
    CALLER_BUSY = "caller-busy"
    CALLER_DECLINED = "caller-declined"
    CALLER_UNAVAILABLE = "caller-unavailable"
    CALLER_REJECTED = "caller-rejected"
    CALLER_UNREACHABLE = "caller-unreachable"
    NODE_RESTARTED = "node-restarted"
    STORE_UNAVAILABLE = "store-unavailable"


@dataclass(frozen=True, slots=True)
class Termination:
    """How a call ended: one value for CDR, metric, log and events.

    `sip_status` is the final status that the caller got to its INVITE, 200 for an answered call. `ended_by` is the side
    whose action ended the call, None when it was the PBX. `detail` is for people: what was wrong and what nearly
    matched.
    """

    result: Result
    reason: Reason
    sip_status: int
    ended_by: LegName | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """What arrived from one far end on one line, as the data plane counted it (RFC 3550 section 6.4)."""

    leg: LegName
    line: int
    kind: str
    packets: int
    octets: int
    lost: int
    reordered: int
    jitter_ms: float | None
    rtcp_packets: int
    relayed_packets: int
    dropped_packets: int
    first_packet_at: datetime | None
    last_packet_at: datetime | None


@dataclass(frozen=True, slots=True)
class LegRecord:
    """One side of a call: its dialog and its parties, as they stood on the wire.

    `remote` is the far end's signalling address, "host:port".
    """

    name: LegName
    sip_call_id: str
    from_uri: str
    to_uri: str
    remote: str
    trunk: str | None = None
    user: str | None = None
    user_agent: str | None = None


@dataclass(frozen=True, slots=True)
class CallRecord:
    """The call detail record: exactly one for each call and for each refused INVITE.

    Times are UTC. `ringing_at` and `answered_at` are None when it did not come to that. `duration_s` counts from the
    answer,
    `setup_s` from the INVITE to the answer or the end. `media_complete` is False when the data plane could not be
    asked for its final statistics. `media_interruptions` and `media_gap_s` tell how often and how long in all the relay
    was interrupted because the data plane was lost.
    """

    call_id: CallId
    direction: CallDirection
    caller: str
    callee: str
    invited_at: datetime
    ringing_at: datetime | None
    answered_at: datetime | None
    ended_at: datetime
    setup_s: float
    duration_s: float
    termination: Termination
    legs: tuple[LegRecord, ...]
    streams: tuple[StreamRecord, ...] = ()
    media_complete: bool = True
    media_interruptions: int = 0
    media_gap_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CallView:
    """A call as others see it while it runs, and with its `record` once it has ended."""

    call_id: CallId
    state: CallState
    direction: CallDirection
    caller: str
    callee: str
    invited_at: datetime
    ringing_at: datetime | None = None
    answered_at: datetime | None = None
    record: CallRecord | None = None

    @classmethod
    def of_record(cls, record: CallRecord) -> "CallView":
        """A call that has ended."""
        return cls(
            record.call_id,
            CallState.ENDED,
            record.direction,
            record.caller,
            record.callee,
            record.invited_at,
            record.ringing_at,
            record.answered_at,
            record,
        )


@dataclass(frozen=True, slots=True)
class RegistrationView:
    """One phone of a user, as others see it. `source` is where its REGISTER came from, "host:port"."""

    user: str
    contact: str
    source: str
    user_agent: str | None
    expires_at: datetime


class CallEventKind(StrEnum):
    """What can happen to a call, as its observers hear it, in this order; `ENDED` comes exactly once.

    `FORWARDED` is for this process alone: the INVITE went on to the callee.
    """

    STARTED = "call.started"
    FORWARDED = "call.forwarded"
    RINGING = "call.ringing"
    ANSWERED = "call.answered"
    ENDED = "call.ended"


@dataclass(frozen=True, slots=True)
class CallEvent:
    """Something happened to a call.

    `elapsed_s` counts from the INVITE; `leg` is the side that rings, with `RINGING` alone; `record` is there with
    `ENDED` alone.
    """

    kind: CallEventKind
    call_id: CallId
    at: datetime
    direction: CallDirection
    caller: str
    callee: str
    elapsed_s: float
    leg: LegName | None = None
    record: CallRecord | None = None


class RegistrationEventKind(StrEnum):
    """What can happen to a binding; a refresh is nothing."""

    REGISTERED = "user.registered"
    UNREGISTERED = "user.unregistered"


class UnregisterCause(StrEnum):
    """Why a binding went."""

    REMOVED = "removed"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class RegistrationEvent:
    """A phone came, or went with `cause`; `expires_at` is when its binding ends, or would have ended."""

    kind: RegistrationEventKind
    at: datetime
    registration: RegistrationView
    cause: UnregisterCause | None = None


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """Something of the PBX failed that its operator should know of.

    `component` and `kind` are literals of the code, the labels of sip_pbx_errors_total; `detail` is for people.
    """

    at: datetime
    component: str
    kind: str
    detail: str
    call_id: CallId | None = None


Event = CallEvent | RegistrationEvent | ErrorEvent

NODE_ERROR = "node.error"
EVENT_TYPES = (
    CallEventKind.STARTED.value,
    CallEventKind.RINGING.value,
    CallEventKind.ANSWERED.value,
    CallEventKind.ENDED.value,
    RegistrationEventKind.REGISTERED.value,
    RegistrationEventKind.UNREGISTERED.value,
    NODE_ERROR,
)
"""What others may hear of, by name."""
