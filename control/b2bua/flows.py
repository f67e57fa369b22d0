"""Where a peer is found again after the connection that it used is gone (RFC 3261 sections 12.2 and 18.1.1)."""

from dataclasses import replace
from ipaddress import ip_address

from control.sip.address import Address, Flow, Transport
from control.sip.headers import Uri
from control.sip.hop import DEFAULT_PORT, DEFAULT_TLS_PORT


def listening_flow(flow: Flow, contact: Uri) -> Flow:
    """The way to where a peer takes connections, for one of its own that came along `flow`.

    That is the port in its Contact, if it names the host that the connection came from: anything else is behind NAT, or
    would let a peer send us to third parties. Then it is `flow`, over which the peer may come back.
    """
    try:
        is_same_host = ip_address(contact.host) == ip_address(flow.remote.host)
    except ValueError:
        is_same_host = False
    if not is_same_host:
        return flow
    default = DEFAULT_TLS_PORT if flow.transport is Transport.TLS else DEFAULT_PORT
    return replace(flow, remote=Address(flow.remote.host, contact.port or default))
