"""Machines as plain data, so that a call outlives its process.

`save` turns a machine into what JSON can hold, by the annotations of its dataclasses; `restore` makes it again. Every
field is saved, save callables: those are tokens and chance, and the new process brings its own. A field that has its
default is left out and a field that is not known is passed over, so that neighbouring versions can read each other.

Monotonic time dies with the process: fields annotated as `Moment` are moved to the new one's by an offset.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum
from typing import Annotated, Any, Final, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from control.sip.message import Headers, Request, Response

MONOTONIC: Final = "monotonic seconds"
Moment = Annotated[float, MONOTONIC]
"""A moment in monotonic seconds, as `now` is."""

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
T = TypeVar("T")

_KIND: Final = "$"
_SCALARS: Final = frozenset({bool, int, float, str})


class SnapshotError(Exception):
    """What was saved cannot be made a machine again; the message says where."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a restored machine needs of its new process."""

    offset_s: float
    callables: Mapping[str, Callable[..., Any]]


_Dump = Callable[[Any], Any]
_Load = Callable[[Any, _Surroundings], Any]


def save(value: object) -> Plain:
    """The fields of a dataclass, and of what they hold, as plain data.

    Raises:
        TypeError: a field has an annotation that this module knows no form for: an error of ours.
    """
    plain: Plain = _codec(type(value))[0](value)
    return plain


def restore(kind: type[T], plain: Plain, *, offset_s: float, callables: Mapping[str, Callable[..., Any]]) -> T:
    """Make a machine of what `save` gave.

    `offset_s` is added to each Moment; `callables` are by field name.

    Raises:
        SnapshotError: it does not fit.
    """
    try:
        value = _codec(kind)[1](plain, _Surroundings(offset_s, callables))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise SnapshotError(f"{kind.__name__} cannot be restored: {error!r}") from error
    if not isinstance(value, kind):
        raise SnapshotError(f"{kind.__name__} cannot be restored from {type(plain).__name__}")
    return value


_codecs: dict[Any, tuple[_Dump, _Load]] = {}


def _codec(annotation: Any) -> tuple[_Dump, _Load]:
    """How values of an annotation are written and read."""
    known = _codecs.get(annotation)
    if known is None:
        known = _codecs[annotation] = _make_codec(annotation)
    return known


def _make_codec(annotation: Any) -> tuple[_Dump, _Load]:  # noqa: C901 -- one case for each form
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if MONOTONIC in arguments[1:]:
            return _same, lambda plain, around: plain + around.offset_s
        return _codec(arguments[0])
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if origin is tuple and arguments[-1:] == (...,):
        dump, load = _codec(arguments[0])
        return lambda value: [dump(item) for item in value], lambda plain, around: tuple(
            load(item, around) for item in plain
        )
    if origin is tuple:
        parts = [_codec(argument) for argument in arguments]
        return (
            lambda value: [dump(item) for (dump, _), item in zip(parts, value, strict=True)],
            lambda plain, around: tuple(load(item, around) for (_, load), item in zip(parts, plain, strict=True)),
        )
    if origin is list:
        dump, load = _codec(arguments[0])
        return lambda value: [dump(item) for item in value], lambda plain, around: [
            load(item, around) for item in plain
        ]
    if origin is dict or origin is Mapping:
        (dump_key, load_key), (dump, load) = _codec(arguments[0]), _codec(arguments[1])
        return (
            lambda value: [[dump_key(key), dump(item)] for key, item in value.items()],
            lambda plain, around: {load_key(key, around): load(item, around) for key, item in plain},
        )
    if hasattr(annotation, "__supertype__"):
        return _codec(annotation.__supertype__)
    if annotation in _SCALARS or annotation is type(None):
        return _same, lambda plain, _: plain
    if annotation is bytes:
        return lambda value: value.decode("latin-1"), lambda plain, _: plain.encode("latin-1")
    if annotation is datetime:
        return lambda value: value.isoformat(), lambda plain, _: datetime.fromisoformat(plain)
    if annotation is Request:
        return _dump_request, lambda plain, _: Request(plain[0], plain[1], Headers(_pairs(plain[2])), _octets(plain[3]))
    if annotation is Response:
        return _dump_response, lambda plain, _: Response(
            plain[0], plain[1], Headers(_pairs(plain[2])), _octets(plain[3])
        )
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return lambda value: value.value, lambda plain, _: annotation(plain)
    if dataclasses.is_dataclass(annotation):
        return _fields(annotation)
    raise TypeError(f"no plain form for {annotation!r}")


def _same(value: Any) -> Any:
    return value


def _fields(kind: Any) -> tuple[_Dump, _Load]:
    hints = get_type_hints(kind, include_extras=True)
    callables = [field.name for field in dataclasses.fields(kind) if get_origin(hints[field.name]) is _CALLABLE]
    # Looked up when they are first needed: a class may hold itself.
    kept = [(field, hints[field.name]) for field in dataclasses.fields(kind) if field.name not in callables]

    steps: list[_Step] = []

    def dump(value: Any) -> Any:
        if not steps:
            steps.extend(_Step.of(field, _codec(hint)[0]) for field, hint in kept)
        plain = {}
        for name, default, by_value, empty, dump_item in steps:
            item = getattr(value, name)
            if item is default or (by_value and item == default) or (not item and item == empty):
                continue
            plain[name] = item if dump_item is _same else dump_item(item)
        return plain

    def load(plain: Any, around: _Surroundings) -> Any:
        values: dict[str, Any] = {name: around.callables[name] for name in callables}
        for field, hint in kept:
            if field.name in plain:
                values[field.name] = _codec(hint)[1](plain[field.name], around)
        return kind(**values)

    return dump, load


_CALLABLE: Final = get_origin(Callable[[], None])


class _Step(NamedTuple):
    """How a field is written: left out when it is `default`, equal to it if `by_value`, or as empty as `empty`."""

    name: str
    default: Any
    by_value: bool
    empty: Any
    dump: _Dump

    @staticmethod
    def of(field: "dataclasses.Field[Any]", dump: _Dump) -> "_Step":
        factory = field.default_factory
        empty = dataclasses.MISSING if factory is dataclasses.MISSING else factory()
        return _Step(field.name, field.default, type(field.default) in _SCALARS | {bytes}, empty, dump)


def _union(arguments: tuple[Any, ...]) -> tuple[_Dump, _Load]:
    """None and one other form; or one of several classes, told apart by their names."""
    others = [argument for argument in arguments if argument is not type(None)]
    if len(others) == 1:
        dump, load = _codec(others[0])
        return (
            lambda value: None if value is None else dump(value),
            lambda plain, around: None if plain is None else load(plain, around),
        )
    kinds = {kind.__name__: kind for kind in others}

    def dump_one(value: Any) -> Any:
        return None if value is None else {_KIND: type(value).__name__, "value": _codec(type(value))[0](value)}

    def load_one(plain: Any, around: _Surroundings) -> Any:
        return None if plain is None else _codec(kinds[plain[_KIND]])[1](plain["value"], around)

    return dump_one, load_one


def _dump_request(request: Request) -> list[Any]:
    return [
        request.method,
        request.uri,
        [list(pair) for pair in request.headers.items()],
        request.body.decode("latin-1"),
    ]


def _dump_response(response: Response) -> list[Any]:
    return [response.status, response.reason, _lists(response.headers), response.body.decode("latin-1")]


def _lists(headers: Headers) -> list[list[str]]:
    return [list(pair) for pair in headers.items()]


def _pairs(plain: list[list[str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in plain]


def _octets(plain: str) -> bytes:
    return plain.encode("latin-1")
