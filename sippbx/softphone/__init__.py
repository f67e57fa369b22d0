"""A small scripted SIP phone with RTP, for the demo, for tests and for trying an installation.

It shares no code with the PBX on purpose: what both got wrong would otherwise look right.
"""
