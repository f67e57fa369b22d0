"""What is wanted of the data plane and not answered yet: the bookkeeping of MediaClient, without I/O or clock.

A wish becomes a command with a deadline. Each wish gets exactly one answer, from the data plane or from here. Sessions
that the data plane has confirmed are remembered with their ports and last confirmed state, so that they can be made
again on the same ports after its restart; such a restored session counts its packets anew. A session that is neither
answered for nor restored in time is reported lost, once.
"""

import heapq
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto

from control.media.wire import CommandError, SessionState
from control.pbx.media import (
    MediaClosed,
    MediaFailed,
    MediaFailure,
    MediaInput,
    MediaLost,
    MediaOpened,
    MediaSpec,
    MediaUpdated,
)

RESTORE_RETRY_S = 0.25


class Action(StrEnum):
    """What a command does."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"


class Purpose(Enum):
    """Why a command is sent, which decides who hears of its result."""

    OPEN = auto()
    UPDATE = auto()
    CLOSE = auto()
    RESTORE = auto()
    DISCARD = auto()

    @property
    def action(self) -> Action:
        """What it does."""
        match self:
            case Purpose.OPEN | Purpose.RESTORE:
                return Action.CREATE
            case Purpose.UPDATE:
                return Action.UPDATE
            case Purpose.CLOSE | Purpose.DISCARD:
                return Action.DELETE


@dataclass(frozen=True, slots=True)
class Command:
    """One thing to ask of the data plane. `spec` is None for deletes; `first_port` is 0 where any block will do."""

    command_id: int
    purpose: Purpose
    session_id: str
    spec: MediaSpec | None
    first_port: int
    queued_at: float
    deadline: float


@dataclass(slots=True)
class _Standing:
    """A session that the data plane has confirmed."""

    spec: MediaSpec
    first_port: int


class MediaLedger:
    """Turns wishes into commands, and results, deadlines and lost connections into answers.

    Methods that can settle something return the answers; commands to send are taken with `take`, in order.
    """

    def __init__(self, *, command_timeout_s: float, lost_timeout_s: float, max_pending: int) -> None:
        self._command_timeout_s = command_timeout_s
        self._lost_timeout_s = lost_timeout_s
        self._max_pending = max_pending
        self._last_id = 0
        self._standing: dict[str, _Standing] = {}
        self._opening: set[str] = set()
        self._pending: dict[int, Command] = {}
        self._unsent: deque[int] = deque()
        self._deadlines: list[tuple[float, int]] = []
        self._retries: list[tuple[float, int, Command]] = []
        self._lost_at: float | None = None

    def __len__(self) -> int:
        """Sessions that stand or are being made."""
        return len(self._standing) + len(self._opening)

    @property
    def unsent(self) -> int:
        """Commands that wait to be taken."""
        return len(self._unsent)

    def standing(self) -> set[str]:
        """The sessions that the data plane has confirmed and that nobody has asked to close."""
        return set(self._standing)

    def open(self, spec: MediaSpec, now: float) -> list[MediaInput]:
        """Wish for a session."""
        if spec.session_id in self._standing or spec.session_id in self._opening:
            return [MediaFailed(spec.session_id, spec.generation, MediaFailure.REFUSED, "this session is open already")]
        if len(self._pending) >= self._max_pending:
            return [_overflow(spec)]
        self._opening.add(spec.session_id)
        self._queue(Purpose.OPEN, spec.session_id, spec, now)
        return []

    def update(self, spec: MediaSpec, now: float) -> list[MediaInput]:
        """Wish for another state of a session."""
        if spec.session_id not in self._standing and spec.session_id not in self._opening:
            return [MediaFailed(spec.session_id, spec.generation, MediaFailure.UNAVAILABLE, "this session is gone")]
        if len(self._pending) >= self._max_pending:
            return [_overflow(spec)]
        self._queue(Purpose.UPDATE, spec.session_id, spec, now)
        return []

    def close(self, session_id: str, now: float) -> list[MediaInput]:
        """Wish for a session's end. Never refused for want of room: there is at most one for each session."""
        if session_id not in self._standing and session_id not in self._opening:
            return [MediaClosed(session_id, None)]
        self._standing.pop(session_id, None)
        self._opening.discard(session_id)
        self._queue(Purpose.CLOSE, session_id, None, now)
        return []

    def take(self, limit: int) -> list[Command]:
        """Take up to `limit` commands to send now."""
        taken: list[Command] = []
        while self._unsent and len(taken) < limit:
            command = self._pending.get(self._unsent.popleft())
            if command is not None:
                taken.append(command)
        return taken

    def settle(
        self, command_id: int, outcome: SessionState | CommandError, now: float
    ) -> tuple[Command | None, list[MediaInput]]:
        """Enter a result; the command is None when nobody waits for it any more."""
        command = self._pending.pop(command_id, None)
        if command is None:
            return None, []
        if isinstance(outcome, CommandError):
            return command, self._failed(command, outcome, now)
        return command, self._done(command, outcome)

    def session_ended(self, session_id: str, detail: str) -> list[MediaInput]:
        """The data plane gave a session up by itself."""
        return [] if self._standing.pop(session_id, None) is None else [MediaLost(session_id, detail)]

    def disconnected(self, now: float) -> None:
        """The data plane cannot be reached from now on; sessions are waited for."""
        if self._lost_at is None:
            self._lost_at = now + self._lost_timeout_s

    def connected(self, present: Collection[str], *, same_instance: bool, now: float) -> list[MediaInput]:
        """The data plane is back and holds the sessions `present`: queue what makes it hold those that are wanted.

        To the same instance everything without a result is sent again. On a new one all sessions are made again first,
        from their last confirmed state, so that updates on their way follow in order; what was to be closed is gone
        with its statistics.
        """
        lost_at = now + self._lost_timeout_s if self._lost_at is None else self._lost_at
        self._lost_at = None
        self._retries.clear()
        answers: list[MediaInput] = []
        waiting: list[Command] = []
        for command in list(self._pending.values()):
            if command.purpose in {Purpose.RESTORE, Purpose.DISCARD}:
                del self._pending[command.command_id]
            elif command.purpose is Purpose.CLOSE and not same_instance:
                del self._pending[command.command_id]
                answers.append(MediaClosed(command.session_id, None))
            else:
                waiting.append(command)
        self._unsent.clear()
        closing = {command.session_id for command in waiting if command.purpose is Purpose.CLOSE}
        for session_id in sorted(set(present) - self._standing.keys() - self._opening - closing):
            self._queue(Purpose.DISCARD, session_id, None, now)
        for session_id, standing in self._standing.items():
            if session_id not in present:
                deadline = max(lost_at, now + self._command_timeout_s)
                self._last_id += 1
                self._enter(
                    Command(
                        self._last_id, Purpose.RESTORE, session_id, standing.spec, standing.first_port, now, deadline
                    )
                )
        self._unsent.extend(command.command_id for command in waiting)
        return answers

    def handle_timer(self, now: float) -> tuple[bool, list[MediaInput]]:
        """Settle what is overdue; True when a command went unanswered, so that the connection is not to be trusted."""
        while self._retries and self._retries[0][0] <= now:
            command = heapq.heappop(self._retries)[2]
            if command.session_id in self._standing:
                self._enter(command)
        answers: list[MediaInput] = []
        unanswered = False
        while self._deadlines and self._deadlines[0][0] <= now:
            command_id = heapq.heappop(self._deadlines)[1]
            overdue = self._pending.pop(command_id, None)
            if overdue is not None:
                unanswered = True
                answers += self._given_up(overdue, "the data plane did not answer in time")
        if self._lost_at is not None and self._lost_at <= now:
            detail = f"the data plane was away for {self._lost_timeout_s:g} s"
            answers += [MediaLost(session_id, detail) for session_id in self._standing]
            self._standing.clear()
            self._lost_at = None
        return unanswered, answers

    def next_deadline(self) -> float | None:
        """When `handle_timer` wants to be called."""
        while self._deadlines and self._deadlines[0][1] not in self._pending:
            heapq.heappop(self._deadlines)
        candidates = [self._deadlines[0][0]] if self._deadlines else []
        if self._retries:
            candidates.append(self._retries[0][0])
        if self._lost_at is not None:
            candidates.append(self._lost_at)
        return min(candidates, default=None)

    def abandon(self, detail: str) -> list[MediaInput]:
        """Answer everything now, because there will be no data plane any more."""
        answers: list[MediaInput] = []
        for command in list(self._pending.values()):
            answers += self._given_up(command, detail)
        self._pending.clear()
        self._unsent.clear()
        self._retries.clear()
        return answers

    def _queue(self, purpose: Purpose, session_id: str, spec: MediaSpec | None, now: float) -> None:
        self._last_id += 1
        self._enter(Command(self._last_id, purpose, session_id, spec, 0, now, now + self._command_timeout_s))

    def _enter(self, command: Command) -> None:
        self._pending[command.command_id] = command
        self._unsent.append(command.command_id)
        heapq.heappush(self._deadlines, (command.deadline, command.command_id))

    def _done(self, command: Command, state: SessionState) -> list[MediaInput]:
        session_id, spec = command.session_id, command.spec
        if command.purpose is Purpose.CLOSE:
            return [MediaClosed(session_id, state.streams)]
        if spec is None or command.purpose is Purpose.RESTORE:
            return []
        if session_id in self._opening or session_id in self._standing:
            self._opening.discard(session_id)
            self._standing[session_id] = _Standing(spec, state.first_port)
        if command.purpose is Purpose.OPEN:
            return [MediaOpened(session_id, state.ports)]
        return [MediaUpdated(session_id, spec.generation, state.ports)]

    def _failed(self, command: Command, error: CommandError, now: float) -> list[MediaInput]:
        if command.purpose is Purpose.RESTORE and not error.session_gone and now + RESTORE_RETRY_S < command.deadline:
            # Ports of the data plane's predecessor may still be held by a worker that is about to end.
            self._last_id += 1
            again = replace(command, command_id=self._last_id)
            heapq.heappush(self._retries, (now + RESTORE_RETRY_S, again.command_id, again))
            return []
        answers = self._given_up(command, error.detail, error.failure)
        if command.purpose is Purpose.UPDATE and error.session_gone:
            answers += self.session_ended(command.session_id, error.detail)
        return answers

    def _given_up(
        self, command: Command, detail: str, failure: MediaFailure = MediaFailure.UNAVAILABLE
    ) -> list[MediaInput]:
        session_id = command.session_id
        match command.purpose:
            case Purpose.OPEN:
                self._opening.discard(session_id)
                return [MediaFailed(session_id, _generation(command), failure, detail)]
            case Purpose.UPDATE:
                return [MediaFailed(session_id, _generation(command), failure, detail)]
            case Purpose.CLOSE:
                return [MediaClosed(session_id, None)]
            case Purpose.RESTORE:
                return self.session_ended(session_id, detail)
            case Purpose.DISCARD:
                return []


def _generation(command: Command) -> int:
    return 0 if command.spec is None else command.spec.generation


def _overflow(spec: MediaSpec) -> MediaFailed:
    detail = "too many media commands wait for the data plane"
    return MediaFailed(spec.session_id, spec.generation, MediaFailure.UNAVAILABLE, detail)
