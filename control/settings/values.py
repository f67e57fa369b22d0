"""Types of single values in the settings: what a key may hold, and what is said of one that holds something else.

Nothing here resolves names or looks at the machine.
"""

import re
from ipaddress import ip_address, ip_network
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator

from control.pbx.records import EVENT_TYPES
from control.pbx.trunks import Network
from control.sip.address import Address, Transport
from sippbx.runtime.settings_reader import nearest_of

AUTO = "auto"
SIP_PORT = 5060
SIPS_PORT = 5061


def matching(pattern: str, what: str) -> AfterValidator:
    """Takes text that the pattern matches as a whole; otherwise it is said not to be `what`."""
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(f"{text!r} is not {what}")
        return text

    return AfterValidator(check)


def _numeric_address(text: str) -> str:
    try:
        return str(ip_address(text.strip("[]")))
    except ValueError:
        raise ValueError(f"{text!r} is not a numeric IPv4 or IPv6 address; host names are not looked up") from None


def _advertisable(text: str) -> str:
    if text == AUTO:
        return text
    address = ip_address(_numeric_address(text))
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"peers cannot reach {text}; give the address that they see, or {AUTO!r}")
    return str(address)


def _host_and_port(value: object) -> Address:
    if isinstance(value, Address):
        return value
    text = str(value)
    match = re.fullmatch(r"\[([^\]]*)\](?::(\d+))?|([^:]*)(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not host:port; IPv6 addresses go in brackets: [2001:db8::1]:{SIP_PORT}")
    host, port = match[1] or match[3] or "", int(match[2] or match[4] or SIP_PORT)
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not within 1 to 65535")
    if ip_address(_numeric_address(host)).is_unspecified:
        raise ValueError(f"nothing can be sent to {host}; give the address of the peer")
    return Address(_numeric_address(host), port)


def network_of(value: object) -> Network:
    """The network that a text names; an address is a network of one."""
    try:
        return ip_network(str(value))
    except ValueError as error:
        raise ValueError(f"{error}; write an address or a network such as 198.51.100.0/24") from None


def _http_url(text: str) -> str:
    parts = urlsplit(text)
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or parts.username or parts.fragment:
        raise ValueError(f"{text!r} is not http://host[:port]/path or https://host[:port]/path")
    return text


def _event_type(text: str) -> str:
    if text not in EVENT_TYPES:
        raise ValueError(f"there is no event {text!r}; {nearest_of(text, set(EVENT_TYPES))}")
    return text


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


IpAddress = Annotated[str, AfterValidator(_numeric_address)]
Advertised = Annotated[str, AfterValidator(_advertisable)]
HostPort = Annotated[Address, PlainValidator(_host_and_port), PlainSerializer(str)]
TrustedNetwork = Annotated[Network, PlainValidator(network_of), PlainSerializer(str)]
TransportName = Annotated[Transport, BeforeValidator(_upper)]
ServerName = Annotated[
    str,
    matching(
        r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*",
        "a host name or an IPv4 address, as a certificate has it",
    ),
]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, matching(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", "a name: 1 to 63 letters, digits, '_', '.', '-'")]
# RFC 3261 section 25.1, unreserved: nothing that a URI would have to escape or that could be taken for a parameter.
UserName = Annotated[str, matching(r"[A-Za-z0-9_.!~*'()+-]{1,64}", "a user: 1 to 64 letters, digits or _.!~*'()+-")]
Prefix = Annotated[str, matching(r"\+?[0-9*#]+|\+", "a prefix: digits, '*' and '#', with an optional '+' in front")]
Prepended = Annotated[str, matching(r"\+?[0-9*#]*", "digits, '*' and '#', with an optional '+' in front")]
Realm = Annotated[
    str, matching(r'[^"\\\x00-\x1f\x7f]{1,128}', "a realm: 1 to 128 characters without quotes and controls")
]
ProductName = Annotated[str, matching(r"[!-~]([ -~]{0,126}[!-~])?", "1 to 128 printable ASCII characters")]
NodeName = Annotated[str, matching(r"[!-~]{1,64}", "1 to 64 printable ASCII characters without spaces")]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
EventType = Annotated[str, AfterValidator(_event_type)]
GrpcTarget = Annotated[
    str,
    matching(r"unix:///\S+|(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5}", "unix:///absolute/path or host:port"),
]
