"""Structured logs on standard error: one JSON object a line, or a form for people.

Every line has `timestamp` (UTC, ISO 8601), `level`, `event` and `plane`; the rest are the keys that the caller gave.
What libraries log through the standard library comes out in the same form, with the logger's name in `logger`.
"""

import json
import logging
import sys
from typing import Any, Literal, TextIO

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["json", "console"]

LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure_logging(
    plane: str, *, level: Level = "info", log_format: Format = "json", stream: TextIO | None = None
) -> None:
    """Sets up structlog and the standard library's logging for this process; may be called again.

    `plane` is noted in every line. `stream` is standard error unless given. Local variables are never logged with an
    exception: they may hold credentials.
    """
    stream = stream or sys.stderr

    def add_plane(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("plane", plane)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        add_plane,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[Processor]
    if log_format == "json":
        rendering = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_dumps)]
    else:
        rendering = [
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]

    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    # Libraries tell at DEBUG what nobody wants to know beside our own DEBUG lines.
    logging.basicConfig(level=max(LEVELS[level], logging.INFO), handlers=[handler], force=True)


def _dumps(event: Any, **_options: Any) -> str:
    try:
        return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except orjson.JSONEncodeError:
        # Octets that are not UTF-8, and integers beyond 64 bits: the slower encoder takes both.
        return json.dumps(event, default=str, skipkeys=True)
