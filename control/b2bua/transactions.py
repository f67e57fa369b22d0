"""Which transaction belongs to which leg of which call."""

from collections.abc import Iterable
from dataclasses import replace

from control.pbx.call import Call
from control.pbx.records import CallId, LegName
from control.sip.transaction import TransactionId


class TransactionOwners:
    """Finds the leg that a transaction's failure or CANCEL is for, and a call's transactions when it is saved."""

    def __init__(self) -> None:
        self._owners: dict[TransactionId, tuple[Call, LegName]] = {}
        self._of_call: dict[CallId, set[TransactionId]] = {}
        # Answered INVITEs of ours by leg: a repeated 2xx must find them for as long as they live (RFC 6026).
        self._accepted: dict[CallId, dict[LegName, TransactionId]] = {}
        # The newest requests of the peers in their dialogs.
        self._newest: dict[CallId, dict[LegName, TransactionId]] = {}

    def __len__(self) -> int:
        """Transactions that may still fail."""
        return len(self._owners)

    def get(self, transaction: TransactionId | None) -> tuple[Call, LegName] | None:
        """Whose it is."""
        return self._owners.get(transaction) if transaction is not None else None

    def own(self, transaction: TransactionId, call: Call, leg: LegName) -> None:
        """It is this leg's."""
        self._owners[transaction] = (call, leg)
        self._of_call.setdefault(call.call_id, set()).add(transaction)

    def serve(self, transaction: TransactionId, call: Call, leg: LegName) -> None:
        """It is the newest request of this leg's peer, in place of the one before."""
        newest = self._newest.setdefault(call.call_id, {})
        before = newest.get(leg)
        if before is not None and self._owners.pop(before, None) is not None:
            self._of_call[call.call_id].discard(before)
        newest[leg] = transaction
        self.own(transaction, call, leg)

    def settle(self, transaction: TransactionId, *, accepted: bool) -> None:
        """It has its final answer, a 2xx if `accepted`, and cannot fail any more."""
        entry = self._owners.pop(transaction, None)
        if entry is None:
            return
        call, leg = entry
        self._of_call[call.call_id].discard(transaction)
        if accepted and transaction.method == "INVITE":
            self._accepted.setdefault(call.call_id, {})[leg] = transaction

    def of_call(self, call: Call) -> Iterable[TransactionId]:
        """All that may be alive of a call's, those that only its sessions know included."""
        found = set(self._of_call.get(call.call_id, ()))
        found.update(self._accepted.get(call.call_id, {}).values())
        for session in call.legs.values():
            found |= session.transactions()
        # The CANCEL of an INVITE is the stack's own affair, and goes on with it.
        return found | {replace(each, method="CANCEL") for each in found if each.method == "INVITE"}

    def forget(self, call_id: CallId) -> None:
        """Forget a call's."""
        self._accepted.pop(call_id, None)
        self._newest.pop(call_id, None)
        for transaction in self._of_call.pop(call_id, ()):
            self._owners.pop(transaction, None)
