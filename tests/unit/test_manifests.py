"""The kustomize base: what a cluster is told, against the schemas of Kubernetes and the settings of the planes."""

import base64
import re
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest

import dataplane.settings
from control.settings.settings import Settings, load
from tests.harness.kubernetes import BASE, Resource, render, the

OLDEST_KUBERNETES = "1.25.0"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "deployment.md"
USER = 10001
UNITS = {"m": 0.001, "Gi": 2.0**30, "": 1.0}


@pytest.fixture(scope="module")
def resources() -> list[Resource]:
    return render(BASE)


@pytest.fixture(scope="module")
def pod(resources: list[Resource]) -> dict[str, Any]:
    spec: dict[str, Any] = the(resources, "StatefulSet")["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def containers(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {container["name"]: container for container in pod["containers"]}


def control_settings(resources: list[Resource], folder: Path) -> Settings:
    path = folder / "control.yaml"
    path.write_bytes(base64.b64decode(the(resources, "Secret")["data"]["control.yaml"]))
    return load(path, {})


def dataplane_settings(resources: list[Resource], folder: Path) -> dataplane.settings.Settings:
    path = folder / "dataplane.yaml"
    path.write_text(the(resources, "ConfigMap")["data"]["dataplane.yaml"])
    return dataplane.settings.load(path, {})


def quantity(text: str) -> float:
    match = re.fullmatch(r"(\d+)([A-Za-z]*)", text)
    assert match is not None
    return int(match[1]) * UNITS[match[2]]


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
def test_every_object_is_valid_on_the_oldest_and_the_newest_kubernetes(resources: list[Resource], version: str) -> None:
    assert sorted(resource["kind"] for resource in resources) == ["ConfigMap", "Secret", "Service", "StatefulSet"]
    for resource in resources:
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_pod_is_the_two_planes_under_the_label_that_selects_it(
    resources: list[Resource], containers: dict[str, dict[str, Any]]
) -> None:
    stateful_set = the(resources, "StatefulSet")
    assert stateful_set["metadata"]["name"] == "sip-pbx"
    assert stateful_set["spec"]["selector"]["matchLabels"] == {"app": "sip-pbx"}
    assert stateful_set["spec"]["template"]["metadata"]["labels"]["app"] == "sip-pbx"
    images = {name: container["image"].partition(":")[0] for name, container in containers.items()}
    assert images == {"control": "sip-pbx-control", "dataplane": "sip-pbx-dataplane"}
    assert not any(container["image"].endswith(":latest") for container in containers.values())


def test_each_port_of_the_containers_is_one_of_the_settings_and_of_the_headless_service(
    resources: list[Resource], containers: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    control, data = control_settings(resources, tmp_path), dataplane_settings(resources, tmp_path)
    open_ports = {
        name: {(port["containerPort"], port["protocol"]) for port in container["ports"]}
        for name, container in containers.items()
    }
    assert open_ports == {
        "control": {(5060, "UDP"), (8080, "TCP"), (50051, "TCP"), (9090, "TCP")},
        "dataplane": {(9091, "TCP")},
    }
    assert [listener.port for listener in control.sip.listeners] == [5060]
    assert (control.api.http.bind, control.api.http.port) == ("0.0.0.0", 8080)
    assert (control.api.grpc.bind, control.api.grpc.port) == ("0.0.0.0", 50051)
    assert (control.metrics.bind, control.metrics.port) == ("0.0.0.0", 9090)
    assert (data.metrics.bind, data.metrics.port) == ("0.0.0.0", 9091)
    service = the(resources, "Service")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"], "requests within the calls of a draining pod still come"
    assert service["selector"] == {"app": "sip-pbx"}
    assert {(port["port"], port["protocol"]) for port in service["ports"]} == set().union(*open_ports.values())
    named = {port["name"]: port["containerPort"] for container in containers.values() for port in container["ports"]}
    assert {named[port["targetPort"]] for port in service["ports"]} == {port["port"] for port in service["ports"]}


@pytest.mark.parametrize(("plane", "port"), [("control", 9090), ("dataplane", 9091)])
def test_each_plane_is_probed_over_http_on_its_metrics_port(
    containers: dict[str, dict[str, Any]], plane: str, port: int
) -> None:
    container = containers[plane]
    ports = {named["name"]: named["containerPort"] for named in container["ports"]}
    for probe, path in (("startupProbe", "/livez"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        assert container[probe]["httpGet"]["path"] == path
        assert ports[container[probe]["httpGet"]["port"]] == port


@pytest.mark.parametrize(("kind", "cpu", "memory"), [("requests", 1, quantity("2Gi")), ("limits", 2, quantity("4Gi"))])
def test_the_pod_asks_for_one_cpu_and_2gi_and_gets_at_most_twice_that(
    containers: dict[str, dict[str, Any]], kind: str, cpu: float, memory: float
) -> None:
    asked = [container["resources"][kind] for container in containers.values()]
    assert sum(quantity(each["cpu"]) for each in asked) == cpu
    assert sum(quantity(each["memory"]) for each in asked) == memory


def test_nothing_in_the_pod_has_rights_that_it_does_not_need(
    pod: dict[str, Any], containers: dict[str, dict[str, Any]]
) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert {pod["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers.values():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_the_planes_share_the_socket_in_memory_and_the_control_plane_alone_has_the_data(
    resources: list[Resource], pod: dict[str, Any], containers: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    control, data = control_settings(resources, tmp_path), dataplane_settings(resources, tmp_path)
    mounted = {
        name: {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        for name, container in containers.items()
    }
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounted["control"]["/run/sippbx"] == mounted["dataplane"]["/run/sippbx"]
    assert volumes[mounted["control"]["/run/sippbx"]]["emptyDir"]["medium"] == "Memory"
    assert control.media.target == data.grpc.listen == "unix:///run/sippbx/media.sock"
    (claim,) = the(resources, "StatefulSet")["spec"]["volumeClaimTemplates"]
    assert mounted["control"]["/var/lib/sippbx"] == claim["metadata"]["name"]
    assert "/var/lib/sippbx" not in mounted["dataplane"]
    assert control.store.path.is_relative_to("/var/lib/sippbx")
    assert control.cdr.jsonl_path is not None
    assert control.cdr.jsonl_path.is_relative_to("/var/lib/sippbx")


def test_settings_are_mounted_where_the_images_look_for_them(
    resources: list[Resource], pod: dict[str, Any], containers: dict[str, dict[str, Any]]
) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for plane, kind, source in (("control", "Secret", "secretName"), ("dataplane", "ConfigMap", "name")):
        (mount,) = [each for each in containers[plane]["volumeMounts"] if each["mountPath"] == "/etc/sippbx"]
        volume = volumes[mount["name"]]["secret" if kind == "Secret" else "configMap"]
        assert volume[source] == the(resources, kind)["metadata"]["name"]
        assert f"/etc/sippbx/{plane}.yaml" in (BASE.parents[2] / "Dockerfile").read_text()


def test_calls_end_before_the_data_plane_leaves_and_that_before_the_pod_is_killed(
    resources: list[Resource], pod: dict[str, Any], tmp_path: Path
) -> None:
    control, data = control_settings(resources, tmp_path), dataplane_settings(resources, tmp_path)
    assert control.drain.timeout_s < data.lease.drain_timeout_s < pod["terminationGracePeriodSeconds"]
    assert Settings().drain.timeout_s < dataplane.settings.Settings().lease.drain_timeout_s


def test_the_base_lets_nobody_in(resources: list[Resource], tmp_path: Path) -> None:
    settings = control_settings(resources, tmp_path)
    assert (settings.users, settings.trunks, settings.routes, settings.api.keys) == ((), (), (), ())


@pytest.mark.parametrize("host_network", [False, True])
def test_the_kustomization_of_the_deployment_page_does_what_it_says(tmp_path: Path, host_network: bool) -> None:
    overlay = tmp_path / "mine"
    overlay.mkdir()
    (tmp_path / "sip-pbx").symlink_to(BASE.parents[2])
    page = PAGE.read_text()
    for name, text in re.findall(r"^`mine/([a-z.]+)`:\n\n```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        (overlay / name).write_text(text)
    if host_network:
        (patches,) = re.findall(r"^```yaml\n(patches:\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
        with (overlay / "kustomization.yaml").open("a") as kustomization:
            kustomization.write(patches)
    resources = render(overlay)
    for resource in resources:
        kubernetes_validate.validate(resource, OLDEST_KUBERNETES, strict=True)
    settings = control_settings(resources, tmp_path)
    assert [user.name for user in settings.users] == ["1001", "1002"]
    assert [key.name for key in settings.api.keys] == ["orchestrator"]
    pod = the(resources, "StatefulSet")["spec"]["template"]["spec"]
    assert [container["image"] for container in pod["containers"]] == [
        "registry.example.org/sip-pbx-control:1.0.0",
        "registry.example.org/sip-pbx-dataplane:1.0.0",
    ]
    assert pod.get("hostNetwork", False) is host_network
