"""What a relay engine is: the protocol that its strategies fulfil, and what they report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dataplane.session.relay import LearnedSource, StreamEvent, StreamSnapshot
from dataplane.session.spec import RelayPlan


class BindFailedError(Exception):
    """The system refused to bind a port; `errno` says why. Nothing of the plan was carried out."""

    def __init__(self, address: str, port: int, errno: int) -> None:
        super().__init__(address, port, errno)
        self.address = address
        self.port = port
        self.errno = errno


class EngineUnavailableError(Exception):
    """The engine did not answer in time or is not running."""


@dataclass(frozen=True, slots=True)
class SessionLost:
    """The engine could not go on with a session: its ports could not be bound again after a failure."""

    session_id: str
    problem: str
    streams: tuple[StreamSnapshot, ...]


@dataclass(frozen=True, slots=True)
class EngineChanged:
    """The engine became ready, or is no longer; ready again, it has all sessions again that it has not lost."""

    ready: bool


EngineEvent = StreamEvent | SessionLost | EngineChanged
EngineObserver = Callable[[EngineEvent], None]


class RelayEngine(Protocol):
    """Carries packets for relay plans, each named by its session id.

    Every method that waits has a deadline of its own and raises EngineUnavailableError when it passes. A session that
    was applied goes on, on the same ports and with what was learned, also when the engine's process dies and returns.
    """

    @property
    def name(self) -> str:
        """The strategy's name, as in the configuration."""
        ...

    @property
    def ready(self) -> bool:
        """Plans can be carried out now."""
        ...

    @property
    def restarts(self) -> int:
        """How often a process of it had to be started again."""
        ...

    async def start(self) -> None:
        """Make it ready."""
        ...

    async def apply(
        self, plan: RelayPlan, learned: tuple[LearnedSource, ...] = (), carried: tuple[StreamSnapshot, ...] = ()
    ) -> None:
        """Carry out a plan, whole or not at all: bind what is new, let go what is not wanted any more.

        A session that is new here goes on with the sources in `learned` and the figures in `carried`.

        Raises: BindFailedError.
        """
        ...

    async def remove(self, session_id: str) -> tuple[StreamSnapshot, ...]:
        """Let go of a session and return its final figures; empty for one that is not known."""
        ...

    async def collect(self, session_ids: Sequence[str] | None = None) -> Mapping[str, tuple[StreamSnapshot, ...]]:
        """Return the present figures of these sessions, as far as they are known, or of all."""
        ...

    async def close(self) -> None:
        """Let go of everything."""
        ...
