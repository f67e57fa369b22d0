"""Calls as the journal keeps them, and how they come back."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from control.pbx.call import Call
from control.pbx.records import LegName
from control.sip.snapshot import Plain, SnapshotError, restore, save
from control.sip.transaction import SavedTransaction


@dataclass(frozen=True, slots=True)
class SavedCall:
    """A call and its live transactions."""

    call: Call
    transactions: tuple[SavedTransaction, ...]


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment by the three clocks: monotonic seconds, the boot that they count from, and UTC."""

    now: float
    boot_id: str
    utc: datetime


def saved(call: Call, transactions: tuple[SavedTransaction, ...]) -> Plain:
    """The call as plain data."""
    return save(SavedCall(call, transactions))


def brought_back(
    plain: Plain, *, then: Instant, here: Instant, new_token: Callable[[], str], random: Callable[[], float]
) -> SavedCall:
    """The call of such data, its deadlines moved to this process's clock.

    Raises:
        SnapshotError: it cannot be read.
    """
    callables = {"new_token": new_token, "random": random}
    found = restore(SavedCall, plain, offset_s=offset_s(then, here), callables=callables)
    if found.call.legs.keys() != set(LegName):
        raise SnapshotError(f"a call has two legs, this one {sorted(found.call.legs)}")
    return found


def offset_s(then: Instant, here: Instant) -> float:
    """What to add to a monotonic moment of `then` to have it by the clock of `here`.

    Within one boot there is one monotonic clock, whoever sets the other; over a boot only UTC tells how much time has
    passed, and a clock that was set back counts as no time at all.
    """
    if then.boot_id == here.boot_id:
        return 0.0
    passed = max(0.0, (here.utc - then.utc).total_seconds())
    return here.now - (then.now + passed)
