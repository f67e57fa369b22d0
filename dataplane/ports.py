"""The pool of UDP ports, in blocks of consecutive ports.

A session takes a whole block or nothing. The block that has been free the longest is taken first, and a freed block
rests before it may be taken again, because the far ends of its last session may still be sending. Pure.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass


class PortsExhaustedError(Exception):
    """No block is free."""


class BlockUnavailableError(Exception):
    """The named block is in use, resting or not a block of this pool."""


@dataclass(frozen=True, slots=True)
class PortBlock:
    """`size` consecutive ports from `first` on: the first half is the caller's, the second the callee's."""

    first: int
    size: int

    @property
    def lines(self) -> int:
        """How many media lines it has ports for: RTP and RTCP, on either leg."""
        return self.size // 4

    def caller_port(self, line: int) -> int:
        """The RTP port that the caller sends line `line` to; its RTCP port is the one above."""
        return self.first + 2 * line

    def callee_port(self, line: int) -> int:
        """The RTP port that the callee sends line `line` to; its RTCP port is the one above."""
        return self.first + self.size // 2 + 2 * line


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Blocks by state; the three states add up to the total."""

    total: int
    in_use: int
    resting: int
    free: int


class PortPool:
    """Blocks of `block_size` ports from `first` to `last`, both included; ports that fill no whole block are left out.

    `rest_s` is how long a released block rests. Times are monotonic seconds that never go back.
    Raises ValueError for a range or a size that makes no block.
    """

    def __init__(self, first: int, last: int, block_size: int, rest_s: float) -> None:
        if block_size < 4 or block_size % 4:
            raise ValueError(f"block size {block_size} is not a multiple of 4")
        if first % 2:
            raise ValueError(f"first port {first} is odd: RTP ports are even (RFC 3550 section 11)")
        count = (last - first + 1) // block_size
        if count < 1:
            raise ValueError(f"ports {first} to {last} hold no block of {block_size}")
        self.first = first
        self.last = last
        self.block_size = block_size
        self._rest_s = rest_s
        self._total = count
        blocks = (PortBlock(first + i * block_size, block_size) for i in range(count))
        self._free = OrderedDict((block.first, block) for block in blocks)
        self._resting: deque[tuple[float, PortBlock]] = deque()
        self._in_use: dict[int, PortBlock] = {}

    def take(self, now: float, first_port: int | None = None) -> PortBlock:
        """Take the block that begins with `first_port`, or the least recently used one.

        Raises: PortsExhaustedError; BlockUnavailableError, when a named block cannot be had.
        """
        self._wake(now)
        if first_port is None:
            if not self._free:
                counts = self.counts(now)
                raise PortsExhaustedError(
                    f"no port block is free: {counts.in_use} of {counts.total} are in use, {counts.resting} are resting"
                )
            _, block = self._free.popitem(last=False)
        else:
            named = self._free.pop(first_port, None)
            if named is None:
                raise BlockUnavailableError(f"block {first_port} {self._why_unavailable(first_port)}")
            block = named
        self._in_use[block.first] = block
        return block

    def release(self, block: PortBlock, now: float) -> None:
        """Give a block back; it rests from `now` on. Raises ValueError when it is not in use."""
        self._leave_use(block)
        self._resting.append((now + self._rest_s, block))

    def put_back(self, block: PortBlock) -> None:
        """Give back a block that no packet can have been sent to; it is free at once. Raises ValueError as release."""
        self._leave_use(block)
        self._free[block.first] = block

    def counts(self, now: float) -> PoolCounts:
        """Count the blocks by state."""
        self._wake(now)
        return PoolCounts(self._total, len(self._in_use), len(self._resting), len(self._free))

    def _leave_use(self, block: PortBlock) -> None:
        if self._in_use.pop(block.first, None) is None:
            raise ValueError(f"block {block.first} is not in use")

    def _wake(self, now: float) -> None:
        while self._resting and self._resting[0][0] <= now:
            _, block = self._resting.popleft()
            self._free[block.first] = block

    def _why_unavailable(self, first_port: int) -> str:
        if first_port in self._in_use:
            return "is in use"
        if any(block.first == first_port for _, block in self._resting):
            return "is resting after its last session"
        return f"does not begin a block of {self.block_size} ports between {self.first} and {self.last}"
