"""The supervisor over real processes: restarts, cap, signals, sockets that outlive the child."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sippbx.runtime.sockets import SocketError, TcpListener, UdpListener, bind_tcp, bind_udp, receive

pytestmark = pytest.mark.integration

DEADLINE_S = 10.0

# Says who it is, then waits; a datagram is repeated in the output.
CHILD = """
import os, signal, sys, time
from sippbx.runtime.sockets import receive
taken = receive()
stop = lambda number, frame: (print("signal", signal.Signals(number).name, flush=True), sys.exit(int(sys.argv[1])))
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGHUP, lambda number, frame: print("signal SIGHUP", flush=True))
print("pid", os.getpid(), flush=True)
for name, each in taken.items():
    each.setblocking(True)
    while True:
        print(name, each.recv(100).decode(), flush=True)
while True:
    signal.pause()
"""


class Supervised:
    """A supervisor under test. Output goes to files, so that nothing can block on a pipe."""

    def __init__(self, folder: Path, command: list[str], *options: str, bootstrap: str | None = None) -> None:
        self.out, self.err = folder / "out", folder / "err"
        start = (
            ["-c", bootstrap] if bootstrap else ["-m", "sippbx.runtime.supervisor", "--name", "test", *options, "--"]
        )
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen([sys.executable, *start, *command], stdout=out, stderr=err)

    def lines(self, first_word: str) -> list[list[str]]:
        return [words for words in map(str.split, self.out.read_text().splitlines()) if words[0] == first_word]

    def events(self, event: str) -> list[dict[str, Any]]:
        logged = [json.loads(line) for line in self.err.read_text().splitlines() if line.startswith("{")]
        return [each for each in logged if each["event"] == event]

    def child(self, number: int) -> int:
        """The pid of the child with this number, from 0, once it runs."""
        eventually(lambda: len(self.lines("pid")) > number)
        return int(self.lines("pid")[number][1])

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


Start = Callable[..., Supervised]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a supervisor; the test's end kills what is left of it."""
    started: list[Supervised] = []

    def run(command: list[str], *options: str, bootstrap: str | None = None) -> Supervised:
        started.append(Supervised(tmp_path, command, *options, bootstrap=bootstrap))
        return started[-1]

    yield run
    for each in started:
        each.process.kill()
        each.process.wait(DEADLINE_S)


def child_command(exit_code: int = 0) -> list[str]:
    return [sys.executable, "-c", CHILD, str(exit_code)]


def test_child_that_was_killed_is_replaced_at_once(start: Start) -> None:
    supervised = start(child_command())
    first = supervised.child(0)
    killed_at = time.monotonic()
    os.kill(first, signal.SIGKILL)
    eventually(lambda: len(supervised.events("supervisor.child_started")) == 2)
    assert time.monotonic() - killed_at < 0.5
    assert supervised.child(1) != first
    assert supervised.events("supervisor.child_died")[0]["exit_code"] == 137


def test_supervisor_gives_up_after_its_cap_and_says_so(start: Start) -> None:
    supervised = start(["false"], "--max-restarts", "3", "--window", "60")
    assert supervised.wait() == 70
    assert len(supervised.events("supervisor.child_started")) == 4
    last = json.loads(supervised.err.read_text().splitlines()[-1])
    assert (last["event"], last["level"], last["plane"]) == ("supervisor.gave_up", "error", "test")


@pytest.mark.parametrize("code", [0, 2])
def test_child_that_finished_or_refused_its_configuration_is_not_restarted(start: Start, code: int) -> None:
    supervised = start(["sh", "-c", f"exit {code}"])
    assert supervised.wait() == code
    assert len(supervised.events("supervisor.child_started")) == 1


def test_command_that_does_not_exist_is_named(start: Start) -> None:
    supervised = start(["/nonexistent/plane"])
    assert supervised.wait() == 127
    assert supervised.events("supervisor.command_failed")[0]["command"] == "/nonexistent/plane"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_is_forwarded_once_and_the_childs_exit_code_returned(start: Start, stop: signal.Signals) -> None:
    supervised = start(child_command(exit_code=5))
    supervised.child(0)
    supervised.process.send_signal(stop)
    assert supervised.wait() == 5
    assert supervised.lines("signal") == [["signal", stop.name]]
    assert len(supervised.events("supervisor.child_started")) == 1


def test_child_that_ends_with_a_final_code_is_not_restarted(start: Start) -> None:
    supervised = start(["sh", "-c", "echo pid $$; exit 4"], "--final", "4")
    assert supervised.wait() == 4
    assert len(supervised.lines("pid")) == 1


def test_hangup_is_forwarded_and_stops_nothing(start: Start) -> None:
    supervised = start(child_command())
    child = supervised.child(0)
    supervised.process.send_signal(signal.SIGHUP)
    eventually(lambda: supervised.lines("signal") == [["signal", "SIGHUP"]])
    assert supervised.process.poll() is None
    assert psutil.pid_exists(child)


def test_second_stop_signal_is_forwarded_and_the_third_kills_a_child_that_does_not_stop(start: Start) -> None:
    supervised = start(["sh", "-c", "trap '' TERM; echo pid $$; while :; do sleep 0.05; done"])
    supervised.child(0)
    supervised.process.send_signal(signal.SIGTERM)
    eventually(lambda: len(supervised.events("supervisor.signal_forwarded")) == 1)
    supervised.process.send_signal(signal.SIGTERM)
    eventually(lambda: len(supervised.events("supervisor.signal_forwarded")) == 2)
    assert supervised.process.poll() is None
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.wait() == 137


def test_child_does_not_outlive_a_killed_supervisor(start: Start) -> None:
    supervised = start(child_command())
    child = supervised.child(0)
    supervised.process.kill()
    supervised.wait()
    eventually(lambda: not psutil.pid_exists(child))


def test_what_a_dead_child_leaves_behind_is_killed_and_reaped(start: Start) -> None:
    supervised = start(["sh", "-c", "sleep 600 & echo left $!; echo pid $$; wait"])
    child = supervised.child(0)
    left = int(supervised.lines("left")[0][1])
    os.kill(child, signal.SIGKILL)
    eventually(lambda: not psutil.pid_exists(left))
    supervised.child(1)


def test_orphans_are_reaped_while_the_child_runs(start: Start) -> None:
    supervised = start(["sh", "-c", "(sleep 0.2 & echo orphan $!); echo pid $$; exec sleep 600"])
    supervised.child(0)
    orphan = int(supervised.lines("orphan")[0][1])
    eventually(lambda: not psutil.pid_exists(orphan))
    assert supervised.process.poll() is None


def test_supervisor_is_small(start: Start) -> None:
    supervised = start(child_command())
    supervised.child(0)
    assert psutil.Process(supervised.process.pid).memory_full_info().uss < 16 * 1024 * 1024


EXEC = """
import sys
from sippbx.runtime.sockets import UdpListener, bind_udp, exec_supervised
listeners = ["udp://127.0.0.1:24101", "udp://[::1]:24102"]
named = [(f"sip-{n}", bind_udp(UdpListener.parse(text))) for n, text in enumerate(listeners)]
exec_supervised("test", list(reversed(named)), sys.argv[1:])
"""


def test_datagrams_sent_while_there_is_no_child_reach_the_next_one(start: Start) -> None:
    # The child stops itself at start until it is told to go on: so the test decides how long there is nobody to read.
    gate = "import os, signal; print('gate', os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGSTOP)\n"
    supervised = start([sys.executable, "-c", gate + CHILD, "0"], bootstrap=EXEC)
    eventually(lambda: len(supervised.lines("gate")) == 1)
    first = int(supervised.lines("gate")[0][1])
    os.kill(first, signal.SIGKILL)
    eventually(lambda: len(supervised.lines("gate")) == 2)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as peer:
        peer.connect(("::1", 24102))
        peer.send(b"INVITE-1")
        peer.send(b"INVITE-2")
    second = int(supervised.lines("gate")[1][1])
    eventually(lambda: psutil.Process(second).status() == psutil.STATUS_STOPPED)
    os.kill(second, signal.SIGCONT)
    eventually(lambda: supervised.lines("sip-1") == [["sip-1", "INVITE-1"], ["sip-1", "INVITE-2"]])


EXEC_TCP = """
import sys
from sippbx.runtime.sockets import TcpListener, bind_tcp, exec_supervised
exec_supervised("test", [("sip-tcp", bind_tcp(TcpListener("127.0.0.1", 24107)))], sys.argv[1:])
"""
ACCEPTING_CHILD = """
import os, signal
from sippbx.runtime.sockets import receive
print("gate", os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
(listening,) = receive().values()
listening.setblocking(True)
connection, _ = listening.accept()
print("got", connection.recv(100).decode(), flush=True)
signal.pause()
"""


def test_connections_made_while_there_is_no_child_are_accepted_by_the_next_one(start: Start) -> None:
    supervised = start([sys.executable, "-c", ACCEPTING_CHILD], bootstrap=EXEC_TCP)
    eventually(lambda: len(supervised.lines("gate")) == 1)
    os.kill(int(supervised.lines("gate")[0][1]), signal.SIGKILL)
    eventually(lambda: len(supervised.lines("gate")) == 2)
    with socket.create_connection(("127.0.0.1", 24107), DEADLINE_S) as peer:
        peer.send(b"INVITE-1")
        second = int(supervised.lines("gate")[1][1])
        eventually(lambda: psutil.Process(second).status() == psutil.STATUS_STOPPED)
        os.kill(second, signal.SIGCONT)
        eventually(lambda: supervised.lines("got") == [["got", "INVITE-1"]])


def test_tcp_port_that_is_taken_is_named_and_one_with_lingering_connections_is_free() -> None:
    listener = TcpListener("127.0.0.1", 24108)
    with bind_tcp(listener) as listening:
        with pytest.raises(SocketError, match=r"tcp://127\.0\.0\.1:24108: another process has it"):
            bind_tcp(listener)
        with socket.create_connection((listener.host, listener.port), DEADLINE_S):
            listening.setblocking(True)
            accepted, _ = listening.accept()
            accepted.close()  # first to close: it lingers
    bind_tcp(listener).close()


def test_socket_that_neither_takes_datagrams_nor_connections_is_refused() -> None:
    program = (
        "import os, socket; from sippbx.runtime.sockets import *\n"
        "idle = socket.socket()\n"
        "place([('sip', idle)], os.environ)\n"
        "idle.detach()\n"
        "try: receive()\n"
        "except SocketError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "descriptor 3, named 'sip', is neither UDP nor a TCP socket that listens" in output


def test_port_that_is_taken_is_named() -> None:
    listener = UdpListener("127.0.0.1", 24103)
    with bind_udp(listener), pytest.raises(SocketError, match=r"udp://127\.0\.0\.1:24103: another process has it"):
        bind_udp(listener)


def test_address_of_another_machine_is_named() -> None:
    with pytest.raises(SocketError, match=r"udp://192\.0\.2\.1:24104: it is not an address of this machine"):
        bind_udp(UdpListener("192.0.2.1", 24104))


def test_ipv6_listener_leaves_the_ipv4_port_free() -> None:
    with bind_udp(UdpListener("::", 24105)), bind_udp(UdpListener("0.0.0.0", 24105)):
        pass


def test_descriptor_that_is_not_a_socket_is_refused(tmp_path: Path) -> None:
    program = (
        "import os, sys; from sippbx.runtime.sockets import *\n"
        f"os.dup2(os.open({str(tmp_path / 'file')!r}, os.O_RDWR | os.O_CREAT), 3)\n"
        "try: receive({'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1', 'LISTEN_FDNAMES': 'sip'})\n"
        "except SocketError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "descriptor 3, named 'sip', is not a socket" in output


def test_received_sockets_do_not_reach_children() -> None:
    program = (
        "import os; from sippbx.runtime.sockets import *\n"
        "bound = bind_udp(UdpListener('127.0.0.1', 24106))\n"
        "place([('sip', bound)], os.environ)\n"
        "bound.detach()\n"
        "taken = receive()['sip']\n"
        "print(taken.getsockname(), taken.get_inheritable(), [each for each in os.environ if 'LISTEN' in each])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "('127.0.0.1', 24106) False []\n"


def test_process_without_inherited_sockets_receives_none() -> None:
    assert receive() == {}
