"""The composition root of the control plane: the one place that makes its objects and ties them together.

Start: probes first, so that everybody can see what is being waited for; then the stores, the data plane's client, the
SIP sockets, and the APIs last. Stop, in the reverse sense: new calls are refused, running calls may end by themselves
for a while and are then ended, and whatever they leave behind is written before the files are closed. Every step has a
deadline; a second stop signal skips the while.
"""

import asyncio
import contextlib
import gc
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import structlog

from control.api.auth import ApiKeys
from control.api.grpc_api import GrpcApi
from control.api.http_api import HttpApi
from control.api.service import ApiBindError, ControlService, NodeView
from control.b2bua.b2bua import B2bua
from control.b2bua.registration import restored_bindings
from control.b2bua.saved_calls import Instant, brought_back, offset_s
from control.events.call_log import log_call_event
from control.events.cdr import JsonLines
from control.events.cdr_csv import CsvLines
from control.events.cdr_file import CdrFile, Rotation
from control.events.codec import call_id_of, encode, event_id, event_type
from control.events.fanout import EventFanOut
from control.events.feed import SinkFeed
from control.events.webhook import Webhooks
from control.media.client import MediaClient
from control.metrics import ControlMetrics, product_version
from control.pbx.admission import Admission
from control.pbx.media import RestoredSession
from control.pbx.records import CallEvent, CallEventKind, CallRecord, ErrorEvent, Event
from control.pbx.registrar import Binding, Registrar
from control.pbx.routing import Router
from control.pbx.trunks import Trunks
from control.settings.sections import CdrSettings, ListenerSettings
from control.settings.settings import Settings
from control.sip.address import Address, Flow, Transport
from control.sip.digest import DigestAuthenticator
from control.sip.snapshot import SnapshotError
from control.sip.stack import SipStack
from control.sip.transaction import Timers
from control.store.database import Database, StoreError
from control.store.events import EventStore, StoredEvent
from control.store.health import StoreHealth
from control.store.journal import Journal, JournalEntry
from control.store.records import RecordStore
from control.store.registrations import RegistrationStore
from control.store.reserve import Reserve, open_store, reserve_for
from control.store.sinks import SinkPositions
from control.transport.tls import TlsError
from control.transport.transports import Transports
from sippbx.runtime.lifecycle import Stop, count_tasks, sample_loop_lag
from sippbx.runtime.probes import ProbeError, ProbeServer
from sippbx.runtime.sockets import SocketError, TcpListener, UdpListener, bind_tcp, bind_udp

EXIT_CLEAN = 0
EXIT_CONFIGURATION = 2
EXIT_ADDRESS = 3
EXIT_FENCED = 4
EXIT_STORE = 5

# How long requests may wait in the sockets for the data plane to be reached: T1, when they would be repeated.
MEDIA_PATIENCE_S = 0.5
CALLS_END_S = 5.0
API_STOP_S = 1.0

_TOKEN_BYTES = 9
_SECRET_BYTES = 32
# Documentation addresses (RFC 5737, RFC 3849): asking for the way to them sends nothing.
_ANYWHERE = {4: "192.0.2.1", 6: "2001:db8::1"}
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}

_log = structlog.get_logger(__name__)


async def run(settings: Settings, inherited: Mapping[str, socket.socket]) -> int:
    """Run the control plane until a stop signal; return the exit code (see control.__main__).

    `inherited` are bound SIP sockets by listener name; listeners that have none are bound here.
    """
    settings = with_advertised_addresses(settings)
    stop, hangup = Stop(), asyncio.Event()
    try:
        with stop.on_signals(hangup=hangup.set):
            async with ControlPlane.started(settings, inherited, stop, hangup) as plane:
                await stop.draining.wait()
                return await plane.finish()
    except (SocketError, TlsError, ProbeError, ApiBindError) as error:
        _log.error("process.start_failed", error=str(error))
        return EXIT_ADDRESS
    except StoreError as error:
        _log.error("process.start_failed", error=str(error))
        return EXIT_STORE


class ControlPlane:
    """Everything that runs, for as long as `started` is open."""

    def __init__(
        self,
        settings: Settings,
        stop: Stop,
        metrics: ControlMetrics,
        database: Database,
        store_trouble: Callable[[], str | None],
    ) -> None:
        self._settings = settings
        self._stop = stop
        self._fenced = False
        self._starting = True
        self._started_at = _utc_now()
        self._listeners = {listener.name: listener for listener in settings.sip.listeners}
        self.metrics = metrics
        self._database = database
        self._store_trouble = store_trouble
        clock = asyncio.get_running_loop().time
        self._journal = Journal(database, boot_id=_boot_id(), clock=clock)
        self._registrations = RegistrationStore(database, boot_id=_boot_id(), clock=clock)
        self._admission = Admission(
            max_calls=settings.limits.max_calls,
            calls_per_second=settings.limits.calls_per_second,
            retry_after_s=settings.limits.retry_after_s,
            store_trouble=store_trouble,
        )
        self._events = EventFanOut(self.metrics)
        self._media = MediaClient(
            target=settings.media.target,
            owner_id=settings.node_name,
            incarnation=database.epoch,
            command_timeout_s=settings.media.command_timeout_s,
            lost_timeout_s=settings.media.lost_timeout_s,
            metrics=self.metrics,
            fenced=self._lose_ownership,
            publish=self._events.publish,
        )
        self._stack = SipStack(
            advertised=self._advertised,
            new_token=_new_token,
            timers=Timers(settings.sip.timers.t1_s, settings.sip.timers.t2_s, settings.sip.timers.t4_s),
            server_name=settings.sip.server_name,
            by_stream=settings.stream_flows().get,
        )
        users = {user.name: user.nat for user in settings.users}
        self._registrar = Registrar(
            is_user=users.__contains__,
            min_expires_s=settings.registrar.min_expires_s,
            max_expires_s=settings.registrar.max_expires_s,
            default_expires_s=settings.registrar.default_expires_s,
            max_bindings=settings.registrar.max_bindings,
        )
        trunks = Trunks(settings.trunk_values())
        self._b2bua = B2bua(
            settings=settings,
            stack=self._stack,
            registrar=self._registrar,
            router=Router(users=users, bindings_of=self._reachable, trunks=trunks, rules=settings.route_rules()),
            trunks=trunks,
            admission=self._admission,
            authenticator=DigestAuthenticator(
                settings.realm,
                secrets.token_bytes(_SECRET_BYTES),
                algorithms=[algorithm.value for algorithm in settings.digest_algorithms],
            ),
            media=self._media,
            transmit=self._transmit,
            publish=self._events.publish,
            metrics=self.metrics,
            new_token=_new_token,
            clock=asyncio.get_running_loop().time,
            utc_now=_utc_now,
            journal=self._journal if settings.store.journal else None,
            bindings=self._registrations,
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def started(
        cls,
        settings: Settings,
        inherited: Mapping[str, socket.socket],
        stop: Stop,
        hangup: asyncio.Event | None = None,
    ) -> AsyncIterator["ControlPlane"]:
        """Start everything; whatever has been started is stopped again on the way out, in reverse order.

        Setting `hangup` has the certificates read again.

        Raises: SocketError, TlsError, ProbeError, ApiBindError, StoreError.
        """
        async with contextlib.AsyncExitStack() as running:
            metrics, store = ControlMetrics(), settings.store
            reserve_bytes = store.reserve_bytes
            if reserve_bytes is None:
                reserve_bytes = reserve_for(settings.limits.max_calls)
            reserve = Reserve(store.path, reserve_bytes, metrics=metrics)
            running.push_async_callback(reserve.close)
            database = await open_store(store.path, reserve, metrics=metrics)
            running.push_async_callback(database.close)
            await reserve.start()
            health = StoreHealth(database, slow_after_s=store.slow_after_s, clock=time.monotonic)
            plane = cls(settings, stop, metrics, database, lambda: reserve.trouble or health.trouble)
            database.when_fenced(plane._lose_ownership)
            await plane._start(running, inherited, hangup or asyncio.Event())
            yield plane

    async def finish(self) -> int:
        """Refuse new calls, let the running ones end, end what is left of them, and return the exit code.

        A fenced process ends nothing: its calls belong to whoever owns the data plane now.
        """
        if self._fenced:
            return EXIT_FENCED
        self._drain()
        timeout_s = self._settings.drain.timeout_s
        _log.info("process.stopping", calls=self._call_count(), drain_timeout_s=timeout_s)
        drained = asyncio.create_task(self._b2bua.idle(), name="last-call")
        hurry = asyncio.create_task(self._stop.now.wait(), name="second-stop-signal")
        await asyncio.wait({drained, hurry}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, hurry):
            task.cancel()
        await asyncio.gather(drained, hurry, return_exceptions=True)
        if calls := self._call_count():
            _log.warning("process.calls_cut", calls=calls, advice="drain.timeout_s is how long they may go on")
        try:
            await asyncio.wait_for(self._b2bua.close(), CALLS_END_S)
        except TimeoutError:
            _log.warning("process.calls_abandoned", calls=self._call_count())
        return EXIT_CLEAN

    def _drain(self) -> None:
        """Refuse new calls from now on."""
        if not self._admission.draining:
            self._admission.draining = True
            _log.info("process.draining", calls=self._call_count())

    def _call_count(self) -> int:
        return sum(self._b2bua.active_calls().values())

    async def _start(
        self, running: contextlib.AsyncExitStack, inherited: Mapping[str, socket.socket], hangup: asyncio.Event
    ) -> None:
        settings = self._settings
        sockets = _listening_sockets(settings.sip.listeners, inherited)
        for sock in sockets.values():
            running.callback(sock.close)
        self._transports = transports = Transports(
            settings.sip.listeners,
            sockets,
            receive=self._b2bua.receive,
            failed=self._b2bua.flow_failed,
            limits=settings.sip.connections,
            peers=settings.tls_peers(),
            hangup=hangup,
            unusable=lambda: self.metrics.error("sip", "certificate"),
        )
        running.push_async_callback(transports.close)
        self.metrics.bind(
            active_calls=self._b2bua.active_calls,
            registrations=self._registrar.__len__,
            transactions=self._stack.counts,
            sockets=transports.counters,
            ready=lambda: not self.unready(),
            draining=lambda: self._admission.draining,
        )
        self.metrics.watch_tasks(count_tasks)
        probes = ProbeServer(
            settings.metrics.bind, settings.metrics.port, registry=self.metrics.registry, unready=self.unready
        )
        await probes.start()
        running.push_async_callback(probes.stop)
        lag = asyncio.create_task(sample_loop_lag(self.metrics.event_loop_lag), name="loop-lag")
        running.callback(lag.cancel)
        records, events = await self._keep_records(running)
        await self._take_up_registrations()
        self._media.restore(await self._take_up_calls())
        self._media.start(self._b2bua.media_input)
        running.push_async_callback(self._media.stop)
        self._b2bua.resume()
        # What came while no process was there is not to be refused because this one has not reached the data plane yet.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._media.reached(), MEDIA_PATIENCE_S)
        transports.start()
        await self._serve_programs(running, records, events)
        self._starting = False
        # What stands now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        _log.info("process.started", listeners=transports.addresses())

    async def _serve_programs(
        self, running: contextlib.AsyncExitStack, records: RecordStore, events: EventStore
    ) -> None:
        """Serve both APIs.

        Raises: ApiBindError.
        """
        api = self._settings.api
        service = ControlService(
            calls=self._b2bua, records=records, events=events, node=self._node_view, drain=self._drain
        )
        keys = ApiKeys(api.keys)
        if not api.keys:
            _log.warning("api.without_keys", advice="nobody can use the APIs; see api.keys")
        http = HttpApi(api, service, keys, self.metrics, self.unready)
        await http.start()
        running.push_async_callback(http.stop)
        grpc = GrpcApi(api, service, keys, self.metrics)
        await grpc.start()
        running.push_async_callback(grpc.stop, API_STOP_S)

    def _node_view(self) -> NodeView:
        reasons = tuple(self.unready())
        return NodeView(
            name=self._settings.node_name,
            version=product_version(),
            started_at=self._started_at,
            ready=not reasons,
            not_ready_reasons=reasons,
            draining=self._admission.draining,
            active_calls=self._call_count(),
            max_calls=self._settings.limits.max_calls,
            registrations=len(self._registrar),
        )

    async def _take_up_registrations(self) -> None:
        """Know the phones that the process before this one knew.

        Raises: StoreError.
        """
        for saved in await self._registrations.load():
            then = Instant(saved.saved_now, saved.boot_id, saved.saved_at)
            try:
                self._registrar.restore(restored_bindings(saved.bindings, offset_s=offset_s(then, _here())))
            except SnapshotError as error:
                _log.warning("registration.unreadable", user=saved.aor, reason=str(error))

    async def _take_up_calls(self) -> list[RestoredSession]:
        """Take up the calls of the process before this one; what cannot be read is set aside, with a record.

        Raises: StoreError.
        """
        sessions: list[RestoredSession] = []
        if not self._settings.store.journal:
            return sessions
        here = _here()
        for entry in await self._journal.load():
            then = Instant(entry.saved_now, entry.boot_id, entry.saved_at)
            try:
                if entry.trouble:
                    raise SnapshotError(entry.trouble)
                call = brought_back(
                    entry.snapshot, then=then, here=here, new_token=_new_token, random=secrets.SystemRandom().random
                )
                session = self._b2bua.take_up(call)
            except SnapshotError as error:
                self._set_aside(entry, str(error))
            else:
                sessions += [] if session is None else [session]
        return sessions

    def _set_aside(self, entry: JournalEntry, reason: str) -> None:
        """End a call of which no more than its record can be read."""
        self.metrics.error("store", "call_unreadable")
        _log.error("journal.call_set_aside", call_id=entry.call_id, reason=reason)
        self._journal.set_aside(entry, reason)
        self._events.publish(ErrorEvent(_utc_now(), "store", "call-unreadable", reason, entry.call_id))
        if (record := entry.record) is not None:
            who = (record.direction, record.caller, record.callee)
            event = CallEvent(CallEventKind.ENDED, record.call_id, record.ended_at, *who, 0.0, record=record)
            self._events.publish(event)

    async def _keep_records(self, running: contextlib.AsyncExitStack) -> tuple[RecordStore, EventStore]:
        """Observe what happens: metrics and log at once, the store by its queue, and all others behind its commits.

        Raises: StoreError.
        """
        settings, database = self._settings, self._database
        webhooks = await Webhooks.open(
            settings.webhooks,
            database=database,
            node_name=settings.node_name,
            metrics=self.metrics,
            publish=self._events.publish,
        )
        running.push_async_callback(webhooks.close)
        records = RecordStore(database)

        positions = SinkPositions(database, settings.store.path)
        running.callback(positions.close)
        feeds = [
            SinkFeed(sink, records=records, positions=positions, metrics=self.metrics) for sink in _sinks(settings.cdr)
        ]
        for feed in feeds:
            running.push_async_callback(feed.close)

        def committed(event: StoredEvent, record: CallRecord | None) -> None:
            webhooks.wake(event)
            if record is not None:
                for feed in feeds:
                    feed.wake()

        events = await EventStore.open(
            database,
            records,
            metrics=self.metrics,
            keep=timedelta(seconds=settings.events.keep_s),
            keep_events=settings.events.keep_events,
            also=lambda event: (*webhooks.deliveries.statements_for(event), *self._journal.statements_for(event)),
            committed=committed,
        )
        running.push_async_callback(events.close)

        def keep(event: Event) -> None:
            if (kind := event_type(event)) is not None:
                events.append(
                    id=event_id(event, _new_token),
                    type=kind,
                    at=event.at,
                    call_id=call_id_of(event),
                    data=encode(event),
                    record=event.record if isinstance(event, CallEvent) else None,
                )

        self._events.subscribe("metrics", self.metrics.observe)
        self._events.subscribe("log", log_call_event)
        self._events.subscribe("store", keep)
        return records, events

    def unready(self) -> list[str]:
        """Why new calls would be refused now; empty when they would not."""
        reasons = []
        if self._starting:
            reasons.append("starting")
        if self._admission.draining or self._stop.draining.is_set():
            reasons.append("draining")
        if (trouble := self._media.trouble) is not None:
            reasons.append(f"media: {trouble}")
        if (trouble := self._store_trouble()) is not None:
            reasons.append(f"store: {trouble}")
        return reasons

    def _lose_ownership(self) -> None:
        self._fenced = True
        self._stop.request()

    def _advertised(self, flow: Flow) -> Address:
        listener = self._listeners[flow.listener]
        return Address(listener.advertise, listener.advertised_port)

    def _transmit(self, data: bytes, flow: Flow) -> None:
        self._transports.send(data, flow)

    def _reachable(self, user: str, now: float) -> list[Binding]:
        """Where a user can be called now: not where the connection is gone by which the phone registered."""
        return [binding for binding in self._registrar.lookup(user, now) if self._transports.is_reachable(binding.flow)]


def with_advertised_addresses(settings: Settings) -> Settings:
    """The same settings with each `advertise: auto` replaced by the address that peers are told."""
    listeners = tuple(
        listener.model_copy(update={"advertise": _address_to_tell(listener.advertised_host, listener.version)})
        for listener in settings.sip.listeners
    )
    addresses = tuple(
        address.model_copy(update={"advertise": _address_to_tell(address.advertised_host, address.version)})
        for address in settings.media.addresses
    )
    return settings.model_copy(
        update={
            "sip": settings.sip.model_copy(update={"listeners": listeners}),
            "media": settings.media.model_copy(update={"addresses": addresses}),
        }
    )


def _address_to_tell(configured: str | None, version: int) -> str:
    if configured is not None:
        return configured
    detected = _outgoing_address(version)
    if detected is None or ip_address(detected).is_loopback:
        detected = _LOOPBACK[version]
        _log.warning("address.loopback_advertised", address=detected, advice="set advertise: no other host can call")
    else:
        _log.info("address.detected", address=detected)
    return detected


def _outgoing_address(version: int) -> str | None:
    """The address that this host would send from to another network, None when it has no way there."""
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((_ANYWHERE[version], 9))
        except OSError:
            return None
        return str(sock.getsockname()[0])


def listener_of(settings: ListenerSettings) -> UdpListener | TcpListener:
    """The socket that a listener of the settings needs."""
    kind = UdpListener if settings.transport is Transport.UDP else TcpListener
    return kind(settings.bind, settings.port)


def bind(listener: UdpListener | TcpListener) -> socket.socket:
    """Bind it.

    Raises: SocketError.
    """
    return bind_udp(listener) if isinstance(listener, UdpListener) else bind_tcp(listener)


def _bound_to(sock: socket.socket) -> UdpListener | TcpListener:
    kind = UdpListener if sock.type == socket.SOCK_DGRAM else TcpListener
    return kind(*sock.getsockname()[:2])


def _listening_sockets(
    listeners: Sequence[ListenerSettings], inherited: Mapping[str, socket.socket]
) -> dict[str, socket.socket]:
    """The sockets of all listeners: those handed over, and new ones for the others.

    Raises: SocketError when one cannot be bound, or is not bound to what the settings say.
    """
    for name in inherited.keys() - {listener.name for listener in listeners}:
        inherited[name].close()
        _log.warning("transport.socket_unused", listener=name)
    sockets: dict[str, socket.socket] = {}
    for listener in listeners:
        wanted = listener_of(listener)
        if listener.name in inherited:
            sock = inherited[listener.name]
            if (bound := _bound_to(sock)) != wanted:
                raise SocketError(f"the socket handed over as {listener.name!r} is {bound}, the settings say {wanted}")
            sockets[listener.name] = sock
        else:
            sockets[listener.name] = bind(wanted)
    return sockets


def _sinks(settings: CdrSettings) -> list[CdrFile]:
    rotation = Rotation(settings.rotate_bytes, settings.rotate_every, settings.keep_files)
    forms = ((settings.jsonl_path, JsonLines()), (settings.csv_path, CsvLines()))
    return [CdrFile(path, lines, rotation=rotation, utc_now=_utc_now) for path, lines in forms if path is not None]


def _here() -> Instant:
    return Instant(asyncio.get_running_loop().time(), _boot_id(), _utc_now())


def _boot_id() -> str:
    """Names the boot since which this host's monotonic clock counts (proc_sys_kernel(5))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _new_token() -> str:
    """72 random bits, well above the 32 that RFC 3261 section 19.3 asks of tags."""
    return secrets.token_hex(_TOKEN_BYTES)


def _utc_now() -> datetime:
    return datetime.now(UTC)
