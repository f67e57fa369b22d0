"""What outlives a control plane that is killed: far ends, network, data plane and time.

Far ends are made of the product's own transaction and session layers, and know nothing of a call but what stands on the
wire.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable

from control.pbx.media import LocalPorts, MediaClosed, MediaOpened, MediaSpec, MediaUpdated
from control.pbx.records import LegName
from control.sip.address import Address, Flow, Transport
from control.sip.headers import NameAddr
from control.sip.message import Request, Response, build_response, parse_message
from control.sip.session import (
    InviteSession,
    LocalParty,
    Offered,
    SendAck,
    SendCancel,
    SendRequest,
    SendResponse,
    SessionState,
)
from control.sip.session import Output as SessionOutput
from control.sip.stack import (
    AckReceived,
    CancelReceived,
    Discarded,
    RequestReceived,
    ResponseReceived,
    SipStack,
    TransactionFailed,
    Transmit,
)
from control.sip.stack import Output as StackOutput
from control.sip.transaction import Timers
from tests.harness.crash_child import CALLEE_HOST, CALLER_HOST, PBX_HOST, Datagram, Input, Restored, Sent
from tests.harness.messages import sdp

LATENCY_S = 0.003
MEDIA_S = 0.002
PBX = Flow(Transport.UDP, "far end", Address(PBX_HOST, 5060))


class FarEnd:
    """A phone: does what its story says when something happens, and remembers what was on the wire."""

    def __init__(self, world: "World", host: str, story: "Story") -> None:
        self.host = host
        self.world = world
        self._story = story
        tokens = (f"{host}-{number}" for number in itertools.count(1))
        self._new_token = tokens.__next__
        self._stack = SipStack(
            advertised=lambda _: Address(host, 5060), new_token=self._new_token, timers=Timers(), server_name=host
        )
        self.party = LocalParty(NameAddr.parse(f"<sip:phone@{host}:5060>"), "phone")
        self.sessions: dict[tuple[str, str], InviteSession] = {}
        self.received: list[Request | Response] = []
        self.failed: list[TransactionFailed] = []

    # ---- for stories

    def call(self, number: str) -> None:
        """Call through the PBX."""
        session = InviteSession.of_callee(
            flow=PBX,
            symmetric=False,
            party=self.party,
            timers=Timers(),
            new_token=self._new_token,
            random=lambda: 0.5,
        )
        self._know(session)
        outputs = session.invite(
            f"sip:{number}@{PBX_HOST}",
            caller=NameAddr.parse(f"<sip:+1555@{self.host}>"),
            callee=NameAddr.parse(f"<sip:{number}@{PBX_HOST}>"),
            sdp=sdp(self.host),
            max_forwards=70,
        )
        self.act(session, outputs)

    def after(self, delay_s: float, session: InviteSession, what: Callable[[float], list[SessionOutput]]) -> None:
        """Let a session do something a while later; `what` is given the time."""
        self.world.at(self.world.now + delay_s, lambda: self.act(session, what(self.world.now)))

    def act(self, session: InviteSession, outputs: Iterable[SessionOutput]) -> None:
        """Send what the session sends, and tell the story what happened."""
        for output in outputs:
            now = self.world.now
            match output:
                case SendRequest():
                    self._perform(self._stack.send_request(output.request, PBX, output.branch, now))
                case SendAck():
                    self._perform(self._stack.send_ack(output.request, PBX, output.branch))
                case SendResponse():
                    self._perform(self._stack.respond(output.transaction, output.response, now))
                case SendCancel():
                    self._perform(self._stack.cancel(output.transaction, now))
                case _:
                    self._story.happened(self, session, output)

    # ---- the wire

    def take(self, data: bytes) -> None:
        message = parse_message(data)
        self.received.append(message)
        self._perform(self._stack.receive(data, PBX, self.world.now))

    def handle_timer(self) -> None:
        now = self.world.now
        self._perform(self._stack.handle_timer(now))
        for session in list(self.sessions.values()):
            self.act(session, session.handle_timer(now))

    def next_deadline(self) -> float | None:
        due = [self._stack.next_deadline(), *(session.next_deadline() for session in self.sessions.values())]
        return min((at for at in due if at is not None), default=None)

    def _perform(self, outputs: Iterable[StackOutput]) -> None:
        now = self.world.now
        for output in outputs:
            match output:
                case Transmit():
                    self.world.to_pbx(Datagram(output.data, Flow(Transport.UDP, "main", Address(self.host, 5060))))
                case RequestReceived():
                    self._requested(output, now)
                case ResponseReceived(response=response):
                    session = self.sessions[response.call_id, response.from_.tag or ""]
                    self.act(session, session.receive(output, now))
                case AckReceived(request=request):
                    if known := self.sessions.get((request.call_id, request.to.tag or "")):
                        self.act(known, known.receive(output, now))
                case CancelReceived(request=request):
                    for session in [each for each in self.talks if each.sip_call_id == request.call_id]:
                        self.act(session, session.receive(output, now))
                case TransactionFailed():
                    self.failed.append(output)
                    for session in self.sessions.values():
                        if output.transaction in session.transactions():
                            self.act(session, session.receive(output, now))
                case Discarded():
                    pass

    def _requested(self, event: RequestReceived, now: float) -> None:
        request = event.request
        session = self.sessions.get((request.call_id, request.to.tag or ""))
        if session is not None:
            self.act(session, session.receive(event, now))
        elif request.method == "INVITE" and request.to.tag is None:
            session = InviteSession.of_caller(
                event,
                symmetric=False,
                party=self.party,
                timers=Timers(),
                new_token=self._new_token,
                random=lambda: 0.5,
            )
            self._know(session)
            self._story.rung(self, session, request)
        else:
            response = build_response(request, 481, to_tag=request.to.tag or self._new_token())
            self._perform(self._stack.respond(event.transaction, response, now))

    def _know(self, session: InviteSession) -> None:
        self.sessions[session.sip_call_id, session.local_tag] = session

    # ---- what it was told

    def statuses(self, method: str) -> list[int]:
        """Of the responses that it got to requests of this method."""
        return [each.status for each in self.received if isinstance(each, Response) and each.cseq.method == method]

    def invites(self, *, again: bool) -> set[tuple[str, int]]:
        """The different INVITEs that it got, of new calls or, `again`, in dialogs: Call-ID and CSeq."""
        requests = [each for each in self.received if isinstance(each, Request) and each.method == "INVITE"]
        return {(each.call_id, each.cseq.number) for each in requests if (each.to.tag is not None) is again}

    @property
    def was_hung_up_on(self) -> bool:
        """It was sent a BYE."""
        return any(isinstance(each, Request) and each.method == "BYE" for each in self.received)

    @property
    def answered(self) -> bool:
        """It was told that its call is up."""
        return 200 in self.statuses("INVITE")

    @property
    def talks(self) -> list[InviteSession]:
        """Sessions that it believes in."""
        return [each for each in self.sessions.values() if each.state is not SessionState.TERMINATED]


class Story:
    """A call from beginning to end. Every story is a subclass that says what its far ends do."""

    reason = "hangup"
    reinvites: tuple[int, int] = (0, 0)  # how many different ones the caller and the callee may get

    def begin(self, world: "World") -> None:
        world.at(world.now + 0.1, lambda: world.caller.call("9123"))

    def rung(self, end: FarEnd, session: InviteSession, invite: Request) -> None:
        """A far end is called."""
        end.after(0.1, session, lambda now: session.progress(180, "Ringing", b"", now))
        end.after(0.6, session, lambda now: session.accept(sdp(end.host), now))

    def happened(self, end: FarEnd, session: InviteSession, event: SessionOutput) -> None:
        """Something happened on a leg; a far end answers offers whatever the story."""
        if isinstance(event, Offered):
            end.act(session, session.answer(sdp(end.host, direction="sendrecv", version=3), end.world.now))
        self.told(end, session, event)

    def told(self, end: FarEnd, session: InviteSession, event: SessionOutput) -> None:
        """What the story does about it."""


class World:
    """All that outlives the process."""

    def __init__(self, story: Story) -> None:
        self.now = self.began = 1000.0
        self.inbox: list[Input] = []
        self.caller = FarEnd(self, CALLER_HOST, story)
        self.callee = FarEnd(self, CALLEE_HOST, story)
        self.sessions: set[str] = set()
        self._ends = {end.host: end for end in (self.caller, self.callee)}
        self._coming: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        story.begin(self)

    def at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._coming, (time, next(self._order), act))

    def to_pbx(self, datagram: Datagram) -> None:
        self.at(self.now + LATENCY_S, lambda: self.inbox.append(datagram))

    def to_far_end(self, sent: Sent) -> None:
        end = self._ends[sent.remote.host]
        self.at(self.now + LATENCY_S, lambda: end.take(sent.data))

    def wished(self, wish: MediaSpec | str) -> None:
        """The data plane does what it is asked for, and answers."""
        ports = tuple(LocalPorts(leg, 0, 10000 + 4 * side, 10001 + 4 * side) for side, leg in enumerate(LegName))
        answer: Input
        if isinstance(wish, str):
            known = wish in self.sessions
            self.sessions.discard(wish)
            answer = MediaClosed(wish, () if known else None)
        else:
            self.sessions.add(wish.session_id)
            answer = (
                MediaOpened(wish.session_id, ports)
                if wish.generation == 1
                else MediaUpdated(wish.session_id, wish.generation, ports)
            )
        self.at(self.now + MEDIA_S, lambda: self.inbox.append(answer))

    def restored(self, restored: Restored) -> None:
        """Only what is wanted stays."""
        self.sessions = {session.spec.session_id for session in restored.sessions}

    def run_until(self, until: float, *, stop_at_input: bool) -> None:
        """Let time pass."""
        while not (stop_at_input and self.inbox):
            timers = [(at, end) for end in self._ends.values() if (at := end.next_deadline()) is not None]
            timer = min(timers, default=(float("inf"), self.caller), key=lambda each: each[0])
            event = self._coming[0][0] if self._coming else float("inf")
            if min(timer[0], event) > until:
                break
            self.now = max(self.now, min(timer[0], event))
            if event <= timer[0]:
                heapq.heappop(self._coming)[2]()
            else:
                timer[1].handle_timer()
        else:
            return
        self.now = max(self.now, until)
