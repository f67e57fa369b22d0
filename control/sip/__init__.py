"""SIP and SDP as pure machines: bytes, events and time in; messages, effects and one deadline out."""
