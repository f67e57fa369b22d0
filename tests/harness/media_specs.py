"""Media specs to test with."""

from control.pbx.media import MediaEndpoint, MediaKind, MediaMode, MediaSpec
from control.pbx.records import LegName
from control.sip.address import Address


def media_spec(session_id: str = "s1", generation: int = 1, *, remote: Address | None = None) -> MediaSpec:
    """One line of audio between two legs; `remote` is the caller's far end, the callee's is not known yet."""
    remotes = {LegName.CALLER: remote, LegName.CALLEE: None}
    return MediaSpec(
        session_id,
        generation,
        MediaMode.BYPASS,
        tuple(MediaEndpoint(leg, 0, MediaKind.AUDIO, "127.0.0.1", remote_rtp=remotes[leg]) for leg in LegName),
    )
