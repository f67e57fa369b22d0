"""`sippbx run` over stand-ins for the planes: ports, order of stopping, failures. The real pair is in tests/e2e."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

DEADLINE_S = 20.0
SIP_PORT, METRICS_PORT, HTTP_PORT, GRPC_PORT = 24160, 24190, 24192, 24193

# Ready at once; notes when it was stopped. "python -m control" finds it first in the working folder.
PLANE = """
import http.server, pathlib, signal, sys, time, yaml
settings = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
name = pathlib.Path(__file__).parent.name
def stop(*_):
    time.sleep(0.2)
    with open("stopped", "a") as file:
        print(name, file=file)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.ThreadingHTTPServer((settings["metrics"]["bind"], settings["metrics"]["port"]), Ready).serve_forever()
"""

Run = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Starts `sippbx run` in a folder with planes of these programs; output goes to the file "output"."""
    started: list[subprocess.Popen[bytes]] = []

    def start(control: str = PLANE, dataplane: str = PLANE) -> "subprocess.Popen[bytes]":
        for name, program in (("control", control), ("dataplane", dataplane)):
            package = tmp_path / name
            package.mkdir()
            (package / "__init__.py").touch()
            (package / "__main__.py").write_text(program)
        command = [sys.executable, "-m", "sippbx", "run", "--address", "127.0.0.1", "--data", "data"]
        ports = ["--sip-port", str(SIP_PORT), "--metrics-port", str(METRICS_PORT)]
        ports += ["--http-port", str(HTTP_PORT), "--grpc-port", str(GRPC_PORT)]
        with (tmp_path / "output").open("wb") as output:
            started.append(subprocess.Popen([*command, *ports], cwd=tmp_path, stdout=output, stderr=output))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(DEADLINE_S)
    # The planes of a killed run end by themselves a moment later; the next test needs their ports.
    deadline = time.monotonic() + DEADLINE_S
    while started and any(is_served(port) for port in (METRICS_PORT, METRICS_PORT + 1)):
        assert time.monotonic() < deadline, "a plane outlived its run"
        time.sleep(0.02)


def is_served(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def output_of(folder: Path) -> str:
    return (folder / "output").read_text()


def until_output_has(folder: Path, text: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while text not in output_of(folder):
        assert time.monotonic() < deadline, output_of(folder)
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_the_control_plane_first_and_then_the_data_plane(
    run: Run, tmp_path: Path, number: signal.Signals
) -> None:
    process = run()
    until_output_has(tmp_path, "is ready")
    assert (tmp_path / "data" / "pair.json").exists()
    process.send_signal(number)
    assert process.wait(DEADLINE_S) == 0
    assert (tmp_path / "stopped").read_text().split() == ["control", "dataplane"]
    assert not (tmp_path / "data" / "pair.json").exists()


def test_it_tells_what_to_dial_and_where_metrics_and_records_are(run: Run, tmp_path: Path) -> None:
    run()
    until_output_has(tmp_path, "Ctrl-C")
    output = output_of(tmp_path)
    for text in (
        f"sip:1001@127.0.0.1:{SIP_PORT}",
        "password ",
        f":{METRICS_PORT}/metrics",
        f":{METRICS_PORT + 1}/metrics",
        f"http://127.0.0.1:{HTTP_PORT}/v1/calls",
        f"{tmp_path}/data/api-key",
        f"127.0.0.1:{GRPC_PORT}",
    ):
        assert text in output
    assert f"{tmp_path}/data/cdr.jsonl" in output


def test_taken_sip_port_is_named_with_what_to_do(run: Run, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", SIP_PORT))
        assert run().wait(DEADLINE_S) == 3
    output = output_of(tmp_path)
    assert f"udp://127.0.0.1:{SIP_PORT}" in output
    assert "--sip-port" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("port", "option"),
    [(METRICS_PORT + 1, "--metrics-port"), (HTTP_PORT, "--http-port"), (GRPC_PORT, "--grpc-port")],
)
def test_taken_tcp_port_is_named_with_what_to_do(run: Run, tmp_path: Path, port: int, option: str) -> None:
    with socket.create_server(("127.0.0.1", port)):
        assert run().wait(DEADLINE_S) == 3
    assert f"TCP port {port}" in output_of(tmp_path)
    assert option in output_of(tmp_path)


def test_plane_that_cannot_start_is_quoted_and_the_other_stopped(run: Run, tmp_path: Path) -> None:
    process = run(control="print('no such realm'); raise SystemExit(2)")
    assert process.wait(DEADLINE_S) == 1
    assert "control ended" in output_of(tmp_path)
    assert "no such realm" in output_of(tmp_path)
    assert "dataplane" in (tmp_path / "stopped").read_text()


def test_plane_that_ends_later_ends_the_pair(run: Run, tmp_path: Path) -> None:
    dies = PLANE + "\n"
    dies = dies.replace(
        "class Ready", "import os, threading\nthreading.Timer(2.0, os._exit, [70]).start()\nclass Ready"
    )
    process = run(dataplane=dies)
    until_output_has(tmp_path, "is ready")
    assert process.wait(DEADLINE_S) == 1
    assert "dataplane ended" in output_of(tmp_path)
    assert (tmp_path / "stopped").read_text().split() == ["control"]


def test_wrong_port_range_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sippbx", "run", "--rtp-range", "20000-10000"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--rtp-range" in refused.stderr
    assert not list(tmp_path.iterdir())
