"""Builds the images and runs the planes as two containers of a pod, with podman and runc, as the kustomize base says.

Nothing outside of the test is touched: storage, locks and run-time files are in a folder of their own, the pod has no
network but its loopback, and the build has none at all. What takes long to get, a base image made from the packages of
this Debian and the wheels of the locks, is kept in ~/.cache/sippbx-e2e by what it was made of.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from tests.harness.kubernetes import BASE, Resource, render, the
from tests.harness.pair import Pair

PROGRAMS = ("podman", "runc", "catatonit", "mmdebstrap", "sipp")
ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sippbx-e2e"
LOCKS = ("requirements-build.lock", "requirements-runtime.lock")
PACKAGES = ("python3", "python3-venv", "libstdc++6")
UNWANTED = ("doc", "locale", "man")
PLANES = ("control", "dataplane")
BASE_IMAGE = "localhost/sip-pbx-base:e2e"
TAG = "e2e"
BUILD_S = 300.0
COMMAND_S = 60.0
KEEP_UNUSED_S = 7 * 86_400.0
_CLONE_NEWNET = 0x40000000  # <linux/sched.h>

_STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{folder}/graph"
runroot = "{folder}/run"
"""
# crun raises limits, for which it may lack the right. The other lines need neither systemd nor what other users share.
_CONTAINERS = """\
[containers]
default_ulimits = []
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{folder}/tmp"
"""
_PIP = """\
[global]
no-index = true
find-links = /wheels
"""


class CannotRunError(Exception):
    """Containers cannot be made or run here; the text says why."""


class Podman:
    """A private podman with the images of both planes, for as long as it is open as a context manager."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sippbx-", dir="/tmp"))  # socket paths have an upper limit
        for name, text in (("storage.conf", _STORAGE), ("containers.conf", _CONTAINERS), ("pip.conf", _PIP)):
            (self._folder / name).write_text(text.format(folder=self._folder))
        self.environment = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(self._folder / "storage.conf"),
            "CONTAINERS_CONF": str(self._folder / "containers.conf"),
        }

    def __enter__(self) -> Self:
        """Build the images.

        Raises:
            CannotRunError: this machine cannot run containers, or cannot get what images are made of.
            AssertionError: the build failed.
        """
        try:
            base = _cached("base", (*PACKAGES, *UNWANTED, _suite(), _sources().read_text()), _make_base)
            self._try("import", "--quiet", str(base), BASE_IMAGE)
            version = self._try(
                *("run", "--rm", "--network", "none", BASE_IMAGE, "python3", "-c"),
                "import sys; print('%d.%d' % sys.version_info[:2])",
            ).strip()
            locks = [(ROOT / lock).read_text() for lock in LOCKS]
            wheels = _cached("wheels", (version, *locks), lambda path: _download(path, version))
            for plane in PLANES:
                self.run(
                    *("build", "--quiet", "--network", "none", "--build-arg", f"PYTHON_IMAGE={BASE_IMAGE}"),
                    *("--volume", f"{wheels}:/wheels:ro", "--volume", f"{self._folder}/pip.conf:/etc/pip.conf:ro"),
                    *("--target", plane, "--tag", f"localhost/sip-pbx-{plane}:{TAG}", str(ROOT)),
                    timeout_s=BUILD_S,
                )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove everything."""
        self.close()

    def run(self, *arguments: str, timeout_s: float = COMMAND_S) -> str:
        """Run a podman command; what it prints.

        Raises:
            AssertionError: it failed, with what it complained about.
        """
        run = subprocess.run(
            ["podman", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        assert run.returncode == 0, f"podman {' '.join(arguments)}: {run.stdout}{run.stderr}"
        return run.stdout

    def close(self) -> None:
        """Remove containers, images, mounts and files."""
        for leftovers in (["pod", "rm", "--all"], ["rm", "--all"]):
            command = ["podman", *leftovers, "--force", "--time", "0"]
            with contextlib.suppress(subprocess.TimeoutExpired):  # the rest is to be removed all the same
                subprocess.run(command, env=self.environment, capture_output=True, check=False, timeout=COMMAND_S)
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for path in sorted((path for path in mounted if path.startswith(f"{self._folder}/")), reverse=True):
            subprocess.run(["umount", "--lazy", path], capture_output=True, check=False, timeout=COMMAND_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _try(self, *arguments: str) -> str:
        try:
            return self.run(*arguments)
        except AssertionError as error:
            raise CannotRunError(f"containers cannot run here: {error}") from error


class ContainerPair(Pair):
    """The pair as the two containers of a pod. While it is open, this thread is in the pod's network.

    Names, user, rights, volumes and places of the settings are those of the kustomize base; the settings are those of
    any other pair, with the paths of the base.
    """

    def __init__(
        self,
        folder: Path,
        podman: Podman,
        *,
        control: Mapping[str, Any] | None = None,
        dataplane: Mapping[str, Any] | None = None,
    ) -> None:
        paths = {
            "media": {"target": "unix:///run/sippbx/media.sock", "lost_timeout_s": 1, "command_timeout_s": 1},
            "store": {"path": "/var/lib/sippbx/sippbx.sqlite"},
            "cdr": {"jsonl_path": "/var/lib/sippbx/cdr.jsonl"},
        }
        listen = {"grpc": {"listen": "unix:///run/sippbx/media.sock"}}
        super().__init__(folder, control=paths | dict(control or {}), dataplane=listen | dict(dataplane or {}))
        self._podman = podman
        self._manifest = the(render(BASE), "StatefulSet")
        self._pod = self._manifest["spec"]["template"]["spec"]
        self._containers: dict[str, Resource] = {each["name"]: each for each in self._pod["containers"]}
        self._name = f"{self._manifest['metadata']['name']}-0"
        self._outside = -1
        self.cdr_path = self._volume("data") / "cdr.jsonl"
        self.store_path = self._volume("data") / "sippbx.sqlite"

    def __enter__(self) -> Self:
        """Make the pod, enter its network, start both containers and wait until they are ready.

        Raises:
            PairError: one is not, in time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._podman.run("pod", "create", "--name", self._name, "--hostname", self._name, "--network", "none")
        try:
            self._podman.run("pod", "start", self._name)
            infra = self._podman.run("pod", "inspect", "--format", "{{.InfraContainerID}}", self._name).strip()
            pid = self._podman.run("inspect", "--format", "{{.State.Pid}}", infra).strip()
            self._outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            with Path(f"/proc/{pid}/ns/net").open() as inside:
                _enter_network(inside.fileno())
            return super().__enter__()
        except BaseException:
            self._remove()
            raise

    def __exit__(self, *_: object) -> None:
        """Stop both containers, leave the pod's network and remove the pod.

        Raises:
            PairError: one did not stop by itself.
        """
        try:
            super().__exit__()
        finally:
            self._remove()

    def start(self, plane: str) -> None:
        """Start the container of a plane. `supervisors` has the podman that runs it, which ends with its exit code."""
        container, rights = self._containers[plane], self._containers[plane]["securityContext"]
        user = self._pod["securityContext"]
        arguments = ["run", "--pod", self._name, "--name", plane, "--pull", "never"]
        arguments += ["--user", f"{user['runAsUser']}:{user['runAsGroup']}"]
        arguments += [f"--cap-drop={capability}" for capability in rights["capabilities"]["drop"]]
        arguments += [] if rights["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]
        arguments += ["--read-only", "--read-only-tmpfs=false"] if rights["readOnlyRootFilesystem"] else []
        for mount in container["volumeMounts"]:
            options = "ro" if mount.get("readOnly") else "rw"
            arguments += ["--volume", f"{self._volume(mount['name'])}:{mount['mountPath']}:{options}"]
            if mount["mountPath"] == "/etc/sippbx":
                settings = self._volume(mount["name"]) / f"{plane}.yaml"
                settings.write_text(yaml.safe_dump(self.settings[plane]))
        image = f"localhost/{container['image'].partition(':')[0]}:{TAG}"
        with (self.folder / f"{plane}.log").open("ab") as log:
            self.supervisors[plane] = subprocess.Popen(
                ["podman", *arguments, image],
                env=self._podman.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def terminate(self) -> None:
        """Send SIGTERM to both containers at once, as a kubelet does."""
        self._podman.run("kill", "--signal", "TERM", *PLANES)

    def execute(self, plane: str, *command: str) -> str:
        """Run a command in the container of a plane; what it prints.

        Raises:
            AssertionError: it failed, with what it complained about.
        """
        return self._podman.run("exec", plane, *command)

    def inspect(self, plane: str, template: str) -> str:
        """What podman knows of the container of a plane, as a template says."""
        return self._podman.run("inspect", "--format", template, plane).strip()

    def _volume(self, name: str) -> Path:
        """The folder that stands for a volume of the pod, its own user's."""
        folder = self.folder / "volumes" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            os.chown(folder, self._pod["securityContext"]["runAsUser"], self._pod["securityContext"]["fsGroup"])
        return folder

    def _remove(self) -> None:
        if self._outside >= 0:
            _enter_network(self._outside)
            os.close(self._outside)
            self._outside = -1
        self._podman.run("pod", "rm", "--force", "--time", "0", self._name)


def missing() -> str:
    """What containers need and this machine lacks; "" when it has everything."""
    if os.geteuid() != 0:
        return "containers are tested as root, which this user is not"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return "" if _sources().exists() else f"no package sources: {_sources()} does not exist"


def _sources() -> Path:
    """The package sources of the distribution itself."""
    folder = Path("/etc/apt/sources.list.d")
    found = [path for path in (folder / "debian.sources", folder / "ubuntu.sources") if path.exists()]
    return found[0] if found else Path("/etc/apt/sources.list")


def _suite() -> str:
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def _cached(kind: str, content: tuple[str, ...], make: Callable[[Path], None]) -> Path:
    """What `make` made of this content, now or in an earlier run; what was not used for long is removed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    made = CACHE / f"{kind}-{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}"
    if not made.exists():
        with tempfile.TemporaryDirectory(prefix="new-", dir=CACHE) as folder:
            fresh = Path(folder, kind)
            make(fresh)
            try:
                fresh.rename(made)
            except OSError:
                if not made.exists():  # unless another run was faster
                    raise
    os.utime(made)
    for old in CACHE.glob(f"{kind}-*"):
        if old.stat().st_mtime < time.time() - KEEP_UNUSED_S:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    return made


def _make_base(path: Path) -> None:
    _get(
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=essential", f"--include={','.join(PACKAGES)}"),
        *(f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in UNWANTED),
        *("--format=tar", _suite(), str(path), str(_sources())),
    )


def _download(path: Path, python_version: str) -> None:
    _get(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"),
        *("--python-version", python_version, "--dest", str(path)),
        *(word for lock in LOCKS for word in ("-r", str(ROOT / lock))),
    )


def _get(*command: str) -> None:
    """Run a command that fetches something.

    Raises:
        CannotRunError: it failed or took too long.
    """
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=BUILD_S)
    except subprocess.CalledProcessError as error:
        raise CannotRunError(f"{command[0]} failed: {error.stderr.strip()[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise CannotRunError(f"{command[0]} took longer than {BUILD_S} s") from error


def _enter_network(namespace: int) -> None:
    """Move this thread into a network namespace; threads and processes that it starts are in it, too."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
