"""Listening sockets, UDP and TCP: bound from a specification, handed to another program, received from a parent.

Hand-over follows the LISTEN_FDS convention of systemd's sd_listen_fds(3): descriptors from 3 on, LISTEN_PID names the
process they are meant for, LISTEN_FDNAMES their names. So a socket unit can take the supervisor's place. Standard
library only, because the supervisor imports it.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import ClassVar, NoReturn, Self

FIRST_FD = 3
NAME_PATTERN = re.compile(r"[!-9;-~]{1,255}")
RECEIVE_BUFFER_BYTES = 4 * 1024 * 1024
BACKLOG = 1024
"""How many connections wait for a process that is being restarted; the kernel may allow fewer (net.core.somaxconn)."""

_BIND_ADVICE = {
    errno.EADDRINUSE: "another process has it; `ss -ltunp` tells which",
    errno.EADDRNOTAVAIL: "it is not an address of this machine",
    errno.EACCES: "not permitted; ports below 1024 need CAP_NET_BIND_SERVICE",
}


class SocketError(Exception):
    """A socket could not be bound, handed over or received; the text says which and what to do."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where to listen: a numeric local address and a port."""

    scheme: ClassVar[str]

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "udp://127.0.0.1:5060" or "tcp://[::1]:5060", by what it is asked of.

        Raises:
            SocketError: when it is anything else.
        """
        match = re.fullmatch(cls.scheme + r"://(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", text)
        if match is None or not 0 < int(match[3]) < 65536:
            advice = f"write {cls.scheme}://ADDRESS:PORT, IPv6 addresses in brackets"
            raise SocketError(f"{text!r} is not a listener; {advice}")
        try:
            return cls(str(ip_address(match[1] or match[2])), int(match[3]))
        except ValueError as error:
            raise SocketError(f"{text!r} is not a listener: {error}") from error

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UdpListener(Listener):
    """Where to listen for datagrams."""

    scheme = "udp"


@dataclass(frozen=True, slots=True)
class TcpListener(Listener):
    """Where to listen for connections."""

    scheme = "tcp"


def bind_udp(listener: UdpListener, *, receive_buffer_bytes: int = RECEIVE_BUFFER_BYTES) -> socket.socket:
    """Binds a non-blocking UDP socket; an IPv6 one takes no IPv4 (RFC 3493 section 5.3).

    The kernel may grant a smaller receive buffer (net.core.rmem_max).

    Raises:
        SocketError: when the address cannot be bound; the text names it and says why.
    """
    with _binding(listener, socket.SOCK_DGRAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        bound.bind((listener.host, listener.port))
    return bound


def bind_tcp(listener: TcpListener, *, backlog: int = BACKLOG) -> socket.socket:
    """Binds a non-blocking TCP socket that listens already; an IPv6 one takes no IPv4 (RFC 3493 section 5.3).

    Connections of an earlier process that linger do not stand in its way (SO_REUSEADDR).

    Raises:
        SocketError: when the address cannot be bound; the text names it and says why.
    """
    with _binding(listener, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((listener.host, listener.port))
        bound.listen(backlog)
    return bound


@contextlib.contextmanager
def _binding(listener: Listener, kind: socket.SocketKind) -> Iterator[socket.socket]:
    """A new socket, closed again when it cannot be bound.

    Raises:
        SocketError: for any OSError.
    """
    family = socket.AF_INET6 if ":" in listener.host else socket.AF_INET
    try:
        bound = socket.socket(family, kind)
    except OSError as error:
        raise SocketError(f"cannot listen on {listener}: {error.strerror}") from error
    try:
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.setblocking(False)
        yield bound
    except OSError as error:
        bound.close()
        advice = _BIND_ADVICE.get(error.errno or 0, error.strerror)
        raise SocketError(f"cannot listen on {listener}: {advice}") from error


def place(named: Sequence[tuple[str, socket.socket]], environment: MutableMapping[str, str]) -> None:
    """Puts sockets on descriptors 3, 4, ... for a program that this process is about to become, and names them.

    Whatever those descriptors were before is closed, so nothing but `exec` should follow.

    Raises:
        SocketError: for a name that is used twice or that LISTEN_FDNAMES cannot carry.
    """
    names = [name for name, _ in named]
    for name in names:
        if not NAME_PATTERN.fullmatch(name) or names.count(name) > 1:
            raise SocketError(f"{name!r} cannot name a socket: 1 to 255 printable characters but ':', each name once")
    # Copies above the target range first: a source may sit on another's target.
    copies = [fcntl.fcntl(each.fileno(), fcntl.F_DUPFD_CLOEXEC, FIRST_FD + len(named)) for _, each in named]
    for target, copy in enumerate(copies, start=FIRST_FD):
        os.dup2(copy, target, inheritable=True)
        os.close(copy)
    environment["LISTEN_FDS"] = str(len(named))
    environment["LISTEN_FDNAMES"] = ":".join(names)
    environment["LISTEN_PID"] = str(os.getpid())


def inherited_names(environment: Mapping[str, str]) -> list[str]:
    """The names of the descriptors from 3 on that a parent meant for this process, in order; empty when there are none.

    Raises:
        SocketError: when the variables contradict each other.
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environment.get("LISTEN_FDS", "")
    names = environment.get("LISTEN_FDNAMES", "").split(":") if count not in {"", "0"} else []
    if not count.isdecimal() or len(names) != int(count):
        raise SocketError(f"LISTEN_FDS={count!r} does not fit LISTEN_FDNAMES={environment.get('LISTEN_FDNAMES')!r}")
    return names


def receive(environment: MutableMapping[str, str] = os.environ) -> dict[str, socket.socket]:
    """Takes the sockets that a parent handed to this process, by name; empty when there are none.

    The variables are removed in any case, and the descriptors will not reach children of this process.

    Raises:
        SocketError: when the variables contradict each other or a descriptor is neither a UDP nor a listening TCP
            socket.
    """
    received: dict[str, socket.socket] = {}
    for descriptor, name in enumerate(inherited_names(environment), start=FIRST_FD):
        try:
            taken = socket.socket(fileno=descriptor)
        except OSError as error:
            raise SocketError(f"descriptor {descriptor}, named {name!r}, is not a socket: {error.strerror}") from error
        if name in received:
            raise SocketError(f"descriptor {descriptor} is the second one named {name!r}")
        if taken.type != socket.SOCK_DGRAM and not taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise SocketError(f"descriptor {descriptor}, named {name!r}, is neither UDP nor a TCP socket that listens")
        taken.set_inheritable(False)
        taken.setblocking(False)
        received[name] = taken
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environment.pop(variable, None)
    return received


def exec_supervised(
    name: str,
    sockets: Sequence[tuple[str, socket.socket]],
    command: Sequence[str],
    *,
    options: Iterable[str] = (),
) -> NoReturn:
    """Becomes the supervisor of `command`, handing it `sockets` by name. Returns only by raising.

    `options` are further options of sippbx.runtime.supervisor.

    Raises:
        SocketError: as `place`.
        OSError: when the interpreter cannot be executed.
    """
    environment = dict(os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    place(sockets, environment)
    supervisor = [sys.executable, "-m", "sippbx.runtime.supervisor", "--name", name, *options, "--", *command]
    os.execve(sys.executable, supervisor, environment)  # noqa: S606 -- no shell is wanted
