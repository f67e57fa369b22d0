"""Webhooks: each configured endpoint gets the events that it asked for, at least once, by HTTP POST.

What is to be delivered is in the store (control.store.deliveries), written with the event itself; here is one task for
each endpoint, which reads what is due in small batches, oldest first, and has a few attempts under way at once. Nothing
is shared between endpoints, so that a slow or dead one delays no other. An attempt that fails is put off with
exponential back-off, in the store; after the configured time the event is given up, kept as dead, and a `node.error`
tells of it. A process that dies between an attempt and the commit of its outcome makes the attempt again: receivers
tell duplicates by their id.
"""

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import structlog

from control.events.backoff import BackOff, Brake
from control.events.webhook_client import Answer, WebhookClient
from control.metrics import ControlMetrics
from control.pbx.records import NODE_ERROR, CallId, ErrorEvent, Event
from control.settings.sections import WebhookSettings
from control.store.database import Database, StoreError
from control.store.deliveries import DEAD_KEPT, Backlog, Deliveries, Delivery
from control.store.events import StoredEvent

BATCH = 64
REFRESH_S = 10.0
RETRIES = BackOff(first_s=1.0, most_s=3600.0)
PAUSES = BackOff(first_s=1.0, most_s=30.0)

_STORE_PAUSE_S = 1.0
_COUNT_SHARE = 100

_log = structlog.get_logger(__name__)


class Webhooks:
    """All endpoints. `deliveries.statements_for` belongs into each event's transaction, `wake` behind its commit."""

    def __init__(self, deliveries: Deliveries, endpoints: Sequence["_Endpoint"]) -> None:
        self.deliveries = deliveries
        self._endpoints = tuple(endpoints)

    @classmethod
    async def open(
        cls,
        settings: Sequence[WebhookSettings],
        *,
        database: Database,
        node_name: str,
        metrics: ControlMetrics,
        publish: Callable[[Event], None],
        back_off: BackOff = RETRIES,
        draw: Callable[[], float] = random.random,
        refresh_s: float = REFRESH_S,
    ) -> "Webhooks":
        """Go on where the process before stopped; what waits for endpoints that are configured no longer is dropped.

        `draw` gives random numbers in [0, 1), for the back-off.

        Raises: StoreError.
        """
        deliveries = Deliveries(database, [(endpoint.name, endpoint.events) for endpoint in settings])
        for name, count in (await deliveries.forget_strangers()).items():
            _log.warning("webhook.endpoint_removed", endpoint=name, dropped=count)
        deliveries.bring_forward(datetime.now(UTC), timedelta(seconds=back_off.longest_s))
        endpoints = [
            _Endpoint(
                endpoint,
                client=WebhookClient(endpoint, node_name),
                deliveries=deliveries,
                metrics=metrics,
                publish=publish,
                back_off=back_off,
                draw=draw,
                refresh_s=refresh_s,
            )
            for endpoint in settings
        ]
        return cls(deliveries, endpoints)

    def wake(self, event: StoredEvent) -> None:
        """An event is in the store, and so are its deliveries."""
        for endpoint in self._endpoints:
            endpoint.wake(event)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Start nothing more and let what is under way end, for at most `timeout_s`; what is left stays stored."""
        await asyncio.gather(*(endpoint.close(timeout_s) for endpoint in self._endpoints))


class _Endpoint:
    """One endpoint and the task that serves it."""

    def __init__(
        self,
        settings: WebhookSettings,
        *,
        client: WebhookClient,
        deliveries: Deliveries,
        metrics: ControlMetrics,
        publish: Callable[[Event], None],
        back_off: BackOff,
        draw: Callable[[], float],
        refresh_s: float,
    ) -> None:
        self._name = settings.name
        self._types = settings.events
        self._concurrency = settings.concurrency
        self._give_up_after = timedelta(seconds=settings.give_up_after_s)
        self._client = client
        self._deliveries = deliveries
        self._metrics = metrics
        self._publish = publish
        self._back_off = back_off
        self._draw = draw
        self._brake = Brake(pauses=PAUSES)
        self._refresh_s = refresh_s
        self._refresh_at = 0.0
        self._backlog = Backlog()
        self._loop = asyncio.get_running_loop()
        self._awake = asyncio.Event()
        # Whether the store may have something due that is not in the batch.
        self._unread = True
        self._batch: deque[Delivery] = deque()
        self._next_at: datetime | None = None
        self._under_way: dict[asyncio.Task[None], int] = {}
        metrics.watch_outbox(self._name, lambda: self._backlog.pending, self._oldest_s)
        self._server = asyncio.create_task(self._serve(), name=f"webhook-{self._name}")

    def wake(self, event: StoredEvent) -> None:
        """Look into the store, if the event is one for this endpoint."""
        if self._types is None or event.type in self._types:
            self._unread = True
            self._awake.set()

    async def close(self, timeout_s: float) -> None:
        """End the task, then the attempts."""
        self._server.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._server
        attempts = set(self._under_way)
        if attempts:
            _, late = await asyncio.wait(attempts, timeout=timeout_s)
            for attempt in late:
                attempt.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._client.close()

    def _oldest_s(self) -> float:
        oldest_at = self._backlog.oldest_at
        return 0.0 if oldest_at is None else max(0.0, (datetime.now(UTC) - oldest_at).total_seconds())

    async def _serve(self) -> None:
        while True:
            try:
                await self._turn()
            except StoreError as error:
                self._metrics.error("webhook", "outbox_unreadable")
                _log.error("webhook.outbox_unreadable", endpoint=self._name, error=str(error))
            except Exception:  # noqa: BLE001 - the boundary
                # The boundary of the endpoint's task: it must not end before the process does.
                self._metrics.error("webhook", "internal")
                _log.exception("webhook.turn_failed", endpoint=self._name)
            else:
                continue
            self._unread = True
            await asyncio.sleep(_STORE_PAUSE_S)

    async def _turn(self) -> None:
        """Read if there may be something, start what there is room for, and wait for a reason to do it again."""
        self._awake.clear()
        if self._loop.time() >= self._refresh_at:
            await self._refresh()
        if self._unread and not self._batch:
            await self._read()
        self._start_attempts()
        if self._unread and not self._batch:
            return
        try:
            async with asyncio.timeout(self._rest_s()):
                await self._awake.wait()
        except TimeoutError:
            self._unread, self._next_at = True, None

    def _rest_s(self) -> float:
        """How long nothing needs to be done unless somebody wakes us."""
        now = self._loop.time()
        rests = [self._refresh_at - now]
        if self._batch and (pause_s := self._brake.pause_s(now)):
            rests.append(pause_s)
        if self._next_at is not None:
            rests.append((self._next_at - datetime.now(UTC)).total_seconds())
        return max(0.0, min(rests))

    async def _refresh(self) -> None:
        """Count what waits, and let go of what was given up long ago."""
        began = self._loop.time()
        self._refresh_at = began + self._refresh_s
        self._backlog = await self._deliveries.backlog(self._name)
        # Counting millions takes a while, in the thread that reads for everybody.
        took_s = self._loop.time() - began
        self._refresh_at = began + max(self._refresh_s, _COUNT_SHARE * took_s)
        now = datetime.now(UTC)
        dead_at = self._backlog.oldest_dead_at
        if dead_at is not None and dead_at < now - DEAD_KEPT:
            self._deliveries.forget_dead(self._name, now)

    async def _read(self) -> None:
        self._unread = False
        due = await self._deliveries.due(self._name, datetime.now(UTC), BATCH, self._under_way.values())
        self._batch.extend(due.deliveries)
        self._next_at = due.next_at
        self._unread |= due.more

    def _start_attempts(self) -> None:
        now = datetime.now(UTC)
        while self._batch:
            hopeless = self._brake.on and now >= self._give_up_at(self._batch[0])
            room = self._concurrency if hopeless else self._brake.room(self._loop.time(), self._concurrency)
            if len(self._under_way) >= room:
                return
            delivery = self._batch.popleft()
            task = asyncio.create_task(self._carry_out(delivery, attempt=not hopeless))
            self._under_way[task] = delivery.event.sequence
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        self._awake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._metrics.error("webhook", "internal")
            _log.error("webhook.delivery_crashed", endpoint=self._name, exc_info=error)

    async def _carry_out(self, delivery: Delivery, *, attempt: bool) -> None:
        """Make an attempt, or none where it is too late and the endpoint is down, and store what became of it."""
        try:
            if attempt:
                started = self._loop.time()
                answer = await self._attempt(delivery.event)
                await self._settle(delivery, answer, self._loop.time() - started)
            else:
                await self._give_up(delivery, "the endpoint is still down", None)
        except StoreError as error:
            # The outcome is lost and the attempt will be made again, but not at once: the receiver is not to blame.
            self._metrics.error("webhook", "outcome_unsaved")
            _log.error("webhook.outcome_unsaved", endpoint=self._name, event_id=delivery.event.id, error=str(error))
            await asyncio.sleep(_STORE_PAUSE_S)
            self._unread = True

    async def _attempt(self, event: StoredEvent) -> Answer:
        try:
            return await self._client.post(event)
        except Exception:  # noqa: BLE001 - the boundary
            # The boundary of an attempt: an event that trips over a bug is put off like any other, and keeps nobody.
            self._metrics.error("webhook", "internal")
            _log.exception("webhook.attempt_crashed", endpoint=self._name, event_id=event.id)
            return Answer("internal error")

    async def _settle(self, delivery: Delivery, answer: Answer, seconds: float) -> None:
        event = delivery.event
        if answer.failure is None:
            self._brake.succeeded()
            self._metrics.webhook_delivery(self._name, "ok", seconds)
            _log.debug("webhook.delivered", endpoint=self._name, event_id=event.id, type=event.type)
            await self._deliveries.delivered(delivery)
            return
        self._brake.failed(self._loop.time(), self._draw())
        now = datetime.now(UTC)
        if now >= self._give_up_at(delivery):
            await self._give_up(delivery, answer.failure, seconds)
            return
        delay_s = self._back_off.delay_s(delivery.attempts + 1, self._draw(), answer.retry_after_s)
        next_at = min(now + timedelta(seconds=delay_s), self._give_up_at(delivery))
        self._metrics.webhook_delivery(self._name, "retry", seconds)
        _log.warning(
            "webhook.attempt_failed",
            endpoint=self._name,
            event_id=event.id,
            type=event.type,
            attempts=delivery.attempts + 1,
            failure=answer.failure,
            next_attempt_at=next_at.isoformat(),
        )
        await self._deliveries.postpone(delivery, next_at, answer.failure)
        self._next_at = next_at if self._next_at is None else min(self._next_at, next_at)

    async def _give_up(self, delivery: Delivery, failure: str, seconds: float | None) -> None:
        event = delivery.event
        now = datetime.now(UTC)
        attempts = delivery.attempts + (seconds is not None)
        self._metrics.webhook_delivery(self._name, "dead", seconds or 0.0)
        since = delivery.queued_at.isoformat()
        detail = f"{self._name} did not take {event.id} in {attempts} attempts since {since}: {failure}"
        _log.error("webhook.delivery_given_up", endpoint=self._name, event_id=event.id, type=event.type, detail=detail)
        await self._deliveries.give_up(delivery, now, failure, attempted=seconds is not None)
        if event.type != NODE_ERROR:
            # Errors about errors that cannot be delivered would breed.
            call_id = None if event.call_id is None else CallId(event.call_id)
            self._publish(ErrorEvent(now, "webhook", "delivery-given-up", detail, call_id))

    def _give_up_at(self, delivery: Delivery) -> datetime:
        return delivery.queued_at + self._give_up_after
