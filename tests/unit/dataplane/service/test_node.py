"""The media node, with an engine that only keeps books."""

import asyncio
import errno
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from dataplane.engine.engine import BindFailedError, EngineChanged, EngineUnavailableError, SessionLost
from dataplane.ports import PortBlock, PortPool
from dataplane.service.events import (
    CapacityChanged,
    CloseReason,
    EventLog,
    NodeEvent,
    RelayInterrupted,
    SessionClosed,
)
from dataplane.service.node import MediaNode, Refusal, RefusedError, SessionView
from dataplane.session.relay import LearnedSource, Resumed, StreamSnapshot
from dataplane.session.spec import (
    Direction,
    Endpoint,
    LatchPolicy,
    Leg,
    MediaKind,
    MediaMode,
    RelayPlan,
    SessionSpec,
)

REST_S = 10.0
GRACE_S = 120.0
TOMBSTONE_S = 600.0
STREAMS = (StreamSnapshot(Leg.CALLER, 0, packets=7),)


class BookKeeper:
    """A relay engine without sockets. `failures` are raised by the next applies; `gate` holds them up."""

    name = "books"
    restarts = 0

    def __init__(self) -> None:
        self.ready = True
        self.plans: dict[str, RelayPlan] = {}
        self.brought: dict[str, tuple[tuple[LearnedSource, ...], tuple[StreamSnapshot, ...]]] = {}
        self.failures: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.answers = True

    async def start(self) -> None:
        self.ready = True

    async def apply(
        self, plan: RelayPlan, learned: tuple[LearnedSource, ...] = (), carried: tuple[StreamSnapshot, ...] = ()
    ) -> None:
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.plans[plan.session_id] = plan
        self.brought.setdefault(plan.session_id, (learned, carried))

    async def remove(self, session_id: str) -> tuple[StreamSnapshot, ...]:
        if not self.answers:
            raise EngineUnavailableError("no answer")
        return STREAMS if self.plans.pop(session_id, None) else ()

    async def collect(self, session_ids: Sequence[str] | None = None) -> Mapping[str, tuple[StreamSnapshot, ...]]:
        if not self.answers:
            raise EngineUnavailableError("no answer")
        return {name: STREAMS for name in self.plans if session_ids is None or name in session_ids}

    async def close(self) -> None:
        self.plans.clear()


class World:
    """A node of a few blocks, its engine, and time. `remembered` are sessions of an earlier instance."""

    def __init__(self, blocks: int = 2, remembered: Sequence[SessionView] = ()) -> None:
        self.now = 1000.0
        self.engine = BookKeeper()
        self.node = MediaNode(
            PortPool(21_000, 21_000 + 8 * blocks - 1, 8, REST_S),
            EventLog(100),
            owner_grace_s=GRACE_S,
            tombstone_s=TOMBSTONE_S,
            first_epoch=5,
            clock=lambda: self.now,
            utc_now=lambda: datetime(2030, 1, 1, tzinfo=UTC),
            remembered=remembered,
        )
        self.node.attach(self.engine)

    def events(self) -> list[NodeEvent]:
        return [record.event for record in self.node.events.read(0, 100)]

    def closed(self) -> list[tuple[str, CloseReason]]:
        return [(event.session_id, event.reason) for event in self.events() if isinstance(event, SessionClosed)]


@pytest.fixture
def world() -> World:
    return World()


def spec(session_id: str = "s", generation: int = 1, direction: Direction = Direction.SENDRECV) -> SessionSpec:
    endpoint = Endpoint(
        leg=Leg.CALLER,
        line=0,
        branch="",
        kind=MediaKind.AUDIO,
        local_address="127.0.0.1",
        remote_rtp=("127.0.0.2", 4000),
        remote_rtcp=None,
        rtcp_mux=False,
        direction=direction,
        latch_policy=LatchPolicy.NAT_AWARE,
        signalling_address="",
        payload_types=(),
    )
    return SessionSpec(session_id, generation, MediaMode.BYPASS, (endpoint,), "")


async def refusal(operation: "asyncio.Future[SessionView] | object") -> tuple[Refusal, str]:
    with pytest.raises(RefusedError) as caught:
        await operation  # type: ignore[misc]
    return caught.value.refusal, caught.value.message


# --------------------------------------------------------------------------------------------------------------- create


async def test_a_created_session_has_a_block_and_is_applied(world: World) -> None:
    view = await world.node.create(spec())
    assert view.block.first == 21_000
    assert world.engine.plans["s"].ports[0].rtp_port == 21_000
    assert world.node.capacity().blocks_in_use == 1


async def test_creating_again_gives_the_same_session(world: World) -> None:
    assert await world.node.create(spec()) is await world.node.create(spec())
    assert world.node.sessions_created == 1


async def test_creating_at_the_same_time_gives_the_same_session(world: World) -> None:
    one, two = await asyncio.gather(world.node.create(spec()), world.node.create(spec()))
    assert one is two


async def test_an_id_in_use_with_other_content_is_refused(world: World) -> None:
    await world.node.create(spec())
    assert (await refusal(world.node.create(spec(generation=2))))[0] is Refusal.STALE_GENERATION


async def test_a_named_block_is_given_or_refused(world: World) -> None:
    assert (await world.node.create(spec("a"), 21_008)).block.first == 21_008
    assert (await refusal(world.node.create(spec("b"), 21_008)))[0] is Refusal.BLOCK_UNAVAILABLE
    assert (await refusal(world.node.create(spec("a"), 21_000)))[0] is Refusal.STALE_GENERATION


async def test_an_exhausted_pool_is_told_and_counted(world: World) -> None:
    await world.node.create(spec("a"))
    await world.node.create(spec("b"))
    assert (await refusal(world.node.create(spec("c"))))[0] is Refusal.PORTS_EXHAUSTED
    assert world.node.allocation_failures[Refusal.PORTS_EXHAUSTED] == 1


async def test_an_invalid_spec_is_told_by_its_field(world: World) -> None:
    reason, message = await refusal(world.node.create(spec("not valid")))
    assert reason is Refusal.INVALID_ARGUMENT
    assert message.startswith("spec.session_id: ")


async def test_a_port_in_somebody_elses_hands_costs_another_try_on_another_block(world: World) -> None:
    world.engine.failures = [BindFailedError("127.0.0.1", 21_001, errno.EADDRINUSE)]
    assert (await world.node.create(spec())).block.first == 21_008
    assert world.node.capacity().blocks_resting == 1
    assert world.node.allocation_failures[Refusal.BIND_FAILED] == 1


async def test_a_named_block_that_cannot_be_bound_is_refused_with_port_and_cause(world: World) -> None:
    world.engine.failures = [BindFailedError("127.0.0.1", 21_001, errno.EADDRINUSE)]
    reason, message = await refusal(world.node.create(spec(), 21_000))
    assert reason is Refusal.BIND_FAILED
    assert "21001" in message
    assert "in use" in message


async def test_a_named_block_that_could_not_be_bound_may_be_asked_for_again_at_once(world: World) -> None:
    world.engine.failures = [BindFailedError("127.0.0.1", 21_001, errno.EADDRINUSE)]
    await refusal(world.node.create(spec(), 21_000))
    assert (await world.node.create(spec(), 21_000)).block.first == 21_000


async def test_an_address_that_is_not_of_this_host_costs_no_block(world: World) -> None:
    world.engine.failures = [BindFailedError("192.0.2.1", 21_000, errno.EADDRNOTAVAIL)]
    reason, message = await refusal(world.node.create(spec()))
    assert reason is Refusal.ADDRESS_NOT_LOCAL
    assert "192.0.2.1" in message
    assert world.node.capacity().blocks_free == 2


async def test_an_engine_that_does_not_answer_leaves_nothing_behind(world: World) -> None:
    world.engine.failures = [EngineUnavailableError("no answer")]
    assert (await refusal(world.node.create(spec())))[0] is Refusal.INTERNAL
    assert (len(world.node), world.node.capacity().blocks_in_use) == (0, 0)


async def test_a_draining_node_takes_no_new_session_and_keeps_the_old(world: World) -> None:
    await world.node.create(spec("a"))
    world.node.drain("stopping")
    assert await refusal(world.node.create(spec("b"))) == (Refusal.DRAINING, "stopping")
    assert (await world.node.create(spec("a"))).spec.session_id == "a"
    assert (await world.node.update(spec("a", 2))).spec.generation == 2


async def test_a_command_that_nobody_waits_for_any_more_is_carried_out(world: World) -> None:
    world.engine.gate.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await world.node.create(spec())
    world.engine.gate.set()
    assert (await world.node.delete("s")).streams == STREAMS


# --------------------------------------------------------------------------------------------------------------- update


async def test_an_update_keeps_the_block(world: World) -> None:
    block = (await world.node.create(spec())).block
    view = await world.node.update(spec(generation=2, direction=Direction.INACTIVE))
    assert (view.block, view.spec.generation) == (block, 2)
    assert world.engine.plans["s"].generation == 2


async def test_repeating_an_update_succeeds(world: World) -> None:
    await world.node.create(spec())
    updated = await world.node.update(spec(generation=2))
    assert await world.node.update(spec(generation=2)) is updated


@pytest.mark.parametrize(
    "stale", [spec(generation=2), spec(generation=3, direction=Direction.INACTIVE)], ids=["older", "other content"]
)
async def test_a_stale_update_is_refused(world: World, stale: SessionSpec) -> None:
    await world.node.create(spec())
    await world.node.update(spec(generation=3))
    assert (await refusal(world.node.update(stale)))[0] is Refusal.STALE_GENERATION


async def test_an_update_that_cannot_be_bound_leaves_the_old_state_in_force(world: World) -> None:
    await world.node.create(spec())
    world.engine.failures = [BindFailedError("127.0.0.1", 21_002, errno.EADDRINUSE)]
    assert (await refusal(world.node.update(spec(generation=2))))[0] is Refusal.BIND_FAILED
    (view,) = await world.node.list("", 10, with_streams=False)
    assert view.spec.generation == 1


async def test_only_sessions_that_there_are_can_be_updated(world: World) -> None:
    assert (await refusal(world.node.update(spec())))[0] is Refusal.UNKNOWN_SESSION
    await world.node.create(spec())
    await world.node.delete("s")
    assert (await refusal(world.node.update(spec(generation=2))))[0] is Refusal.SESSION_DELETED


# --------------------------------------------------------------------------------------------------------------- delete


async def test_a_delete_gives_the_final_figures_as_often_as_it_is_repeated(world: World) -> None:
    await world.node.create(spec())
    first = await world.node.delete("s")
    assert first.streams == STREAMS
    assert await world.node.delete("s") == first
    assert world.closed() == [("s", CloseReason.DELETED)]
    assert world.node.capacity().blocks_resting == 1


async def test_a_deleted_session_cannot_be_made_again_until_its_tombstone_is_gone(world: World) -> None:
    await world.node.create(spec())
    await world.node.delete("s")
    assert (await refusal(world.node.create(spec())))[0] is Refusal.SESSION_DELETED
    world.now += TOMBSTONE_S
    await world.node.tick()
    assert (await refusal(world.node.delete("s")))[0] is Refusal.UNKNOWN_SESSION
    await world.node.create(spec())


async def test_a_delete_succeeds_without_figures_when_the_engine_does_not_answer(world: World) -> None:
    await world.node.create(spec())
    world.engine.answers = False
    assert (await world.node.delete("s")).streams == ()


# ----------------------------------------------------------------------------------------------- ownership and lifetime


def test_epochs_grow_and_the_owner_before_is_fenced(world: World) -> None:
    first, second = world.node.acquire("a"), world.node.acquire("b")
    assert (first.epoch, second.epoch) == (5, 6)
    assert first.fenced.is_set()
    assert not second.fenced.is_set()
    assert world.node.owner_of(6) is second
    with pytest.raises(RefusedError, match="epoch 5 is not in force: the newest is 6"):
        world.node.owner_of(5)


def test_an_owner_that_wakes_up_late_does_not_take_the_node_from_its_successor(world: World) -> None:
    world.node.acquire("old", 1)
    new = world.node.acquire("new", 2)
    with new.stream(lambda: world.now):
        world.now += 60
        with pytest.raises(RefusedError, match="incarnation 1 is not the newest: incarnation 2 owns") as caught:
            world.node.acquire("old", 1)
        assert caught.value.refusal is Refusal.FENCED
        assert not new.fenced.is_set()


def test_an_owner_that_has_just_acquired_or_been_cut_off_is_alive(world: World) -> None:
    new = world.node.acquire("new", 2)
    with pytest.raises(RefusedError):
        world.node.acquire("old", 1)
    world.now += 5
    with new.stream(lambda: world.now):
        world.now += 5
    with pytest.raises(RefusedError):
        world.node.acquire("old", 1)


def test_the_same_owner_comes_back_and_a_dead_one_keeps_nobody_out(world: World) -> None:
    world.node.acquire("new", 2)
    world.node.acquire("new", 2)
    world.now += 5
    assert world.node.acquire("with an empty journal", 1).epoch == 7


async def test_sessions_outlive_their_owner_for_the_grace_time_and_no_longer(world: World) -> None:
    owner = world.node.acquire("a")
    with owner.stream(lambda: world.now):
        await world.node.create(spec())
        world.now += 10 * GRACE_S
        await world.node.tick()
    world.now += GRACE_S - 1
    await world.node.tick()
    assert len(world.node) == 1
    world.now += 1
    await world.node.tick()
    assert world.closed() == [("s", CloseReason.OWNER_LOST)]


async def test_a_new_owner_has_the_whole_grace_time(world: World) -> None:
    world.node.acquire("a")
    await world.node.create(spec())
    world.now += GRACE_S - 1
    world.node.acquire("b")
    world.now += GRACE_S - 1
    await world.node.tick()
    assert len(world.node) == 1


async def test_a_session_that_the_engine_lost_is_closed_once(world: World) -> None:
    await world.node.create(spec())
    world.node.observe(SessionLost("s", "127.0.0.1 port 21000: in use", STREAMS))
    world.node.observe(SessionLost("s", "again", STREAMS))
    assert world.closed() == [("s", CloseReason.WORKER_LOST)]
    assert (await world.node.delete("s")).streams == STREAMS


async def test_all_sessions_can_be_ended_at_once(world: World) -> None:
    await world.node.create(spec("a"))
    await world.node.create(spec("b"))
    assert len(world.node) == 2
    await world.node.close_all(CloseReason.SHUTDOWN)
    assert len(world.node) == 0
    assert sorted(world.closed()) == [("a", CloseReason.SHUTDOWN), ("b", CloseReason.SHUTDOWN)]


async def test_watchers_hear_when_sessions_are_taken_or_not(world: World) -> None:
    world.node.observe(EngineChanged(ready=True))
    await world.node.create(spec("a"))
    await world.node.create(spec("b"))
    await world.node.delete("a")
    world.now += REST_S
    await world.node.tick()
    world.engine.ready = False
    world.node.observe(EngineChanged(ready=False))
    changes = [event.capacity.accepting for event in world.events() if isinstance(event, CapacityChanged)]
    assert changes == [True, False, True, False]


def test_what_the_engine_reports_of_streams_is_passed_on(world: World) -> None:
    resumed = Resumed("s", 1.0, Leg.CALLER, 0)
    world.node.observe(resumed)
    assert world.events() == [resumed]


# ----------------------------------------------------------------------------------------------------------------- list


async def test_sessions_are_listed_in_pages_by_id() -> None:
    world = World(blocks=3)
    for name in ("b", "c", "a"):
        await world.node.create(spec(name))
    first = await world.node.list("", 2, with_streams=False)
    rest = await world.node.list("b", 2, with_streams=True)
    assert [view.spec.session_id for view in first] == ["a", "b"]
    assert [(view.spec.session_id, view.streams) for view in rest] == [("c", STREAMS)]


async def test_one_session_is_listed_by_its_name(world: World) -> None:
    await world.node.create(spec("a"))
    assert len(await world.node.list("", 10, with_streams=False, session_id="a")) == 1
    assert await world.node.list("", 10, with_streams=False, session_id="b") == []


async def test_a_list_with_figures_is_refused_when_the_engine_does_not_answer(world: World) -> None:
    await world.node.create(spec())
    world.engine.answers = False
    with pytest.raises(RefusedError, match="no answer"):
        await world.node.list("", 10, with_streams=True)


async def test_sessions_that_ended_are_taken_once(world: World) -> None:
    await world.node.create(spec())
    final = await world.node.delete("s")
    assert world.node.take_closed() == [final]
    assert world.node.take_closed() == []


async def test_tombstones_are_views_of_the_last_state(world: World) -> None:
    created = await world.node.create(spec())
    assert await world.node.delete("s") == replace(created, streams=STREAMS)


# --------------------------------------------------------------------------------------------- of an earlier instance

EARLIER = SessionView(spec(), PortBlock(21_008, 8), datetime(2029, 1, 1, tzinfo=UTC), STREAMS)
LEARNED = (LearnedSource(Leg.CALLER, 0, ("127.0.0.2", 4000), ("127.0.0.2", 4444), None),)


async def test_a_session_made_again_goes_on_with_its_sources_figures_and_age() -> None:
    world = World(remembered=[EARLIER])
    view = await world.node.create(spec(generation=2), 21_008, LEARNED)
    assert world.engine.brought["s"] == (LEARNED, STREAMS)
    assert (view.block.first, view.created_at, view.carried) == (21_008, EARLIER.created_at, STREAMS)
    assert world.node.ended() == []


async def test_a_session_that_could_not_be_made_again_is_still_remembered() -> None:
    world = World(remembered=[EARLIER])
    world.engine.failures = [BindFailedError("127.0.0.1", 21_009, errno.EADDRINUSE)]
    await refusal(world.node.create(spec(), 21_008))
    assert (await world.node.create(spec(), 21_008)).carried == STREAMS


async def test_a_session_that_is_not_made_again_gives_what_is_remembered_of_it() -> None:
    world = World(remembered=[EARLIER])
    assert await world.node.delete("s") == await world.node.delete("s") == EARLIER
    assert world.closed() == []


async def test_what_nobody_asks_for_is_forgotten() -> None:
    world = World(remembered=[EARLIER])
    world.now += TOMBSTONE_S
    await world.node.tick()
    assert (await refusal(world.node.delete("s")))[0] is Refusal.UNKNOWN_SESSION


async def test_a_later_instance_is_left_what_runs_what_ended_lately_and_what_was_left_to_this_one() -> None:
    world = World(blocks=3, remembered=[EARLIER])
    await world.node.create(spec("long-ended"))
    await world.node.delete("long-ended")
    world.now += 60
    await world.node.create(spec("ended"))
    await world.node.create(spec("running"))
    await world.node.delete("ended")
    assert [view.spec.session_id for view in world.node.ended()] == ["s", "ended"]
    assert [(view.spec.session_id, view.streams) for view in world.node.live({"running": STREAMS})] == [
        ("running", STREAMS)
    ]


async def test_a_session_made_again_that_was_not_collected_yet_has_the_figures_it_began_with() -> None:
    world = World(remembered=[EARLIER])
    await world.node.create(spec(), 21_008)
    assert [view.streams for view in world.node.live({})] == [STREAMS]


def test_a_relay_that_failed_and_is_back_is_told_with_the_time_it_took(world: World) -> None:
    world.node.observe(EngineChanged(ready=True))
    world.node.observe(EngineChanged(ready=False))
    world.now += 0.25
    world.node.observe(EngineChanged(ready=True))
    assert [event for event in world.events() if isinstance(event, RelayInterrupted)] == [RelayInterrupted(0.25)]


async def test_what_was_begun_can_be_waited_for(world: World) -> None:
    world.engine.gate.clear()
    begun = asyncio.create_task(world.node.create(spec()))
    await asyncio.sleep(0)
    settled = asyncio.create_task(world.node.settled())
    await asyncio.sleep(0)
    assert not settled.done()
    world.engine.gate.set()
    await asyncio.wait_for(settled, 1.0)
    assert (await begun).spec == spec()
