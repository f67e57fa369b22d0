"""What can go wrong with a phone: `SoftphoneError`, and below it deadlines, refusals and malformed messages."""


class SoftphoneError(Exception):
    """Anything that keeps a phone from doing what its script says."""


class DeadlineError(SoftphoneError):
    """The far end did not do what was awaited in time."""


class MalformedError(SoftphoneError):
    """The far end sent something that is not SIP, or lacks what the phone needs to go on."""


class RefusedError(SoftphoneError):
    """The far end answered a request with a final status of 300 or above."""

    def __init__(self, method: str, status: int, reason: str) -> None:
        super().__init__(f"{method} was refused: {status} {reason}")
        self.method = method
        self.status = status
        self.reason = reason
