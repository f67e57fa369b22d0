"""The supervised pair as a test starts it: both planes from a configuration of its own, on ports of its own.

Nothing in here is asynchronous, so that one pair can serve tests with event loops of their own.
"""

import atexit
import copy
import itertools
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sippbx.pair import PairDescription

_CLAIM_PORT = 25059


def _claim_network() -> tuple[str, socket.socket]:
    """A network of loopback addresses that no other test run here uses, held as long as the socket is open."""
    for number in range(1, 255):
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind((f"127.0.{number}.1", _CLAIM_PORT))
        except OSError:
            claim.close()
        else:
            return f"127.0.{number}", claim
    raise OSError("all loopback networks are in use")


NETWORK, _CLAIM = _claim_network()
atexit.register(_CLAIM.close)
HOST = f"{NETWORK}.11"
"""The PBX's address; phones and trunks have others, so that a leaked address shows."""
TRUNK_HOST = f"{NETWORK}.50"
TRUNK_PORT = 25950
USERS = {"1001": "secret-1001", "1002": "secret-1002", "1003": "secret-1003"}
API_KEY = "test-key-0123456789abcdef"
START_S = 20.0
STOP_S = 15.0
_NUMBERS = itertools.cycle(range(16))
_PLANES = ("dataplane", "control")

Metrics = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


class PairError(Exception):
    """The pair did not do what a test asked of it; the logs are in the message."""


class Pair:
    """Two supervisors and their planes. `control` and `dataplane` are merged into the default settings, by section."""

    def __init__(
        self, folder: Path, *, control: Mapping[str, Any] | None = None, dataplane: Mapping[str, Any] | None = None
    ) -> None:
        number = next(_NUMBERS)
        self.folder = folder
        self.sip = (HOST, 25060 + number)
        self.metrics_ports = {"control": 25000 + 2 * number, "dataplane": 25001 + 2 * number}
        self.http_port, self.grpc_port = 25100 + 2 * number, 25101 + 2 * number
        self.http_url = f"http://{HOST}:{self.http_port}"
        self.grpc_target = f"{HOST}:{self.grpc_port}"
        self.api_key = API_KEY
        self.rtp_range = (12000 + 120 * number, 12000 + 120 * number + 119)
        self.cdr_path = folder / "cdr.jsonl"
        self.store_path = folder / "sippbx.sqlite"
        self.settings = {
            "control": _merged(self._control_settings(), control or {}),
            "dataplane": _merged(self._dataplane_settings(), dataplane or {}),
        }
        self.supervisors: dict[str, subprocess.Popen[bytes]] = {}
        self._seen: set[int] = set()

    def __enter__(self) -> Self:
        """Start both planes and wait until they are ready.

        Raises:
            PairError: one is not, in time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for plane in _PLANES:
                self.start(plane)
            for plane in _PLANES:
                self.wait_until_ready(plane)
        except PairError:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop both planes.

        Raises:
            PairError: one did not stop by itself, or left a process behind.
        """
        self.stop()

    def start(self, plane: str) -> None:
        """Start the supervisor of a plane."""
        config = self.folder / f"{plane}.yaml"
        config.write_text(yaml.safe_dump(self.settings[plane]))
        with (self.folder / f"{plane}.log").open("ab") as log:
            command = [sys.executable, "-m", plane, "--supervise", "--config", str(config)]
            self.supervisors[plane] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_until_ready(self, plane: str) -> None:
        """Wait until /readyz says yes.

        Raises:
            PairError: it did not, in time.
        """
        self.wait(lambda: self.is_ready(plane), START_S, f"{plane} is ready")
        self._seen.update(self.pids())

    def is_ready(self, plane: str) -> bool:
        """Whether /readyz of a plane answers 200 now.

        Raises:
            PairError: its supervisor has ended.
        """
        if self.supervisors[plane].poll() is not None:
            raise PairError(f"{plane} ended with {self.supervisors[plane].returncode}\n{self.logs()}")
        try:
            return bool(self._get(plane, "/readyz"))
        except OSError:
            return False

    def metrics(self, plane: str) -> Metrics:
        """The samples of a plane's /metrics, by name and sorted labels."""
        families = text_string_to_metric_families(self._get(plane, "/metrics"))
        samples = (sample for family in families for sample in family.samples)
        return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}

    def metric(self, plane: str, name: str, **labels: str) -> float:
        """The sum of the samples of a name that have these labels; 0 where there are none."""
        wanted = set(labels.items())
        samples = self.metrics(plane).items()
        return sum(value for (found, has), value in samples if found == name and wanted <= set(has))

    def pids(self, plane: str = "") -> list[int]:
        """The processes of a plane, or of both, the supervisor first."""
        found: list[int] = []
        for name, supervisor in self.supervisors.items():
            if supervisor.poll() is None and plane in {"", name}:
                children = psutil.Process(supervisor.pid).children(recursive=True)
                found += [supervisor.pid, *(child.pid for child in children)]
        return found

    def kill(self, plane: str) -> None:
        """Kill a plane with its supervisor, so that nothing comes back."""
        pids = self.pids(plane)
        self._seen.update(pids)
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        self.supervisors.pop(plane).wait(STOP_S)

    def freeze(self, plane: str) -> None:
        """Stop all processes of a plane where they stand: sockets stay open, nobody answers."""
        for pid in self.pids(plane):
            _signal(pid, signal.SIGSTOP)

    def thaw(self, plane: str) -> None:
        """Let the processes of a plane go on, the supervisor last."""
        for pid in reversed(self.pids(plane)):
            _signal(pid, signal.SIGCONT)

    def cdrs(self) -> list[dict[str, Any]]:
        """The call detail records written so far, the oldest first."""
        lines = self.cdr_path.read_text().splitlines(keepends=True) if self.cdr_path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait(self, condition: Callable[[], bool], deadline_s: float, what: str) -> None:
        """Wait, blocking, for something that takes its time.

        Raises:
            PairError: it did not happen in time.
        """
        end = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > end:
                raise PairError(f"not within {deadline_s} s: {what}\n{self.logs()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop both planes, the control plane first.

        Raises:
            PairError: one did not stop by itself, or left a process behind.
        """
        self._seen.update(self.pids())
        stubborn = []
        for plane in reversed(_PLANES):
            supervisor = self.supervisors.pop(plane, None)
            if supervisor is not None and supervisor.poll() is None:
                supervisor.terminate()
                try:
                    supervisor.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    stubborn.append(plane)
        left = [pid for pid in self._seen if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        for pid in left:
            _signal(pid, signal.SIGKILL)
        if stubborn or left:
            raise PairError(f"not stopped within {STOP_S} s: {stubborn}; left behind: {left}\n{self.logs()}")

    def description(self, passwords: Mapping[str, str] = USERS) -> PairDescription:
        """What `sippbx` would know of this pair; `write` puts it where `--data` finds it."""
        return PairDescription(
            address=HOST,
            sip_port=self.sip[1],
            metrics_port=self.metrics_ports["control"],
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            rtp_range=self.rtp_range,
            folder=self.folder,
            passwords=dict(passwords),
            api_key=self.api_key,
        )

    def logs(self, lines: int = 60) -> str:
        """The last lines of both logs, for a failing test."""
        paths = [self.folder / f"{plane}.log" for plane in _PLANES]
        tails = [path.read_text(errors="replace").splitlines()[-lines:] for path in paths if path.exists()]
        return "\n".join(f"=== {path.name}\n" + "\n".join(tail) for path, tail in zip(paths, tails, strict=False))

    def _get(self, plane: str, path: str) -> str:
        """The body of a page of a plane; "" where its status says no."""
        url = f"http://{HOST}:{self.metrics_ports[plane]}{path}"
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return str(answer.read().decode()) or "ok"
        except urllib.error.HTTPError as error:
            error.close()
            return ""

    def _control_settings(self) -> dict[str, Any]:
        return {
            "node_name": "test",
            "sip": {
                "listeners": [
                    {"name": "udp", "bind": HOST, "port": self.sip[1]},
                    {"name": "tcp", "transport": "tcp", "bind": HOST, "port": self.sip[1]},
                ],
                "ring_timeout_s": 30,
                "timers": {"t1_s": 0.1, "t2_s": 0.4, "t4_s": 0.5},
            },
            "users": [{"name": name, "password": password} for name, password in USERS.items()],
            "trunks": [{"name": "carrier", "destination": f"{TRUNK_HOST}:{TRUNK_PORT}"}],
            "routes": [
                {"prefix": "9", "trunk": "carrier", "strip": 1},
                {"prefix": "+8225550100", "user": "1002", "from": ["carrier"]},
            ],
            "media": {
                "target": f"unix://{self.folder}/media.sock",
                "addresses": [{"bind": HOST}],
                "lost_timeout_s": 1,
                "command_timeout_s": 1,
            },
            "store": {"path": str(self.store_path), "reserve_bytes": 1_048_576},
            "cdr": {"jsonl_path": str(self.cdr_path)},
            "api": {
                "keys": [{"name": "test", "key": self.api_key}],
                "http": {"bind": HOST, "port": self.http_port},
                "grpc": {"bind": HOST, "port": self.grpc_port},
            },
            "metrics": {"bind": HOST, "port": self.metrics_ports["control"]},
            "drain": {"timeout_s": 5},
        }

    def _dataplane_settings(self) -> dict[str, Any]:
        return {
            "grpc": {"listen": f"unix://{self.folder}/media.sock"},
            "media": {"port_range": list(self.rtp_range), "rest_s": 1},
            "lease": {"owner_grace_s": 5, "drain_timeout_s": 5},
            "metrics": {"bind": HOST, "port": self.metrics_ports["dataplane"]},
        }


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return merged


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        psutil.Process(pid).send_signal(number)
    except psutil.NoSuchProcess:
        return
