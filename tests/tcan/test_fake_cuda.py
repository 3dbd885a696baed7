"""The GPU path on a machine without a GPU: on `cuda`, tensors have a device, a dtype and a shape but no data.

See `tests.fake_cuda` for what raises. A backward pass on such tensors needs a real CUDA device, so gradients are checked on
fake CPU tensors, where host synchronizations raise too.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

import tcan
from pipelines.config.parser import load_config
from pipelines.preprocess.models import PoseAndLatents
from pipelines.train.data import Batch
from pipelines.train.engine import AdamW
from pipelines.train.loss_guard import LossGuard
from pipelines.train.throughput import FlopsMeter
from pipelines.train.trainer import Trainer
from pipelines.train.validation import SampleImages, Validation
from tcan.memory import to_fake
from tcan.model import TCAN, diffusion_loss
from tcan.pipeline import TCANPipeline
from tcan.pose import hands, openpose
from tcan.pose.hands import FaceDetector, HandDetector, OpenPoseParts
from tcan.pose.network import BodyPoseNetwork
from tcan.pose.openpose import OpenPose
from tcan.pose.parts import BODY, FACE, HANDS
from tcan.schedule import sampler
from tests.fake_cuda import FakeCuda
from tests.tiny import LATENT, tiny_tcan

PACKAGE = Path(tcan.__file__).parent
FRAMES = {1: 1, 2: 4}  # by stage
SIZES = {"tiny": LATENT, "sd15": 64}  # side of the latents
CUDA = torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)  # needs a driver
    with FakeCuda() as mode:
        yield mode


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of one worker; its collective operations accept any device."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Networks:
    """The networks of `tests.tiny` or of the preset sd15 with fake weights, on one device."""

    def __init__(self, size: str, dtype: torch.dtype, mode: FakeTensorMode, device: torch.device = CUDA):
        self.side = 8 * SIZES[size]
        self.scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(PACKAGE / "sd15" / "scheduler"))
        with unset_fake_temporarily():
            model, vae = tiny_networks() if size == "tiny" else sd15_networks()
            vae = torch.nn.Module.to(vae, dtype).eval().requires_grad_(False)
            self.tcan: TCAN = to_fake(model.to(dtype), device, mode)
            self.vae: AutoencoderKL = to_fake(vae, device, mode)

    def pipeline(self) -> TCANPipeline:
        pipe = TCANPipeline(self.vae, self.tcan, self.scheduler)
        pipe.model_info |= {"height": self.side, "width": self.side, "stick_width": 2}
        pipe.set_progress_bar_config(disable=True)
        return pipe


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


def training_batch(stage: int, side: int, reference_mask: Sequence[bool] = (True, False)) -> Batch:
    """A batch in host memory for images of `side` x `side` pixels."""
    size, frames, latent = len(reference_mask), FRAMES[stage], side // 8
    return Batch(
        latents=torch.zeros(size, frames, 4, latent, latent),
        noise=torch.zeros(size, frames, 4, latent, latent),
        timestep=torch.zeros(size, dtype=torch.int64),
        pose=torch.zeros(size, frames, side, side, 3, dtype=torch.uint8),
        reference=torch.zeros(size, 4, latent, latent),
        reference_mask=torch.tensor(reference_mask),
    )


class Engine:
    """The interface of a DeepSpeed engine around a model. DeepSpeed itself and backward passes need a real device."""

    def __init__(self, model: TCAN, ema_decay: float):
        self.module = model
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = self.basic_optimizer = AdamW(self._trained, ema_decay, lr=1e-3)
        self.optimizer.init_state(self._trained)

    def __call__(self, *inputs: Any) -> Tensor:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.requires_grad
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)

    def step(self) -> None:
        self.optimizer.step()


def trainer(networks: Networks, stage: int, micro_batches: int = 1, ema_decay: float = 0.0) -> Trainer:
    """A worker of a training stage on a GPU, without Ray and data."""
    networks.tcan.set_stage(stage)
    networks.tcan.train()
    config = load_config("--train.snr_gamma=5").train
    worker: Any = object.__new__(Trainer)
    worker.device, worker.workers, worker.host_group, worker.compiled = CUDA, 1, None, False
    worker.config, worker.stage = config, config.stage1 if stage == 1 else config.stage2
    worker.pretrained = SimpleNamespace(scheduler=networks.scheduler, vae=networks.vae)
    worker.engine = Engine(networks.tcan, ema_decay)
    worker.heartbeat = SimpleNamespace(send=lambda step: False)
    worker.loss_guard = LossGuard(10.0, {}, CUDA)
    worker.flops_meter = FlopsMeter(micro_batches, 1, None)
    return worker


@pytest.mark.parametrize(
    ("stage", "size", "dtype"),
    [
        (1, "tiny", torch.bfloat16),
        (2, "tiny", torch.float16),
        (1, "sd15", torch.bfloat16),
        (2, "sd15", torch.bfloat16),
    ],
)
def test_training_step_never_waits_for_the_gpu(
    stage: int,
    size: str,
    dtype: torch.dtype,
    cuda: FakeCuda,
    process_group: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transfer of the batches, forward pass, check of the loss, optimizer step with EMA, and the values for the log."""
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None)
    networks = Networks(size, dtype, cuda)
    masks = [[True, stage == 2]]  # stage 2 always has the reference
    if (stage, size) == (1, "tiny"):
        masks += [[True, False, True], [False, False]]
    batches = [training_batch(stage, networks.side, mask).pin_memory() for mask in masks]
    worker = trainer(networks, stage, len(batches), ema_decay=0.99)
    for step in range(2 if size == "tiny" else 1):
        result = worker.train_step(step, batches)
        assert result.values.shape == (4,) and result.values.device.type == "cuda"
        assert cuda.downloads == []
        # The first step copies the noise schedule to the GPU.
        assert cuda.uploads == ([(1000,)] if step == 0 else [])
        cuda.uploads.clear()


@pytest.mark.parametrize(("stage", "checkpointing"), [(1, False), (2, True)])
def test_backward_pass_needs_no_host_synchronization(stage: int, checkpointing: bool) -> None:
    with FakeTensorMode() as mode:
        networks = Networks("tiny", torch.bfloat16, mode, torch.device("cpu"))
        networks.tcan.set_stage(stage)
        networks.tcan.train()
        if checkpointing:
            networks.tcan.enable_gradient_checkpointing()
        trained = [parameter for parameter in networks.tcan.parameters() if parameter.requires_grad]
        batch = training_batch(stage, networks.side)
        # The mask comes from the data on the host: real values, unlike those of fake tensors.
        inputs = batch.latents, batch.noise, batch.timestep, batch.pose.movedim(-1, 2), batch.reference
        diffusion_loss(networks.tcan, networks.scheduler, *inputs, [True, False]).backward()
        assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize(("stage", "dtype"), [(1, torch.float16), (2, torch.bfloat16)])
def test_validation_and_sample_images_run_on_cuda(
    stage: int, dtype: torch.dtype, cuda: FakeCuda, process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for the losses once, and for the decoded images."""

    def samples(split: str, size: int) -> Any:
        return SimpleNamespace(batch=lambda step, indices: training_batch(stage, side, [True] * len(indices)))

    networks = Networks("tiny", dtype, cuda)
    monkeypatch.setattr("pipelines.train.validation.IMAGE_STEPS", 2)
    # torch cannot move fake weights; they are on the device already.
    monkeypatch.setattr(networks.vae, "to", lambda device: networks.vae)
    worker, side = trainer(networks, stage), networks.side
    worker.validation = Validation(samples("validation", 2), 2)
    worker.sample_images = SampleImages(samples, stage, worker.pretrained, CUDA)
    logged: dict[str, Any] = {}
    worker.logger = SimpleNamespace(
        metrics=lambda metrics, step: logged.update(metrics),
        samples=lambda *images: logged.update(samples=images),
    )
    cuda.downloads.clear()
    worker.validate(1)
    assert cuda.downloads == [(4,)]
    assert len(logged) == 5
    cuda.downloads.clear()
    worker.log_samples(1)
    image, clip, _ = logged["samples"]
    rows, frames = (4, 1) if stage == 1 else (1, 4)
    assert image.shape == (rows * side, (1 + 3 * frames) * side, 3)
    assert clip.shape == (frames, side, 3 * side, 3)
    assert set(cuda.downloads) == {(rows, frames, side, side, 3)}


def moving_poses(frames: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, side, (frames, 18, 3)).astype(np.float32)


@pytest.mark.parametrize(("size", "dtype"), [("tiny", torch.bfloat16), ("sd15", torch.float16)])
def test_clip_of_several_windows_runs_on_cuda(size: str, dtype: torch.dtype, cuda: FakeCuda) -> None:
    """From the image to decoded frames, with guidance, temperature map and ControlNet scale."""
    networks = Networks(size, dtype, cuda)
    side, steps, frames = networks.side, 2, 6
    uploads: list[int] = []  # of each step

    def at_end_of_step(*arguments: object) -> dict:
        uploads.append(len(cuda.uploads))
        cuda.uploads.clear()
        return {}

    output = networks.pipeline()(
        np.zeros((side, side, 3), np.uint8), moving_poses(frames, side), retarget="none", steps=steps, window=4, overlap=2,
        controlnet_scale=0.8, ptm_limit=side // 16, start_from_reference=True, decode_batch=4, callback_on_step_end=at_end_of_step,
    )  # fmt: skip
    # The first step uploads the image, and the pose images and temperature map of each window.
    assert uploads == [1 + 2 * 2, 0]
    assert output.frames.shape == (frames, side, side, 3)
    latent = side // 8
    window, windows = (1, 4, 4, latent, latent), 2
    embedding = (1, 4, networks.tcan.controlnet.config.block_out_channels[0], latent, latent)
    # Nothing else leaves the GPU: the reference, each window's pose embedding once and its prediction at each step.
    denoising = [(1, 4, latent, latent), *[embedding, window] * windows, *[window] * windows * (steps - 1)]
    assert cuda.downloads == [*denoising, (4, side, side, 3), (2, side, side, 3)]


def test_every_scheduler_denoises_after_training_used_its_schedule(cuda: FakeCuda) -> None:
    """`add_noise` on the GPU moves the tensors of the schedule there. Without the denoiser, which other tests run."""
    networks = Networks("tiny", torch.float16, cuda)
    pipe, side = networks.pipeline(), networks.side
    pipe.predict_noise = lambda noisy, *inputs: noisy / 2
    schedulers = [kind.__name__ for kind in networks.scheduler.compatibles]
    schedulers = [name for name in schedulers if name not in ("EDMEulerScheduler", "DPMSolverSDEScheduler")]
    for name in [*schedulers, "LCMScheduler"]:
        pipe.scheduler = sampler(networks.scheduler, name)
        if hasattr(pipe.scheduler, "alphas_cumprod"):
            pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to("cuda")
        options = dict(steps=2, window=1, overlap=0, guidance_scale=1, ptm=False)
        found = pipe.denoise(np.zeros((side, side, 3), np.uint8), moving_poses(1, side), **options)
        assert found.shape == (1, 4, side // 8, side // 8) and found.device.type == "cpu"


def pose_detectors(dtype: torch.dtype, mode: FakeCuda) -> dict[str, Any]:
    """Detectors with the networks of mini and of OpenPose."""
    with unset_fake_temporarily(), torch.device("meta"):
        model, face = openpose.open_pose_module("model"), openpose.open_pose_module("face")
        detectors = {
            "mini": OpenPose(BodyPoseNetwork(), device="meta"),
            "body": OpenPose(model.bodypose_model(), device="meta"),
            "hand": HandDetector(model.handpose_model(), "meta"),
            "face": FaceDetector(face.FaceNet(), "meta"),
        }
        for detector in detectors.values():
            to_fake(torch.nn.Module.to(detector.network, dtype), CUDA, mode)
            detector.device = CUDA
    return detectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pose_networks_never_wait_for_the_gpu(dtype: torch.dtype, cuda: FakeCuda) -> None:
    with torch.no_grad():
        detectors = pose_detectors(dtype, cuda)
        frames = torch.zeros(2, 64, 64, 3, dtype=torch.uint8).to("cuda", non_blocking=True)
        for name in ("mini", "body"):
            maps = detectors[name].maps(frames)
            assert maps.shape == (2, 38 + 18, 8, 8)
            assert maps.dtype == torch.float32 and maps.device.type == "cuda"
        heatmaps = detectors["hand"].heatmaps(frames)
        assert heatmaps.shape == (2, 8, 8, 22) and heatmaps.dtype == torch.float32
        points = detectors["face"].points(frames, [(50, 60), (70, 80)])
        assert points.shape == (2, 70, 3) and points.dtype == torch.float32 and points.device.type == "cuda"
    assert cuda.uploads == cuda.downloads == []


def test_hands_and_faces_are_detected_in_one_upload_and_one_download_per_batch(cuda: FakeCuda) -> None:
    """The networks see nothing, so there are no points; the person is known, because it decides on the crops."""
    detectors = pose_detectors(torch.float16, cuda)
    person = np.ones((1, 18, 3), np.float32)
    person[0, :, :2] = 128 + 40 * np.random.default_rng(0).normal(size=(18, 2))
    frames = np.zeros((2, 256, 256, 3), np.uint8)
    body = SimpleNamespace(detect=lambda frames, batch_size, zoom: [person] * len(frames))
    found = OpenPoseParts(body, detectors["hand"], detectors["face"]).detect(frames)
    assert [points.shape for points in found] == [(1, 130, 3)] * 2
    for points in found:
        np.testing.assert_array_equal(points[:, BODY], person)
        assert not points[:, HANDS].any() and not points[:, FACE].any()
    assert cuda.uploads == []
    hand_maps = [
        (4, side // 8, side // 8, 22) for side in hands.HAND_SIDES
    ]  # two hands in each of two frames
    assert cuda.downloads == [*hand_maps, (2, 70, 3)]


@pytest.mark.parametrize(("size", "dtype"), [("tiny", torch.float16), ("sd15", torch.bfloat16)])
def test_preprocessing_actor_copies_two_results_back(size: str, dtype: torch.dtype, cuda: FakeCuda) -> None:
    """From uint8 frames to the columns of a clip: latents in one copy, and the pose network's maps in one per batch."""
    side = 8 * SIZES[size]
    actor = object.__new__(PoseAndLatents)
    actor.vae = Networks(size, dtype, cuda).vae
    actor.detector = pose_detectors(torch.float32, cuda)["body" if size == "sd15" else "mini"]
    actor.parts, actor.batch_frames = {}, 2
    columns = actor.encode(np.zeros((4, side, side, 3), np.uint8))
    assert columns["people_per_frame"] == [0] * 4
    assert len(columns["latent_mean"]) == len(columns["latent_logvar"]) == 4 * (4 * SIZES[size] ** 2) * 2
    assert cuda.uploads == []
    assert cuda.downloads == [(2, 4, 4, side // 8, side // 8)] + [(2, 56, 23, 23)] * 2


@pytest.mark.parametrize(
    "synchronize",
    [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool((x > 0).any()), lambda x: x.nonzero()],
)
def test_host_synchronizations_raise(synchronize: Callable[[Tensor], Any], cuda: FakeCuda) -> None:
    synchronize(torch.zeros(3))
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        synchronize(torch.zeros(3, device="cuda"))


def test_mixed_devices_raise_and_copies_are_recorded(cuda: FakeCuda) -> None:
    on_gpu, on_host = torch.zeros(3, device="cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="device"):
        on_gpu + on_host
    on_host.to("cuda", non_blocking=True)
    assert cuda.uploads == cuda.downloads == []
    torch.tensor([1, 2], device="cuda")
    assert cuda.uploads == [(2,)]
    assert on_gpu.cpu().tolist() == [0] * 3 and on_host.copy_(on_gpu).tolist() == [0] * 3
    assert cuda.downloads == [(3,), (3,)]


def test_batch_inputs_keep_the_reference_mask_on_the_host() -> None:
    batch = dataclasses.replace(
        training_batch(1, 64), pose=torch.full((2, 1, 64, 64, 3), 255, dtype=torch.uint8)
    )
    inputs = batch.inputs(torch.device("meta"))
    assert inputs["reference_mask"] == [True, False]
    assert inputs["pose"].shape == (2, 1, 3, 64, 64) and inputs["pose"].dtype == torch.float32
    assert {value.device.type for value in inputs.values() if isinstance(value, Tensor)} == {"meta"}
    np.testing.assert_array_equal(batch.inputs(torch.device("cpu"))["pose"].numpy(), 1.0)
