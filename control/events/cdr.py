"""Call detail records as JSON lines: one object a line for each call, in the order in which the store committed them.

    version       1; grows when a key changes its meaning or goes
    call_id       this PBX's id of the call
    direction     internal | inbound | outbound
    caller        who called: user or number
    callee        who was called: user or number
    invited_at, ringing_at, answered_at, ended_at
                  RFC 3339, UTC; null for what did not happen
    setup_s       from the INVITE to the answer, or to the end when there was none
    duration_s    from the answer to the end; 0 when there was no answer
    termination   result, reason (closed sets), sip_status (what the caller's INVITE got), ended_by (caller | callee |
                  null for the PBX), detail (for people)
    legs          for each side: name (caller | callee), sip_call_id, from_uri, to_uri, remote (host:port), trunk, user,
                  user_agent
    streams       what arrived from each side on each line: leg, line, kind (audio | video), packets, octets, lost,
                  reordered, jitter_ms, rtcp_packets, relayed_packets, dropped_packets, first_packet_at, last_packet_at
    media_complete
                  false when the data plane could not be asked for its final statistics
    media_interruptions, media_gap_s
                  how often, and for how long in all, the relay was interrupted because the data plane was lost

control.events.cdr_file writes the file.
"""

from typing import Final

import orjson

from control.pbx.records import CallRecord

CDR_VERSION = 1


class JsonLines:
    """The form of a file of JSON lines."""

    name: Final = "jsonl"
    header: Final = b""

    def line(self, record: CallRecord) -> bytes:
        """The record as one line, newline included."""
        return cdr_line(record)

    def key(self, line: bytes) -> str | None:
        """The call_id in a line; None when this is no line of a record."""
        try:
            document = orjson.loads(line)
        except ValueError:
            return None
        call_id = document.get("call_id") if isinstance(document, dict) else None
        return call_id if isinstance(call_id, str) else None


def cdr_line(record: CallRecord) -> bytes:
    """The record as one line of the file, newline included."""
    return orjson.dumps(cdr_document(record), option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)


def cdr_document(record: CallRecord) -> dict[str, object]:
    """The record as a JSON object, with the keys that this module lists."""
    return {
        "version": CDR_VERSION,
        "call_id": record.call_id,
        "direction": record.direction,
        "caller": record.caller,
        "callee": record.callee,
        "invited_at": record.invited_at,
        "ringing_at": record.ringing_at,
        "answered_at": record.answered_at,
        "ended_at": record.ended_at,
        "setup_s": round(record.setup_s, 6),
        "duration_s": round(record.duration_s, 6),
        "termination": record.termination,
        "legs": record.legs,
        "streams": record.streams,
        "media_complete": record.media_complete,
        "media_interruptions": record.media_interruptions,
        "media_gap_s": round(record.media_gap_s, 6),
    }
