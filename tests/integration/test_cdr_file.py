"""control.events.cdr on a real file."""

import asyncio
import json
import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from control.events import cdr
from control.events.cdr import CdrFile, cdr_line
from control.metrics import ControlMetrics
from control.pbx.records import Reason, Result, Termination
from tests.harness.records import INVITED_AT, call_record

pytestmark = pytest.mark.integration


def ids(path: Path) -> list[str]:
    return [json.loads(line)["call_id"] for line in path.read_text().splitlines()]


def test_a_line_has_the_documented_keys_and_forms() -> None:
    line = cdr_line(call_record())
    assert line.endswith(b"}\n")
    document = json.loads(line)
    assert list(document) == [
        "version", "call_id", "direction", "caller", "callee", "invited_at", "ringing_at", "answered_at", "ended_at",
        "setup_s", "duration_s", "termination", "legs", "streams", "media_complete", "media_interruptions",
        "media_gap_s",
    ]  # fmt: skip
    assert set(document) | {key for part in ("termination",) for key in document[part]} <= set(
        (cdr.__doc__ or "").replace(",", " ").split()
    )
    assert document["invited_at"] == "2026-03-01T09:30:00.250000Z"
    assert datetime.fromisoformat(document["ended_at"]) == INVITED_AT + timedelta(seconds=8)
    assert document["termination"] == {
        "result": "answered", "reason": "hangup", "sip_status": 200, "ended_by": "caller", "detail": "",
    }  # fmt: skip
    assert [leg["name"] for leg in document["legs"]] == ["caller", "callee"]
    assert document["streams"][0]["jitter_ms"] == 0.125
    assert document["streams"][1]["jitter_ms"] is None


def test_what_did_not_happen_is_null() -> None:
    termination = Termination(Result.BUSY, Reason.CALLEE_BUSY, 486)
    document = json.loads(cdr_line(call_record(ringing_at=None, answered_at=None, termination=termination)))
    assert (document["ringing_at"], document["answered_at"]) == (None, None)
    assert document["termination"]["ended_by"] is None


async def test_records_are_appended_in_order_behind_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "cdr.jsonl"
    for calls in (("a", "b"), ("c",)):
        file = CdrFile(path, metrics=ControlMetrics())
        file.add([call_record(call_id) for call_id in calls])
        await file.close()
    assert ids(path) == ["a", "b", "c"]


async def test_a_renamed_file_is_followed_by_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "cdr.jsonl"
    metrics = ControlMetrics()
    file = CdrFile(path, metrics=metrics)
    file.add([call_record("a")])
    await until_written(metrics, 1)
    path.rename(tmp_path / "cdr.jsonl.1")
    file.add([call_record("b")])
    await file.close()
    assert (ids(tmp_path / "cdr.jsonl.1"), ids(path)) == (["a"], ["b"])


async def until_written(metrics: ControlMetrics, count: int) -> None:
    async with asyncio.timeout(10):
        labels = {"backend": "jsonl"}
        while metrics.registry.get_sample_value("sip_pbx_cdrs_written_total", labels) != count:
            await asyncio.sleep(0.01)


async def test_a_line_cut_by_a_crash_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "cdr.jsonl"
    path.write_bytes(b'{"call_id": "cu')
    file = CdrFile(path, metrics=ControlMetrics())
    file.add([call_record("next")])
    await file.close()
    assert json.loads(path.read_text().splitlines()[1])["call_id"] == "next"


async def test_a_group_that_fails_halfway_is_taken_back_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cdr.jsonl"
    path.write_bytes(cdr_line(call_record("before")))
    real_write = os.write
    failures = iter([10, OSError(28, "No space left on device")])

    def failing_write(descriptor: int, data: memoryview) -> int:
        match next(failures, None):
            case OSError() as error:
                raise error
            case int() as room:
                return real_write(descriptor, data[:room])
            case _:
                return real_write(descriptor, data)

    monkeypatch.setattr("control.events.cdr.os.write", failing_write)
    metrics = ControlMetrics()
    file = CdrFile(path, metrics=metrics)
    file.add([call_record("after")])
    await until_written(metrics, 1)
    await file.close()
    assert ids(path) == ["before", "after"]
    labels = {"component": "events", "kind": "cdr_write_failed"}
    assert metrics.registry.get_sample_value("sip_pbx_errors_total", labels) == 1


async def test_what_has_no_room_is_counted(tmp_path: Path) -> None:
    metrics = ControlMetrics()
    file = CdrFile(tmp_path / "cdr.jsonl", metrics=metrics, max_pending=2)
    file.add([call_record(str(number)) for number in range(3)])
    await file.close()
    assert ids(tmp_path / "cdr.jsonl") == ["0", "1"]
    assert metrics.registry.get_sample_value("sip_pbx_cdr_failures_total", {"backend": "jsonl"}) == 1


async def test_lines_that_cannot_be_written_before_the_end_are_counted(tmp_path: Path) -> None:
    metrics = ControlMetrics()
    (tmp_path / "cdr.jsonl").mkdir()
    file = CdrFile(tmp_path / "cdr.jsonl", metrics=metrics)
    file.add([call_record()])
    await file.close(timeout_s=0.1)
    assert metrics.registry.get_sample_value("sip_pbx_cdr_failures_total", {"backend": "jsonl"}) == 1
