"""The gRPC API: a server of sippbx.control.v1 and of the health service, over TLS where there is a certificate."""

import errno
import os
import socket
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from control.api.auth import ApiKeys
from control.api.errors import ApiBindError
from control.api.grpc_border import MAX_REQUESTS, Border
from control.api.grpc_services import CallServicer, CdrServicer, NodeServicer, RegistrationServicer
from control.api.http_connection import tls_context
from control.api.service import ControlService
from control.api.watch import HEARTBEAT_S, WRITE_TIMEOUT_S, EventServicer
from control.metrics import ControlMetrics
from control.settings.sections import ApiSettings, TlsSettings
from sippbx.control.v1 import (
    call_service_pb2_grpc,
    cdr_service_pb2_grpc,
    event_service_pb2_grpc,
    node_service_pb2_grpc,
    registration_service_pb2_grpc,
)

MAX_MESSAGE_BYTES = 1024 * 1024
SERVICES = tuple(
    f"sippbx.control.v1.{name}"
    for name in ("CallService", "CdrService", "EventService", "NodeService", "RegistrationService")
)

# A client that has gone without a word is found out in 40 s; clients may look for their server every 5 s.
_KEEPALIVE_TIME_S = 30
_KEEPALIVE_TIMEOUT_S = 10
_MIN_PING_INTERVAL_S = 5


class GrpcApi:
    """Serves the control service over gRPC; `heartbeat_s` and `write_timeout_s` are those of watchers."""

    def __init__(
        self,
        settings: ApiSettings,
        service: ControlService,
        keys: ApiKeys,
        metrics: ControlMetrics,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        write_timeout_s: float = WRITE_TIMEOUT_S,
    ) -> None:
        self._settings = settings
        self._service = service
        self._keys = keys
        self._metrics = metrics
        self._heartbeat_s = heartbeat_s
        self._write_timeout_s = write_timeout_s
        self._server: grpc.aio.Server | None = None
        self._events: EventServicer | None = None
        self._health = health.aio.HealthServicer()
        self._port = 0

    @property
    def port(self) -> int:
        """The bound port, which differs from the wanted one when that was 0; 0 while stopped."""
        return self._port

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            ApiBindError: the port cannot be bound, or the certificate not be used.
        """
        credentials = None if self._settings.tls is None else _credentials(self._settings.tls)
        max_watchers = self._settings.grpc.max_watchers
        server = grpc.aio.server(
            interceptors=[Border(self._keys, self._metrics)],
            options=[
                # Two servers on one port would share its clients.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_concurrent_streams", max_watchers + MAX_REQUESTS),
                ("grpc.keepalive_time_ms", _KEEPALIVE_TIME_S * 1000),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_S * 1000),
                ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_INTERVAL_S * 1000),
            ],
        )
        events = EventServicer(
            self._service,
            self._metrics,
            max_watchers=max_watchers,
            heartbeat_s=self._heartbeat_s,
            write_timeout_s=self._write_timeout_s,
        )
        call_service_pb2_grpc.add_CallServiceServicer_to_server(CallServicer(self._service), server)
        registration_service_pb2_grpc.add_RegistrationServiceServicer_to_server(
            RegistrationServicer(self._service), server
        )
        cdr_service_pb2_grpc.add_CdrServiceServicer_to_server(CdrServicer(self._service), server)
        node_service_pb2_grpc.add_NodeServiceServicer_to_server(NodeServicer(self._service), server)
        event_service_pb2_grpc.add_EventServiceServicer_to_server(events, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        host, port = self._settings.grpc.bind, self._settings.grpc.port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = (
                server.add_insecure_port(address)
                if credentials is None
                else server.add_secure_port(address, credentials)
            )
        except RuntimeError as error:
            reason = _why_not(host, port) or str(error)
            raise ApiBindError(f"cannot serve the gRPC API on {host} TCP port {port}: {reason}") from error
        await server.start()
        self._server, self._events, self._port = server, events, bound
        for name in ("", *SERVICES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float = 1.0) -> None:
        """End the streams, answer the requests under way for at most `grace_s`, and close."""
        server, self._server = self._server, None
        if server is None:
            return
        await self._health.enter_graceful_shutdown()
        if self._events is not None:
            self._events.stop()
        await server.stop(grace_s)
        self._port = 0


def _credentials(settings: TlsSettings) -> grpc.ServerCredentials:
    chain, key = (_read(settings.certificate_path), _read(settings.private_key_path))
    # gRPC would say no more than that it failed.
    tls_context(settings)
    return grpc.ssl_server_credentials([(key, chain)])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ApiBindError(f"cannot read {path} of api.tls: {error.strerror}") from error


def _why_not(host: str, port: int) -> str | None:
    """Why the address cannot be bound, which gRPC does not tell."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As gRPC does, so that connections of before, not quite gone yet, are no reason.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or os.strerror(error.errno or errno.EINVAL)
    return None
