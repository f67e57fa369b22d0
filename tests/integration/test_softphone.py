"""The scripted phone against another of its kind, with no PBX between: what it claims must hold on a bare wire."""

from collections.abc import AsyncIterator

import pytest

from sippbx.softphone.call import Call, CallState
from sippbx.softphone.digest import authorization
from sippbx.softphone.errors import DeadlineError, MalformedError, RefusedError
from sippbx.softphone.media import PCMU, RtpEndpoint, frame_payload
from sippbx.softphone.message import SipMessage, host_port_of, parameter, uri_of
from sippbx.softphone.phone import Account, Phone, Timers

pytestmark = pytest.mark.integration
FAST = Timers(t1=0.05, t2=0.2)


@pytest.fixture
async def phones() -> AsyncIterator[tuple[Phone, Phone]]:
    async with (
        Phone(Account("bob", "-", ("127.0.0.1", 9)), timers=FAST) as bob,
        Phone(Account("alice", "-", bob.address), timers=FAST) as alice,
    ):
        yield alice, bob


async def test_two_phones_talk_and_count_every_frame(phones: tuple[Phone, Phone]) -> None:
    alice, bob = phones
    outgoing = Call.place(alice, "bob", kinds=("audio", "video"))
    incoming = await Call.take(bob, deadline_s=2)
    incoming.ring()
    await outgoing.wait_for(CallState.RINGING, 2)
    await incoming.answer()
    await outgoing.wait_for(CallState.ANSWERED, 2)
    for line in (*outgoing.lines, *incoming.lines):
        await line.send_frames(5)
        line.send_sender_report()
    for line in (*outgoing.lines, *incoming.lines):
        await line.wait_for(5, 2, rtcp_packets=1)
        assert (line.report.received, line.report.lost, line.report.damaged) == (5, 0, 0)
    assert outgoing.lines[0].report.streams == {11}
    assert incoming.lines[1].report.streams == {2}
    assert (await outgoing.reinvite("sendonly")).status == 200
    assert (await incoming.hang_up()).status == 200
    await outgoing.wait_for(CallState.ENDED, 2)
    assert (outgoing.ended_by, incoming.ended_by) == ("remote", "local")
    await outgoing.close()
    await incoming.close()


async def test_cancelled_call_ends_with_487_on_both_sides(phones: tuple[Phone, Phone]) -> None:
    alice, bob = phones
    outgoing = Call.place(alice, "bob")
    incoming = await Call.take(bob, deadline_s=2)
    incoming.ring()
    await outgoing.cancel()
    await incoming.wait_for(CallState.ENDED, 2)
    assert (outgoing.status, incoming.status) == (487, 487)
    await outgoing.close()
    await incoming.close()


async def test_refused_call_names_its_status(phones: tuple[Phone, Phone]) -> None:
    alice, bob = phones
    outgoing = Call.place(alice, "bob")
    incoming = await Call.take(bob, deadline_s=2)
    incoming.reject(486, "Busy Here")
    with pytest.raises(RefusedError, match="INVITE was refused: 486 Busy Here"):
        await outgoing.wait_for(CallState.ANSWERED, 2)
    await outgoing.close()
    await incoming.close()


async def test_silent_far_end_is_a_deadline_not_a_hang() -> None:
    async with Phone(Account("alice", "-", ("127.0.0.1", 9)), timers=Timers(t1=0.01, t2=0.04)) as alice:
        with pytest.raises(DeadlineError):
            await alice.register(deadline_s=0.1)
        call = Call.place(alice, "bob")
        with pytest.raises(DeadlineError, match="INVITE"):
            await call.wait_for(CallState.RINGING, 5)
        await call.close()


async def test_receiver_tells_lost_repeated_reordered_and_damaged_packets() -> None:
    sender, receiver = RtpEndpoint("127.0.0.1"), RtpEndpoint("127.0.0.1")
    sender.connect("127.0.0.1", receiver.port)
    for frame in (0, 3, 1, 1):
        sender.report.sent = frame
        sender.send_frame()
    sender.stream = 0x1FF
    sender.media = type(PCMU)("audio", 8, "PCMA/8000", 8000, 160, 0.02)
    sender.send_frame()
    await receiver.wait_for(5, 2)
    report = receiver.report
    assert (report.lost, report.duplicates, report.reordered, report.damaged) == (1, 1, 1, 1)
    assert report.missing_of(4) == [2]
    await sender.close()
    await receiver.close()


def test_frames_differ_from_each_other_and_between_streams() -> None:
    frames = {frame_payload(stream, frame, 160) for stream in (1, 2) for frame in range(300)}
    assert len(frames) == 600
    assert {len(frame) for frame in frames} == {160}


@pytest.mark.rfc("7616", "3.9.1")
def test_digest_answers_the_first_challenge_it_knows() -> None:
    challenges = [
        'Digest realm="x", nonce="n1", algorithm=SHA-512-256',
        'Digest realm="x", nonce="n2", qop="auth", algorithm=MD5',
    ]
    value = authorization(challenges, method="REGISTER", uri="sip:x", user="u", password="p")
    assert 'nonce="n2"' in value
    assert "algorithm=MD5" in value
    with pytest.raises(MalformedError):
        authorization(challenges[:1], method="REGISTER", uri="sip:x", user="u", password="p")


def test_header_values_give_uri_host_and_parameters() -> None:
    value = '"A; <B>" <sip:1001@[::1]:5070;transport=udp>;tag=x;lr'
    assert parameter(value, "tag") == "x"
    assert parameter(value, "lr") == ""
    assert parameter(value, "transport") is None
    assert parameter("sip:a@b;tag=y", "tag") == "y"
    assert uri_of("<sip:a@b>;tag=x") == "sip:a@b"
    assert host_port_of("sip:1001@[::1]:5070;transport=udp") == ("::1", 5070)
    with pytest.raises(MalformedError):
        SipMessage.parse(b"HELLO\r\n\r\n")
