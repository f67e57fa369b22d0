"""Checks the contracts: lint, format, freshness of the committed stubs, and that nothing was broken.

What must not be broken is the contract of the newest release tag (vX.Y.Z), or proto/baseline.binpb before there is one.
Exit codes: 0 all is well, 1 something is not, and it has been printed.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "proto" / "baseline.binpb"
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command at the root of the repository, with the programs beside this interpreter found first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def breaking_against() -> str:
    """The buf input to compare with."""
    tags = run(["git", "tag", "--list", "v*", "--sort=-v:refname"]).stdout.split()
    releases = [tag for tag in tags if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]
    return f".git#tag={releases[0]}" if releases else str(BASELINE.relative_to(ROOT))


def stubs_below(folder: Path) -> dict[str, bytes]:
    """Generated files by path relative to `folder`."""
    paths = (path for pattern in STUB_PATTERNS for path in (folder / "sippbx").rglob(pattern))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def stale_stubs() -> Iterator[str]:
    """What differs between the committed stubs and newly generated ones."""
    with tempfile.TemporaryDirectory() as folder:
        generated = run(["buf", "generate", "--output", folder])
        if generated.returncode:
            yield f"buf generate failed:\n{generated.stderr}"
            return
        wanted, found = stubs_below(Path(folder)), stubs_below(ROOT)
    for path in sorted(wanted.keys() | found.keys()):
        if path not in found:
            yield f"{path} is missing: make proto"
        elif path not in wanted:
            yield f"{path} has no source any more: remove it"
        elif wanted[path] != found[path]:
            yield f"{path} is stale: make proto"


def failures() -> Iterator[str]:
    """Everything that is wrong, as text for people."""
    against = breaking_against()
    for command in (
        ["buf", "lint"],
        ["buf", "format", "--diff", "--exit-code"],
        ["buf", "breaking", "--against", against],
    ):
        result = run(command)
        if result.returncode:
            yield f"{' '.join(command)}:\n{result.stdout}{result.stderr}"
    yield from stale_stubs()
    print(f"contracts checked; compared with {against}")


def main() -> int:
    """Prints what is wrong."""
    found = list(failures())
    for failure in found:
        print(failure, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
