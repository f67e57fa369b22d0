"""What the end of a leg means for its call: each way to end, as the one `Termination` that everybody is told."""

from typing import Final

from control.pbx.media import MediaFailure
from control.pbx.records import LegName, Reason, Result, Termination
from control.sip.session import EndCause, Ended, Rejected

# What a final answer means. A status that is not here is passed on as it is, for CALLEE_REJECTED.
_ANSWERS: Final[dict[int, tuple[Result, Reason, int]]] = {
    401: (Result.REJECTED, Reason.CALLEE_REJECTED, 403),  # a challenge to us: the caller has nothing to answer it with
    407: (Result.REJECTED, Reason.CALLEE_REJECTED, 403),
    408: (Result.NO_ANSWER, Reason.CALLEE_UNAVAILABLE, 408),
    480: (Result.NO_ANSWER, Reason.CALLEE_UNAVAILABLE, 480),
    486: (Result.BUSY, Reason.CALLEE_BUSY, 486),
    600: (Result.BUSY, Reason.CALLEE_BUSY, 600),
    503: (Result.FAILED, Reason.CALLEE_REJECTED, 500),  # would speak of us (RFC 3261 section 16.7 step 6)
    603: (Result.REJECTED, Reason.CALLEE_DECLINED, 603),
    607: (Result.REJECTED, Reason.CALLEE_DECLINED, 607),
}

# The same said by a caller that we called first.
_OF_CALLER: Final = {
    Reason.CALLEE_BUSY: Reason.CALLER_BUSY,
    Reason.CALLEE_DECLINED: Reason.CALLER_DECLINED,
    Reason.CALLEE_UNAVAILABLE: Reason.CALLER_UNAVAILABLE,
    Reason.CALLEE_REJECTED: Reason.CALLER_REJECTED,
    Reason.CALLEE_UNREACHABLE: Reason.CALLER_UNREACHABLE,
    Reason.RING_TIMEOUT: Reason.CALLER_UNAVAILABLE,
}

MEDIA_FAILURES: Final[dict[MediaFailure, Reason]] = {
    MediaFailure.PORTS_EXHAUSTED: Reason.PORTS_EXHAUSTED,
    MediaFailure.UNAVAILABLE: Reason.MEDIA_UNAVAILABLE,
    MediaFailure.REFUSED: Reason.MEDIA_UNAVAILABLE,
}

_END_REASONS: Final[dict[EndCause, Reason]] = {
    EndCause.BYE: Reason.HANGUP,
    EndCause.ACK_TIMEOUT: Reason.ACK_TIMEOUT,
    EndCause.PRACK_TIMEOUT: Reason.ACK_TIMEOUT,
    EndCause.DIALOG_LOST: Reason.DIALOG_LOST,
}


def of_rejection(leg: LegName, event: Rejected) -> Termination:
    """A called leg refused, or did not answer the INVITE at all."""
    if event.timed_out:
        result, reason, status, ended_by = Result.FAILED, Reason.CALLEE_UNREACHABLE, 408, None
        detail = f"the {leg}'s side did not answer"
    else:
        default = (Result.REJECTED, Reason.CALLEE_REJECTED, event.status if event.status >= 400 else 480)
        (result, reason, status), ended_by = _ANSWERS.get(event.status, default), leg
        detail = f"the {leg}'s side answered {event.status} {event.reason}"
    return Termination(result, _said_by(leg, reason), status, ended_by, detail)


def of_ring_timeout(leg: LegName, seconds: float) -> Termination:
    """A called leg rang for too long."""
    detail = f"no answer of the {leg} within {seconds:g} s"
    return Termination(Result.NO_ANSWER, _said_by(leg, Reason.RING_TIMEOUT), 480, None, detail)


def of_end(leg: LegName, event: Ended, *, answered: bool) -> Termination:
    """A leg's session is over without our doing."""
    by = leg if event.cause is EndCause.BYE else None
    if answered:
        return Termination(Result.ANSWERED, _END_REASONS[event.cause], 200, by)
    if event.cause is EndCause.BYE:
        return Termination(Result.CANCELLED, Reason.CALLER_CANCELLED, 487, by, "BYE before the answer")
    return Termination(Result.FAILED, _END_REASONS[event.cause], 504, by)


def of_cancellation(leg: LegName) -> Termination:
    """The caller gave up."""
    return Termination(Result.CANCELLED, Reason.CALLER_CANCELLED, 487, leg, "the caller gave up before the answer")


def of_failure(reason: Reason, detail: str, *, answered: bool) -> Termination:
    """Something of ours, or between us and the far ends, broke."""
    if answered:
        return Termination(Result.ANSWERED, reason, 200, detail=detail)
    return Termination(Result.FAILED, reason, 503, detail=detail)


def of_hangup(detail: str, *, answered: bool) -> Termination:
    """A program ended the call over an API."""
    if answered:
        return Termination(Result.ANSWERED, Reason.API_HANGUP, 200, detail=detail)
    return Termination(Result.CANCELLED, Reason.API_HANGUP, 480, detail=detail)


def _said_by(leg: LegName, reason: Reason) -> Reason:
    return reason if leg is LegName.CALLEE else _OF_CALLER[reason]
