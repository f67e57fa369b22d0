"""RTP and RTCP packets for tests."""


def rtp(
    sequence: int = 1,
    *,
    timestamp: int = 0,
    ssrc: int = 0x1234,
    payload_type: int = 0,
    first_octet: int = 0x80,
    payload: bytes = b"\xd5" * 160,
) -> bytes:
    header = bytes([first_octet, payload_type]) + (sequence & 0xFFFF).to_bytes(2, "big")
    return header + (timestamp & 0xFFFFFFFF).to_bytes(4, "big") + ssrc.to_bytes(4, "big") + payload


def rtcp(packet_type: int = 200, *, ssrc: int = 0x1234) -> bytes:
    return bytes([0x80, packet_type, 0, 6]) + ssrc.to_bytes(4, "big") + bytes(20)
