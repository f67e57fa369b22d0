"""Tests: unit (pure, no sockets), integration (real sockets and processes), e2e (as shipped)."""
