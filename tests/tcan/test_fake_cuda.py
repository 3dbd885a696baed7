"""The GPU path on a machine without a GPU: fake CUDA tensors, which have a device, a dtype and a shape but no data.

On fake tensors, mixing devices raises, and so does every host synchronization (`.item()`, `.tolist()`, `nonzero`,
`bool(tensor)`). A backward pass on fake CUDA tensors needs a real CUDA device, so gradients are checked on fake CPU
tensors, where host synchronizations raise too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

import tcan
from pipelines.preprocess import latents as preprocess_latents
from pipelines.preprocess.latents import encode_batch
from pipelines.preprocess.models import PoseAndLatents
from pipelines.train.data import Batch
from pipelines.train.engine import AdamW
from pipelines.train.loss_guard import LossGuard
from tcan.memory import to_fake
from tcan.model import TCAN, diffusion_loss
from tcan.pixels import from_vae_output
from tcan.pose import hands, openpose
from tcan.pose.hands import FaceDetector, HandDetector
from tcan.pose.network import BodyPoseNetwork
from tcan.pose.openpose import OpenPose
from tcan.schedule import sampler
from tests.tiny import LATENT, tiny_tcan

PACKAGE = Path(tcan.__file__).parent
FRAMES = {1: 1, 2: 4}  # by stage
SIZES = {"tiny": LATENT, "sd15": 64}  # side of the latents


class Networks:
    """The networks of `tests.tiny` or of the preset sd15 with fake weights, on one device."""

    def __init__(self, size: str, dtype: torch.dtype, device: str, mode: FakeTensorMode):
        self.latent_size = SIZES[size]
        self.scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(PACKAGE / "sd15" / "scheduler"))
        with unset_fake_temporarily():
            model, vae = tiny_networks() if size == "tiny" else sd15_networks()
            vae = vae.to(dtype).eval().requires_grad_(False)
            self.tcan: TCAN = to_fake(model.to(dtype), torch.device(device), mode)
            self.vae: AutoencoderKL = to_fake(vae, torch.device(device), mode)


def tiny_networks() -> tuple[TCAN, AutoencoderKL]:
    """The smallest TCAN, and a VAE with the factor of SD1.5, on the meta device."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
        )  # fmt: skip
    return tiny_tcan().to("meta"), vae


def sd15_networks() -> tuple[TCAN, AutoencoderKL]:
    """TCAN and VAE at SD1.5's size, on the meta device."""

    def build(network: Any, part: str, **options: Any) -> Any:
        return network.from_config({**network.load_config(PACKAGE / "sd15" / part), **options})

    with torch.device("meta"):
        unet = build(UNet2DConditionModel, "unet")
        controlnet = build(ControlNetModel, "controlnet")
        adapter = build(MotionAdapter, "motion_adapter", use_motion_mid_block=False)
        model = TCAN(unet, controlnet, adapter, torch.zeros(1, 77, unet.config.cross_attention_dim), 4, 4)
        return model, build(AutoencoderKL, "vae")


def training_batch(networks: Networks, stage: int, size: int = 2) -> Batch:
    frames, side = FRAMES[stage], networks.latent_size
    return Batch(
        latents=torch.zeros(size, frames, 4, side, side),
        noise=torch.zeros(size, frames, 4, side, side),
        timestep=torch.zeros(size, dtype=torch.int64),
        pose=torch.zeros(size, frames, side * 8, side * 8, 3, dtype=torch.uint8),
        reference=torch.zeros(size, 4, side, side),
        reference_mask=torch.ones(size, dtype=torch.bool),
    )


def loss_of(
    networks: Networks, batch: Batch, device: str, reference_mask: list[bool], gamma: float | None
) -> Tensor:
    # The mask comes from the data on the host: real values, unlike those of fake tensors.
    inputs = {name: getattr(batch, name).to(device) for name in ("latents", "noise", "timestep", "reference")}
    pose = batch.pose.to(device).movedim(-1, 2).float() / 255
    return diffusion_loss(
        networks.tcan, networks.scheduler, inputs["latents"], inputs["noise"], inputs["timestep"], pose,
        inputs["reference"], reference_mask, gamma,
    )  # fmt: skip


@contextmanager
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


CASES = [("tiny", torch.float16), ("sd15", torch.bfloat16)]


@pytest.mark.parametrize(
    ("stage", "size", "dtype"),
    [
        (1, "tiny", torch.bfloat16),
        (2, "tiny", torch.float16),
        (1, "sd15", torch.bfloat16),
        (2, "sd15", torch.bfloat16),
    ],
)
def test_training_loss_runs_on_cuda_without_host_synchronization(
    stage: int, size: str, dtype: torch.dtype
) -> None:
    with fake() as mode:
        networks = Networks(size, dtype, "cuda", mode)
        networks.tcan.set_stage(stage)
        batch = training_batch(networks, stage)
        masks = (
            [[True, True], [True, False], [False, False]] if (stage, size) == (1, "tiny") else [[True, False]]
        )
        for mask in masks:
            loss = loss_of(networks, batch, "cuda", mask, gamma=5.0)
            assert loss.device.type == "cuda" and loss.dtype == torch.float32


@pytest.mark.parametrize(("stage", "checkpointing"), [(1, False), (2, True)])
def test_backward_and_optimizer_step_need_no_host_synchronization(stage: int, checkpointing: bool) -> None:
    with fake() as mode:
        networks = Networks("tiny", torch.bfloat16, "cpu", mode)
        networks.tcan.set_stage(stage)
        networks.tcan.train()
        if checkpointing:
            networks.tcan.enable_gradient_checkpointing()
        trained = [parameter for parameter in networks.tcan.parameters() if parameter.requires_grad]
        loss_of(networks, training_batch(networks, stage), "cpu", [True, False], None).backward()
        assert all(parameter.grad is not None for parameter in trained)


def test_optimizer_step_with_ema_runs_on_cuda() -> None:
    with fake():
        weight = torch.nn.Parameter(torch.zeros(8, 8, device="cuda"))
        optimizer = AdamW([weight], 0.99, lr=1e-3)
        optimizer.init_state([weight])
        for _ in range(2):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        assert optimizer.state[weight]["ema"].device.type == "cuda"


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_denoising_step_runs_on_cuda_without_host_synchronization(size: str, dtype: torch.dtype) -> None:
    frames = 4
    with fake() as mode:
        networks = Networks(size, dtype, "cuda", mode)
        side = networks.latent_size
        tcan_model, cuda = networks.tcan, torch.device("cuda")
        noisy = torch.zeros(1, frames, 4, side, side, dtype=dtype, device=cuda)
        timestep = torch.zeros(1, dtype=torch.int64, device=cuda)
        with torch.no_grad():
            pose = tcan_model.embed_pose(torch.zeros(1, frames, 3, side * 8, side * 8, device=cuda))
            features = tcan_model.appearance(noisy[0, :1], timestep)
            residuals = tcan_model.pose_residuals(noisy, timestep, pose, 0.8)
            temperature = torch.ones(side * 8, side * 8, device=cuda)
            rows = tcan_model.denoise(noisy, timestep, residuals, features, [False, True], temperature, side)
        assert rows.shape == (2, *noisy.shape[1:]) and rows.device.type == "cuda" and rows.dtype == dtype


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_vae_runs_on_cuda_from_uint8_to_pixels(size: str, dtype: torch.dtype) -> None:
    with fake() as mode:
        networks = Networks(size, dtype, "cuda", mode)
        side = networks.latent_size * 8
        frames = torch.zeros(2, side, side, 3, dtype=torch.uint8).to("cuda")
        with torch.no_grad():
            latents = encode_batch(networks.vae, frames)
            assert latents.shape == (2, 2, 4, side // 8, side // 8)
            assert latents.device.type == "cuda" and latents.dtype == torch.float16
            pixels = from_vae_output(networks.vae.decode(latents[0].to(dtype)).sample)
        assert pixels.shape == (2, side, side, 3) and pixels.dtype == torch.float32
        assert pixels.device.type == "cuda"


def test_bad_loss_skips_the_optimizer_step_without_host_synchronization() -> None:
    with fake():
        guard = LossGuard(10.0, {}, "cuda")
        weight = torch.nn.Parameter(torch.zeros(8, device="cuda"))
        optimizer = AdamW([weight], 0.9, lr=1e-3)
        optimizer.init_state([weight])
        for _ in range(2):
            weight.grad = torch.zeros_like(weight)
            optimizer.found_inf = guard.check(torch.zeros((), device="cuda")).float()
            optimizer.step()
        assert guard.mean.device.type == "cuda"


def pose_detectors(dtype: torch.dtype, mode: FakeTensorMode) -> dict[str, Any]:
    """Detectors with the networks of mini and of OpenPose, on a fake CUDA device."""
    with unset_fake_temporarily(), torch.device("meta"):
        model, face = openpose.open_pose_module("model"), openpose.open_pose_module("face")
        detectors = {
            "mini": OpenPose(BodyPoseNetwork(), device="meta"),
            "body": OpenPose(model.bodypose_model(), device="meta"),
            "hand": HandDetector(model.handpose_model(), "meta"),
            "face": FaceDetector(face.FaceNet(), "meta"),
        }
        for detector in detectors.values():
            to_fake(torch.nn.Module.to(detector.network, dtype), torch.device("cuda"), mode)
            detector.device = torch.device("cuda")
    return detectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pose_networks_run_on_cuda_without_host_synchronization(dtype: torch.dtype) -> None:
    with fake() as mode, torch.no_grad():
        detectors = pose_detectors(dtype, mode)
        frames = torch.zeros(2, 64, 64, 3, dtype=torch.uint8).to("cuda")
        for name in ("mini", "body"):
            maps = detectors[name].maps(frames)
            assert maps.shape == (2, 38 + 18, 8, 8)
            assert maps.dtype == torch.float32 and maps.device.type == "cuda"
        heatmaps = detectors["hand"].heatmaps(frames)
        assert heatmaps.shape == (2, 8, 8, 22) and heatmaps.dtype == torch.float32
        points = detectors["face"].points(frames, [(50, 60), (70, 80)])
        assert points.shape == (2, 70, 3) and points.dtype == torch.float32 and points.device.type == "cuda"


class HostBoundary:
    """Replaces the copies between host and device, which fake tensors do not support, by zeros, and counts them."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.uploads: list[tuple[int, ...]] = []
        self.downloads: list[tuple[int, ...]] = []
        self._patch = patch
        for module in (preprocess_latents, openpose, hands):
            patch.setattr(module, "upload", self._upload)
            patch.setattr(module, "HostCopy", self._download)
        decode = OpenPose._decode_on_host

        def decode_real(*args: Any) -> Any:
            with unset_fake_temporarily():  # the maps are on the host
                return decode(*args)

        patch.setattr(OpenPose, "_decode_on_host", decode_real)

    def _upload(self, array: np.ndarray, device: Any) -> Tensor:
        assert array.dtype == np.uint8
        self.uploads.append(array.shape)
        return torch.zeros(array.shape, dtype=torch.uint8).to(device)

    def _download(self, tensor: Tensor) -> Any:
        assert tensor.device.type == "cuda"
        self.downloads.append(tuple(tensor.shape))
        array = np.zeros(tensor.shape, np.float16 if tensor.dtype == torch.float16 else np.float32)
        return type("Copy", (), {"numpy": lambda self: array})()


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_preprocessing_actor_copies_frames_to_cuda_and_two_results_back(
    size: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From uint8 frames to the columns of a clip: latents in one copy, and the pose network's maps in one per batch."""
    side = SIZES[size] * 8
    with fake() as mode:
        actor = object.__new__(PoseAndLatents)
        networks = Networks(size, dtype, "cuda", mode)
        actor.vae = networks.vae
        actor.detector = pose_detectors(torch.float32, mode)["body" if size == "sd15" else "mini"]
        actor.parts, actor.batch_frames = {}, 2
        boundary = HostBoundary(monkeypatch)
        columns = actor.encode(np.zeros((4, side, side, 3), np.uint8))
    assert columns["people_per_frame"] == [0] * 4
    assert len(columns["latent_mean"]) == len(columns["latent_logvar"]) == 4 * (4 * SIZES[size] ** 2) * 2
    assert boundary.uploads == [(2, side, side, 3)] * 2 + [(2, 184, 184, 3)] * 2
    assert boundary.downloads == [(2, 4, 4, side // 8, side // 8)] + [(2, 56, 23, 23)] * 2


def test_every_scheduler_steps_after_training_used_its_schedule() -> None:
    """`add_noise` on the device moves the schedule's tensors there; sampling continues with a new scheduler."""
    with fake():
        trained = DDIMScheduler.from_config(DDIMScheduler.load_config(PACKAGE / "mini" / "scheduler"))
        latents = torch.zeros(1, 4, 8, 8, device="cuda")
        trained.add_noise(latents, latents, torch.zeros(1, dtype=torch.int64, device="cuda"))
        assert trained.alphas_cumprod.device.type == "cuda"
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"):
        fresh = sampler(trained, name)
        fresh.set_timesteps(2)
        noise = torch.zeros(1, 4, 8, 8)
        for timestep in fresh.timesteps:
            noise = fresh.step(noise, timestep, fresh.scale_model_input(noise, timestep)).prev_sample
        assert noise.device.type == "cpu"


@pytest.mark.parametrize(
    "synchronize",
    [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool((x > 0).any()), lambda x: x.nonzero()],
)
def test_fake_tensors_detect_host_synchronizations(synchronize: Callable[[Tensor], Any]) -> None:
    with fake(), pytest.raises((DataDependentOutputException, RuntimeError, NotImplementedError)):
        synchronize(torch.zeros(3, device="cuda"))


def test_fake_tensors_detect_mixed_devices() -> None:
    with fake(), pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device="cuda") + torch.zeros(3)


def test_batch_inputs_keep_the_reference_mask_on_the_host() -> None:
    batch = Batch(
        latents=torch.zeros(2, 1, 4, 8, 8), noise=torch.zeros(2, 1, 4, 8, 8), timestep=torch.zeros(2, dtype=torch.int64),
        pose=torch.full((2, 1, 64, 64, 3), 255, dtype=torch.uint8), reference=torch.zeros(2, 4, 8, 8),
        reference_mask=torch.tensor([True, False]),
    )  # fmt: skip
    inputs = batch.inputs(torch.device("meta"))
    assert inputs["reference_mask"] == [True, False]
    assert inputs["pose"].shape == (2, 1, 3, 64, 64) and inputs["pose"].dtype == torch.float32
    assert {value.device.type for value in inputs.values() if isinstance(value, Tensor)} == {"meta"}
    np.testing.assert_array_equal(batch.inputs(torch.device("cpu"))["pose"].numpy(), 1.0)
