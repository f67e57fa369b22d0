"""Relay engines: strategies behind one protocol that carry packets for relay plans."""
