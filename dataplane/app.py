"""The composition root of the data plane."""

import asyncio
import contextlib
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from dataplane.engine.engine import EngineUnavailableError
from dataplane.engine.userspace import UserspaceEngine
from dataplane.metrics import DataplaneMetrics, Tables
from dataplane.ports import PortPool
from dataplane.service.events import CloseReason, EventLog
from dataplane.service.node import MediaNode, Ownership, SessionView
from dataplane.service.servicer import SERVICE_NAME, MediaServicer
from dataplane.service.statistics import StatisticsFile
from dataplane.session.relay import DropReason, StreamSnapshot
from dataplane.session.spec import Leg
from dataplane.settings import Settings
from sippbx.runtime.lifecycle import Stop, count_tasks, sample_loop_lag
from sippbx.runtime.probes import ProbeError, ProbeServer

EXIT_CLEAN = 0
EXIT_CONFIGURATION = 2
EXIT_ADDRESS = 3
EXIT_ENGINE = 4

EVENTS_KEPT = 10_000
TICK_S = 1.0
DRAIN_TICK_S = 0.1
GRPC_STOP_S = 1.0
# Both planes of a pod are signalled at once. For so long, sessions are still taken, for calls that the control plane
# had let in by then; it refuses those that come later.
SETTLE_S = 2.0
# Without sessions, the control plane has so long to leave first.
RELEASE_S = 5.0
# A control plane that restarts is back well before; one that has ended will not release its sessions.
DRAIN_WITHOUT_OWNER_S = 5.0
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

log = structlog.get_logger(__name__)


class ListenError(Exception):
    """The gRPC address cannot be used; the text names it."""


async def run(settings: Settings) -> int:
    """Run the data plane until a stop signal, or until it is told to shut down; return the exit code."""
    stop = Stop()
    plane = DataPlane(settings, stop)
    with stop.on_signals(hangup=_ignore_hangup):
        try:
            async with contextlib.AsyncExitStack() as running:
                await plane.start(running)
                await stop.draining.wait()
                await plane.drain()
                return EXIT_CLEAN
        except (ProbeError, ListenError) as error:
            log.error("process.start_failed", error=str(error))
            return EXIT_ADDRESS
        except EngineUnavailableError as error:
            log.error("process.start_failed", error=str(error))
            return EXIT_ENGINE


class DataPlane:
    """Everything that runs."""

    def __init__(self, settings: Settings, stop: Stop) -> None:
        media, lease = settings.media, settings.lease
        self._settings = settings
        self._stop = stop
        self._starting = True
        self._totals: Counter[tuple[str, tuple[str, ...]]] = Counter(dict.fromkeys(_packet_labels(), 0))
        self._live: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.metrics = DataplaneMetrics(_product_version())
        path = settings.statistics_path
        self._statistics = None if path is None else StatisticsFile(path, clock=time.monotonic, utc_now=_utc_now)
        self._to_keep: Sequence[SessionView] = ()
        self._has_collected = asyncio.Event()
        first, last = media.port_range
        self.node = MediaNode(
            PortPool(first, last, media.block_size, media.rest_s),
            EventLog(EVENTS_KEPT),
            owner_grace_s=lease.owner_grace_s,
            tombstone_s=lease.tombstone_s,
            first_epoch=int(time.time() * 1000),
            clock=time.monotonic,
            utc_now=_utc_now,
            remembered=() if self._statistics is None else self._statistics.read(),
        )
        self._engine = UserspaceEngine(
            self.node.observe,
            silence_s=media.silence_s,
            receive_buffer_bytes=media.receive_buffer_bytes,
            clock=time.monotonic,
        )
        self.node.attach(self._engine)

    async def start(self, running: contextlib.AsyncExitStack) -> None:
        """Start everything; what was started is stopped in reverse order when `running` closes.

        Raises: ProbeError, ListenError, EngineUnavailableError when the relay worker does not come up.
        """
        settings = self._settings
        self.metrics.register(
            Tables(
                gauges=self._gauges,
                closed=lambda: {reason.value: count for reason, count in self.node.sessions_closed.items()},
                allocation_failures=lambda: {
                    refusal.value: count for refusal, count in self.node.allocation_failures.items()
                },
                counters=lambda: {
                    "media_sessions_opened": self.node.sessions_created,
                    "media_worker_restarts": self._engine.restarts,
                },
                packets=self._packets,
            )
        )
        self.metrics.watch_tasks(count_tasks)
        probes = ProbeServer(
            settings.metrics.bind, settings.metrics.port, registry=self.metrics.registry, unready=self.unready
        )
        await probes.start()
        running.push_async_callback(probes.stop)
        running.push_async_callback(self._engine.close)
        await self._engine.start()
        work = {"loop-lag": sample_loop_lag(self.metrics.loop_lag), "housekeeping": self._keep_house()}
        if self._statistics is not None:
            work["statistics"] = self._keep_statistics(self._statistics)
        for name, coroutine in work.items():
            running.push_async_callback(_cancelled, asyncio.create_task(coroutine, name=name))
        await self._serve(running)
        self._starting = False
        log.info("process.started", listen=settings.grpc.listen, ports=list(settings.media.port_range))

    async def _serve(self, running: contextlib.AsyncExitStack) -> None:
        listen, path = self._settings.grpc.listen, self._settings.grpc.socket_path
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ]
        )
        servicer = MediaServicer(
            self.node,
            instance_id=secrets.token_hex(16),
            version=_product_version(),
            observe=self.metrics.grpc_request,
            shut_down=self._stop.draining.set,
        )
        servicer.add_to(server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if path is not None:
            _make_way(path)
            running.callback(path.unlink, missing_ok=True)
        try:
            server.add_insecure_port(listen)
        except RuntimeError as error:
            raise ListenError(f"grpc.listen: {listen} cannot be bound: {error}") from error
        await server.start()
        if path is not None:
            path.chmod(0o660)
        running.push_async_callback(server.stop, GRPC_STOP_S)
        for service in ("", SERVICE_NAME):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Relay on until nobody needs it any more, the time is up, or a second signal comes; then end what is left.

        The control plane is to go first: it is waited for as long as it has sessions, and a moment longer.
        """
        begun = time.monotonic()
        log.info("process.draining", sessions=len(self.node))
        for service in ("", SERVICE_NAME):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        deadline = begun + self._settings.lease.drain_timeout_s
        needed_at = begun
        while not self._stop.now.is_set() and (now := time.monotonic()) < deadline:
            owner = self.node.owner
            if owner is None or not owner.connected or now - begun >= SETTLE_S:
                self.node.drain("the data plane is stopping")
            if len(self.node):
                needed_at = now
            if self._is_released(owner, now, needed_at):
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.now.wait(), DRAIN_TICK_S)
        self.node.drain("the data plane is stopping")
        if len(self.node):
            log.warning("process.sessions_cut", sessions=len(self.node))
            await self.node.close_all(CloseReason.SHUTDOWN)
        log.info("process.stopped")

    def _is_released(self, owner: Ownership | None, now: float, needed_at: float) -> bool:
        """Nobody needs this data plane any more; `needed_at` is when there last were sessions."""
        if owner is None:
            return True
        if not owner.connected:
            return not len(self.node) or owner.absent_s(now) > DRAIN_WITHOUT_OWNER_S
        return now - needed_at > RELEASE_S

    def unready(self) -> list[str]:
        """Why the data plane would refuse a session now; empty when it would not."""
        if self._starting:
            return ["starting"]
        if self._stop.draining.is_set():
            return ["draining"]
        capacity = self.node.capacity()
        return [] if capacity.accepting else [capacity.not_accepting_reason]

    async def _keep_house(self) -> None:
        """Lets time pass for the node, and collects the figures that metrics show."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.node.tick()
                figures = await self._engine.collect()
            except Exception:
                # The border of this task: one failed round must not end it.
                log.exception("housekeeping.failed")
                continue
            # From here on without an await, so that every session is either among those that ended or among the live.
            for view in self.node.take_closed():
                _add(self._totals, view)
            live: Counter[tuple[str, tuple[str, ...]]] = Counter()
            views = self.node.live(figures)
            for view in views:
                _add(live, view)
            self._live = live
            self._to_keep = [*views, *self.node.ended()]
            self._has_collected.set()

    async def _keep_statistics(self, file: StatisticsFile) -> None:
        """Keeps what housekeeping collected. Of its own, so that a disk that hangs holds up nothing else."""
        while True:
            await self._has_collected.wait()
            self._has_collected.clear()
            try:
                await file.keep(self._to_keep)
            except Exception:
                # The border of this task, as above.
                log.exception("statistics.failed")

    def _packets(self) -> Mapping[tuple[str, tuple[str, ...]], int]:
        sums = self._totals.copy()
        sums.update(self._live)  # unlike +, this keeps what is zero
        return sums

    def _gauges(self) -> Mapping[str, float]:
        capacity = self.node.capacity()
        owner = self.node.owner
        return {
            "media_ports_capacity": capacity.blocks_total * capacity.block_size,
            "media_ports_in_use": capacity.blocks_in_use * capacity.block_size,
            "media_ports_quarantined": capacity.blocks_resting * capacity.block_size,
            "media_control_connected": float(owner is not None and owner.connected),
            "media_accepting": float(capacity.accepting),
            "media_sessions": len(self.node),
        }


def _packet_labels() -> Iterable[tuple[str, tuple[str, ...]]]:
    for leg in Leg:
        for direction in ("rx", "tx"):
            for kind in ("rtp", "rtcp"):
                yield "rtp_packets", (direction, kind, leg.value)
                yield "rtp_bytes", (direction, kind, leg.value)
        yield "rtp_lost", (leg.value,)
        yield "rtp_reordered", (leg.value,)
    for reason in DropReason:
        yield "rtp_dropped", (reason.value,)


def _add(sums: Counter[tuple[str, tuple[str, ...]]], view: SessionView) -> None:
    """Adds a session, without what an earlier process has counted of it."""
    for stream in view.streams:
        _add_stream(sums, stream, 1)
    for stream in view.carried:
        _add_stream(sums, stream, -1)


def _add_stream(sums: Counter[tuple[str, tuple[str, ...]]], stream: StreamSnapshot, sign: int) -> None:
    """Adds or takes off a stream: what came from a leg was received there and sent at the opposite one."""
    leg, other = stream.leg.value, stream.leg.opposite.value
    for kind, packets, octets, relayed, relayed_octets in (
        ("rtp", stream.packets, stream.octets, stream.relayed_rtp, stream.relayed_rtp_octets),
        ("rtcp", stream.rtcp_packets, stream.rtcp_octets, stream.relayed_rtcp, stream.relayed_rtcp_octets),
    ):
        sums["rtp_packets", ("rx", kind, leg)] += sign * packets
        sums["rtp_bytes", ("rx", kind, leg)] += sign * octets
        sums["rtp_packets", ("tx", kind, other)] += sign * relayed
        sums["rtp_bytes", ("tx", kind, other)] += sign * relayed_octets
    sums["rtp_lost", (leg,)] += sign * max(0, stream.lost)
    sums["rtp_reordered", (leg,)] += sign * stream.reordered
    for reason, packets in stream.drops:
        sums["rtp_dropped", (reason.value,)] += sign * packets


def _make_way(path: Path) -> None:
    """Makes the socket's folder, and removes a socket that an earlier process left.

    Raises: ListenError when something else is in the way.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise ListenError(f"grpc.listen: {path} exists and is no socket; remove it or choose another path")
            path.unlink()
    except OSError as error:
        raise ListenError(f"grpc.listen: {path} cannot be used: {os.strerror(error.errno or 0)}") from error


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _ignore_hangup() -> None:
    log.info("process.hangup_ignored", advice="settings are read at the start alone")


def _product_version() -> str:
    try:
        return version("sip-pbx")
    except PackageNotFoundError:
        return "unknown"


def _utc_now() -> datetime:
    return datetime.now(UTC)
