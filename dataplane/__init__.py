"""The data plane: relays RTP between the addresses that the control plane names."""
