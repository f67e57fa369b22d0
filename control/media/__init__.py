"""The data plane as the control plane sees it: wanted sessions, and the gRPC client that makes them real."""
