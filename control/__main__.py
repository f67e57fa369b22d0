"""The control plane's process.

    python -m control [--config FILE] [--supervise]

It runs in the foreground, logs to standard error, and stops on SIGTERM or SIGINT: new calls are refused, running ones
ended. A second signal does not wait for that. SIP sockets are taken from LISTEN_FDS (sd_listen_fds(3)), by listener
name, or bound here. With --supervise they are bound first and this process becomes the supervisor of another that has
them, so that requests wait in them while that one is restarted.

Exit codes:
    0   stopped as asked
    1   an internal error; the log has it
    2   the settings or the command line are refused; standard error has every fault
    3   an address or a port cannot be bound, or a certificate not be used; the message names it
    4   fenced: another control plane has acquired the data plane or the store; nothing was ended, and with --supervise
        it is not restarted
    5   the store of call records cannot be opened
    70  with --supervise: the process died too often
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from control.app import EXIT_ADDRESS, EXIT_CONFIGURATION, EXIT_FENCED, bind, listener_of, run
from control.settings.settings import Settings, load
from sippbx.runtime.logging import configure_logging
from sippbx.runtime.settings_reader import SettingsError
from sippbx.runtime.sockets import SocketError, exec_supervised, receive


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and the settings, and run; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m control", description="The SIP control plane.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML; see deploy/config/control.yaml")
    parser.add_argument("--supervise", action="store_true", help="restart it at once after it dies")
    options = parser.parse_args(arguments)
    try:
        settings = load(options.config, os.environ)
    except SettingsError as error:
        for message in error.messages:
            sys.stderr.write(f"{message}\n")
        return EXIT_CONFIGURATION
    try:
        if options.supervise:
            _supervise(settings, options.config)
        inherited = receive()
    except SocketError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_ADDRESS
    configure_logging("control", level=settings.log.level.value, log_format=settings.log.format.value)
    return asyncio.run(run(settings, inherited))


def _supervise(settings: Settings, config: Path | None) -> None:
    """Become the supervisor; return only by raising."""
    sockets = [(listener.name, bind(listener_of(listener))) for listener in settings.sip.listeners]
    command = [sys.executable, "-m", "control", *(("--config", str(config)) if config else ())]
    # Whoever has what this one had would lose it again to a restart.
    exec_supervised("control", sockets, command, options=["--final", str(EXIT_FENCED)])


if __name__ == "__main__":
    sys.exit(main())
