"""The data plane's process.

    python -m dataplane [--config FILE] [--supervise]

It runs in the foreground and logs to standard error. SIGTERM or SIGINT ends it once its sessions and then the control
plane are gone, or `lease.drain_timeout_s` has passed; a second signal does not wait for that. So both planes may be
signalled at once. With --supervise this process becomes the supervisor of another, which it restarts at once after it
dies.

Exit codes:
    0   stopped as asked
    1   an internal error; the log has it
    2   the settings or the command line are refused; standard error has every fault
    3   an address or a port cannot be bound; the message names it
    4   the relay engine does not start
    70  with --supervise: the process died too often
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dataplane.app import EXIT_CONFIGURATION, run
from dataplane.settings import SettingsError, load, prepare_host
from sippbx.runtime.logging import configure_logging
from sippbx.runtime.sockets import exec_supervised


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and the settings, and run; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dataplane", description="The RTP data plane.")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings in YAML; see deploy/config/dataplane.yaml"
    )
    parser.add_argument("--supervise", action="store_true", help="restart it at once after it dies")
    options = parser.parse_args(arguments)
    try:
        settings = load(options.config, os.environ)
        prepare_host(settings.media)
    except SettingsError as error:
        for message in error.messages:
            sys.stderr.write(f"{message}\n")
        return EXIT_CONFIGURATION
    if options.supervise:
        config = ("--config", str(options.config)) if options.config else ()
        exec_supervised("dataplane", [], [sys.executable, "-m", "dataplane", *config])
    configure_logging("dataplane", level=settings.log.level.value, log_format=settings.log.format.value)
    return asyncio.run(run(settings))


if __name__ == "__main__":
    sys.exit(main())
