"""Calls whose connections are lost: where the peer is sought, and where it is found when it comes back."""

from dataclasses import replace
from ipaddress import ip_network

import pytest

from control.b2bua.flows import listening_flow
from control.pbx.registrar import Binding
from control.pbx.trunks import Trunk, Trunks
from control.sip.address import Address, Flow, Transport
from control.sip.headers import Uri
from control.sip.message import Request, Response, parse_message
from sippbx.softphone.digest import authorization
from tests.harness.messages import request_bytes, response_to, sdp
from tests.unit.control.test_b2bua import CONTACT, PASSWORD, TRUNK, Rig, rig, statuses

__all__ = ["rig"]

PHONE = "192.0.2.10"
DIALLED = "sip:9123@198.51.100.1"


def connection(port: int, host: str = PHONE) -> Flow:
    return Flow(Transport.TCP, "main", Address(host, port))


FIRST, SECOND = connection(40001), connection(40002)
LISTENING, BEHIND_NAT = "<sip:1001@192.0.2.10:5062;transport=tcp>", "<sip:1001@10.0.0.9:5062;transport=tcp>"


@pytest.mark.parametrize(
    ("contact", "port"),
    [
        ("sip:a@192.0.2.10:5062", 5062),
        ("sip:a@192.0.2.10", 5060),
        ("sip:a@192.0.2.11:5062", 40001),
        ("sip:a@phone.example:5062", 40001),
    ],
)
def test_a_peer_listens_at_its_contact_only_where_that_shows_its_own_host(contact: str, port: int) -> None:
    assert listening_flow(FIRST, Uri.parse(contact)) == connection(port)


def test_the_default_port_is_that_of_the_transport() -> None:
    secure = replace(FIRST, transport=Transport.TLS)
    assert listening_flow(secure, Uri.parse("sip:a@192.0.2.10")).remote.port == 5061


def test_numeric_hosts_are_compared_by_value() -> None:
    flow = connection(40001, "2001:db8::5")
    assert listening_flow(flow, Uri.parse("sip:a@[2001:DB8:0::5]:5062")) == connection(5062, "2001:db8::5")


class Talk:
    """A call from user 1001, over a connection, to the trunk; `rig.sent` shows where its messages go."""

    def __init__(self, rig: Rig, contact: str) -> None:
        self.rig = rig
        self.contact = contact
        self.register(FIRST, 1)
        challenge = self._sent_by(request_bytes(uri=DIALLED, branch="z9hG4bK-c", call_id="c"), FIRST)
        proof = self._proof(challenge, "Proxy-Authenticate", "INVITE", DIALLED)
        data = request_bytes(
            uri=DIALLED, branch="z9hG4bK-d", call_id="d", contact=contact, body=sdp(),
            headers=(("Proxy-Authorization", proof),),
        )  # fmt: skip
        rig.b2bua.receive(data, FIRST)
        (self.invite,) = [message for message in rig.open_media() if isinstance(message, Request)]
        rig.receive(response_to(self.invite, 200, headers=(CONTACT,), body=sdp(TRUNK)).encode(), TRUNK)
        (ok,) = [message for message in rig.open_media() if isinstance(message, Response)]
        self.ok = ok
        self.dialog = {"call_id": "d", "to": str(ok.to)}
        ack = request_bytes("ACK", branch="z9hG4bK-a", contact=contact, **self.dialog)  # type: ignore[arg-type]
        rig.b2bua.receive(ack, FIRST)

    def register(self, flow: Flow, cseq: int, *, contact: str = "") -> None:
        """Register over a connection."""
        call_id, uri = f"register-{cseq}", "sip:198.51.100.1"
        whose = {"from_": "<sip:1001@pbx>;tag=r", "to": "<sip:1001@pbx>", "contact": contact or self.contact}

        def register(number: int, *headers: tuple[str, str]) -> bytes:
            branch = f"z9hG4bK-{call_id}-{number}"
            return request_bytes(
                "REGISTER", uri=uri, branch=branch, call_id=call_id, cseq=number, headers=headers, **whose,  # type: ignore[arg-type]
            )  # fmt: skip

        proof = self._proof(self._sent_by(register(1), flow), "WWW-Authenticate", "REGISTER", uri)
        answer = self._sent_by(register(2, ("Authorization", proof)), flow)
        assert answer.status == 200

    def hung_up_by_the_trunk(self) -> tuple[Request, Flow]:
        """The BYE to the user, and where it goes."""
        bye = request_bytes(
            "BYE", branch="z9hG4bK-bye", call_id=self.invite.call_id, cseq=1,
            from_=f"{self.invite.to};tag=to-1", to=str(self.invite.from_),
        )  # fmt: skip
        before = len(self.rig.sent)
        self.rig.receive(bye, TRUNK)
        (sent,) = [(message, flow) for message, flow in self.rig.sent[before:] if isinstance(message, Request)]
        return sent

    def _sent_by(self, data: bytes, flow: Flow) -> Response:
        before = len(self.rig.sent)
        self.rig.b2bua.receive(data, flow)
        message, to = self.rig.sent[before:][-1]
        assert isinstance(message, Response)
        assert to == flow, "answers go back over the connection of the request"
        return message

    @staticmethod
    def _proof(challenge: Response, field: str, method: str, uri: str) -> str:
        values = challenge.headers.get_all(field)
        return authorization(values, method=method, uri=uri, user="1001", password=PASSWORD, algorithms=("MD5",))


async def test_while_its_connection_stands_a_phone_is_reached_over_it(rig: Rig) -> None:
    _, flow = Talk(rig, LISTENING).hung_up_by_the_trunk()
    assert flow == FIRST


async def test_our_contact_names_the_transport_towards_a_phone_on_a_connection_and_no_other(rig: Rig) -> None:
    talk = Talk(rig, LISTENING)
    assert str(talk.ok.headers.get("Contact")).endswith(";transport=tcp>")
    assert "transport" not in str(talk.invite.headers.get("Contact"))


async def test_after_the_connection_was_lost_a_phone_is_sought_where_it_listens(rig: Rig) -> None:
    talk = Talk(rig, LISTENING)
    rig.b2bua.flow_failed(FIRST)
    _, flow = talk.hung_up_by_the_trunk()
    assert flow == connection(5062)


async def test_a_phone_behind_nat_is_never_sought_at_the_third_party_that_its_contact_names(rig: Rig) -> None:
    talk = Talk(rig, BEHIND_NAT)
    rig.b2bua.flow_failed(FIRST)
    _, flow = talk.hung_up_by_the_trunk()
    assert flow == FIRST


@pytest.mark.parametrize("contact", [LISTENING, BEHIND_NAT])
@pytest.mark.parametrize("noticed", [True, False])
async def test_a_phone_that_registers_over_another_connection_is_reached_there(
    rig: Rig, contact: str, noticed: bool
) -> None:
    talk = Talk(rig, contact)
    if noticed:
        rig.b2bua.flow_failed(FIRST)
    talk.register(SECOND, 2)
    _, flow = talk.hung_up_by_the_trunk()
    assert flow == SECOND


async def test_a_phone_whose_contact_changes_with_its_connection_is_known_by_its_instance(rig: Rig) -> None:
    instance = ';+sip.instance="<urn:uuid:0c67446e-f1a1-11d9-94d3-000a95a0e128>"'
    talk = Talk(rig, BEHIND_NAT + instance)
    talk.register(SECOND, 2, contact=f"<sip:1001@10.0.0.9:9999;transport=tcp>{instance}")
    _, flow = talk.hung_up_by_the_trunk()
    assert flow == SECOND


async def test_another_phone_of_the_user_takes_over_nothing(rig: Rig) -> None:
    talk = Talk(rig, LISTENING)
    talk.register(SECOND, 2, contact="<sip:1001@192.0.2.10:5099;transport=tcp>")
    _, flow = talk.hung_up_by_the_trunk()
    assert flow == FIRST


async def test_nobody_takes_over_the_calls_of_another_user_by_naming_his_port_in_a_contact(rig: Rig) -> None:
    talk = Talk(rig, LISTENING)
    theirs = Binding("1002", Uri.parse("sip:1002@192.0.2.10:40001"), connection(40009), "x", 1, rig.now + 60)
    assert listening_flow(theirs.flow, theirs.contact) == FIRST
    rig.b2bua._follow(theirs, SECOND, rig.now)
    _, flow = talk.hung_up_by_the_trunk()
    assert flow == FIRST


async def test_a_request_of_the_phone_over_another_connection_moves_its_call_there(rig: Rig) -> None:
    talk = Talk(rig, BEHIND_NAT)
    rig.b2bua.flow_failed(FIRST)
    options = request_bytes("OPTIONS", branch="z9hG4bK-o", cseq=2, **talk.dialog)  # type: ignore[arg-type]
    rig.b2bua.receive(options, SECOND)
    _, flow = talk.hung_up_by_the_trunk()
    assert flow == SECOND


async def test_a_bye_that_found_no_connection_ends_its_leg_at_once(rig: Rig) -> None:
    talk = Talk(rig, BEHIND_NAT)
    talk.hung_up_by_the_trunk()
    assert sum(rig.b2bua._stack.counts().values()) > 0
    rig.b2bua.flow_failed(FIRST)
    assert rig.b2bua._stack.counts()["nict"] == 0


async def test_an_invite_that_found_no_connection_fails_at_once(rig: Rig) -> None:
    carrier = Flow(Transport.TCP, "main", Address(TRUNK, 5060))
    trunks = Trunks([Trunk("carrier", carrier, (ip_network(TRUNK),))])
    rig.b2bua._trunks = rig.b2bua._router._trunks = trunks
    invite = rig.trunk_call()
    assert rig.sent[-1] == (parse_message(invite.encode()), carrier)
    before = len(rig.sent)
    rig.b2bua.flow_failed(carrier)
    assert statuses([message for message, _ in rig.sent[before:]])[-1] >= 400


async def test_a_trunk_without_numeric_contact_is_reached_at_its_own_address_once_its_connection_is_gone(
    rig: Rig,
) -> None:
    carrier, theirs = Flow(Transport.TCP, "main", Address(TRUNK, 5060)), connection(40003, TRUNK)
    rig.b2bua._trunks = rig.b2bua._router._trunks = Trunks([Trunk("carrier", carrier, (ip_network(TRUNK),))])
    data = request_bytes(uri=DIALLED, contact="<sip:sbc.carrier.example;transport=tcp>", body=sdp(TRUNK))
    rig.b2bua.receive(data, theirs)
    (call,) = rig.b2bua._calls.values()
    session = next(session for session in call.legs.values() if session.flow == theirs)
    rig.b2bua.flow_failed(theirs)
    assert session.flow == carrier
