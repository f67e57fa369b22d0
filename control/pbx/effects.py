"""What a call asks its edge to do, besides what its legs send."""

from dataclasses import dataclass

from control.pbx.media import MediaSpec
from control.pbx.records import CallEvent
from control.sip.session import Command


@dataclass(frozen=True, slots=True)
class OpenMedia:
    """Make the media session; MediaOpened or MediaFailed comes back."""

    spec: MediaSpec


@dataclass(frozen=True, slots=True)
class UpdateMedia:
    """Change the media session; MediaUpdated or MediaFailed comes back."""

    spec: MediaSpec


@dataclass(frozen=True, slots=True)
class CloseMedia:
    """End the media session; MediaClosed comes back."""

    session_id: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell the observers."""

    event: CallEvent


Effect = Command | OpenMedia | UpdateMedia | CloseMedia | Publish
