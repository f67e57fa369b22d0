"""`python -m bench [NAME [OPTION ...]]`: one benchmark, or all of them, each with its command."""

import subprocess
import sys

BENCHMARKS = ("calls_with_media", "signalling", "journal")


def main() -> int:
    """Run what was named; the exit code is that of the worst."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in BENCHMARKS:
        print(f"no benchmark {arguments[0]!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    commands = [arguments] if arguments else [[name] for name in BENCHMARKS]
    worst = 0
    for name, *options in commands:
        print(f"$ python -m bench.{name} {' '.join(options)}".rstrip(), flush=True)
        worst = max(worst, subprocess.run([sys.executable, "-m", f"bench.{name}", *options], check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
