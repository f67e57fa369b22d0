"""Stop signals as events, and how late the event loop runs."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

LAG_INTERVAL_S = 0.5


class Stop:
    """What has been asked of this process: first to drain, then, by a second request, to stop now."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.now = asyncio.Event()

    def request(self) -> None:
        """Asks once; a signal, or whoever else wants the process to end."""
        if self.draining.is_set():
            self.now.set()
        self.draining.set()

    @contextlib.contextmanager
    def on_signals(self, hangup: Callable[[], None]) -> Iterator[None]:
        """While it is open, SIGTERM and SIGINT are requests, and SIGHUP, which would kill the process, calls `hangup`.

        To be used in the main thread, with the event loop running.
        """
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGTERM: self.request, signal.SIGINT: self.request, signal.SIGHUP: hangup}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)


async def sample_loop_lag(observe: Callable[[float], None], interval_s: float = LAG_INTERVAL_S) -> None:
    """Tells `observe` twice a second by how many seconds a timer of the event loop was late; runs until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        observe(max(0.0, loop.time() - due))


def count_tasks() -> int:
    """How many tasks the running event loop has; to be called from within it."""
    return len(asyncio.all_tasks())
