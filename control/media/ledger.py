"""What is wanted of the data plane and not answered yet: the bookkeeping of MediaClient, without I/O or clock.

A wish becomes a command with a deadline. Each wish gets exactly one answer, from the data plane or from here. Sessions
that the data plane has confirmed, and those that an earlier process of the control plane had, are remembered with their
ports, sources and state. Whenever the data plane is connected, what it holds and what is wanted are brought together:
a session that it holds as wanted is left alone, one that it holds otherwise is updated, one that it does not hold is
made again on the same ports, one that nobody wants is deleted. A session that is neither answered for nor restored in
time is reported lost, once.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto

from control.media.session import ClientSession, Phase
from control.media.wire import CommandError, HeldSession, SessionState, is_held
from control.pbx.media import (
    LearnedSource,
    MediaClosed,
    MediaFailed,
    MediaFailure,
    MediaInput,
    MediaLatched,
    MediaLost,
    MediaOpened,
    MediaSpec,
    MediaUpdated,
    RestoredSession,
)

RETRY_S = 0.25


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
    """Make a session again that the data plane does not hold."""
    AMEND = auto()
    """Give a session the wanted state where the data plane holds another."""
    DISCARD = auto()
    """Delete what nobody wants."""

    @property
    def action(self) -> Action:
        """What it does."""
        match self:
            case Purpose.OPEN | Purpose.RESTORE:
                return Action.CREATE
            case Purpose.UPDATE | Purpose.AMEND:
                return Action.UPDATE
            case Purpose.CLOSE | Purpose.DISCARD:
                return Action.DELETE

    @property
    def reconciles(self) -> bool:
        """Nobody wished for it: it is tried until the session is lost."""
        return self in {Purpose.RESTORE, Purpose.AMEND}


@dataclass(frozen=True, slots=True)
class Command:
    """One thing to ask of the data plane.

    `spec` is None for deletes; `generation` is the spec's as the data plane counts it; `first_port` is 0 where any
    block will do.
    """

    command_id: int
    purpose: Purpose
    session_id: str
    spec: MediaSpec | None
    queued_at: float
    deadline: float
    generation: int = 0
    first_port: int = 0
    learned: tuple[LearnedSource, ...] = ()


class MediaLedger:
    """Turns wishes into commands, and results, deadlines and lost connections into answers.

    Methods that can settle something return the answers; commands to send are taken with `take`, in order.
    """

    def __init__(self, *, command_timeout_s: float, lost_timeout_s: float, max_pending: int) -> None:
        self._command_timeout_s = command_timeout_s
        self._lost_timeout_s = lost_timeout_s
        self._max_pending = max_pending
        self._last_id = 0
        self._sessions: dict[str, ClientSession] = {}
        self._pending: dict[int, Command] = {}
        self._unsent: deque[int] = deque()
        self._deadlines: list[tuple[float, int]] = []
        self._retries: list[tuple[float, int, Command]] = []
        self._is_connected = False
        self._lost_at: float | None = None

    def __len__(self) -> int:
        """Sessions that stand or are being made."""
        return sum(session.is_wanted for session in self._sessions.values())

    def standing(self) -> set[str]:
        """The sessions that the data plane has confirmed, or is to have again, and that nobody has asked to close."""
        return {session_id for session_id, session in self._sessions.items() if session.phase is Phase.STANDING}

    # ---- wishes ----------------------------------------------------------------------------------------------------

    def restore(self, sessions: Iterable[RestoredSession], now: float) -> None:
        """Take over the sessions of an earlier process, before the first connection."""
        for known in sessions:
            self._sessions[known.spec.session_id] = ClientSession.restored(known, now)
        self.disconnected(now)

    def open(self, spec: MediaSpec, now: float) -> list[MediaInput]:
        """Wish for a session."""
        if spec.session_id in self._sessions:
            return [MediaFailed(spec.session_id, spec.generation, MediaFailure.REFUSED, "this session is open already")]
        if len(self._pending) >= self._max_pending:
            return [_overflow(spec)]
        self._sessions[spec.session_id] = ClientSession(spec)
        self._queue(Purpose.OPEN, spec.session_id, spec, now)
        return []

    def update(self, spec: MediaSpec, now: float) -> list[MediaInput]:
        """Wish for another state of a session."""
        session = self._sessions.get(spec.session_id)
        if session is None or not session.is_wanted:
            return [MediaFailed(spec.session_id, spec.generation, MediaFailure.UNAVAILABLE, "this session is gone")]
        if len(self._pending) >= self._max_pending:
            return [_overflow(spec)]
        self._queue(Purpose.UPDATE, spec.session_id, spec, now)
        return []

    def close(self, session_id: str, now: float) -> list[MediaInput]:
        """Wish for a session's end. Never refused for want of room: there is at most one for each session."""
        session = self._sessions.get(session_id)
        if session is None or session.phase is Phase.CLOSING:
            return [MediaClosed(session_id, None)]
        was_lost = session.phase is Phase.LOST
        session.end(now)
        if was_lost and not self._is_connected:
            return self._closed(session_id, None)
        self._queue(Purpose.CLOSE, session_id, None, now)
        return []

    # ---- what the data plane says ----------------------------------------------------------------------------------

    def take(self, limit: int) -> list[Command]:
        """Take up to `limit` commands to send now."""
        taken: list[Command] = []
        while self._unsent and len(taken) < limit:
            command = self._pending.get(self._unsent.popleft())
            if command is not None:
                taken.append(self._filled(command))
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
        return command, self._done(command, outcome, now)

    def session_ended(self, session_id: str, detail: str, now: float) -> list[MediaInput]:
        """The data plane gave a session up by itself."""
        session = self._sessions.get(session_id)
        if session is None or session.phase is not Phase.STANDING:
            return []
        session.phase = Phase.LOST
        session.left(now)
        return [MediaLost(session_id, detail)]

    def latched(self, session_id: str, source: LearnedSource) -> list[MediaInput]:
        """The data plane locked a source."""
        session = self._sessions.get(session_id)
        key = source.leg, source.line
        if session is None or not session.is_wanted or session.learned.get(key) == source:
            return []
        session.learned[key] = source
        return [MediaLatched(session_id, source)]

    def interrupted(self, gap_s: float) -> list[MediaInput]:
        """No session had a relay for so long; those that stand have it again."""
        standing = (session for session in self._sessions.values() if session.phase is Phase.STANDING)
        return [session.interrupted(gap_s) for session in standing]

    def disconnected(self, now: float) -> None:
        """The data plane cannot be reached from now on; sessions are waited for."""
        self._is_connected = False
        for session in self._sessions.values():
            if session.phase is Phase.STANDING:
                session.left(now)
        if self._lost_at is None:
            self._lost_at = now + self._lost_timeout_s

    def connected(self, held: Mapping[str, HeldSession], *, same_instance: bool, now: float) -> None:
        """The data plane is back and holds the sessions `held`: queue what makes it hold those that are wanted.

        What has no result is sent again, behind that, so that it follows in order.
        """
        lost_at = now + self._lost_timeout_s if self._lost_at is None else self._lost_at
        until = max(lost_at, now + self._command_timeout_s)
        self._is_connected = True
        self._lost_at = None
        for command in list(self._pending.values()):
            if command.purpose.reconciles or command.purpose is Purpose.DISCARD:
                del self._pending[command.command_id]
        for _, _, command in sorted(self._retries, key=lambda entry: entry[:2]):
            if command.purpose is Purpose.UPDATE:
                self._enter(command)
        self._retries.clear()
        self._unsent.clear()
        waiting = list(self._pending.values())
        updating = {command.session_id for command in waiting if command.purpose is Purpose.UPDATE}
        for session_id in sorted(held.keys() - self._sessions.keys()):
            self._queue(Purpose.DISCARD, session_id, None, now)
        for session_id, session in self._sessions.items():
            there = held.get(session_id)
            was_restoring, session.is_restoring = session.is_restoring, False
            if was_restoring and there is not None:
                # It was made again, and the connection broke before the answer came.
                session.returned(now)
            if session.phase is Phase.CLOSING and (there is not None or same_instance):
                session.relays()
            elif session.phase is not Phase.STANDING:
                continue
            elif there is None:
                session.is_restoring = True
                self._queue(Purpose.RESTORE, session_id, session.spec, now, until)
            elif self._needs_amendment(session, there, is_updating=session_id in updating):
                self._queue(Purpose.AMEND, session_id, session.spec, now, until)
        self._unsent.extend(command.command_id for command in waiting)

    # ---- time ------------------------------------------------------------------------------------------------------

    def handle_timer(self, now: float) -> tuple[bool, list[MediaInput]]:
        """Settle what is overdue; True when a command went unanswered, so that the connection is not to be trusted."""
        while self._retries and self._retries[0][0] <= now:
            command = heapq.heappop(self._retries)[2]
            session = self._sessions.get(command.session_id)
            if command.purpose is Purpose.UPDATE or (session is not None and session.phase is Phase.STANDING):
                self._enter(command)
        answers: list[MediaInput] = []
        unanswered = False
        while self._deadlines and self._deadlines[0][0] <= now:
            command_id = heapq.heappop(self._deadlines)[1]
            overdue = self._pending.pop(command_id, None)
            if overdue is not None:
                unanswered = True
                answers += self._given_up(overdue, "the data plane did not answer in time", now)
        if self._lost_at is not None and self._lost_at <= now:
            detail = f"the data plane was away for {self._lost_timeout_s:g} s"
            for session_id in sorted(self.standing()):
                answers += self.session_ended(session_id, detail, now)
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

    def abandon(self, detail: str, now: float) -> list[MediaInput]:
        """Answer everything now, because there will be no data plane any more."""
        answers: list[MediaInput] = []
        for command in [*self._pending.values(), *(entry[2] for entry in self._retries)]:
            if not command.purpose.reconciles:
                answers += self._given_up(command, detail, now)
        self._pending.clear()
        self._unsent.clear()
        self._retries.clear()
        return answers

    # ---- internal --------------------------------------------------------------------------------------------------

    def _queue(
        self, purpose: Purpose, session_id: str, spec: MediaSpec | None, now: float, deadline: float | None = None
    ) -> None:
        self._last_id += 1
        until = now + self._command_timeout_s if deadline is None else deadline
        self._enter(Command(self._last_id, purpose, session_id, spec, now, until))

    def _enter(self, command: Command) -> None:
        self._pending[command.command_id] = command
        self._unsent.append(command.command_id)
        heapq.heappush(self._deadlines, (command.deadline, command.command_id))

    def _filled(self, command: Command) -> Command:
        """A command with what it depends on as that is now."""
        session = self._sessions.get(command.session_id)
        if session is None or command.spec is None:
            return command
        spec = session.spec if command.purpose.reconciles else command.spec
        is_restoration = command.purpose is Purpose.RESTORE
        return replace(
            command,
            spec=spec,
            generation=spec.generation + session.ahead,
            first_port=session.first_port if is_restoration else 0,
            learned=session.sources() if is_restoration else (),
        )

    @staticmethod
    def _needs_amendment(session: ClientSession, there: HeldSession, *, is_updating: bool) -> bool:
        """Take note of a session that the data plane holds; True where it has to be told the wanted state.

        What it holds may even be newer than what is wanted: an earlier process of the control plane did not live to
        journal it. Generations there then go on from the one in force.
        """
        session.relays()
        if is_held(there, session.spec):
            session.ahead = max(session.ahead, there.generation - session.spec.generation)
            return False
        if is_updating:
            session.ahead = max(session.ahead, there.generation - session.spec.generation)
            return False
        session.ahead = max(session.ahead, there.generation + 1 - session.spec.generation)
        return True

    def _closed(self, session_id: str, state: SessionState | None) -> list[MediaInput]:
        session = self._sessions.pop(session_id, None)
        streams = None if state is None else state.streams
        return [MediaClosed(session_id, streams) if session is None else session.closed(streams)]

    def _done(self, command: Command, state: SessionState, now: float) -> list[MediaInput]:
        session_id, spec = command.session_id, command.spec
        if command.purpose is Purpose.CLOSE:
            return self._closed(session_id, state)
        session = self._sessions.get(session_id)
        if command.purpose is Purpose.RESTORE and session is not None:
            session.is_restoring = False
            interrupted = session.returned(now)
            return [interrupted] if session.is_wanted else []
        if spec is None or command.purpose is Purpose.AMEND:
            return []
        if session is not None and session.is_wanted:
            session.phase = Phase.STANDING
            session.first_port = state.first_port
            session.confirm(spec)
        if command.purpose is Purpose.OPEN:
            return [MediaOpened(session_id, state.ports)]
        return [MediaUpdated(session_id, spec.generation, state.ports)]

    def _failed(self, command: Command, error: CommandError, now: float) -> list[MediaInput]:
        session = self._sessions.get(command.session_id)
        # Ports of the data plane's predecessor may still be held by a worker that is about to end. An update has to
        # wait for the session that it is for.
        waits = (
            command.purpose is Purpose.UPDATE and error.session_gone and session is not None and session.is_restoring
        )
        if (waits or (command.purpose.reconciles and not error.session_gone)) and now + RETRY_S < command.deadline:
            self._last_id += 1
            again = replace(command, command_id=self._last_id)
            heapq.heappush(self._retries, (now + RETRY_S, again.command_id, again))
            return []
        answers = self._given_up(command, error.detail, now, error.failure)
        if command.purpose is Purpose.UPDATE and error.session_gone:
            answers += self.session_ended(command.session_id, error.detail, now)
        return answers

    def _given_up(
        self, command: Command, detail: str, now: float, failure: MediaFailure = MediaFailure.UNAVAILABLE
    ) -> list[MediaInput]:
        session_id = command.session_id
        match command.purpose:
            case Purpose.OPEN:
                session = self._sessions.get(session_id)
                if session is not None and session.phase is Phase.OPENING:
                    del self._sessions[session_id]
                return [MediaFailed(session_id, _generation(command), failure, detail)]
            case Purpose.UPDATE:
                if failure is MediaFailure.UNAVAILABLE:
                    self._still_want(command, now)
                return [MediaFailed(session_id, _generation(command), failure, detail)]
            case Purpose.CLOSE:
                return self._closed(session_id, None)
            case Purpose.RESTORE | Purpose.AMEND:
                return self.session_ended(session_id, detail, now)
            case Purpose.DISCARD:
                return []

    def _still_want(self, update: Command, now: float) -> None:
        """An update that nobody could carry out is what is wanted all the same."""
        session = self._sessions.get(update.session_id)
        if session is None or update.spec is None or session.phase is not Phase.STANDING:
            return
        session.confirm(update.spec)
        if self._is_connected and not session.is_restoring:
            self._last_id += 1
            deadline = now + self._lost_timeout_s
            amend = Command(self._last_id, Purpose.AMEND, update.session_id, update.spec, now, deadline)
            heapq.heappush(self._retries, (now + RETRY_S, amend.command_id, amend))


def _generation(command: Command) -> int:
    return 0 if command.spec is None else command.spec.generation


def _overflow(spec: MediaSpec) -> MediaFailed:
    detail = "too many media commands wait for the data plane"
    return MediaFailed(spec.session_id, spec.generation, MediaFailure.UNAVAILABLE, detail)
