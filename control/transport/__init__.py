"""Sockets under SIP: they carry bytes along flows and hold no rules."""
