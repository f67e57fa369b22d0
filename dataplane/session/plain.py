"""Values as plain data: dataclasses as lists of their fields in order, for writers and readers of the same version."""

import dataclasses
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints


def plain(value: object) -> Any:
    """Return what JSON can hold of a value: dataclasses and tuples as lists, enums as their values."""
    if dataclasses.is_dataclass(value):
        return [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value


def decoder_of(hint: Any) -> Callable[[Any], Any]:
    """Return a function that makes a value of this type, known by its annotation, out of its plain form.

    It raises ValueError or TypeError for what does not fit; scalars are taken as they are.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        decode_inner = decoder_of(inner)
        return lambda value: None if value is None else decode_inner(value)
    if origin is tuple and arguments[-1] is Ellipsis:
        decode_item = decoder_of(arguments[0])
        return lambda value: tuple(map(decode_item, value))
    if origin is tuple:
        decoders = [decoder_of(argument) for argument in arguments]
        return lambda value: tuple(decoder(item) for decoder, item in zip(decoders, value, strict=True))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        fields = [decoder_of(hints[field.name]) for field in dataclasses.fields(hint)]
        return lambda value: hint(*(decoder(item) for decoder, item in zip(fields, value, strict=True)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint
    return lambda value: value
