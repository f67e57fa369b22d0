"""One attempt to hand an event to an endpoint: a signed HTTP POST and what was answered.

The body is a CloudEvents 1.0 envelope in JSON (structured mode of the HTTP binding, with the `sequence` extension),
signed as Standard Webhooks 1.0 with the time of the attempt. No redirect is followed, no cookie kept, no proxy taken
from the environment, and no more than `MAX_ANSWER_BYTES` of an answer read.
"""

import asyncio
import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote

import aiohttp
import orjson
from aiohttp.abc import AbstractResolver, ResolveResult
from standardwebhooks import Webhook

from control.events.backoff import retry_after_s
from control.settings.sections import WebhookSettings
from control.store.events import StoredEvent

CONTENT_TYPE = "application/cloudevents+json"
MAX_ANSWER_BYTES = 65_536

_MAX_FAILURE_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of an attempt: `failure` says what was wrong, None when the event was taken."""

    failure: str | None = None
    retry_after_s: float | None = None


class WebhookClient:
    """Posts events to one endpoint, over connections of its own."""

    def __init__(self, settings: WebhookSettings, node_name: str) -> None:
        self._url = settings.url
        self._timeout_s = settings.timeout_s
        self._source = f"/sippbx/{quote(node_name, safe='')}"
        self._webhook = Webhook(settings.secret.get_secret_value())
        self._resolver = _Resolver(settings.name)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=settings.concurrency, resolver=self._resolver),
            timeout=aiohttp.ClientTimeout(total=settings.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "sippbx", "Content-Type": CONTENT_TYPE},
            auto_decompress=False,
            trust_env=False,
        )

    async def post(self, event: StoredEvent) -> Answer:
        """Make one attempt; it ends within the endpoint's timeout."""
        body = cloud_event(event, self._source)
        headers = signed_headers(self._webhook, event.id, body, datetime.now(UTC))
        try:
            async with self._session.post(self._url, data=body, headers=headers, allow_redirects=False) as response:
                # The status has decided; a body that stalls or breaks off takes nothing back.
                with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
                    await _skip_body(response)
                if 200 <= response.status < 300:
                    return Answer()
                asked = retry_after_s(response.headers.get("Retry-After"), datetime.now(UTC))
                return Answer(f"answered {response.status}", asked)
        except TimeoutError:
            return Answer(f"no answer within {self._timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Answer(_printable(f"{type(error).__name__}: {error}"))

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()
        await self._resolver.close()


def cloud_event(event: StoredEvent, source: str) -> bytes:
    """The event as the body of a request.

    `sequence` is a decimal padded with zeros, because the extension compares it as text.
    """
    envelope = {
        "specversion": "1.0",
        "id": event.id,
        "source": source,
        "type": f"sippbx.{event.type}",
        "time": event.at,
        "sequence": f"{event.sequence:020d}",
        "datacontenttype": "application/json",
    }
    if event.call_id is not None:
        envelope["subject"] = event.call_id
    envelope["data"] = orjson.Fragment(event.data)
    return orjson.dumps(envelope, option=orjson.OPT_UTC_Z)


def signed_headers(webhook: Webhook, event_id: str, body: bytes, now: datetime) -> dict[str, str]:
    """The three headers of Standard Webhooks for an attempt made `now`."""
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": webhook.sign(event_id, now, body.decode()),
    }


async def _skip_body(response: aiohttp.ClientResponse) -> None:
    """Read what there is, so that the connection can be used again; one that has more to say is closed."""
    size = 0
    while size < MAX_ANSWER_BYTES and (chunk := await response.content.read(MAX_ANSWER_BYTES - size)):
        size += len(chunk)


def _printable(text: str) -> str:
    """What a receiver put into an error message: on one line, cut, and fit for the store (no lone surrogates)."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:_MAX_FAILURE_CHARACTERS]


class _Resolver(AbstractResolver):
    """Looks names up in a thread of its own.

    getaddrinfo knows no deadline: in the threads that everybody shares, name servers that are silent for one endpoint
    would hold up the others, and files.
    """

    def __init__(self, endpoint: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"webhook-{endpoint}-dns")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, socket.getaddrinfo, host, port, family, socket.SOCK_STREAM)
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=int(address[1]),
                family=kind,
                proto=proto,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, proto, _, address in found
        ]

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
