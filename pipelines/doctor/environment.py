"""Checks of the machine: Python, packages, GPU, memory, disk, Ray, DeepSpeed, decoders, tracking store."""

import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from pipelines.doctor.finding import Finding, grade
from pipelines.doctor.sample import PUPPET_SIZE
from pipelines.doctor.subject import Subject

GIB = 2**30
PYTHONS = ((3, 11), (3, 12))
PACKAGES = ("torch", "diffusers", "transformers", "ray", "deepspeed", "mlflow", "decord", "av", "numpy")
LARGE = {"memory": 24, "disk": 50, "gpu": 24}
"""GiB for SD1.5: 7 of weights in float32 and as many of copies; checkpoints of 10 each; training of one image in bf16."""
SMALL = {"memory": 4, "disk": 2, "gpu": 0}
SHARED = 0.3
"""Ray's object store uses 30 % of the memory; if /dev/shm is smaller, it uses files in /tmp, which is slow."""


def needs(subject: Subject) -> dict[str, int]:
    """Recommended GiB of memory, disk and GPU memory."""
    return SMALL if subject.config.size < PUPPET_SIZE else LARGE


def python(subject: Subject) -> Finding:
    """Version of Python, and versions of the packages that affect results."""
    versions, missing = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    found = f"Python {platform.python_version()}, {platform.platform()}; {', '.join(versions)}"
    return Finding(
        "python",
        grade(not missing and sys.version_info[:2] in PYTHONS, not missing),
        found + (f"; missing: {', '.join(missing)}" if missing else ""),
        "Python 3.11 or 3.12",
        "install Python 3.11 or 3.12 and rerun make install",
    )


def gpu(subject: Subject) -> Finding:
    """GPU, its memory and driver. Networks of SD1.5 size need one; the mini networks do not."""
    wanted = needs(subject)["gpu"]
    advice = (
        "run nvidia-smi and install a PyTorch build for this driver; `tcan memory --config sd15 --job animate` lists what fits "
        "into GPUs of 6 to 80 GiB; pass --animate.device cpu to run all checks on the CPU, which takes hours"
    )
    if not torch.cuda.is_available():
        build = torch.version.cuda or "CPU only"
        device = subject.config.animate.device
        status = grade(not wanted and not device.startswith("cuda"), device == "cpu")
        return Finding("gpu", status, f"none (PyTorch for CUDA: {build})", f"{wanted} GiB", advice)
    properties = torch.cuda.get_device_properties(subject.device if subject.device.type == "cuda" else 0)
    size, free = properties.total_memory / GIB, torch.cuda.mem_get_info()[0] / GIB
    product = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    works = bool((product == 64).all())
    return Finding(
        "gpu",
        grade(works and free >= wanted, works),
        f"{properties.name}, {size:.0f} GiB ({free:.0f} free), compute capability {properties.major}.{properties.minor}, "
        f"driver {_driver()}, CUDA {torch.version.cuda}, bf16 {torch.cuda.is_bf16_supported()}",
        f"at least {wanted} GiB free",
        "stop other programs on the GPU; " + advice,
    )


def _driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def memory(subject: Subject) -> Finding:
    """Available host memory."""
    available, total = (getattr(psutil.virtual_memory(), key) / GIB for key in ("available", "total"))
    wanted = needs(subject)["memory"]
    return Finding(
        "memory",
        grade(available >= wanted, available >= wanted / 2),
        f"{available:.1f} of {total:.1f} GiB available, {os.cpu_count()} CPU cores",
        f"at least {wanted} GiB",
        "stop other programs, or use a machine with more memory",
    )


def disk(subject: Subject) -> Finding:
    """Free space in the working directory and in the temporary folder."""
    free = {path: shutil.disk_usage(path).free / GIB for path in (str(Path.cwd()), tempfile.gettempdir())}
    wanted = needs(subject)["disk"]
    return Finding(
        "disk",
        grade(min(free.values()) >= wanted, min(free.values()) >= wanted / 5),
        ", ".join(f"{size:.0f} GiB free in {path}" for path, size in free.items()),
        f"at least {wanted} GiB each for checkpoints and the spilled objects of Ray",
        "free space, or set TMPDIR to a larger disk",
    )


def shared_memory(subject: Subject) -> Finding:
    """Size of /dev/shm, where Ray stores objects."""
    size = shutil.disk_usage("/dev/shm").total / GIB
    wanted = SHARED * psutil.virtual_memory().total / GIB
    return Finding(
        "shared memory",
        grade(size >= wanted, size > 0),
        f"/dev/shm has {size:.1f} GiB",
        f"at least {wanted:.1f} GiB ({SHARED:.0%} of the memory), the size of Ray's object store",
        f"start containers with --shm-size={wanted:.0f}g; Ray is slow without it",
    )


def ray(subject: Subject) -> Finding:
    """Ray starts, or the cluster at RAY_ADDRESS responds, and runs a task."""
    import ray

    from pipelines.cluster import connect, is_local

    connect()
    answer = ray.get(ray.remote(num_cpus=1)(_cpus_of_task).remote(), timeout=120)
    resources = ray.cluster_resources()
    where = "started on this machine" if is_local() else f"cluster at {os.environ.get('RAY_ADDRESS')}"
    gpus = int(resources.get("GPU", 0))
    visible = torch.cuda.device_count()
    return Finding(
        "ray",
        grade(not is_local() or gpus == visible, answer > 0),
        f"{where}: {resources.get('CPU', 0):g} CPUs, {gpus} GPUs, {len(ray.nodes())} nodes; a task ran",
        "" if not is_local() else f"{visible} GPUs, as many as PyTorch finds",
        "check CUDA_VISIBLE_DEVICES and `ray status`",
    )


def _cpus_of_task() -> int:
    return os.cpu_count() or 1


def deepspeed(subject: Subject) -> Finding:
    """DeepSpeed is importable, for the device of the subject. The checks of training run its engine."""
    os.environ.setdefault("DS_ACCELERATOR", subject.device.type)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    return Finding(
        "deepspeed",
        grade(name == subject.device.type, True),
        f"DeepSpeed {deepspeed.__version__} for {name}",
        f"for {subject.device.type}",
        "unset DS_ACCELERATOR, and reinstall DeepSpeed with the same PyTorch",
    )


def decoders(subject: Subject) -> Finding:
    """decord and PyAV decode a video that PyAV wrote; both agree."""
    import av
    import decord

    from tcan.video import read_video, write_video

    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    frames = np.stack([np.broadcast_to((ramp + 8 * i)[None, :, None] // 2, (64, 64, 3)) for i in range(5)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ramp.mp4"
        write_video(frames, path, 8)
        ours, fps = read_video(path)
        others = decord.VideoReader(str(path)).get_batch(range(5)).asnumpy()
    error = max(float(np.abs(x.astype(int) - frames).mean()) for x in (ours, others))
    return Finding(
        "decoders",
        grade(ours.shape == frames.shape and fps == 8 and error < 5, ours.shape == frames.shape),
        f"decord {decord.__version__}, PyAV {av.__version__}: {len(ours)} frames, mean error {error:.1f} of 255",
        "5 frames, mean error below 5",
        "reinstall decord and av from requirements.lock",
    )


def tracking(subject: Subject) -> Finding:
    """The MLflow store can be used."""
    from pipelines.mlflow_store import connect, experiment_id, masked, resolve, resolve_uri

    config: Any = resolve(subject.config.tracking)
    experiment_id(connect(config), config)
    return Finding("tracking", "OK", f"{masked(resolve_uri(config))}, experiment {config.experiment}")
