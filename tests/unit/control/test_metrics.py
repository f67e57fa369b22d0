from datetime import timedelta

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from control.metrics import ControlMetrics
from control.pbx.records import CallDirection, CallEventKind, Reason, Result, Termination
from control.sip.stack import MessageLabel
from tests.harness.records import INVITED_AT, call_event, call_record


@pytest.fixture
def metrics() -> ControlMetrics:
    made = ControlMetrics()
    made.bind(
        active_calls=lambda: {"ringing": 2, "established": 3},
        registrations=lambda: 4,
        transactions=lambda: {"ict": 1, "ist": 2},
        sockets=lambda: {"received": 7},
        ready=lambda: True,
        draining=lambda: False,
    )
    return made


def value(metrics: ControlMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_the_four_names_exist_exactly_before_the_first_call(metrics: ControlMetrics) -> None:
    text = generate_latest(metrics.registry).decode()
    samples = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert {
        "sip_pbx_active_calls",
        "sip_pbx_total_calls",
        "sip_pbx_call_duration_seconds_bucket",
        "sip_pbx_errors_total",
    } <= samples
    assert "# TYPE sip_pbx_total_calls untyped" in text


def test_the_text_keeps_to_the_rules_of_the_format(metrics: ControlMetrics) -> None:
    families = list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    for family in families:
        assert family.documentation, family.name
        assert family.type != "counter" or all(sample.name.endswith("_total") for sample in family.samples), family.name
        keys = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(keys) == len(set(keys)), family.name
        assert not any(sample.name.endswith("_created") for sample in family.samples)
    assert {
        family.name for family in families if not family.name.startswith(("sip_pbx_", "process_", "python_"))
    } == set()


def test_a_call_from_start_to_end_is_counted_once_in_each_place(metrics: ControlMetrics) -> None:
    for kind, elapsed_s in (
        (CallEventKind.STARTED, 0.0),
        (CallEventKind.FORWARDED, 0.02),
        (CallEventKind.RINGING, 0.5),
        (CallEventKind.ANSWERED, 3.0),
        (CallEventKind.ENDED, 8.0),
    ):
        metrics.observe(call_event(kind, elapsed_s=elapsed_s))
    assert value(metrics, "sip_pbx_calls_total", direction="internal") == 1
    assert value(metrics, "sip_pbx_total_calls") == 1
    ended = {"direction": "internal", "result": "answered", "reason": "hangup"}
    assert value(metrics, "sip_pbx_calls_ended_total", **ended) == 1
    sums = {
        name: (
            value(metrics, f"sip_pbx_{name}_count", direction="internal"),
            value(metrics, f"sip_pbx_{name}_sum", direction="internal"),
        )
        for name in ("call_setup_seconds", "post_dial_delay_seconds", "ring_seconds", "call_duration_seconds")
    }
    assert sums == {
        "call_setup_seconds": (1, 0.02),
        "post_dial_delay_seconds": (1, 0.5),
        "ring_seconds": (1, 2.5),
        "call_duration_seconds": (1, 5.0),
    }


def test_an_unanswered_call_has_no_duration(metrics: ControlMetrics) -> None:
    record = call_record(answered_at=None, termination=Termination(Result.NO_ANSWER, Reason.RING_TIMEOUT, 408))
    metrics.observe(call_event(CallEventKind.ENDED, record=record))
    assert value(metrics, "sip_pbx_call_duration_seconds_count", direction="internal") == 0
    labels = {"direction": "internal", "result": "no_answer", "reason": "ring-timeout"}
    assert value(metrics, "sip_pbx_calls_ended_total", **labels) == 1


def test_a_clock_that_was_set_back_gives_no_negative_ring_time(metrics: ControlMetrics) -> None:
    record = call_record(ringing_at=INVITED_AT + timedelta(seconds=9))
    metrics.observe(call_event(CallEventKind.ENDED, record=record))
    assert value(metrics, "sip_pbx_ring_seconds_sum", direction="internal") == 0


def test_the_alias_sums_all_directions(metrics: ControlMetrics) -> None:
    for direction in CallDirection:
        metrics.observe(call_event(CallEventKind.STARTED, direction=direction))
    assert value(metrics, "sip_pbx_total_calls") == 3


def test_every_termination_has_its_series_from_the_start(metrics: ControlMetrics) -> None:
    for reason in Reason:
        labels = {"direction": "inbound", "result": "failed", "reason": reason.value}
        assert value(metrics, "sip_pbx_calls_ended_total", **labels) == 0


def test_gauges_are_read_from_the_tables(metrics: ControlMetrics) -> None:
    assert value(metrics, "sip_pbx_active_calls") == 5
    assert value(metrics, "sip_pbx_calls_by_state", state="established") == 3
    assert value(metrics, "sip_pbx_registrations") == 4
    assert value(metrics, "sip_pbx_sip_transactions", kind="ist") == 2
    assert value(metrics, "sip_pbx_sip_socket_events_total", event="received") == 7
    assert (value(metrics, "sip_pbx_ready"), value(metrics, "sip_pbx_draining")) == (1, 0)


def test_sip_messages_are_counted_by_method_and_class(metrics: ControlMetrics) -> None:
    metrics.sip_message("in", MessageLabel("INVITE"))
    metrics.sip_message("in", MessageLabel("INVITE", None, retransmission=True))
    metrics.sip_message("out", MessageLabel("INVITE", 180))
    metrics.sip_message("out", MessageLabel("INVITE", 486))
    metrics.sip_message("out", MessageLabel("INVITE", 486, retransmission=True))
    assert value(metrics, "sip_pbx_sip_requests_total", method="INVITE", direction="in", transport="udp") == 2
    assert value(metrics, "sip_pbx_sip_retransmissions_total", method="INVITE", direction="in") == 1
    assert value(metrics, "sip_pbx_sip_responses_total", method="INVITE", code_class="1xx", direction="out") == 1
    assert value(metrics, "sip_pbx_sip_responses_total", method="INVITE", code_class="4xx", direction="out") == 2
    assert value(metrics, "sip_pbx_sip_final_responses_total", method="INVITE", code="486", direction="out") == 1
    assert value(metrics, "sip_pbx_sip_final_responses_total", method="INVITE", code="180", direction="out") is None


def test_malformed_datagrams_are_parse_errors_and_strays_are_not(metrics: ControlMetrics) -> None:
    metrics.sip_discarded("malformed")
    metrics.sip_discarded("stray-response")
    assert value(metrics, "sip_pbx_sip_parse_errors_total") == 1
    assert value(metrics, "sip_pbx_sip_discarded_total", reason="stray-response") == 1


def test_methods_of_strangers_make_no_series_of_their_own(metrics: ControlMetrics) -> None:
    metrics.authentication("EVIL-%d", "wrong")
    assert value(metrics, "sip_pbx_sip_auth_total", method="OTHER", result="wrong") == 1


def test_edges_count_what_they_do(metrics: ControlMetrics) -> None:
    metrics.registration("registered")
    metrics.error("media", "answer_failed")
    metrics.media_command("create", "ports_exhausted", 0.003)
    metrics.media_connected(True)
    metrics.media_restored("ok")
    metrics.cdrs_written("sqlite", 3)
    metrics.cdr_failed("jsonl", 2)
    metrics.event_loop_lag(0.004)
    assert value(metrics, "sip_pbx_register_requests_total", result="registered") == 1
    assert value(metrics, "sip_pbx_errors_total", component="media", kind="answer_failed") == 1
    assert value(metrics, "sip_pbx_media_rpc_seconds_sum", method="create", code="ports_exhausted") == 0.003
    assert value(metrics, "sip_pbx_media_connected") == 1
    assert value(metrics, "sip_pbx_media_restores_total", result="ok") == 1
    assert value(metrics, "sip_pbx_cdrs_written_total", backend="sqlite") == 3
    assert value(metrics, "sip_pbx_cdr_failures_total", backend="jsonl") == 2
    assert value(metrics, "sip_pbx_event_loop_lag_seconds_count") == 1
