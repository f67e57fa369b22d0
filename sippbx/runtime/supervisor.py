"""The supervisor: runs one command, restarts it at once after it dies, and may be PID 1 of a container.

    python -m sippbx.runtime.supervisor --name NAME [--max-restarts N] [--window S] [--final CODE]... -- COMMAND...

A container orchestrator restarts with a growing back-off, far too slowly for a call; this does it within milliseconds,
and gives up after N restarts within S seconds, so that the orchestrator sees a plane that cannot start.

Sockets inherited by the LISTEN_FDS convention stay open here and are given to each child in turn: datagrams that arrive
while there is none wait in the socket. SIGTERM, SIGINT and SIGHUP are forwarded. After SIGTERM or SIGINT nothing is
restarted any more; a second one is forwarded, too, so that a plane cuts its draining short, and a third kills the
child. The child leads a process group of its own, so a terminal's Ctrl-C reaches it once, from here. It is killed when
the supervisor dies, and what it leaves in its group when it dies itself. Orphans are reaped.

Exit codes:
    the child's   it ended after a stop signal; or by itself with 0 (finished), 2 (its configuration is refused), or a
                  code that was given as final
    128 + signal  the child was killed by a signal after a stop signal (137: by the third one)
    70            the child died too often; the log's last line is "supervisor.gave_up"
    127           the command cannot be executed
    2             wrong usage

Standard library only, and little of it: it sits beside each plane for as long as that runs.
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NoReturn

from sippbx.runtime.sockets import SocketError, inherited_names

EXIT_GAVE_UP = 70
EXIT_CANNOT_EXECUTE = 127
FINAL_EXIT_CODES = frozenset({0, 2, EXIT_CANNOT_EXECUTE})

# Stop signals that are forwarded: one to drain, one to stop now.
_PATIENCE = 2
_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
_WATCHED = _STOP_SIGNALS | {signal.SIGHUP, signal.SIGCHLD}

# From <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def exit_code(wait_status: int) -> int:
    """A wait status as a shell reports it: the exit code, or 128 plus the signal."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


class RestartCap:
    """Allows `limit` restarts within any `window_s` seconds."""

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._restarts: deque[float] = deque()

    def allows(self, now: float) -> bool:
        """Whether one more restart is allowed at `now` (monotonic seconds); counts it if so."""
        while self._restarts and now - self._restarts[0] >= self._window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._limit:
            return False
        self._restarts.append(now)
        return True


class Supervisor:
    """Runs `command` under `cap`; `name` is for the log and `socket_names` are those of the descriptors from 3 on.

    After one of `final_codes` it is not restarted, as after FINAL_EXIT_CODES.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        cap: RestartCap,
        socket_names: Sequence[str],
        final_codes: Iterable[int] = (),
    ) -> None:
        self._name = name
        self._command = list(command)
        self._cap = cap
        self._socket_names = socket_names
        self._final_codes = FINAL_EXIT_CODES.union(final_codes)
        self._child = 0
        self._stop_signals = 0

    def run(self) -> int:
        """Supervises until there is nothing left to do; returns the exit code. The caller has one thread only."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._start(before)
        while True:
            received = signal.sigwait(_WATCHED)
            if received != signal.SIGCHLD:
                self._forward(signal.Signals(received))
                continue
            status = self._reap()
            if status is None:
                continue
            code = exit_code(status)
            if self._stop_signals or code in self._final_codes:
                self._log("info", "supervisor.stopped", exit_code=code)
                return code
            if not self._cap.allows(time.monotonic()):
                self._log("error", "supervisor.gave_up", exit_code=code, advice="it died too often; see its log above")
                return EXIT_GAVE_UP
            self._log("warning", "supervisor.child_died", exit_code=code, restarting=True)
            self._start(before)

    def _start(self, mask: set[int | signal.Signals]) -> None:
        supervisor = os.getpid()
        child = os.fork()
        if child == 0:
            self._become_child(supervisor, mask)
        with contextlib.suppress(OSError):  # whoever is first, so that the group stands before it is signalled
            os.setpgid(child, child)
        self._child = child
        self._log("info", "supervisor.child_started", child=child)

    def _become_child(self, supervisor: int, mask: set[int | signal.Signals]) -> NoReturn:
        try:
            os.setpgid(0, 0)
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != supervisor:
                os._exit(EXIT_CANNOT_EXECUTE)  # it died before the line above
            environment: Mapping[str, str] = os.environ
            if self._socket_names:
                environment = {**os.environ, "LISTEN_PID": str(os.getpid())}
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execvpe(self._command[0], self._command, environment)  # noqa: S606 -- no shell is wanted
        except OSError as error:
            self._log("error", "supervisor.command_failed", command=self._command[0], error=error.strerror)
        finally:
            os._exit(EXIT_CANNOT_EXECUTE)

    def _forward(self, received: signal.Signals) -> None:
        if received in _STOP_SIGNALS:
            self._stop_signals += 1
            if self._stop_signals > _PATIENCE:
                self._log("warning", "supervisor.child_killed", signal=received.name)
                os.kill(self._child, signal.SIGKILL)
                return
        self._log("info", "supervisor.signal_forwarded", signal=received.name)
        os.kill(self._child, received)

    def _reap(self) -> int | None:
        """Takes in all who died; the child's wait status if it is among them."""
        child_status = None
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return child_status
            if dead is None:
                return child_status
            if dead.si_pid == self._child:
                # Before it is reaped, while nobody else can have its number.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._child, signal.SIGKILL)
            pid, status = os.waitpid(dead.si_pid, 0)
            if pid == self._child:
                child_status = status

    def _log(self, level: str, event: str, **values: str | int | bool | None) -> None:
        timestamp = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        line = {"timestamp": timestamp, "level": level, "event": event, "plane": self._name, **values}
        os.write(2, (json.dumps(line) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and supervises; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sippbx.runtime.supervisor", description="Restarts a command at once after it dies."
    )
    parser.add_argument("--name", required=True, help="what the log calls it")
    parser.add_argument("--max-restarts", type=int, default=10, metavar="N", help="within the window (default 10)")
    parser.add_argument("--window", type=float, default=60.0, metavar="S", help="seconds (default 60)")
    parser.add_argument(
        "--final", type=int, action="append", default=[], metavar="CODE", help="an exit code after which not to restart"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    options = parser.parse_args(arguments)
    try:
        socket_names = inherited_names(os.environ)
    except SocketError as error:
        parser.error(str(error))
    cap = RestartCap(options.max_restarts, options.window)
    return Supervisor(options.name, options.command, cap, socket_names, options.final).run()


if __name__ == "__main__":
    sys.exit(main())
