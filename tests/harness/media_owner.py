"""A control plane that does nothing but own a data plane, as a process that can be stopped and woken up.

    python -m tests.harness.media_owner TARGET FIRST_PORT

It takes over the session "s1" that stands on FIRST_PORT and changes it every now and then. It prints one word a line:
"connected", "changed" for each change that was carried out, and "fenced", with which it ends.
"""

import asyncio
import dataclasses
import sys

import structlog

from control.media.client import MediaClient
from control.metrics import ControlMetrics
from control.pbx.media import MediaInput, MediaUpdated, RestoredSession
from control.pbx.records import ErrorEvent
from tests.harness.media_specs import media_spec

INTERVAL_S = 0.05


def say(word: str) -> None:
    print(word, flush=True)


async def main(target: str, first_port: int) -> None:
    """Owns, until it is fenced."""
    fenced = asyncio.Event()

    def hear(answer: MediaInput) -> None:
        if isinstance(answer, MediaUpdated):
            say("changed")

    def publish(_: ErrorEvent) -> None:
        """Nobody listens."""

    client = MediaClient(
        target=target,
        owner_id="old",
        command_timeout_s=5.0,
        lost_timeout_s=10.0,
        metrics=ControlMetrics(),
        fenced=fenced.set,
        publish=publish,
        incarnation=2,
    )
    spec = media_spec("s1")
    client.restore([RestoredSession(spec, first_port)])
    client.start(hear)
    while client.trouble is not None:
        await asyncio.sleep(INTERVAL_S)
    say("connected")
    while not fenced.is_set():
        spec = dataclasses.replace(spec, generation=spec.generation + 1)
        client.update(spec)
        await asyncio.sleep(INTERVAL_S)
    say("fenced")
    await client.stop()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
