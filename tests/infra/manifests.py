"""Checks of the files in infra/. Each returns the problems that it found, one line per problem."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines import cli
from pipelines.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
SCHEMAS = Path(os.path.normpath(ROOT / "../shared/schemas"))
GPU = "nvidia.com/gpu"


class _Loader(yaml.SafeLoader):
    """PyYAML accepts duplicate keys and uses the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if duplicates := {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"duplicate keys {sorted(duplicates)}{node.start_mark}")
        return super().construct_mapping(node, deep)


def documents(text: str) -> list[Any]:
    """Objects of a YAML text; raises yaml.YAMLError for invalid YAML and duplicate keys."""
    return [document for document in yaml.load_all(text, _Loader) if document is not None]


def locked_version(package: str, text: str) -> str:
    """Version of a package in the text of a lock file."""
    match = re.search(rf"^{re.escape(package)}==([^ ;]+)", text, re.MULTILINE)
    assert match, package
    return match[1]


# Kubernetes


def schema_problems(item: dict[str, Any]) -> list[str]:
    """Differences of a ray.io object from the CRD schema of KubeRay; unknown fields are problems."""
    schema = json.loads((SCHEMAS / f"{item['kind'].lower()}.schema.json").read_text())
    errors = jsonschema.Draft202012Validator(schema).iter_errors(item)
    return [f"{error.json_path}: {error.message}" for error in errors]


def cluster_problems(spec: dict[str, Any]) -> list[str]:
    """What the schema cannot express about the spec of a RayCluster."""
    problems = []
    if spec.get("authOptions", {}).get("mode") != "token":
        problems.append("no token authentication")
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    pods = {"head": spec["headGroupSpec"]} | groups
    for name, group in pods.items():
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        if volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {}).get("medium") != "Memory":
            problems.append(f"{name}: /dev/shm is not in memory")
        if "persistentVolumeClaim" not in volumes.get(mounts.get("/shared", ""), {}):
            problems.append(f"{name}: no shared volume at /shared")
        if "ephemeral-storage" not in container["resources"]["limits"]:
            problems.append(f"{name}: no limit of the ephemeral storage")
        if not pod.get("securityContext", {}).get("runAsNonRoot"):
            problems.append(f"{name}: may run as root")
        tolerated = {item["key"] for item in pod.get("tolerations", [])}
        if (GPU in container["resources"]["limits"]) != (GPU in tolerated):
            problems.append(f"{name}: GPU and toleration do not agree")
        if group.get("minReplicas", 0) > group.get("replicas", 0):
            problems.append(f"{name}: fewer replicas than minReplicas")
    return problems


def job_problems(spec: dict[str, Any]) -> list[str]:
    """Settings of a RayJob that KubeRay does not require, and the rules of KubeRay's own validation."""
    problems = [] if spec.get("backoffLimit", 0) > 0 else ["backoffLimit: no retries"]
    if not spec.get("shutdownAfterJobFinishes") or not spec.get("ttlSecondsAfterFinished"):
        problems.append("the cluster remains after the job")
    if "clusterSelector" in spec:
        problems.append("backoffLimit is not allowed with clusterSelector")
    return problems + command_problems(spec["entrypoint"])


def kustomization_problems(folder: Path) -> list[str]:
    """Files and folders that a kustomization names but that do not exist, and files that it does not name."""
    (content,) = documents((folder / "kustomization.yaml").read_text())
    named = [*content.get("resources", []), *content.get("components", [])]
    for generator in content.get("configMapGenerator", []):
        named += generator.get("files", [])
    problems = [f"{name}: does not exist" for name in named if not (folder / name).exists()]
    problems += [
        f"{name}: no kustomization.yaml"
        for name in named
        if (folder / name).is_dir() and not (folder / name / "kustomization.yaml").exists()
    ]
    unused = {path.name for path in folder.iterdir() if path.is_file()} - {*named, "kustomization.yaml"}
    return problems + [f"{name}: not used" for name in sorted(unused)]


def built(folder: Path) -> list[dict[str, Any]]:
    """Objects of a kustomization, as `kubectl apply -k` sends them."""
    process = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return documents(process.stdout)


# Commands and scripts


def command_problems(command: str) -> list[str]:
    """What the parser of `tcan` rejects about a command line."""
    program, name, *arguments = shlex.split(command)
    if program != "tcan" or name not in COMMANDS:
        return [f"{program} {name}: no command of tcan"]
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setitem(COMMANDS, name, dataclasses.replace(COMMANDS[name], run=lambda *_: None))
        try:
            status = cli.main([name, *arguments])
        except SystemExit as error:
            status = int(error.code or 0)
    return [f"{command}: {errors.getvalue().strip()}"] if status else []


def script_commands(text: str) -> Iterator[str]:
    """`tcan` commands of a shell script, with the number 8 for arithmetic and words for variables."""
    for match in re.finditer(r'^"?(?:\S*/)?tcan"? ([^\n&|]+?)(?: &)?$', text, re.MULTILINE):
        line = re.sub(r'"?\$\(\(.*?\)\)"?', "8", match[1]).replace('"$@"', "")
        yield "tcan " + re.sub(r'"?\$\{?(\w+)\}?"?', r"\1", line)


def shell_problems(path: Path) -> list[str]:
    """Syntax errors, and a missing `set -euo pipefail`."""
    process = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    problems = process.stderr.splitlines() if process.returncode else []
    if not re.search(r"^set -euo pipefail$", path.read_text(), re.MULTILINE):
        problems.append(f"{path.name}: no set -euo pipefail")
    return problems


# Images


def dockerfile_problems(text: str) -> list[str]:
    """A root user, packages without hashes, images without a version, copies of the entire folder."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    arguments = dict(line[4:].split("=", 1) for line in lines if line.startswith("ARG ") and "=" in line)
    problems, stages = [], set()
    user = "root"
    for line in lines:
        words = line.split()
        if line.startswith("FROM "):
            image = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), words[1])
            if image not in stages and not re.search(r":(?!latest$)[\w.-]+$", image):
                problems.append(f"{image}: no version")
            stages |= {words[-1]}
            user = "root"
        elif line.startswith("USER "):
            user = words[1]
        elif line.startswith("COPY ") and "." in words[1:-1]:
            problems.append(f"{line}: copies the entire folder")
        elif "requirements.lock" in line and line.startswith("RUN ") and "--require-hashes" not in line:
            problems.append(f"{line}: no --require-hashes")
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", user):
        problems.append(f"USER {user}: not the number of a non-root user")
    if not any("--require-hashes" in line for line in lines):
        problems.append("no packages with hashes")
    return problems


def compose_problems(text: str, example: str) -> list[str]:
    """Services without a health check, undefined dependencies and volumes, variables that the example lacks."""
    (content,) = documents(text)
    services, problems = content["services"], []
    variables = set(re.findall(r"\$\{(\w+)", text))
    defined = set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    problems += [f"{name}: not in example.env" for name in sorted(variables - defined)]
    problems += [f"{name}: not used" for name in sorted(defined - variables)]
    for name, service in services.items():
        if not re.search(r":(?!latest$)[\w.-]+$", service["image"]):
            problems.append(f"{name}: {service['image']} has no version")
        for needed, condition in service.get("depends_on", {}).items():
            if needed not in services:
                problems.append(f"{name}: depends on {needed}, which does not exist")
            elif condition["condition"] == "service_healthy" and "healthcheck" not in services[needed]:
                problems.append(f"{needed}: no health check")
        for volume in service.get("volumes", []):
            if volume[0] not in "./" and volume.split(":")[0] not in content["volumes"]:
                problems.append(f"{name}: volume {volume} is not defined")
        for key, value in service["environment"].items():
            if re.search("PASSWORD|SECRET", key) and not re.fullmatch(r"\$\{\w+:\?.+\}", value):
                problems.append(f"{name}: {key} is not a required variable")
        if "ports" in service and "healthcheck" not in service:
            problems.append(f"{name}: no health check")
    return problems


def version_problems(text: str, lock: str, project: str) -> list[str]:
    """Versions of Ray and of the image in a Dockerfile, a manifest or a page that are not the current ones."""
    ray = locked_version("ray", lock)
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version
    problems = []
    for found in re.findall(r"(?:rayVersion: |RAY_VERSION=)\"?([\d.]+)", text):
        if found != ray:
            problems.append(f"Ray {found}: the lock has {ray}")
    for found in re.findall(r"\b(\d+\.\d+\.\d+-ray[\d.]+\d)", text):
        if found != f"{version[1]}-ray{ray}":
            problems.append(f"image {found}: should be {version[1]}-ray{ray}")
    for found in re.findall(r'image\.version="(.+?)"', text):
        if found != version[1]:
            problems.append(f"version {found}: the project has {version[1]}")
    return problems
