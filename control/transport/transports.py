"""The SIP transports of a node: one for each listener, found by the flows that name it."""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from control.settings.sections import ConnectionSettings, ListenerSettings, TrunkTlsSettings
from control.sip.address import Address, Flow, Transport
from control.transport.stream import StreamTransport
from control.transport.tls import TlsContexts, keep_current
from control.transport.udp import UdpTransport


class Transports:
    """Owns `sockets`, which are by listener name, and what is built on them.

    `receive` takes each message with its flow, `failed` each flow whose connection is gone. `peers` are trunks reached
    by TLS. Certificates are kept current; setting `hangup` has them read again at once, and `unusable` is told when
    they cannot be used.
    """

    def __init__(
        self,
        listeners: Sequence[ListenerSettings],
        sockets: Mapping[str, socket.socket],
        *,
        receive: Callable[[bytes, Flow], None],
        failed: Callable[[Flow], None],
        limits: ConnectionSettings,
        peers: Mapping[Address, TrunkTlsSettings],
        hangup: asyncio.Event,
        unusable: Callable[[], None],
    ) -> None:
        """Raises TlsError when a certificate cannot be used; the sockets are the caller's then."""
        self._kinds = {listener.name: listener.transport for listener in listeners}
        self._hangup = hangup
        self._unusable = unusable
        self._watching: asyncio.Task[None] | None = None
        self._tls = {
            listener.name: TlsContexts(listener.name, listener.tls, peers)
            for listener in listeners
            if listener.tls is not None
        }
        self._datagrams = {
            listener.name: UdpTransport(sockets[listener.name], listener=listener.name, receive=receive)
            for listener in listeners
            if listener.transport is Transport.UDP
        }
        self._streams = {
            listener.name: StreamTransport(
                sockets[listener.name],
                listener=listener.name,
                receive=receive,
                failed=failed,
                limits=limits,
                tls=self._tls.get(listener.name),
            )
            for listener in listeners
            if listener.transport is not Transport.UDP
        }
        self._all: dict[str, UdpTransport | StreamTransport] = {**self._datagrams, **self._streams}

    def start(self) -> None:
        """Begin to read, on the running loop."""
        for transport in self._all.values():
            transport.start()
        work = keep_current(tuple(self._tls.values()), self._hangup, failed=self._unusable)
        self._watching = asyncio.create_task(work, name="certificates")

    async def close(self) -> None:
        """Stop all; what was given to a connection leaves, if its peer takes it within a second."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.gather(*(stream.close() for stream in self._streams.values()))
        for datagrams in self._datagrams.values():
            datagrams.close()

    def send(self, data: bytes, flow: Flow) -> None:
        """Send a message along a flow; one of a listener that there is no more goes nowhere."""
        transport = self._all.get(flow.listener)
        if transport is not None:
            transport.send(data, flow)

    def is_reachable(self, flow: Flow) -> bool:
        """Whether its peer can be reached along a flow by which it spoke: over a connection, while that is open."""
        stream = self._streams.get(flow.listener)
        return stream.is_connected(flow) if stream is not None else flow.listener in self._datagrams

    def addresses(self) -> list[str]:
        """What is listened on, for people."""
        return [f"{self._kinds[name]} {transport.local}" for name, transport in self._all.items()]

    def counters(self) -> Mapping[str, int]:
        """What went through all of them, by event."""
        total: Counter[str] = Counter()
        for transport in self._all.values():
            total.update(asdict(transport.counters))
        total["kernel_dropped"] = sum(datagrams.kernel_drops() for datagrams in self._datagrams.values())
        return total
