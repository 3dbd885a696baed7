"""Shared environment and fixtures: a local Ray cluster, servers of buckets, random pretrained models and a model on them."""

import os
import signal
import subprocess
import sys

# A shell starts jobs in the background with SIGINT ignored; programs that tests start would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Set before torch, ray and deepspeed are imported; their child processes inherit it.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(name, value)
os.environ.pop("MLFLOW_TRACKING_URI", None)

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.user_errors import (  # noqa: F401  (pytest finds hooks by their name here)
    pytest_addoption,
    pytest_configure,
    pytest_runtest_logstart,
    pytest_terminal_summary,
)

LONGEST = (
    "train", "study", "demo", "preprocess", "engines", "faults", "submit", "train_buckets", "buckets", "animate",
    "weights", "pipeline", "fake_cuda", "acceleration",
)  # fmt: skip
"""Modules that take minutes, without their prefix `test_`. They start first, so that the processes of `make test` end at the
same time."""
LAST = "user_errors"  # checks the errors that all other tests have provoked


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def position(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST) + (name == LAST)

    items.sort(key=position)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with two CPUs, started once per session."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """URI of a bucket on a local S3 server (moto), configured by environment variables that child processes inherit."""
    import requests
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert requests.put(f"http://127.0.0.1:{port}/corpus", timeout=60).ok
        yield "s3://corpus"
    server.stop()


@pytest.fixture(scope="session")
def gcs_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a bucket on a local server of Google Cloud Storage, configured like `bucket`."""
    from tests.gcs_server import write_credentials

    credentials = tmp_path_factory.mktemp("gcs") / "account.json"
    write_credentials(credentials)
    command = [sys.executable, "-m", "tests.gcs_server", "corpus"]
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[1],
        ) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert server.stdout is not None
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.stdout.readline().strip())
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(credentials))
        yield "gs://corpus"
        server.kill()


@pytest.fixture(params=["bucket", "gcs_bucket"], ids=["s3", "gs"])
def any_bucket(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 250 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=250k", "none", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("requires permission to mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="session")
def pretrained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small pretrained models with random weights, including the pose network of the mini preset's size."""
    from tests.pretrained import write_random_pretrained

    folder = tmp_path_factory.mktemp("pretrained")
    write_random_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(pretrained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 model of 64 x 64 pixels on `pretrained_folder`, without zero-initialized weights.

    It names no pose network, so that of mini is used.
    """
    import torch

    from tcan.model import TCAN
    from tcan.weights import load_pretrained, save_model

    parts = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")
    pretrained = load_pretrained(**dict.fromkeys(parts, str(pretrained_folder)))
    torch.manual_seed(0)
    tcan = TCAN(pretrained.unet, pretrained.controlnet, pretrained.motion_adapter, pretrained.empty_prompt)
    for part in tcan.parts().values():
        for tensor in part.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.02)
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(tcan, folder, pretrained=pretrained.info, stage=2, height=64, width=64, stick_width=2)
    return folder
