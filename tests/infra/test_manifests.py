"""The files in infra/ are valid and agree with the code and the lock file. No cluster is needed.

Every check is also run on a file with a fault, to show that it finds it.
"""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.manifests import (
    GPU,
    INFRA,
    ROOT,
    SCHEMAS,
    built,
    cluster_problems,
    command_problems,
    compose_problems,
    dockerfile_problems,
    documents,
    job_problems,
    kustomization_problems,
    locked_version,
    schema_problems,
    script_commands,
    shell_problems,
    version_problems,
)

KUBERAY = INFRA / "kuberay"
JOBS = ("preprocess", "train", "animate", "evaluate")
YAML_FILES = sorted(INFRA.rglob("*.yaml"))
KUSTOMIZATIONS = [path.parent for path in YAML_FILES if path.name == "kustomization.yaml"]
APPLICABLE = [
    folder
    for folder in KUSTOMIZATIONS
    if yaml.safe_load((folder / "kustomization.yaml").read_text())["kind"] == "Kustomization"
]
SCRIPTS = sorted([*INFRA.rglob("*.sh"), *INFRA.rglob("*.sbatch")])
DOCKERFILES = sorted(INFRA.rglob("Dockerfile"))
VERSIONED = [*YAML_FILES, *DOCKERFILES, INFRA / "README.md"]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()

needs_schemas = pytest.mark.skipif(
    not SCHEMAS.is_dir(), reason=f"the CRD schemas of KubeRay are not in {SCHEMAS}"
)
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
needs_jq = pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")


def name(path: Path) -> str:
    return str(path.relative_to(INFRA))


def raycluster() -> dict[str, Any]:
    (cluster,) = documents((KUBERAY / "cluster/raycluster.yaml").read_text())
    return cluster


def rayjob(job: str) -> dict[str, Any]:
    (item,) = documents((KUBERAY / f"jobs/{job}/rayjob.yaml").read_text())
    return item


def ray_objects(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        item["metadata"]["name"]: item for item in built(folder) if item["apiVersion"].startswith("ray.io/")
    }


def gpu_group(spec: dict[str, Any]) -> dict[str, Any]:
    return next(group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu")


# YAML and kustomize


@pytest.mark.parametrize("path", YAML_FILES, ids=name)
def test_yaml_files_have_valid_syntax_and_unique_keys(path: Path) -> None:
    assert documents(path.read_text())


@pytest.mark.parametrize("text", ["a: [1", "a: 1\na: 2", "a:\n\t- b", "b: {c: 1, c: 2}"])
def test_invalid_yaml_is_found(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        documents(text)


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=name)
def test_kustomizations_name_existing_files_and_all_files(folder: Path) -> None:
    assert not kustomization_problems(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("resources: [job.yaml, missing.yaml]", "missing.yaml: does not exist"),
        ("resources: [job.yaml]\ncomponents: [../missing]", "../missing: does not exist"),
        ("resources: [job.yaml, empty]", "empty: no kustomization.yaml"),
        ("resources: [job.yaml]\nconfigMapGenerator: [{name: a, files: [b.sh]}]", "b.sh: does not exist"),
        ("resources: []", "job.yaml: not used"),
    ],
)
def test_faults_of_a_kustomization_are_found(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "job.yaml").write_text("a: 1")
    (tmp_path / "kustomization.yaml").write_text(text)
    assert kustomization_problems(tmp_path) == [problem]


# KubeRay


@needs_schemas
@pytest.mark.parametrize(
    "path", [KUBERAY / "cluster/raycluster.yaml", *KUBERAY.glob("jobs/*/rayjob.yaml")], ids=name
)
def test_kuberay_files_match_the_schema(path: Path) -> None:
    (item,) = documents(path.read_text())
    assert not schema_problems(item)


@needs_schemas
@needs_kubectl
@pytest.mark.parametrize("folder", APPLICABLE, ids=name)
def test_built_kuberay_objects_match_the_schema(folder: Path) -> None:
    for item in ray_objects(folder).values():
        assert not schema_problems(item)
        assert item["metadata"]["namespace"] == "tcan"
        spec = item["spec"] if item["kind"] == "RayCluster" else item["spec"]["rayClusterSpec"]
        assert not cluster_problems(spec)


@needs_schemas
@pytest.mark.parametrize(
    "fault",
    [
        lambda spec: spec.update(enableAutoscaling=True),
        lambda spec: spec["authOptions"].update(token="x"),
        lambda spec: spec.pop("headGroupSpec"),
        lambda spec: spec["workerGroupSpecs"][0].update(replicas="1"),
        lambda spec: spec["workerGroupSpecs"][1].update(maxReplica=8),
        lambda spec: spec["workerGroupSpecs"][1]["template"]["spec"].update(toleration=[]),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(mounts=[]),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].pop("name"),
    ],
)
def test_schema_faults_of_a_cluster_are_found(fault: Callable[[Any], Any]) -> None:
    cluster = raycluster()
    fault(cluster["spec"])
    assert len(schema_problems(cluster)) == 1


@needs_schemas
@pytest.mark.parametrize("key", ["backOffLimit", "ttlSeconds", "entryPoint", "runtimeEnv"])
def test_schema_faults_of_a_job_are_found(key: str) -> None:
    job = rayjob("train")
    job["spec"][key] = 3
    assert len(schema_problems(job)) == 1


def test_cluster_scales_gpu_nodes_from_zero() -> None:
    spec = raycluster()["spec"]
    assert not cluster_problems(spec)
    assert spec["enableInTreeAutoscaling"] is True
    gpu = gpu_group(spec)
    assert (gpu["replicas"], gpu["minReplicas"], gpu["maxReplicas"]) == (0, 0, 8)
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"][GPU] == 1


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (lambda spec: spec.pop("authOptions"), "no token authentication"),
        (lambda spec: spec["authOptions"].update(mode="disabled"), "no token authentication"),
        (lambda spec: pod(spec, 0)["volumes"].pop(1), "cpu: /dev/shm is not in memory"),
        (lambda spec: pod(spec, 1)["volumes"].pop(0), "gpu: no shared volume at /shared"),
        (lambda spec: pod(spec, 1).pop("tolerations"), "gpu: GPU and toleration do not agree"),
        (
            lambda spec: pod(spec, 0).update(tolerations=[{"key": GPU}]),
            "cpu: GPU and toleration do not agree",
        ),
        (lambda spec: pod(spec, 0).pop("securityContext"), "cpu: may run as root"),
        (
            lambda spec: pod(spec, 0)["containers"][0]["resources"]["limits"].pop("ephemeral-storage"),
            "cpu: no limit of the ephemeral storage",
        ),
        (lambda spec: gpu_group(spec).update(minReplicas=1), "gpu: fewer replicas than minReplicas"),
    ],
)
def test_faults_of_a_cluster_are_found(fault: Callable[[Any], Any], problem: str) -> None:
    spec = raycluster()["spec"]
    fault(spec)
    assert cluster_problems(spec) == [problem]


def pod(spec: dict[str, Any], group: int) -> dict[str, Any]:
    return spec["workerGroupSpecs"][group]["template"]["spec"]


@pytest.mark.parametrize("job", JOBS)
def test_jobs_retry_shut_down_and_run_an_accepted_command(job: str) -> None:
    item = rayjob(job)
    assert not job_problems(item["spec"])
    assert item["metadata"]["name"] == f"tcan-{job}"
    assert item["spec"]["entrypoint"].split()[:2] == ["tcan", job]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"backoffLimit": 0}, "backoffLimit: no retries"),
        ({"shutdownAfterJobFinishes": False}, "the cluster remains after the job"),
        ({"ttlSecondsAfterFinished": 0}, "the cluster remains after the job"),
        ({"clusterSelector": {"a": "b"}}, "backoffLimit is not allowed with clusterSelector"),
        ({"entrypoint": "tcan fly a b"}, "tcan fly: no command of tcan"),
    ],
)
def test_faults_of_a_job_are_found(changes: dict[str, Any], problem: str) -> None:
    assert job_problems(rayjob("train")["spec"] | changes) == [problem]


@needs_kubectl
@pytest.mark.parametrize("job", JOBS)
def test_built_job_has_the_spec_of_the_cluster(job: str) -> None:
    (cluster,) = ray_objects(KUBERAY / "cluster").values()
    (item,) = ray_objects(KUBERAY / f"jobs/{job}").values()
    assert item["spec"]["rayClusterSpec"] == cluster["spec"]
    # Without nodes at the start, a job must request its GPUs.
    entrypoint = item["spec"]["entrypoint"]
    assert any(f"--{key}.device cuda" in entrypoint for key in ("preprocess", "animate")) == (
        job in ("preprocess", "animate")
    )


@needs_kubectl
def test_jobs_do_not_contain_the_storage() -> None:
    """`kubectl delete -k` of a job deletes everything that the kustomization contains."""
    for job in JOBS:
        assert {item["kind"] for item in built(KUBERAY / f"jobs/{job}")} == {"RayJob"}
    kinds = {item["kind"] for item in built(KUBERAY / "setup")}
    assert kinds == {"Namespace", "PersistentVolumeClaim", "ConfigMap"}


@needs_kubectl
def test_referenced_volumes_settings_and_secrets_exist() -> None:
    defined = {(item["kind"], item["metadata"]["name"]) for item in built(KUBERAY / "setup")}
    text = json.dumps(raycluster())
    assert ("PersistentVolumeClaim", "tcan-shared") in defined and '"claimName": "tcan-shared"' in text
    assert ("ConfigMap", "tcan-settings") in defined and '"configMapRef": {"name": "tcan-settings"}' in text
    assert "create secret generic tcan-mlflow " in (INFRA / "README.md").read_text()


@needs_kubectl
def test_overlays_have_their_effect() -> None:
    (cluster,) = ray_objects(KUBERAY / "overlays/cluster-gcs-fault-tolerance").values()
    assert cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"] == "redis://tcan-redis:6379"
    (train,) = ray_objects(KUBERAY / "overlays/train-kueue").values()
    assert train["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tcan"}
    spec = train["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is False and "autoscalerOptions" not in spec
    workers = int(train["spec"]["entrypoint"].split("--train.workers ")[1].split()[0])
    assert gpu_group(spec)["replicas"] == workers


@needs_schemas
@needs_kubectl
@needs_jq
def test_nightly_job_is_created_from_the_suspended_template() -> None:
    (template,) = ray_objects(KUBERAY / "overlays/nightly").values()
    assert template["metadata"]["name"] == "tcan-preprocess-template" and template["spec"]["suspend"] is True
    stored = copy.deepcopy(template)  # as the API server returns it
    stored["metadata"].update(uid="1", resourceVersion="2", finalizers=["ray.io/rayjob-finalizer"])
    stored["status"] = {"jobDeploymentStatus": "Suspended"}
    process = subprocess.run(
        ["jq", "--from-file", str(KUBERAY / "overlays/nightly/rayjob.jq")],
        input=json.dumps(stored),
        capture_output=True,
        text=True,
        check=True,
    )
    job = json.loads(process.stdout)
    assert not schema_problems(job) and not job_problems(job["spec"])
    assert job["metadata"] == {"name": "tcan-preprocess-nightly", "namespace": "tcan"}
    assert job["spec"] == {key: value for key, value in template["spec"].items() if key != "suspend"}
    assert "status" not in job


# Commands and scripts


def test_batch_script_runs_an_accepted_command() -> None:
    (command,) = script_commands((INFRA / "slurm/train.sbatch").read_text())
    assert command.startswith("tcan train dataset --out out --train.workers 8")
    assert not command_problems(f"{command} --config sd15")  # as in the usage of the script


@pytest.mark.parametrize(
    "command",
    [
        "tcan train /shared/dataset",  # no --out
        "tcan train /shared/dataset --out /shared/run --train.worker 8",
        "tcan train /shared/dataset --out /shared/run --config sd15 --train.workers 3",
        "tcan evaluate /shared/held-out --model /shared/model",
        "tcan preproces /shared/videos /shared/dataset",
        "python train.py",
    ],
)
def test_commands_that_the_parser_rejects_are_found(command: str) -> None:
    assert len(command_problems(command)) == 1


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_have_valid_syntax(path: Path) -> None:
    assert not shell_problems(path)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize(
    "text", ["set -euo pipefail\nif true; then", "set -euo pipefail\necho 'a", "echo no options"]
)
def test_faults_of_a_script_are_found(text: str, tmp_path: Path) -> None:
    path = tmp_path / "script.sh"
    path.write_text(text)
    assert shell_problems(path)


# Images and versions


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
def test_images_have_hashes_and_a_non_root_user(path: Path) -> None:
    assert not dockerfile_problems(path.read_text())


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("USER 1000:1000\n", "", "USER root: not the number of a non-root user"),
        ("USER 1000:1000\n", "USER ray\n", "USER ray: not the number of a non-root user"),
        ("USER 1000:1000\n", "USER 1000:1000\nUSER 0\n", "USER 0: not the number of a non-root user"),
        ("USER 1000:1000\n", "USER 1000:1000\nFROM a:1\n", "USER root: not the number of a non-root user"),
        ("--require-hashes ", "", "no packages with hashes"),
        ("uv:0.13.9", "uv", "ghcr.io/astral-sh/uv: no version"),
        ("python:3.11-slim-bookworm", "python:latest", "python:latest: no version"),
        ("COPY tcan tcan", "COPY . .", "COPY . .: copies the entire folder"),
    ],
)
def test_faults_of_a_dockerfile_are_found(old: str, new: str, problem: str) -> None:
    text = (INFRA / "docker/Dockerfile").read_text()
    assert old in text
    assert problem in dockerfile_problems(text.replace(old, new))


def test_build_context_contains_only_what_the_image_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = set()
    for line in (INFRA / "docker/Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and not line.startswith("COPY --from"):
            copied |= set(line.split()[1:-1])
    assert allowed == copied
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.parametrize("path", VERSIONED, ids=name)
def test_versions_agree_with_the_lock_file_and_the_project(path: Path) -> None:
    assert not version_problems(path.read_text(), LOCK, PROJECT)


def test_versions_are_named() -> None:
    """Otherwise the test above would be empty."""
    assert documents((KUBERAY / "cluster/raycluster.yaml").read_text())[0]["spec"]["rayVersion"]
    dockerfile = (INFRA / "docker/Dockerfile").read_text()
    assert dockerfile.count(f"ARG RAY_VERSION={locked_version('ray', LOCK)}") == 2
    (kustomization,) = documents((KUBERAY / "cluster/kustomization.yaml").read_text())
    assert kustomization["images"][0]["newTag"].endswith("-ray" + locked_version("ray", LOCK))


@pytest.mark.parametrize(
    "text",
    ['rayVersion: "2.9.0"', "ARG RAY_VERSION=2.9.0", "image: tcan:0.1.0-ray2.9.0", "tcan:9.1.0-ray2.60.0"],
)
def test_other_versions_are_found(text: str) -> None:
    assert len(version_problems(text, LOCK, PROJECT)) == 1


# MLflow server


def test_mlflow_server_has_the_version_of_the_client() -> None:
    lock = (INFRA / "mlflow/requirements.lock").read_text()
    version = locked_version("mlflow", LOCK)
    assert locked_version("mlflow", lock) == version
    assert f"mlflow[auth]=={version}\n" in (INFRA / "mlflow/requirements.in").read_text()
    assert f"tcan-mlflow:{version}\n" in (INFRA / "mlflow/compose.yaml").read_text()
    for package in ("flask-wtf", "psycopg", "psycopg-binary", "boto3"):  # authentication, database, store
        assert locked_version(package, lock)


def test_mlflow_services_are_complete() -> None:
    example = (INFRA / "mlflow/example.env").read_text()
    assert not compose_problems((INFRA / "mlflow/compose.yaml").read_text(), example)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "healthcheck:\n      test: [CMD, pg_isready",
            "labels:\n      test: [CMD, pg_isready",
            "postgres: no health check",
        ),
        ("postgres:17-bookworm", "postgres", "postgres: postgres has no version"),
        (
            "      bucket:\n        condition",
            "      buckets:\n        condition",
            "mlflow: depends on buckets, which does not exist",
        ),
        (
            "artifacts:/artifacts\n",
            "artefacts:/artifacts\n",
            "s3: volume artefacts:/artifacts is not defined",
        ),
        ("BACKUP_DAYS:-14", "BACKUP_AGE:-14", "BACKUP_AGE: not in example.env"),
        (
            "PGPASSWORD: ${POSTGRES_PASSWORD:?set it in .env}",
            "PGPASSWORD: secret",
            "mlflow: PGPASSWORD is not a required variable",
        ),
    ],
)
def test_faults_of_the_mlflow_services_are_found(old: str, new: str, problem: str) -> None:
    text = (INFRA / "mlflow/compose.yaml").read_text()
    assert old in text
    assert problem in compose_problems(text.replace(old, new), (INFRA / "mlflow/example.env").read_text())
