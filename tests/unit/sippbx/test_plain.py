"""Messages of the contracts as plain values: the same words as in the call detail record."""

import json
from datetime import datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from control.events.cdr import cdr_line
from control.pbx.records import LegName, Reason, Result
from sippbx.control.v1 import call_service_pb2, event_service_pb2, registration_service_pb2
from sippbx.events.v1 import event_pb2, record_pb2
from sippbx.plain import event, plain
from tests.harness.records import INVITED_AT, call_record


def stamp(at: datetime | None) -> Timestamp | None:
    if at is None:
        return None
    message = Timestamp()
    message.FromDatetime(at)
    return message


def record_message() -> record_pb2.CallRecord:
    record = call_record()
    legs = {LegName.CALLER: record_pb2.LEG_CALLER, LegName.CALLEE: record_pb2.LEG_CALLEE}
    message = record_pb2.CallRecord(
        call_id=record.call_id,
        direction=record_pb2.CALL_DIRECTION_INTERNAL,
        caller=record.caller,
        callee=record.callee,
        invite_time=stamp(record.invited_at),
        ring_time=stamp(record.ringing_at),
        answer_time=stamp(record.answered_at),
        end_time=stamp(record.ended_at),
        termination=record_pb2.Termination(
            result=record_pb2.RESULT_ANSWERED,
            reason=record_pb2.REASON_HANGUP,
            sip_status=200,
            ended_by=record_pb2.LEG_CALLER,
        ),
        legs=[
            record_pb2.LegRecord(
                leg=legs[leg.name],
                sip_call_id=leg.sip_call_id,
                from_uri=leg.from_uri,
                to_uri=leg.to_uri,
                remote=leg.remote,
                user=leg.user or "",
                user_agent=leg.user_agent or "",
            )
            for leg in record.legs
        ],
        streams=[
            record_pb2.StreamRecord(
                leg=legs[stream.leg],
                line=stream.line,
                kind=stream.kind,
                packets=stream.packets,
                octets=stream.octets,
                lost=stream.lost,
                reordered=stream.reordered,
                rtcp_packets=stream.rtcp_packets,
                relayed_packets=stream.relayed_packets,
                dropped_packets=stream.dropped_packets,
                first_packet_time=stamp(stream.first_packet_at),
                last_packet_time=stamp(stream.last_packet_at),
            )
            for stream in record.streams
        ],
        media_complete=True,
        media_interruptions=1,
        media_gap=Duration(nanos=250_000_000),
    )
    message.setup_duration.FromMilliseconds(3000)
    message.talk_duration.FromMilliseconds(5000)
    message.streams[0].jitter.FromMicroseconds(125)
    return message


def test_record_reads_as_the_line_of_the_cdr_file() -> None:
    assert json.dumps(plain(record_message())) == json.dumps(json.loads(cdr_line(call_record())))


def test_every_result_and_reason_is_called_as_in_the_record() -> None:
    results = [plain(record_pb2.Termination(result=number))["result"] for number in record_pb2.Result.values()]
    reasons = [plain(record_pb2.Termination(reason=number))["reason"] for number in record_pb2.Reason.values()]
    assert results == [None, *(result.value for result in Result)]
    assert reasons == [None, *(reason.value for reason in Reason)]


def test_word_that_is_newer_than_this_program_is_its_number() -> None:
    assert plain(record_pb2.Termination(reason=999))["reason"] == 999  # type: ignore[arg-type]


def test_running_call_has_nothing_where_nothing_has_happened() -> None:
    call = call_service_pb2.Call(
        call_id="call-1", state=call_service_pb2.CALL_STATE_RINGING, invite_time=stamp(INVITED_AT)
    )
    assert plain(call) == {
        "call_id": "call-1",
        "state": "ringing",
        "direction": None,
        "caller": "",
        "callee": "",
        "invited_at": "2026-03-01T09:30:00.250000Z",
        "ringing_at": None,
        "answered_at": None,
        "record": None,
    }


def test_registration_of_a_phone_without_a_name_has_none() -> None:
    registration = registration_service_pb2.Registration(user="1001", contact="sip:x", source="h:1")
    assert plain(registration) == {
        "user": "1001",
        "contact": "sip:x",
        "source": "h:1",
        "user_agent": None,
        "expires_at": None,
    }


def event_message(**payload: Any) -> event_pb2.Event:
    return event_pb2.Event(sequence=7, id="evt_1", time=stamp(INVITED_AT), node="pbx-0", **payload)


def test_event_is_named_by_its_type_and_has_the_data_of_it() -> None:
    message = event_message(
        call_ringing=event_pb2.CallRinging(
            call_id="call-1",
            direction=record_pb2.CALL_DIRECTION_INBOUND,
            caller="+1",
            callee="1002",
            leg=record_pb2.LEG_CALLEE,
        )
    )
    assert event(message) == {
        "sequence": 7,
        "id": "evt_1",
        "type": "call.ringing",
        "at": "2026-03-01T09:30:00.250000Z",
        "node": "pbx-0",
        "data": {"call_id": "call-1", "direction": "inbound", "caller": "+1", "callee": "1002", "leg": "callee"},
    }


def test_end_of_a_call_has_its_record_for_data() -> None:
    told = event(event_message(call_ended=event_pb2.CallEnded(record=record_message())))
    assert (told["type"], told["data"]) == ("call.ended", plain(record_message()))


def test_error_that_concerns_no_call_has_none() -> None:
    told = event(event_message(node_error=event_pb2.NodeError(component="store", kind="write-failed")))
    assert (told["type"], told["data"]["call_id"]) == ("node.error", None)


def test_event_that_is_newer_than_this_program_is_shown_without_a_type() -> None:
    told = event(event_message())
    assert (told["type"], told["data"]) == (None, {})


def test_of_a_choice_only_what_was_chosen_is_told() -> None:
    assert plain(event_service_pb2.WatchEventsResponse(heartbeat=event_service_pb2.Heartbeat(sequence=3))) == {
        "heartbeat": {"sequence": 3, "time": None}
    }
