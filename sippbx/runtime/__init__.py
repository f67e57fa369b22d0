"""The process contract of either plane: logs, probes, signals and drain, supervision. Knows no SIP and no RTP."""
