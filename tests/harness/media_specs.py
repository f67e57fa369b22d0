"""Media specs to test with."""

from control.pbx.media import MediaEndpoint, MediaKind, MediaMode, MediaSpec
from control.pbx.records import LegName


def media_spec(session_id: str = "s1", generation: int = 1) -> MediaSpec:
    """One line of audio between two legs whose far ends are not known yet."""
    return MediaSpec(
        session_id,
        generation,
        MediaMode.BYPASS,
        tuple(MediaEndpoint(leg, 0, MediaKind.AUDIO, "127.0.0.1") for leg in LegName),
    )
