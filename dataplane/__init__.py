"""The data plane: relays RTP and RTCP between the legs of calls, as the control plane wants it over sippbx.media.v1."""
