"""The `sippbx` command."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from sippbx import commands
from sippbx.commands import EXIT_CODES, EXIT_FAILED, EXIT_PORT_TAKEN
from sippbx.pair import Pair, PairDescription, PairError, PortTakenError, describe, own_address
from sippbx.runtime.lifecycle import Stop

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A SIP back-to-back user agent: run one, or drive one that runs.",
    epilog=EXIT_CODES,
)

Address = Annotated[str | None, typer.Option(help="Numeric address to use. Default: this machine's own.")]
SipPort = Annotated[int, typer.Option(min=1, max=65535, help="UDP port for SIP.")]
MetricsPort = Annotated[
    int, typer.Option(min=1, max=65534, help="TCP port for the control plane's metrics; the data plane's is the next.")
]
HttpPort = Annotated[int, typer.Option(min=1, max=65535, help="TCP port for the HTTP API.")]
GrpcPort = Annotated[int, typer.Option(min=1, max=65535, help="TCP port for the gRPC API.")]
RtpRange = Annotated[str, typer.Option(metavar="FIRST-LAST", help="UDP ports for media.")]
Data = Annotated[Path, typer.Option(help="Folder for configuration, passwords, API key, logs and call records.")]


@app.command()
def run(
    *,
    address: Address = None,
    sip_port: SipPort = 5060,
    metrics_port: MetricsPort = 9090,
    http_port: HttpPort = 8080,
    grpc_port: GrpcPort = 50051,
    rtp_range: RtpRange = "10000-20000",
    data: Data = Path("run"),
) -> None:
    """Start the supervised pair on embedded defaults, until Ctrl-C.

    Exit codes: 0 stopped by signal, 1 a plane failed, 2 wrong usage, 3 a port is taken.
    """
    try:
        description = describe(
            address or own_address(),
            sip_port=sip_port,
            metrics_port=metrics_port,
            http_port=http_port,
            grpc_port=grpc_port,
            rtp_range=_range_of(rtp_range),
            folder=data,
        )
        code = asyncio.run(_run(Pair(description)))
    except PairError as error:
        typer.echo(f"sippbx: {error}", err=True)
        code = EXIT_PORT_TAKEN if isinstance(error, PortTakenError) else EXIT_FAILED
    raise typer.Exit(code)


@app.command()
def demo(data: Data = Path("run")) -> None:
    """Let two scripted phones talk for five seconds, and print the call's record.

    Uses the pair that runs from the folder, or starts its own. Exit codes: 0 the call went well, 1 it did not.
    """
    from sippbx.demo import run_demo  # noqa: PLC0415 -- brings the phones, which nothing else here needs

    try:
        code = asyncio.run(run_demo(data))
    except PairError as error:
        typer.echo(f"sippbx: {error}", err=True)
        code = EXIT_FAILED
    raise typer.Exit(code)


app.add_typer(commands.app)


def _range_of(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if first.isdecimal() and last.isdecimal() and 1024 <= int(first) < int(last) <= 65535:
        return int(first), int(last)
    raise typer.BadParameter(f"{text!r} is not a range of ports such as 10000-20000", param_hint="--rtp-range")


async def _run(pair: Pair) -> int:
    stop = Stop()
    with stop.on_signals(hangup=stop.request):
        asked = asyncio.create_task(stop.draining.wait())
        starting = asyncio.create_task(pair.start())
        typer.echo("starting ...")
        await asyncio.wait({asked, starting}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            return 0
        try:
            await starting
        except PairError:
            asked.cancel()
            raise
        typer.echo(_banner(pair.description))
        ended = asyncio.create_task(pair.ended())
        await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
        failed = None if asked.done() else ended.result()
        asked.cancel()
        ended.cancel()
        typer.echo("stopping ...")
        stopping = asyncio.create_task(pair.stop())
        hurried = asyncio.create_task(stop.now.wait())
        await asyncio.wait({stopping, hurried}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not stopping.done():
            stopping.cancel()
        await asyncio.wait({stopping})
        if failed is not None:
            typer.echo(f"sippbx: {failed.name} ended. The end of {failed.log}:\n{failed.last_words()}", err=True)
            return EXIT_FAILED
        typer.echo("stopped")
        return 0


def _banner(pair: PairDescription) -> str:
    users = "\n".join(
        f"    sip:{user}@{pair.sip_host}   password {password}" for user, password in pair.passwords.items()
    )
    first, last = pair.rtp_range
    return f"""
sip-pbx is ready. Register two phones over UDP (the user name is the number):

{users}

and dial 1002 from 1001, or the other way round. `make demo` does it without phones.

    SIP            UDP {pair.address} port {pair.sip_port}
    media          UDP {pair.address} ports {first}-{last}
    HTTP API       {pair.http_url}/v1/calls with the key in {pair.folder}/api-key
    gRPC API       {pair.grpc_target} with the same key; `sippbx calls`, `sippbx events` and others use it
    metrics        {pair.control_url}/metrics (signalling)
                   {pair.dataplane_url}/metrics (media)
    call records   {pair.folder}/cdr.jsonl, and the same in sippbx.sqlite
    logs           {pair.folder}/control.log
                   {pair.folder}/dataplane.log

Ctrl-C stops it.
"""


def main() -> None:
    """The entry point of the `sippbx` script."""
    app()
