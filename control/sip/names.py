"""Names of header fields: standard spelling and compact forms (RFC 3261 sections 7.3.3 and 20, IANA's registry)."""

from __future__ import annotations

from typing import Final

_STANDARD_NAMES: Final = """
    Accept Accept-Contact Accept-Encoding Accept-Language Alert-Info Allow Allow-Events Authentication-Info
    Authorization Call-ID Call-Info Contact Content-Disposition Content-Encoding Content-Language Content-Length
    Content-Type CSeq Date Diversion Error-Info Event Expires Flow-Timer From Geolocation History-Info Identity
    Identity-Info In-Reply-To Info-Package Max-Forwards MIME-Version Min-Expires Min-SE Organization
    P-Access-Network-Info P-Asserted-Identity P-Called-Party-ID P-Charging-Vector P-Early-Media P-Preferred-Identity
    Path Priority Privacy Proxy-Authenticate Proxy-Authorization Proxy-Require RAck Reason Record-Route Recv-Info
    Refer-Sub Refer-To Referred-By Reject-Contact Remote-Party-ID Replaces Reply-To Request-Disposition Require
    Retry-After Route RSeq Server Service-Route Session-Expires SIP-ETag SIP-If-Match Subject Subscription-State
    Supported Target-Dialog Timestamp To Unsupported User-Agent User-to-User Via Warning WWW-Authenticate
"""

_COMPACT_FORMS: Final = {
    "a": "accept-contact",
    "b": "referred-by",
    "c": "content-type",
    "d": "request-disposition",
    "e": "content-encoding",
    "f": "from",
    "i": "call-id",
    "j": "reject-contact",
    "k": "supported",
    "l": "content-length",
    "m": "contact",
    "n": "identity-info",
    "o": "event",
    "r": "refer-to",
    "s": "subject",
    "t": "to",
    "u": "allow-events",
    "v": "via",
    "x": "session-expires",
    "y": "identity",
}

# By key: a name in lower case and long form.
SPELLINGS: Final = {name.lower(): name for name in _STANDARD_NAMES.split()}

# The key for each way in which well-behaved peers write a known name: one look-up instead of strip, lower and look-up.
KEYS: Final = {
    **{name: key for key, name in SPELLINGS.items()},
    **{key: key for key in SPELLINGS},
    **_COMPACT_FORMS,
}


def key_of(name: str) -> str:
    """The key of a name in any spelling, with white space around it or not."""
    known = KEYS.get(name)
    if known is None:
        known = name.strip(" \t").lower()
        known = _COMPACT_FORMS.get(known, known)
    return known
