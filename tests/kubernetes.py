"""Reads the manifests of infra/kubernetes as a cluster does: containers with their environment, commands and files."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dockerfile
import yaml

INFRA = Path(__file__).parents[1] / "infra"
MANIFESTS = INFRA / "kubernetes"
EXAMPLE = "secrets.example.yaml"
KUSTOMIZATION = "kustomization.yaml"


def documents(name: str | None = None) -> list[dict[str, Any]]:
    """Returns the objects of a manifest, or of all manifests of the kustomization."""
    if name is None:
        (chosen,) = documents(KUSTOMIZATION)
        return [one for resource in chosen["resources"] for one in documents(resource)]
    return [one for one in yaml.safe_load_all((MANIFESTS / name).read_text()) if one]


def instructions(command: str) -> list[dockerfile.Command]:
    """Returns the instructions of a kind in the Containerfile."""
    return [one for one in dockerfile.parse_file(str(INFRA / "Containerfile")) if one.cmd.upper() == command]


@dataclass(frozen=True)
class Container:
    """Container of a workload.

    Attributes:
        workload: Object that has the template of the container's pods.
        pod: Specification of its pods.
        spec: Specification of the container.
    """

    workload: dict[str, Any]
    pod: dict[str, Any]
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    def environment(self, given: Mapping[str, str], *, index: int = 0) -> dict[str, str]:
        """Returns the variables of the container in a pod.

        Args:
            given: Values that replace those of config map, secret and manifest, such as addresses of this machine.
            index: Number of the pod in its set.
        """
        found: dict[str, str] = {}
        for source in self.spec.get("envFrom", []):
            kind, name = next((kind, ref["name"]) for kind, ref in source.items())
            found |= keeper("ConfigMap" if kind == "configMapRef" else "Secret", name)
        for one in self.spec.get("env", []):
            label = one.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            assert "value" in one or label == "metadata.labels['apps.kubernetes.io/pod-index']", one
            found[one["name"]] = one.get("value", str(index))
        return found | {name: value for name, value in given.items() if name in found}

    def arguments(self, environment: Mapping[str, str]) -> list[str]:
        """Returns the command as the kubelet starts it: the image's entry point and the arguments."""
        entry = list(instructions("ENTRYPOINT")[0].value)
        texts = [*self.spec.get("command", entry), *self.spec.get("args", [])]
        return [re.sub(r"\$\((\w+)\)", lambda name: environment[name[1]], text) for text in texts]


def keeper(kind: str, name: str) -> dict[str, str]:
    """Returns the content of a config map or a secret."""
    for one in [*documents(), *documents(EXAMPLE)]:
        if one["kind"] == kind and one["metadata"]["name"] == name:
            return dict(one.get("data") or one.get("stringData") or {})
    raise AssertionError(f"no {kind} {name}")


def containers() -> Iterator[Container]:
    """Yields the containers of all workloads."""
    for one in documents():
        pod = one.get("spec", {}).get("template", {}).get("spec", {})
        for spec in pod.get("containers", []):
            yield Container(one, pod, spec)
