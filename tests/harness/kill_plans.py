"""What a round of kills is: how many calls, doing what, when which plane is struck how."""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from tests.harness.kill_phones import Delay


class Manner(Enum):
    """What happens to a plane."""

    PROCESS = "its process killed"
    GROUP = "killed with its supervisor"
    STOP = "stopped for a while"


class Moment(Enum):
    """What half of the calls (all, with TALKING and ANY) are in when the blow falls."""

    TALKING = "talk"
    ANSWERED = "between 200 and ACK"
    CHANGING = "in a re-INVITE"
    HANGING_UP = "in a BYE"
    RINGING = "ringing"
    ANY = "anywhere"


_DELAYS: Final = {
    Moment.ANSWERED: Delay.ACK,
    Moment.CHANGING: Delay.CHANGE,
    Moment.HANGING_UP: Delay.BYE,
    Moment.RINGING: Delay.ANSWER,
}
# Calls may begin or end while the planes are away.
SHORT: Final = frozenset({Moment.ANSWERED, Moment.HANGING_UP, Moment.RINGING, Moment.ANY})


@dataclass(frozen=True, slots=True)
class Plan:
    """One round. `planes` are struck in this order, `blows` times; without planes nothing is."""

    seed: int
    calls: int
    planes: tuple[str, ...] = ()
    manner: Manner = Manner.PROCESS
    moment: Moment = Moment.TALKING
    blows: int = 1
    stop_s: float = 3.0
    calls_per_s: float = 20.0

    def __str__(self) -> str:
        what = f"{' then '.join(self.planes)} {self.manner.value}" if self.planes else "nothing killed"
        times = f" {self.blows} times" if self.blows > 1 else ""
        return f"{what}{times}, calls {self.moment.value}, {self.calls} calls, seed {self.seed}"

    @property
    def kills_dataplane(self) -> bool:
        """Whether media cannot but suffer."""
        return "dataplane" in self.planes

    @property
    def refusals(self) -> frozenset[str]:
        """Why calls that were not answered yet may end."""
        return frozenset({"node-restarted", *(("media-unavailable",) if self.kills_dataplane else ())})

    def delay(self, number: int) -> Delay:
        """What of this call waits for the gate: of half of the calls, in both directions."""
        return _DELAYS.get(self.moment, Delay.NOTHING) if number % 4 < 2 else Delay.NOTHING
