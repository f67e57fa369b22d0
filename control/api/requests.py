"""What the HTTP API is told: bodies as models, and queries, each with bounds and a fault that says what to do."""

from typing import Annotated, TypeVar

from aiohttp import hdrs, web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from control.api.problem import Problem

MAX_FAULTS = 5
MAX_QUERY_VALUE_CHARACTERS = 512
MAX_PAGE_SIZE_DIGITS = 6
JSON = "application/json"

PAGE_KEYS = ("page_size", "page_token")


class Body(BaseModel):
    """A body: types are taken literally, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Nothing(Body):
    """For verbs that need no more than their path: no body, or an empty object."""


class OriginateBody(Body):
    """Two parties to bring together: the caller's phone rings first, and the callee's once the caller has answered."""

    caller: Annotated[str, Field(description="A user or a number, as it would be dialled.")]
    callee: Annotated[str, Field(description="A user or a number, as the caller would dial it.")]


B = TypeVar("B", bound=Body)


async def body_of(request: web.Request, model: type[B], max_bytes: int) -> B:
    """The body as the model; no body counts as {}.

    Raises:
        Problem: it is too long, not JSON, or does not fit the model.
    """
    if (request.content_length or 0) > max_bytes:
        raise web.HTTPRequestEntityTooLarge(max_bytes, request.content_length or 0)
    data = await request.read()
    if data and request.content_type != JSON:
        detail = f"the body is {request.content_type}, not {JSON}; say Content-Type: {JSON}"
        raise Problem(415, "unsupported-media-type", detail, {hdrs.ACCEPT: JSON})
    try:
        return model.model_validate_json(data or b"{}")
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        if faults[0]["type"] == "json_invalid":
            raise Problem(400, "bad-json", f"the body is not JSON: {faults[0]['ctx']['error']}") from None
        told = "; ".join(_told(fault, model) for fault in faults[:MAX_FAULTS])
        raise Problem(400, "bad-body", told) from None


def query_of(request: web.Request, *known: str) -> dict[str, str]:
    """The query, of which each key may be given once.

    Raises:
        Problem: there is another key, the same one twice, or too long a value.
    """
    values: dict[str, str] = {}
    for key, value in request.query.items():
        if key not in known:
            choice = f"known are {', '.join(known)}" if known else "none is taken here"
            raise Problem(400, "bad-query", f"{key[:64]!r} is not a parameter of this path; {choice}")
        if key in values:
            raise Problem(400, "bad-query", f"{key} is given twice")
        if len(value) > MAX_QUERY_VALUE_CHARACTERS:
            raise Problem(400, "bad-query", f"{key} has more than {MAX_QUERY_VALUE_CHARACTERS} characters")
        values[key] = value
    return values


def page_of(query: dict[str, str]) -> tuple[int, str]:
    """Page size and page token: 0 and "" where there are none.

    Raises:
        Problem: the size is not a whole number.
    """
    size = query.get("page_size", "0")
    if not (size.isascii() and size.isdecimal() and len(size) <= MAX_PAGE_SIZE_DIGITS):
        raise Problem(400, "bad-query", "page_size must be a whole number; 0 means the default")
    return int(size), query.get("page_token", "")


def _told(fault: ErrorDetails, model: type[Body]) -> str:
    where = ".".join(str(part) for part in fault["loc"])[:64]
    match fault["type"]:
        case "missing":
            return f"{where} is required"
        case "extra_forbidden":
            known = ", ".join(model.model_fields)
            return f"{where!r} is not a key of this request; {f'known are {known}' if known else 'none is taken here'}"
        case "model_type":
            return "the body must be a JSON object"
        case _:
            return f"{where}: {fault['msg']}"
