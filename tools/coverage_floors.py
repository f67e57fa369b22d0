"""Holds each pure package to its own coverage floor, from [tool.sippbx.coverage-floors] in pyproject.toml.

A floor is a percentage of lines and branches together, over the files whose path begins with the key. Reads the
.coverage file of the last run. Exit codes: 0 all floors hold, 1 one does not or names no measured file.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Prints each floor with what was measured."""
    floors: dict[str, float] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["sippbx"]["coverage-floors"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "coverage.json")
        command = [sys.executable, "-m", "coverage", "json", "--quiet", "--fail-under=0", "-o", str(report)]
        subprocess.run(command, cwd=ROOT, check=True)
        files = json.loads(report.read_text())["files"]
    failed = False
    for prefix, floor in floors.items():
        summaries = [
            entry["summary"] for path, entry in files.items() if path == prefix or path.startswith(f"{prefix}/")
        ]
        covered = sum(summary["covered_lines"] + summary["covered_branches"] for summary in summaries)
        total = sum(summary["num_statements"] + summary["num_branches"] for summary in summaries)
        percent = 100 * covered / total if total else 0.0
        holds = percent >= floor
        failed = failed or not holds
        print(f"{'ok    ' if holds else 'BELOW '} {prefix:24} {percent:5.1f} % (floor {floor} %)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
