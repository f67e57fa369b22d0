"""Calls through a process that is killed at each point of their life, and what must hold of them each time.

`python -m tests.harness.crash_points FOLDER STORY SEED` prints what was wrong, a finding a line; silence is good. How
many points were tried goes to the standard error stream.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from control.sip.message import Request
from control.sip.session import Accepted, Established, InviteSession, Progressed, SessionState
from control.sip.session import Output as SessionOutput
from control.store.database import migrations
from sippbx.runtime.logging import configure_logging
from tests.harness.crash_child import (
    CALLEE_HOST,
    Finish,
    Finished,
    Life,
    Occasion,
    Originate,
    Point,
    Restored,
    Sent,
    Waiting,
    Wished,
    live,
)
from tests.harness.crash_world import FarEnd, Story, World
from tests.harness.messages import sdp

LASTS_S = 400.0


def _hangs_up(session: InviteSession) -> Callable[[float], list[SessionOutput]]:
    return lambda _: session.terminate(200, None)


class CallerHangsUp(Story):
    def told(self, end: FarEnd, session: InviteSession, event: SessionOutput) -> None:
        if isinstance(event, Accepted):
            end.after(1.0, session, _hangs_up(session))


class CalleeHangsUp(Story):
    def told(self, end: FarEnd, session: InviteSession, event: SessionOutput) -> None:
        if isinstance(event, Established):
            end.after(1.0, session, _hangs_up(session))


class CallerHolds(Story):
    reinvites = (0, 1)

    def told(self, end: FarEnd, session: InviteSession, event: SessionOutput) -> None:
        if isinstance(event, Accepted):
            held = sdp(end.host, direction="sendonly", version=2)
            end.after(0.5, session, lambda now: session.offer(held, "INVITE", now))
            end.after(40.0, session, _hangs_up(session))


class CallerGivesUp(Story):
    reason = "caller-cancelled"

    def rung(self, end: FarEnd, session: InviteSession, invite: Request) -> None:
        end.after(0.1, session, lambda now: session.progress(180, "Ringing", b"", now))

    def told(self, end: FarEnd, session: InviteSession, event: SessionOutput) -> None:
        if isinstance(event, Progressed) and event.status == 180 and session.owns_call_id:
            end.after(0.5, session, _hangs_up(session))


class CalleeIsBusy(Story):
    reason = "callee-busy"

    def rung(self, end: FarEnd, session: InviteSession, invite: Request) -> None:
        end.after(0.1, session, lambda now: session.progress(180, "Ringing", b"", now))
        end.after(0.3, session, lambda _: session.reject(486))


class ProgramOriginates(Story):
    reinvites = (1, 0)

    def begin(self, world: "World") -> None:
        world.at(world.now + 0.1, lambda: world.inbox.append(Originate("asked-for", "8100", "7100")))

    def told(self, end: FarEnd, session: InviteSession, event: SessionOutput) -> None:
        if isinstance(event, Established) and end.host == CALLEE_HOST:
            end.after(1.0, session, _hangs_up(session))


STORIES: dict[str, type[Story]] = {
    "caller_hangs_up": CallerHangsUp,
    "callee_hangs_up": CalleeHangsUp,
    "caller_holds": CallerHolds,
    "caller_gives_up": CallerGivesUp,
    "callee_is_busy": CalleeIsBusy,
    "program_originates": ProgramOriginates,
}


@dataclass
class Outcome:
    """How a run went: the occasions of its last process, the points that were reached, and what was wrong."""

    occasions: Counter[Occasion] = field(default_factory=Counter)
    killed: list[Point] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def serve(world: World, child: Connection) -> Finished | None:
    """Be the world of one process; None when it was killed.

    Raises:
        RuntimeError: it failed.
    """
    ends_at = world.began + LASTS_S
    told = False
    while True:
        try:
            message = child.recv()
        except (EOFError, ConnectionResetError):
            return None
        match message:
            case Sent():
                world.to_far_end(message)
            case Wished():
                world.wished(message.wish)
            case Restored():
                world.restored(message)
            case Waiting(until=until):
                world.run_until(min(until, ends_at) if not told else until, stop_at_input=True)
                given, world.inbox = world.inbox, []
                if not given and world.now >= ends_at and not told:
                    told = True
                    given = [Finish()]
                with contextlib.suppress(BrokenPipeError):
                    child.send((world.now, given))
            case Finished():
                return message
            case str():
                raise RuntimeError(message)


def born(life: Life) -> tuple[int, Connection]:
    """Fork a process; returns its id and the way to it."""
    here, there = multiprocessing.Pipe()
    pid = os.fork()
    if pid == 0:
        try:
            here.close()
            live(life, there)
        except BaseException:  # noqa: BLE001 - told to the parent
            there.send(traceback.format_exc())
        os._exit(0)
    there.close()
    return pid, here


def play(story: type[Story], path: Path, kills: list[Point], *, down_s: float, booted: bool) -> Outcome:
    """Play a story, its processes killed one after the other at these points, and look what has become of it."""
    world, outcome = World(story()), Outcome()
    finished = None
    for number, kill_at in enumerate([*kills, None], start=1):
        origin_s, boot_id = (-300.0 * number, f"boot-{number}") if booted else (0.0, "boot")
        pid, child = born(Life(number, path, world.now, origin_s, boot_id, kill_at))
        try:
            finished = serve(world, child)
        except RuntimeError as error:
            outcome.findings.append(str(error))
            break
        finally:
            child.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if finished is not None:
            outcome.occasions = finished.occasions
            break
        if kill_at is not None:
            outcome.killed.append(kill_at)
        world.run_until(world.now + down_s, stop_at_input=False)
    if not outcome.findings:
        outcome.findings += list(findings(world, path, story, outcome.killed))
    return outcome


def findings(world: World, path: Path, story: type[Story], kills: list[Point]) -> Iterable[str]:  # noqa: C901 - a list
    """What is wrong with a world in which nothing happens any more."""
    caller, callee = world.caller, world.callee
    with contextlib.closing(sqlite3.connect(path)) as store:
        records = store.execute("SELECT call_id, reason FROM call_records").fetchall()
        events = Counter(store.execute("SELECT call_id, type FROM events").fetchall())
        rows = store.execute("SELECT call_id FROM calls").fetchall()
        aside = store.execute("SELECT call_id, reason FROM calls_set_aside").fetchall()
    ended = [call_id for call_id, kind in events if kind == "call.ended"]
    started = [call_id for call_id, kind in events if kind == "call.started"]
    if set(ended) != {call_id for call_id, _ in records} or any(
        count != 1 for (_, kind), count in events.items() if kind != "call.ringing"
    ):
        yield f"records {records}, events {events}"
    if set(started) != set(ended):
        yield f"calls that were told of: {started}, those that ended: {ended}"
    if any(kind == "node.error" for _, kind in events):
        yield "an error was told of"
    if rows or aside:
        yield f"left in the journal: {rows}, set aside: {aside}"
    told = any(status > 100 for status in caller.statuses("INVITE")) or callee.invites(again=False)
    if len(records) != 1 and (told or records or started or not kills):
        yield f"{len(records)} records of one call"
    if not records:
        # The first commit was not reached: nobody was told of a call, a caller may give up on it.
        return
    if len(callee.invites(again=False)) > 1:
        yield f"the callee was called twice: {callee.invites(again=False)}"
    for end, most in zip((caller, callee), story.reinvites, strict=True):
        if len(end.invites(again=True)) > most or (not kills and len(end.invites(again=True)) < most):
            yield f"{end.host} was re-invited: {end.invites(again=True)}"
        for method in ("INVITE", "BYE", "CANCEL", "ACK", "UPDATE"):
            # Whoever was hung up on while he hung up himself believes in the call no more.
            if 481 in end.statuses(method) and not end.was_hung_up_on:
                yield f"{end.host} was told 481 to {method}"
        if end.failed:
            yield f"{end.host} got no answer: {[each.transaction.method for each in end.failed]}"
        # After two kills, a refusal may have been sent by one that died before it could repeat it; a caller gives up.
        standing = (SessionState.ACCEPTED, SessionState.CONFIRMED, SessionState.TERMINATING)
        if unfinished := [each.state.value for each in end.talks if len(kills) < 2 or each.state in standing]:
            yield f"{end.host} still believes in a call: {unfinished}"
    reasons = {reason for _, reason in records}
    stood = caller.answered or any(kind == "call.answered" for _, kind in events)
    allowed = {story.reason} if not kills or stood else {story.reason, "node-restarted"}
    if not reasons <= allowed:
        yield f"ended because of {reasons}"
    if world.sessions:
        yield f"left in the data plane: {world.sessions}"


def main(folder: Path, name: str, seed: int) -> None:
    configure_logging("crash-points", level="error")
    chance = random.Random(seed)
    story = STORIES[name]
    template = folder / "template.sqlite"
    with contextlib.closing(sqlite3.connect(template, isolation_level=None)) as store:
        store.execute("PRAGMA journal_mode = WAL")
        store.execute("CREATE TABLE schema_version (version INTEGER PRIMARY KEY) STRICT")
        for version, script in migrations():
            store.executescript(f"BEGIN; {script} INSERT INTO schema_version VALUES ({version}); COMMIT;")
    numbers = itertools.count(1)
    tried = 0

    def attempt(kills: list[Point], *, down_s: float = 0.0, booted: bool = False) -> Outcome:
        path = folder / f"{next(numbers)}.sqlite"
        shutil.copy(template, path)
        outcome = play(story, path, kills, down_s=down_s, booted=booted)
        killed = ", then ".join(map(str, kills)) or "nothing"
        for finding in outcome.findings:
            print(f"{name}, killed {killed}, down for {down_s} s, booted {booted}: {finding}", flush=True)
        for leftover in folder.glob(f"{path.name}*"):
            leftover.unlink()
        return outcome

    whole = attempt([]).occasions
    for occasion, count in sorted(whole.items()):
        for number in range(1, count + 1):
            point = Point(occasion, number)
            down_s, booted = chance.choice((0.0, 0.2, 1.3, 7.0)), chance.random() < 0.5
            once = attempt([point], down_s=down_s, booted=booted)
            tried += len(once.killed)
            if once.killed != [point]:
                print(f"{name}: was not killed {point}", flush=True)
            if once.occasions:
                again = chance.choice([Point(each, 1 + chance.randrange(n)) for each, n in once.occasions.items()])
                tried += len(attempt([point, again], down_s=down_s, booted=booted).killed)
    print(
        f"{name}: {tried} kills, of {', '.join(f'{count} {each.name}' for each, count in sorted(whole.items()))}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
