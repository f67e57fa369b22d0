"""Both planes on one machine: their configuration in a folder, their processes, and whether they are ready.

Each plane runs as `python -m PLANE --supervise --config FILE`, with its log beside its configuration.
"""

import asyncio
import contextlib
import ctypes
import json
import re
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml

from sippbx.runtime.sockets import SocketError, UdpListener, bind_udp

USERS = ("1001", "1002")
REALM = "sippbx"
READY_TIMEOUT_S = 30.0
# Enough for the few calls of two phones, in a folder that nobody expects to be large.
RESERVE_BYTES = 4 * 1024 * 1024
DRAIN_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = DRAIN_TIMEOUT_S + 10.0
PROBE_TIMEOUT_S = 2.0
PROBE_INTERVAL_S = 0.1

_PR_SET_PDEATHSIG = 1
_MAX_SOCKET_PATH_BYTES = 107
_PASSWORD_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"  # noqa: S105 -- what passwords are made of, without look-alikes


class PairError(Exception):
    """The pair cannot run; the text says why and what to do."""


class PortTakenError(PairError):
    """A port that the pair needs cannot be bound."""


def own_address() -> str:
    """The address that this machine would send from, without sending anything; 127.0.0.1 where it has no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


@dataclass(frozen=True, slots=True)
class PairDescription:
    """What others need to know of a pair: kept as pair.json in its folder while it runs.

    `passwords` are by user; the data plane's metrics are on the port above `metrics_port`; `api_key` opens both APIs.
    """

    address: str
    sip_port: int
    metrics_port: int
    http_port: int
    grpc_port: int
    rtp_range: tuple[int, int]
    folder: Path
    passwords: dict[str, str]
    api_key: str

    @property
    def control_url(self) -> str:
        """Where the control plane's probes and metrics are."""
        return self._url(self.metrics_port)

    @property
    def dataplane_url(self) -> str:
        """Where the data plane's probes and metrics are."""
        return self._url(self.metrics_port + 1)

    @property
    def http_url(self) -> str:
        """Where the HTTP API is."""
        return f"http://{_in_uri(self.api_address)}:{self.http_port}"

    @property
    def grpc_target(self) -> str:
        """Where the gRPC API is, host:port."""
        return f"{_in_uri(self.api_address)}:{self.grpc_port}"

    @property
    def api_address(self) -> str:
        """Where both APIs are bound: on loopback, as keys would travel in the clear."""
        if ip_address(self.address).is_loopback:
            return self.address
        return "::1" if ":" in self.address else "127.0.0.1"

    @property
    def sip_host(self) -> str:
        """Host and port as a SIP URI has them."""
        host = _in_uri(self.address)
        return f"{host}:{self.sip_port}" if self.sip_port != 5060 else host

    def _url(self, port: int) -> str:
        return f"http://{_in_uri(self.address)}:{port}"

    def control_settings(self) -> dict[str, Any]:
        """The control plane's configuration (deploy/config/control.yaml explains it)."""
        return {
            "node_name": "local",
            "realm": REALM,
            "sip": {"listeners": [{"name": "udp", "bind": self.address, "port": self.sip_port}]},
            "users": [{"name": user, "password": password} for user, password in self.passwords.items()],
            "media": {"target": f"unix://{self.folder}/media.sock", "addresses": [{"bind": self.address}]},
            "store": {"path": str(self.folder / "sippbx.sqlite"), "reserve_bytes": RESERVE_BYTES},
            "cdr": {"jsonl_path": str(self.folder / "cdr.jsonl")},
            "api": {
                "keys": [{"name": "local", "key": self.api_key}],
                "http": {"bind": self.api_address, "port": self.http_port},
                "grpc": {"bind": self.api_address, "port": self.grpc_port},
            },
            "metrics": {"bind": self.address, "port": self.metrics_port},
            "drain": {"timeout_s": DRAIN_TIMEOUT_S},
        }

    def dataplane_settings(self) -> dict[str, Any]:
        """The data plane's configuration (deploy/config/dataplane.yaml explains it)."""
        first, last = self.rtp_range
        return {
            "grpc": {"listen": f"unix://{self.folder}/media.sock"},
            "media": {"port_range": [first, last]},
            "metrics": {"bind": self.address, "port": self.metrics_port + 1},
        }

    def write(self) -> None:
        """Writes both configurations and pair.json; they hold passwords, so nobody else may read them.

        Raises:
            PairError: when the folder cannot be written.
        """
        for name, content in (
            ("control.yaml", yaml.safe_dump(self.control_settings(), sort_keys=False)),
            ("dataplane.yaml", yaml.safe_dump(self.dataplane_settings(), sort_keys=False)),
            ("pair.json", json.dumps({**asdict(self), "folder": str(self.folder)}, indent=2)),
        ):
            _write_private(self.folder / name, content)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The description of the pair that runs from `folder`; None when there is none."""
        try:
            values = json.loads((folder / "pair.json").read_text())
            first, last = values.pop("rtp_range")
            return cls(**{**values, "folder": Path(values["folder"]), "rtp_range": (first, last)})
        except (OSError, ValueError, TypeError, KeyError):
            return None


def _in_uri(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _write_private(path: Path, content: str) -> None:
    try:
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text(content)
    except OSError as error:
        raise PairError(f"cannot write {path}: {error.strerror}; choose another folder with --data") from error


def passwords_in(folder: Path) -> dict[str, str]:
    """The users' passwords: made at the first run and kept in passwords.json, so that phones need no change after it.

    Raises:
        PairError: when the folder cannot be used or the file does not fit.
    """
    path = folder / "passwords.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise PairError(f"cannot use {path}: {error}; remove it or choose another folder with --data") from error
    if kept is None:
        kept = {user: "".join(secrets.choice(_PASSWORD_ALPHABET) for _ in range(10)) for user in USERS}
        _write_private(path, json.dumps(kept, indent=2))
    if not isinstance(kept, dict) or set(kept) != set(USERS):
        raise PairError(f"{path} does not hold the passwords of {' and '.join(USERS)}; remove it")
    return {str(user): str(password) for user, password in kept.items()}


def api_key_in(folder: Path) -> str:
    """The key of the APIs: made at the first run and kept in api-key, so that programs need no change after it.

    Raises:
        PairError: when the folder cannot be used or the file does not fit.
    """
    path = folder / "api-key"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = path.read_text().strip() if path.exists() else None
    except (OSError, ValueError) as error:
        raise PairError(f"cannot use {path}: {error}; remove it or choose another folder with --data") from error
    if kept is None:
        kept = secrets.token_hex(24)
        _write_private(path, f"{kept}\n")
    if not re.fullmatch(r"[!-~]{16,}", kept):
        raise PairError(f"{path} does not hold a key of 16 or more characters without spaces; remove it")
    return kept


def describe(
    address: str,
    *,
    sip_port: int,
    metrics_port: int,
    http_port: int,
    grpc_port: int,
    rtp_range: tuple[int, int],
    folder: Path,
) -> PairDescription:
    """A pair on these addresses, with its passwords and its API key.

    Raises:
        PairError: when the folder cannot be used.
    """
    folder = folder.absolute()
    if len(str(folder / "media.sock").encode()) > _MAX_SOCKET_PATH_BYTES:
        raise PairError(f"{folder} is too long a path for a Unix socket in it; choose a shorter folder with --data")
    return PairDescription(
        address=address,
        sip_port=sip_port,
        metrics_port=metrics_port,
        http_port=http_port,
        grpc_port=grpc_port,
        rtp_range=rtp_range,
        folder=folder,
        passwords=passwords_in(folder),
        api_key=api_key_in(folder),
    )


def check_ports(pair: PairDescription) -> None:
    """Tries the ports that the pair will bind, media ports aside.

    Raises:
        PortTakenError: for the first that cannot be bound.
    """
    try:
        bind_udp(UdpListener(pair.address, pair.sip_port)).close()
    except SocketError as error:
        raise PortTakenError(f"{error}. Stop it, or choose another port: --sip-port") from error
    family = socket.AF_INET6 if ":" in pair.address else socket.AF_INET
    for what, address, port, option in (
        ("metrics", pair.address, pair.metrics_port, "--metrics-port"),
        ("metrics", pair.address, pair.metrics_port + 1, "--metrics-port"),
        ("the HTTP API", pair.api_address, pair.http_port, "--http-port"),
        ("the gRPC API", pair.api_address, pair.grpc_port, "--grpc-port"),
    ):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                message = f"cannot serve {what} on {address} TCP port {port}: {error.strerror}"
                raise PortTakenError(f"{message}. Stop who has it (`ss -ltnp`), or choose another: {option}") from error


class Plane:
    """One supervised plane as a child process."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._config = folder / f"{name}.yaml"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts its supervisor, in a session of its own, so that a terminal's Ctrl-C does not reach it."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self.name, "--supervise", "--config", str(self._config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def ended(self) -> int:
        """Waits until it ends; its exit code."""
        return await self._process.wait() if self._process else 0

    async def stop(self) -> None:
        """Asks it to stop, insists after a while, and waits. Cancelling that insists at once."""
        if not self.running or self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except (TimeoutError, asyncio.CancelledError):
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def last_words(self, lines: int = 12) -> str:
        """The end of its log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


def _end_with_parent() -> None:
    # Survives exec, so it reaches the supervisor, which passes the signal on.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Pair:
    """Both planes, started and stopped together."""

    def __init__(self, description: PairDescription) -> None:
        self.description = description
        self.control = Plane("control", description.folder)
        self.dataplane = Plane("dataplane", description.folder)

    def _planes(self) -> Iterator[tuple[Plane, str]]:
        yield self.dataplane, self.description.dataplane_url
        yield self.control, self.description.control_url

    async def start(self) -> None:
        """Writes the configuration, starts both and waits until both are ready; on failure neither is left running.

        Raises:
            PairError: when one ends or is not ready in time; the text has the end of its log.
            PortTakenError: when a port cannot be bound.
        """
        check_ports(self.description)
        self.description.write()
        try:
            for plane, _ in self._planes():
                await plane.start()
            for plane, url in self._planes():
                await self._until_ready(plane, url)
        except BaseException:
            await self.stop()
            raise

    async def _until_ready(self, plane: Plane, url: str) -> None:
        reason = "it does not answer"
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while plane.running:
                    ready, reason = await readiness(url)
                    if ready:
                        return
                    await asyncio.sleep(PROBE_INTERVAL_S)
        except TimeoutError:
            raise PairError(
                f"{plane.name} is not ready after {READY_TIMEOUT_S:.0f} s: {reason}. See {plane.log}"
            ) from None
        raise PairError(f"{plane.name} ended. The end of {plane.log}:\n{plane.last_words()}")

    async def ended(self) -> Plane:
        """Waits until one of the planes ends; which."""
        waits = {asyncio.create_task(plane.ended()): plane for plane, _ in self._planes()}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return waits[done.pop()]

    async def stop(self) -> None:
        """Stops the control plane, which ends its calls, and then the data plane."""
        try:
            await self.control.stop()
        finally:
            await self.dataplane.stop()
            (self.description.folder / "pair.json").unlink(missing_ok=True)


async def readiness(url: str) -> tuple[bool, str]:
    """Whether the plane with its probes at `url` is ready, and if not, why."""
    try:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as client, client.get(f"{url}/readyz") as response:
            return response.status == 200, (await response.text()).strip().replace("\n", ", ")
    except (aiohttp.ClientError, TimeoutError) as error:
        return False, f"it does not answer ({type(error).__name__})"
