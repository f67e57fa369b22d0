"""Renders a kustomization as `kubectl apply -k` would send it, without a cluster."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

KUBECTL = Path(sys.executable).parent / "kubectl"
BASE = Path(__file__).resolve().parents[2] / "deploy" / "k8s" / "base"

Resource = dict[str, Any]
"""A Kubernetes object as plain data."""


def render(folder: Path) -> list[Resource]:
    """The objects of a kustomization.

    Raises:
        AssertionError: with what kubectl complained about.
    """
    run = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    return list(yaml.safe_load_all(run.stdout))


def the(resources: list[Resource], kind: str) -> Resource:
    """The only object of a kind."""
    (found,) = [resource for resource in resources if resource["kind"] == kind]
    return found
