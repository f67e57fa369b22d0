"""Reads settings: a YAML file, overridden by the environment, checked by a pydantic model.

Scalars are text until the model types them, so that 0100, +82 or no mean what they say, with or without quotes. In the
environment, PREFIX_SECTION__KEY sets section.key; lists and whole sections are written there as YAML (JSON will do) and
replace what the file says. What is wrong is told by the path of its key, all at once, never with the value of a secret.
"""

from collections.abc import Hashable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[str | int, ...]


class SettingsError(Exception):
    """The settings cannot be used. `messages` tells everything that is wrong, a line each, with the path of its key."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class Fault(NamedTuple):
    """Something wrong, where, and what to do about it."""

    location: Location
    message: str


class ContradictionError(ValueError):
    """Raised by a model whose keys do not go together; locations are relative to that model."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = faults


def path_of(location: Location) -> str:
    """A location as people write it: trunks[1].destination."""
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)
    return path.removeprefix(".")


def nearest_of(name: str, known: set[str]) -> str:
    """A hint for somebody who wrote `name` where one of `known` belongs."""
    if close := get_close_matches(name, known, n=1):
        return f"did you mean {close[0]!r}?"
    return f"there are: {', '.join(sorted(known))}" if known else "there are none"


def read(model: type[Model], path: Path | None, prefix: str, environ: Mapping[str, str]) -> Model:
    """The settings in the file, if any, with the variables of this prefix over it; other variables are not looked at.

    Raises:
        SettingsError: with everything that is wrong, as far as it can be told in one go.
    """
    values = _read_file(path) if path is not None else {}
    overrides, unknown = _from_environment(model, prefix, environ)
    for location, override in overrides.items():
        _set(values, location, override.value)
    try:
        settings = model.model_validate(values)
    except ValidationError as error:
        faults = [fault for details in error.errors() for fault in _faults(model, details)]
        raise SettingsError(unknown + [_described(fault, overrides) for fault in faults]) from None
    if unknown:
        raise SettingsError(unknown)
    return settings


class _Override(NamedTuple):
    variable: str
    value: object


class _TextLoader(yaml.SafeLoader):
    """YAML whose scalars are text, save null."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is set twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_TextLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str, origin: str) -> object:
    try:
        return yaml.load(text, _TextLoader)  # noqa: S506 (a SafeLoader that resolves less)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise SettingsError([f"{origin}: {line}{error.problem}"]) from None
    except yaml.YAMLError as error:
        raise SettingsError([f"{origin}: {error}"]) from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{path}: cannot be read: {error}"]) from None
    values = _parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError([f"{path}: must hold keys and values, such as 'realm: example.org'"])
    # A section whose keys are all commented out is the section of defaults.
    return {str(key): value for key, value in values.items() if value is not None}


def _from_environment(
    root: type[BaseModel], prefix: str, environ: Mapping[str, str]
) -> tuple[dict[Location, _Override], list[str]]:
    overrides: dict[Location, _Override] = {}
    unknown: list[str] = []
    for variable in sorted(name for name in environ if name.startswith(prefix)):
        location = tuple(variable.removeprefix(prefix).lower().split("__"))
        model: type[BaseModel] | None = root
        annotation: object = root
        for depth, key in enumerate(location):
            fields = _fields(model) if get_origin(annotation) is not tuple else {}
            if key not in fields:
                if get_origin(annotation) is tuple:
                    choices = "a list is set as a whole"
                else:
                    choices = nearest_of(key, set(fields)) if fields else f"{path_of(location[:depth])!r} has no keys"
                unknown.append(
                    f"{path_of(location[: depth + 1])}: unknown key in the environment variable {variable}; {choices}"
                )
                break
            annotation = fields[key].annotation
            model = _model_in(annotation)
        else:
            structured = model is not None or get_origin(annotation) is tuple
            value = environ[variable]
            overrides[location] = _Override(variable, _parse(value, variable) if structured else value)
    return overrides, unknown


def _set(values: dict[str, Any], location: Location, value: object) -> None:
    section = values
    for key in location[:-1]:
        section = section.setdefault(str(key), {})
        if not isinstance(section, dict):
            return  # The file has no section there, which is reported for itself.
    section[str(location[-1])] = value


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for argument in get_args(annotation) if (model := _model_in(argument))), None)


def _fields(model: type[BaseModel] | None) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()} if model else {}


# What to tell people, by pydantic's error type; {input} is what was given and appears only where no secret can be.
_MESSAGES = {
    "missing": "is required",
    "model_type": "must hold keys and values",
    "tuple_type": "must be a list, each entry on a line of its own behind '- '",
    "string_type": "must be a single value",
    "int_parsing": "{input!r} is not a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "{input!r} is not a number",
    "float_type": "must be a number",
    "finite_number": "{input} is not a finite number",
    "enum": "{input!r} is not one of {expected}",
    "greater_than": "{input} is too little; it must be more than {gt:g}",
    "greater_than_equal": "{input} is too little; it must be at least {ge:g}",
    "less_than_equal": "{input} is too much; it must be at most {le:g}",
    "too_short": "must have at least {min_length} entry",
    "too_long": "must have at most {max_length} entries",
    "path_type": "must be a path",
}


def _faults(root: type[BaseModel], details: ErrorDetails) -> Iterator[Fault]:
    location, context = details["loc"], details.get("ctx", {})
    error = context.get("error")
    if isinstance(error, ContradictionError):
        for fault in error.faults:
            yield Fault(location + fault.location, fault.message)
    elif isinstance(error, ValueError):
        yield Fault(location, str(error))
    elif details["type"] == "extra_forbidden":
        model: type[BaseModel] | None = root
        for key in location[:-1]:
            model = model if isinstance(key, int) else _model_in(_fields(model)[key].annotation)
        yield Fault(location, f"unknown key; {nearest_of(str(location[-1]), set(_fields(model)))}")
    else:
        template = _MESSAGES.get(details["type"])
        yield Fault(location, template.format(input=details["input"], **context) if template else details["msg"])


def _described(fault: Fault, overrides: Mapping[Location, _Override]) -> str:
    variable = next(
        (o.variable for location, o in overrides.items() if fault.location[: len(location)] == location), None
    )
    return f"{path_of(fault.location)}: {fault.message}" + (f" (set by {variable})" if variable else "")
