"""The manifests are objects of Kubernetes without unknown fields, and agree with each other and with the image."""

from typing import Any

import kubernetes_validate
import pytest
from typer.main import get_command

from tessera.cli.main import app
from tests.kubernetes import EXAMPLE, KUSTOMIZATION, MANIFESTS, Container, containers, documents, instructions, keeper

# The oldest release with the label of a pod's number, and the newest that the package knows.
VERSIONS = ("1.28", "1.32", "1.37")
FILES = sorted(path.name for path in MANIFESTS.glob("*.yaml") if path.name != KUSTOMIZATION)
CONTAINERS = {one.name: one for one in containers()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FILES)
def test_a_manifest_has_only_the_fields_of_its_kind(name: str, version: str) -> None:
    found = documents(name)
    assert found
    for one in found:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicas"), "two"),
        (("spec", "replica"), 2),
        (("spec", "template", "spec", "containers", 0, "livenesProbe"), {}),
        (("spec", "template", "spec", "containers", 0, "resources", "limits"), ["memory"]),
        (("spec", "selector"), {"matchLabel": {}}),
    ],
)
def test_a_planted_fault_of_a_manifest_is_found(path: tuple[Any, ...], value: Any) -> None:
    (one,) = [found for found in documents("trainer.yaml") if found["kind"] == "StatefulSet"]
    place: Any = one
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, VERSIONS[-1], strict=True)


def test_the_kustomization_has_all_manifests_but_the_example_of_secrets() -> None:
    (found,) = documents(KUSTOMIZATION)
    assert sorted(found["resources"]) == sorted(set(FILES) - {EXAMPLE})
    assert [image["name"] for image in found["images"]] == ["tessera"]
    assert not [one for one in documents() if one["kind"] == "Secret"]


def test_there_is_a_container_for_each_part_of_a_deployment() -> None:
    assert list(CONTAINERS) == ["topics", "trainer", "writer", "server", "judge"]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_may_do_nothing_but_its_work(name: str) -> None:
    one = CONTAINERS[name]
    user, group = instructions("USER")[-1].value[0].split(":")
    assert one.spec["image"] == "tessera"
    assert one.pod["automountServiceAccountToken"] is False
    assert one.pod["securityContext"]["runAsNonRoot"] is True
    assert one.pod["securityContext"]["runAsUser"] == int(user) > 0
    assert one.pod["securityContext"]["fsGroup"] == one.pod["securityContext"]["runAsGroup"] == int(group)
    assert one.pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert one.spec["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert one.spec["resources"]["limits"]["memory"]
    assert set(one.spec["resources"]["requests"]) == {"cpu", "memory"}
    # The home and /tmp are all that the image's processes write.
    state = instructions("WORKDIR")[-1].value[0]
    assert state == "${STATE}"
    places = {mount["mountPath"] for mount in one.spec["volumeMounts"]}
    assert {"/var/lib/tessera", "/tmp"} <= places
    volumes = {volume["name"] for volume in one.pod["volumes"]}
    assert {mount["name"] for mount in one.spec["volumeMounts"]} == volumes


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_s_command_and_variables_are_known(name: str) -> None:
    one = CONTAINERS[name]
    environment = one.environment({})
    words = one.arguments(environment)
    assert words[0] == "tessera"
    command: Any = get_command(app)
    rest = words[1:]
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context(name, list(rest), resilient_parsing=False)
    required = environment["TESSERA_REQUIRE"].split()
    assert set(required) <= set(keeper("ConfigMap", "tessera")) | set(keeper("Secret", "tessera"))
    assert "TESSERA_KAFKA" in required
    assert "TESSERA_REDIS" in required
    # Passwords are in secrets alone.
    plain = keeper("ConfigMap", "tessera")
    assert not [key for key in plain if key in ("TESSERA_REDIS",) or "SECRET" in key or "PASSWORD" in key]


@pytest.mark.parametrize("name", ["trainer", "writer", "server"])
def test_probes_ask_a_port_at_which_the_container_listens(name: str) -> None:
    one = CONTAINERS[name]
    ports = {port["name"]: str(port["containerPort"]) for port in one.spec["ports"]}
    words = one.arguments(one.environment({}))
    given = [word.partition("=")[2] for word in words if word.startswith(("--port=", "--metrics-port="))]
    listening = [word.rpartition(":")[2] for word in given]
    assert "--host=0.0.0.0" in words or all(word.startswith("0.0.0.0:") for word in given)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        if probe in one.spec:
            assert ports[one.spec[probe]["httpGet"]["port"]] in listening
    assert ("readinessProbe" in one.spec) == (name == "server")
    exposed = {port for each in instructions("EXPOSE") for port in each.value}
    assert set(listening) <= exposed


def test_trainers_meet_at_the_first_pod_and_are_as_many_as_they_say() -> None:
    one = CONTAINERS["trainer"]
    service, workload, budget = documents("trainer.yaml")
    environment = one.environment({}, index=1)
    assert environment["RANK"] == "1"
    assert environment["PROCESSES"] == str(workload["spec"]["replicas"])
    assert workload["spec"]["replicas"] <= int(environment["TESSERA_PARTITIONS"])
    assert workload["spec"]["serviceName"] == service["metadata"]["name"]
    host, _, port = environment["MEET"].partition(":")
    assert host == f"{workload['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(port) in [each["port"] for each in service["spec"]["ports"]]
    assert service["spec"]["publishNotReadyAddresses"] is True
    # A trainer waits for the others, so all are started and replaced together.
    assert workload["spec"]["podManagementPolicy"] == "Parallel"
    assert workload["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert budget["kind"] == "PodDisruptionBudget"


def test_selectors_and_budgets_choose_the_pods_of_their_workload() -> None:
    labels = {one.name: one.workload["spec"]["template"]["metadata"]["labels"] for one in CONTAINERS.values()}
    assert len({tuple(sorted(found.items())) for found in labels.values()}) == len(labels)
    for one in documents():
        selector = one.get("spec", {}).get("selector")
        if selector:
            chosen = selector.get("matchLabels", selector)
            matched = [name for name, found in labels.items() if chosen.items() <= found.items()]
            assert len(matched) == 1, one["metadata"]["name"]


def test_a_server_s_grace_is_longer_than_its_drain() -> None:
    one: Container = CONTAINERS["server"]
    (drain,) = [word for word in one.arguments(one.environment({})) if word.startswith("--drain-s=")]
    assert float(drain.partition("=")[2]) + 20 <= one.pod["terminationGracePeriodSeconds"]
    probe = one.spec["readinessProbe"]
    # No new request comes when the server ends.
    assert float(drain.partition("=")[2]) >= probe["periodSeconds"] * probe["failureThreshold"]
