"""Log lines: one JSON object each, whoever logs."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import structlog

from sippbx.runtime.logging import Format, configure_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def logged(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_line_has_its_plane_level_event_and_keys_with_utc_time() -> None:
    stream = io.StringIO()
    configure_logging("control", stream=stream)
    structlog.get_logger().info("call.answered", call_id="c1", legs=2)
    (line,) = logged(stream)
    assert datetime.fromisoformat(line.pop("timestamp")).utcoffset() == timedelta(0)
    assert line == {"level": "info", "event": "call.answered", "plane": "control", "call_id": "c1", "legs": 2}


def test_lines_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    configure_logging("control", level="warning", stream=stream)
    structlog.get_logger().info("call.answered")
    logging.getLogger("aiohttp").info("quiet")
    structlog.get_logger().warning("media.session_lost")
    assert [line["event"] for line in logged(stream)] == ["media.session_lost"]


def test_what_libraries_log_comes_in_the_same_form_with_the_loggers_name() -> None:
    stream = io.StringIO()
    configure_logging("dataplane", stream=stream)
    logging.getLogger("aiohttp.server").error("it %s", "broke")
    (line,) = logged(stream)
    assert (line["event"], line["logger"], line["level"], line["plane"]) == (
        "it broke",
        "aiohttp.server",
        "error",
        "dataplane",
    )


def test_libraries_debug_lines_are_left_out_even_at_debug() -> None:
    stream = io.StringIO()
    configure_logging("control", level="debug", stream=stream)
    logging.getLogger("asyncio").debug("selector")
    structlog.get_logger().debug("message.received")
    assert [line["event"] for line in logged(stream)] == ["message.received"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_exceptions_are_told_without_local_variables(log_format: Format) -> None:
    stream = io.StringIO()
    configure_logging("control", log_format=log_format, stream=stream)
    password = "do-not-" + "tell"
    try:
        raise ValueError(len(password))
    except ValueError:
        structlog.get_logger().exception("task.failed")
    assert "ValueError" in stream.getvalue()
    assert password not in stream.getvalue()


@pytest.mark.parametrize("value", [2**80, "\udcff", object(), {1: b"x"}])
def test_value_that_json_lacks_does_not_raise(value: object) -> None:
    stream = io.StringIO()
    configure_logging("control", stream=stream)
    structlog.get_logger().info("message.discarded", value=value)
    (line,) = logged(stream)
    assert (line["event"], line["level"]) == ("message.discarded", "info")
    assert "value" in line


def test_console_form_is_for_people() -> None:
    stream = io.StringIO()
    configure_logging("control", log_format="console", stream=stream)
    structlog.get_logger().info("call.answered", call_id="c1")
    assert "call.answered" in stream.getvalue()
    assert "call_id=c1" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_configuring_again_replaces_what_was() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("control", stream=first)
    configure_logging("control", stream=second)
    logging.getLogger("aiohttp").error("once")
    assert (first.getvalue(), len(logged(second))) == ("", 1)
