"""What the client makes of errors; what it does on the wire is in tests/integration/test_grpc_api.py."""

from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from sippbx import client
from sippbx.client import ClientError

DETAILS_KEY = "grpc-status-details-bin"


def rpc_error(code: grpc.StatusCode, message: str, details: Sequence[Any] = (), key: str = DETAILS_KEY) -> Any:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    trailing = grpc.aio.Metadata((key, status.SerializeToString()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=message)


def test_error_has_the_nodes_reason_and_when_to_come_back() -> None:
    error = client._client_error(
        rpc_error(
            grpc.StatusCode.UNAVAILABLE,
            "the node drains",
            [
                error_details_pb2.ErrorInfo(reason="draining", domain="sippbx"),
                error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000)),
            ],
        )
    )
    assert (error.code, error.reason, error.detail) == (grpc.StatusCode.UNAVAILABLE, "draining", "the node drains")
    assert error.retry_after_s == 2.5
    assert str(error) == "draining: the node drains"


@pytest.mark.parametrize(
    "raised",
    [
        rpc_error(grpc.StatusCode.UNAVAILABLE, "no route", key="other-bin"),
        rpc_error(grpc.StatusCode.UNAVAILABLE, "no route", [error_details_pb2.ErrorInfo(reason="x", domain="proxy")]),
        grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, details="no route"),
        grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE,
            grpc.aio.Metadata(),
            grpc.aio.Metadata((DETAILS_KEY, status_pb2.Status(code=3, message="else").SerializeToString())),
            details="no route",
        ),
        grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE,
            grpc.aio.Metadata(),
            grpc.aio.Metadata((DETAILS_KEY, b"\xff\xff")),
            details="no route",
        ),
    ],
)
def test_error_that_is_not_the_nodes_has_no_reason(raised: grpc.aio.AioRpcError) -> None:
    error = client._client_error(raised)
    assert (error.code, error.reason, error.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, "", None)
    assert str(error) == "unavailable: no route"


async def test_waiting_grows_to_a_bound_and_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    backoff = client._Backoff()
    for _ in range(2000):
        await backoff.wait()
    for wait, most in zip(waits, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0], strict=False):
        assert most / 2 <= wait <= most
    assert max(waits) <= 5.0
    assert len(set(waits)) > 1000
    backoff.reset()
    await backoff.wait()
    assert waits[-1] <= 0.1


async def test_when_time_is_up_the_error_says_what_it_was_spent_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(_seconds: float) -> None:
        pass

    failures = [
        grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, details="certificate verify failed"),
        grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, details="Deadline Exceeded"),
    ]

    async def verb(_request: object, **_options: object) -> None:
        raise failures.pop(0)

    monkeypatch.setattr("asyncio.sleep", sleep)
    async with client.Client("192.0.2.1:50051", "key") as made:
        with pytest.raises(ClientError) as failed:
            await made._ask(verb, None)
    assert failures == []
    assert (failed.value.code, failed.value.detail) == (grpc.StatusCode.UNAVAILABLE, "certificate verify failed")


def test_error_tells_its_code_where_there_is_no_reason() -> None:
    assert str(ClientError(grpc.StatusCode.DEADLINE_EXCEEDED, "", "too late")) == "deadline-exceeded: too late"
