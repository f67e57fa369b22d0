"""The commands that drive a running node, over gRPC.

Tables and lines are for people; `-o json` is for programs, in the words of the HTTP API: one document for what is asked
once, one object a line for events.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import grpc
import typer
from google.protobuf.message import Message
from rich.console import RenderableType

from sippbx import tables
from sippbx.client import Client, ClientError
from sippbx.node_address import ApiKeyError, NodeAddress, NoNodeError, node_address
from sippbx.plain import event, plain

EXIT_FAILED = 1
EXIT_PORT_TAKEN = 3
EXIT_UNREACHABLE = 4
EXIT_REFUSED = 5
EXIT_CODES = (
    "Exit codes: 0 all went well, 1 something failed, 2 wrong usage, 3 a port is taken (run), 4 the node cannot be"
    " reached, 5 the node refuses (its reason is on the standard error)."
)

_PAGE_SIZE = 1000
_CALL_ID_BYTES = 8
_MAX_SEQUENCE = 2**63 - 1
_UNANSWERED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}

Document = dict[str, Any]
T = TypeVar("T")

app = typer.Typer()


class Output(StrEnum):
    """How results are written."""

    TABLE = "table"
    JSON = "json"


Target = Annotated[
    str | None,
    typer.Option(envvar="SIPPBX_TARGET", metavar="HOST:PORT", help="The node's gRPC API. Default: the pair of --data."),
]
Key = Annotated[str | None, typer.Option(envvar="SIPPBX_API_KEY", help="The API key; with --target.")]
Ca = Annotated[
    Path | None,
    typer.Option(envvar="SIPPBX_CA", help="Speak TLS, and trust the authorities of this PEM file; with --target."),
]
Data = Annotated[Path, typer.Option(help="Folder of a pair that `sippbx run` started.")]
OutputAs = Annotated[Output, typer.Option("--output", "-o", help="For people or for programs.")]
CallIdOf = Annotated[str, typer.Argument(metavar="CALL_ID", help="Which call.")]


@app.command(epilog=EXIT_CODES)
def calls(
    call_id: Annotated[
        str | None, typer.Argument(metavar="CALL_ID", help="This one, running or ended. Default: all that run.")
    ] = None,
    *,
    target: Target = None,
    key: Key = None,
    ca: Ca = None,
    data: Data = Path("run"),
    output: OutputAs = Output.TABLE,
) -> None:
    """List the calls that run, or show one."""
    node = _node(target, key, ca, data)
    if call_id is not None:
        _show_call(_ask(node, lambda client: client.get_call(call_id)), output)
        return
    found = _ask(node, lambda client: _collected(client.calls(page_size=_PAGE_SIZE)))
    _show({"calls": found}, [tables.table(tables.CALLS, found)], output)


@app.command(epilog=EXIT_CODES)
def originate(
    caller: Annotated[str, typer.Argument(metavar="CALLER", help="User or number whose phone rings first.")],
    callee: Annotated[str, typer.Argument(metavar="CALLEE", help="User or number that is called then.")],
    *,
    call_id: Annotated[str | None, typer.Option(help="Id of the call; repeating it makes no second call.")] = None,
    target: Target = None,
    key: Key = None,
    ca: Ca = None,
    data: Data = Path("run"),
    output: OutputAs = Output.TABLE,
) -> None:
    """Start a call between two parties. Returns at once; `sippbx events` tells what becomes of it."""
    chosen = f"cli-{secrets.token_hex(_CALL_ID_BYTES)}" if call_id is None else call_id
    node = _node(target, key, ca, data)
    _show_call(_ask(node, lambda client: client.originate(chosen, caller=caller, callee=callee)), output)


@app.command(epilog=EXIT_CODES)
def hangup(
    call_id: CallIdOf,
    *,
    target: Target = None,
    key: Key = None,
    ca: Ca = None,
    data: Data = Path("run"),
    output: OutputAs = Output.TABLE,
) -> None:
    """End a call."""
    _show_call(_ask(_node(target, key, ca, data), lambda client: client.hang_up(call_id)), output)


@app.command(epilog=EXIT_CODES)
def registrations(
    user: Annotated[str, typer.Argument(metavar="USER", help="Of this user alone.")] = "",
    *,
    target: Target = None,
    key: Key = None,
    ca: Ca = None,
    data: Data = Path("run"),
    output: OutputAs = Output.TABLE,
) -> None:
    """List the phones that are registered."""
    node = _node(target, key, ca, data)
    found = _ask(node, lambda client: _collected(client.registrations(user, page_size=_PAGE_SIZE)))
    _show({"registrations": found}, [tables.table(tables.REGISTRATIONS, found)], output)


@app.command(epilog=EXIT_CODES)
def cdr(
    *,
    limit: Annotated[int, typer.Option(min=1, help="So many at the most.")] = 20,
    target: Target = None,
    key: Key = None,
    ca: Ca = None,
    data: Data = Path("run"),
    output: OutputAs = Output.TABLE,
) -> None:
    """List call detail records, the newest first."""
    node = _node(target, key, ca, data)
    found = _ask(node, lambda client: _collected(client.records(page_size=min(limit, _PAGE_SIZE)), limit))
    _show({"cdrs": found}, [tables.table(tables.RECORDS, found)], output)


@app.command(epilog=EXIT_CODES)
def events(
    *,
    resume_after: Annotated[
        int | None,
        typer.Option(
            min=0, max=_MAX_SEQUENCE, help="Begin behind this sequence. Default: with the calls that run now."
        ),
    ] = None,
    types: Annotated[
        list[str] | None, typer.Option("--type", metavar="TYPE", help="Only such, as call.ended; may be repeated.")
    ] = None,
    target: Target = None,
    key: Key = None,
    ca: Ca = None,
    data: Data = Path("run"),
    output: OutputAs = Output.TABLE,
) -> None:
    """Tell what happens, until Ctrl-C; a lost connection is resumed.

    With `-o json` the calls that run now come first, as an object of the type snapshot.
    """
    node = _node(target, key, ca, data)
    with contextlib.suppress(KeyboardInterrupt):
        _ask(node, lambda client: _tail(client, resume_after, types or (), output))


async def _tail(client: Client, resume_after: int | None, types: Sequence[str], output: Output) -> None:
    console = tables.console()
    async with contextlib.aclosing(client.watch_events(resume_after=resume_after, types=types)) as messages:
        async for message in messages:
            match message.DESCRIPTOR.name:
                case "Snapshot":
                    snapshot = plain(message)
                    if output is Output.JSON:
                        _print_line({"type": "snapshot", "sequence": snapshot["sequence"], "calls": snapshot["calls"]})
                    elif snapshot["calls"]:
                        console.print(tables.table(tables.CALLS, snapshot["calls"]))
                case "Event":
                    document = event(message)
                    if output is Output.JSON:
                        _print_line(document)
                    else:
                        console.print(tables.event_line(document))


def _node(target: str | None, key: str | None, ca: Path | None, data: Path) -> NodeAddress:
    try:
        return node_address(target, key, ca, data)
    except ApiKeyError as error:
        raise typer.BadParameter(str(error), param_hint="--key") from error
    except NoNodeError as error:
        _fail(EXIT_UNREACHABLE, str(error))


def _ask(node: NodeAddress, ask: Callable[[Client], Awaitable[T]]) -> T:
    """Ask the node, or end the program with the code that belongs to what went wrong."""
    try:
        authorities = None if node.ca is None else node.ca.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"cannot read {node.ca}: {error.strerror}", param_hint="--ca") from error

    async def asked() -> T:
        tls = None if authorities is None else grpc.ssl_channel_credentials(authorities)
        async with Client(node.target, node.api_key, tls=tls) as client:
            return await ask(client)

    try:
        return asyncio.run(asked())
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"{tables.printable(str(error.object))!r} is not UTF-8") from error
    except ClientError as error:
        if error.code in _UNANSWERED and not error.reason:
            _fail(EXIT_UNREACHABLE, f"cannot reach the node at {node.target}: {error.detail}")
        _fail(EXIT_REFUSED, str(error))


async def _collected(messages: AsyncIterator[Message], limit: int | None = None) -> list[Document]:
    found: list[Document] = []
    async for message in messages:
        found.append(plain(message))
        if len(found) == limit:
            break
    return found


def _show_call(call: Message, output: Output) -> None:
    document = plain(call)
    _show(document, tables.call_details(document), output)


def _show(document: Document, renderables: Sequence[RenderableType], output: Output) -> None:
    if output is Output.JSON:
        typer.echo(json.dumps(document, indent=2))
        return
    console = tables.console()
    for renderable in renderables:
        console.print(renderable)


def _print_line(document: Document) -> None:
    typer.echo(json.dumps(document, separators=(",", ":")))


def _fail(code: int, message: str) -> NoReturn:
    typer.echo(f"sippbx: {tables.printable(message)}", err=True)
    raise typer.Exit(code)
