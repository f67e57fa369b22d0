"""An orchestrator as a platform team would write one, over sippbx.client alone, in a process of its own.

    python -m tests.harness.orchestrator TARGET KEY CALL_ID CALLER CALLEE INTRUDER

It originates a call between CALLER and CALLEE and follows it to its end, and hangs up any call from INTRUDER as soon as
that is answered. What it sees is printed, a line for each event; it ends once both calls have.
"""

import asyncio
import sys

from sippbx.client import Client
from sippbx.control.v1 import event_service_pb2
from sippbx.events.v1 import event_pb2, record_pb2


def describe(event: event_pb2.Event) -> str:
    """Type, call and what is particular of an event of a call."""
    kind = str(event.WhichOneof("payload"))
    payload = getattr(event, kind)
    if kind == "call_ended":
        record = payload.record
        reason = record_pb2.Reason.Name(record.termination.reason).removeprefix("REASON_").lower()
        return f"{kind} {record.call_id} {reason} {record.talk_duration.ToTimedelta().total_seconds():.1f}"
    if kind == "call_ringing":
        return f"{kind} {payload.call_id} {record_pb2.Leg.Name(payload.leg).removeprefix('LEG_').lower()}"
    return f"{kind} {payload.call_id}"


async def orchestrate(client: Client, *, call_id: str, caller: str, callee: str, intruder: str) -> None:
    """Both tasks in one loop over the events."""
    open_calls = 2
    async for message in client.watch_events(types=["call.ringing", "call.answered", "call.ended"]):
        match message:
            case event_service_pb2.Snapshot():
                print(f"snapshot {len(message.calls)}", flush=True)
                await client.originate(call_id, caller=caller, callee=callee)
                again = await client.originate(call_id, caller=caller, callee=callee)
                print(f"originated {again.call_id}", flush=True)
            case event_pb2.Event():
                print(describe(message), flush=True)
                if message.call_answered.caller == intruder:
                    await client.hang_up(message.call_answered.call_id)
                if message.HasField("call_ended"):
                    open_calls -= 1
                    if not open_calls:
                        return


async def main(target: str, key: str, *parties: str) -> None:
    """Run it; `parties` are call_id, caller, callee and intruder."""
    call_id, caller, callee, intruder = parties
    async with Client(target, key) as client:
        await orchestrate(client, call_id=call_id, caller=caller, callee=callee, intruder=intruder)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
