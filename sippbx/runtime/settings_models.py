"""What the settings of both planes share: strict sections and logging."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from sippbx.runtime.settings_reader import ContradictionError, Fault


class Section(BaseModel):
    """A part of the settings: immutable, without unknown keys and without contradictions."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def contradictions(self) -> Iterator[Fault]:
        """What is wrong between the keys of this section."""
        yield from ()

    @model_validator(mode="after")
    def _free_of_contradictions(self) -> Self:
        if faults := list(self.contradictions()):
            raise ContradictionError(faults)
        return self


class LogLevel(StrEnum):
    """The least severity that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How log lines look."""

    JSON = "json"
    CONSOLE = "console"


class LogSettings(Section):
    """What is logged and how."""

    level: LogLevel = LogLevel.INFO
    format: LogFormat = LogFormat.JSON
