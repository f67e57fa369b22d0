"""MediaService: the sessions that there are, who owns them, and the gRPC contract in front."""
