"""What MediaClient knows of one media session: its wanted state, its sources, and how long it was without a relay."""

from dataclasses import dataclass, field
from enum import Enum, auto

from control.pbx.media import (
    LearnedSource,
    MediaClosed,
    MediaInterrupted,
    MediaSpec,
    RestoredSession,
    still_learned,
)
from control.pbx.records import LegName, StreamRecord


class Phase(Enum):
    """Where a session is in its life."""

    OPENING = auto()
    """Asked for, not confirmed."""
    STANDING = auto()
    """Confirmed, or restored: to be had again, whatever the data plane goes through."""
    LOST = auto()
    """Given up; whoever wanted it has been told and has not closed it yet."""
    CLOSING = auto()
    """Its end was asked for."""


@dataclass(slots=True)
class ClientSession:
    """One session.

    `spec` is the state that the data plane has confirmed or is to be given again. `ahead` is how far its generations
    there are ahead of those of the spec. `is_seen` is False for a restored one until the data plane's word of it.
    `away_since` is since when it has, or may have, no relay.
    """

    spec: MediaSpec
    phase: Phase = Phase.OPENING
    first_port: int = 0
    ahead: int = 0
    is_seen: bool = True
    is_restoring: bool = False
    learned: dict[tuple[LegName, int], LearnedSource] = field(default_factory=dict)
    away_since: float | None = None
    ended_at: float = 0.0
    interruptions: int = 0
    gap_s: float = 0.0

    @classmethod
    def restored(cls, known: RestoredSession, now: float) -> "ClientSession":
        """A session that an earlier process had."""
        return cls(
            known.spec,
            Phase.STANDING,
            known.first_port,
            is_seen=False,
            learned={(source.leg, source.line): source for source in known.learned},
            away_since=now,
            interruptions=known.interruptions,
            gap_s=known.gap_s,
        )

    @property
    def is_wanted(self) -> bool:
        """It is to stand, now or soon."""
        return self.phase in {Phase.OPENING, Phase.STANDING}

    def sources(self) -> tuple[LearnedSource, ...]:
        """What was learned of its far ends and still holds."""
        return still_learned(self.spec, self.learned.values())

    def confirm(self, spec: MediaSpec) -> None:
        """A state is in force; what was learned of far ends that it moves is forgotten, even if they move back."""
        self.spec = spec
        self.learned = {(source.leg, source.line): source for source in self.sources()}

    def left(self, now: float) -> None:
        """The data plane is out of reach, so the relay may be gone."""
        if self.away_since is None:
            self.away_since = now

    def relays(self) -> None:
        """The relay was there all the time."""
        self.is_seen = True
        self.away_since = None

    def returned(self, now: float) -> MediaInterrupted:
        """It was made again."""
        self.is_seen = True
        self._count(now)
        return MediaInterrupted(self.spec.session_id, self.interruptions, self.gap_s)

    def interrupted(self, gap_s: float) -> MediaInterrupted:
        """It was without a relay for so long and has it again."""
        self.interruptions += 1
        self.gap_s += gap_s
        return MediaInterrupted(self.spec.session_id, self.interruptions, self.gap_s)

    def end(self, now: float) -> None:
        """Its end was asked for. What became of one that has not been seen yet is not known, so nothing is counted."""
        self.phase = Phase.CLOSING
        self.ended_at = now
        if not self.is_seen:
            self.away_since = None

    def closed(self, streams: tuple[StreamRecord, ...] | None) -> MediaClosed:
        """It is gone, with these statistics; an outage that had not ended lasted until its end was asked for."""
        self._count(self.ended_at)
        return MediaClosed(self.spec.session_id, streams, self.interruptions, self.gap_s)

    def _count(self, until: float) -> None:
        if self.away_since is not None:
            self.interruptions += 1
            self.gap_s += max(0.0, until - self.away_since)
            self.away_since = None
