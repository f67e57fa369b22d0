"""Machines as plain data: what is kept, what moves with the clock, and what cannot be read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import NewType

import pytest

from control.sip.message import Headers, Request, Response
from control.sip.snapshot import Moment, Plain, SnapshotError, restore, save

Id = NewType("Id", str)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    start: Point
    end: Point


@dataclass(slots=True)
class Machine:
    id: Id
    colour: Colour
    at: Moment
    draw: Callable[[], float]
    later: Moment | None = None
    shape: Point | Line | None = None
    points: tuple[Point, ...] = ()
    pair: tuple[Colour, int] | None = None
    by_colour: dict[Colour, Point] = field(default_factory=dict)
    told: Mapping[str, bytes] = field(default_factory=dict)
    waiting: list[bytes] = field(default_factory=list)
    utc: datetime | None = None
    request: Request | None = None
    response: Response | None = None


def one() -> float:
    return 1.0


def reborn(machine: Machine, *, offset_s: float = 0.0) -> Machine:
    return restore(Machine, json.loads(json.dumps(save(machine))), offset_s=offset_s, callables={"draw": one})


FULL = Machine(
    id=Id("m-1"),
    colour=Colour.BLUE,
    at=100.0,
    draw=one,
    later=105.5,
    shape=Line(Point(1, 2), Point(3)),
    points=(Point(1), Point(2, 5)),
    pair=(Colour.RED, 7),
    by_colour={Colour.RED: Point(4)},
    told={"a": b"\x00\xff"},
    waiting=[b"one", b"two"],
    utc=datetime(2026, 3, 1, 9, 30, tzinfo=UTC),
)


def test_every_field_comes_back() -> None:
    assert reborn(FULL) == FULL


def test_moments_move_with_the_clock_and_nothing_else_does() -> None:
    moved = reborn(FULL, offset_s=1000.0)
    assert (moved.at, moved.later) == (1100.0, 1105.5)
    moved.at, moved.later = FULL.at, FULL.later
    assert moved == FULL


def test_messages_come_back_with_all_their_headers_and_octets() -> None:
    headers = Headers([("Via", "SIP/2.0/UDP h;branch=z9hG4bK1"), ("via", "x"), ("From", "J\udcfcrg <sip:a@b>;tag=1")])
    machine = Machine(Id("m"), Colour.RED, 0.0, one)
    machine.request = Request("INVITE", "sip:b@c", headers, b"\x00v=0\r\n")
    machine.response = Response(180, "Ringing", headers, b"")
    again = reborn(machine)
    assert again.request is not None
    assert again.response is not None
    assert list(again.request.headers.items()) == list(headers.items())
    assert (again.request.method, again.request.uri, again.request.body) == ("INVITE", "sip:b@c", b"\x00v=0\r\n")
    assert again.request.encode() == machine.request.encode()
    assert again.response.encode() == machine.response.encode()


def test_defaults_are_not_written() -> None:
    assert save(Machine(Id("m"), Colour.RED, 0.0, one)) == {"id": "m", "colour": "red", "at": 0.0}


def test_what_an_older_version_did_not_know_has_its_default_and_what_a_newer_one_added_is_passed_over() -> None:
    plain: Plain = {"id": "m", "colour": "red", "at": 1.0, "of a newer version": [1]}
    assert restore(Machine, plain, offset_s=0.0, callables={"draw": one}) == Machine(Id("m"), Colour.RED, 1.0, one)


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [],
        {"id": "m"},
        {"id": "m", "colour": "green", "at": 0.0},
        {"id": "m", "colour": "red", "at": "soon"},
        {"id": "m", "colour": "red", "at": 0.0, "points": [5]},
        {"id": "m", "colour": "red", "at": 0.0, "shape": {"$": "Circle", "value": {}}},
    ],
)
def test_what_does_not_fit_is_refused(plain: object) -> None:
    with pytest.raises(SnapshotError, match="Machine cannot be restored"):
        restore(Machine, plain, offset_s=0.0, callables={"draw": one})  # type: ignore[arg-type]


def test_a_field_of_a_kind_without_plain_form_is_an_error_of_ours() -> None:
    @dataclass
    class Odd:
        value: set[int]

    with pytest.raises(TypeError, match="no plain form"):
        save(Odd({1}))
