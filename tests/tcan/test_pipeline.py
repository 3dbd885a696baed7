"""TCANPipeline on random weights: equality with a baseline implementation, and its documented behavior."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from tcan.crop import fit_image
from tcan.errors import UserError
from tcan.pipeline import TCANPipeline
from tcan.pose import OpenPose, draw_poses
from tcan.sampling import SamplingConfig
from tcan.schedule import sampler
from tcan.temperature import temperature_map
from tcan.weights import export_model
from tests.tiny import tiny_tcan

SIZE = 64


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> TCANPipeline:
    pipe = TCANPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    for parameter in pipe.tcan.controlnet.parameters():
        if not parameter.any():  # zero-initialized output convolutions
            torch.nn.init.normal_(parameter, std=0.05)
    return pipe


def dance(num_frames: int) -> np.ndarray:
    """Keypoints `[F, 18, 3]` of an upright person with moving arms in an image of 64 x 64."""
    joints = [
        (32, 12), (32, 20), (26, 20), (22, 28), (20, 36), (38, 20), (42, 28), (44, 36), (28, 36), (28, 46), (28, 56),
        (36, 36), (36, 46), (36, 56), (31, 10), (33, 10), (29, 11), (35, 11),
    ]  # fmt: skip
    poses = np.repeat(np.array([[(x, y, 1) for x, y in joints]], dtype=np.float32), num_frames, axis=0)
    poses[:, [3, 4, 6, 7], 1] -= np.arange(num_frames)[:, None]
    return poses


def random_image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def baseline_latents(
    pipe: TCANPipeline,
    image: np.ndarray,
    poses: np.ndarray,
    steps: int,
    scale: float,
    length: int,
    overlap: int,
    seed: int,
    start_from_reference: bool = False,
) -> Tensor:
    """Two separate full passes per window, with appearance and ControlNet each; explicit averaging and DDIM."""
    height, width = image.shape[:2]
    drawn = torch.from_numpy(draw_poses(poses, height, width, 2)).permute(0, 3, 1, 2)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    reference = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(length, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    length = 1 if len(poses) == 1 else length  # an image
    starts = [0]
    while starts[-1] + length < len(poses):
        starts.append(starts[-1] + length - overlap)
    total = starts[-1] + length
    frame_of = [min(i, len(poses) - 1) for i in range(total)]
    x = torch.stack([noise[i % length] for i in range(total)])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    timesteps = [1 + (1000 // steps) * i for i in reversed(range(steps))]
    if start_from_reference:
        for channels in x:
            for channel in channels:
                channel -= channel.sum() / channel.numel()
        signal = float(alphas[timesteps[0]])
        x = signal**0.5 * reference + (1 - signal) ** 0.5 * x
    for t in timesteps:
        time = torch.tensor([t])
        collected: list[list[Tensor]] = [[] for _ in range(total)]
        for start in starts:
            frames = range(start, start + length)
            pose = torch.stack([drawn[frame_of[i]] for i in frames])
            tau = temperature_map(pose)
            noisy, pose = x[list(frames)][None], pose[None] / 255
            without = pipe.tcan.denoise(
                noisy, time, pipe.tcan.pose_residuals(noisy, time, pose), None, None, tau
            )
            features = pipe.tcan.appearance(reference, time)
            residuals = pipe.tcan.pose_residuals(noisy, time, pose)
            conditional = pipe.tcan.denoise(noisy, time, residuals, features, None, tau)
            for i, eps in zip(frames, (without + scale * (conditional - without))[0], strict=True):
                collected[i].append(eps)
        eps = torch.stack([sum(e) / len(e) for e in collected])
        before = t - 1000 // steps
        # set_alpha_to_one=False: alpha_0 at the end
        now, then = alphas[t].float(), alphas[max(before, 0)].float()
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = then.sqrt() * x0 + (1 - then).sqrt() * eps
    return x[: len(poses)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_frames", "height", "width", "start"),
    [(7, 64, 64, False), (5, 64, 128, False), (1, 128, 64, False), (7, 64, 64, True)],
)
def test_latents_equal_two_full_passes_per_window(
    pipe: TCANPipeline, num_frames: int, height: int, width: int, start: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With temperature map; square and rectangular, clips and a single frame, from noise or from the reference.

    The cache holds the inputs of the first window; those of the others are computed again at each step.
    """
    monkeypatch.setattr("tcan.window_inputs.CACHED_WINDOWS", 1)
    image, poses = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8), dance(num_frames)
    options = dict(steps=2, guidance_scale=3.0, window=4, overlap=2, height=height, width=width)
    options |= dict(start_from_reference=start, generator=torch.Generator().manual_seed(5))
    latents = pipe(image, poses, retarget="none", output_type="latent", **options).frames
    expected = baseline_latents(
        pipe, image, poses, steps=2, scale=3.0, length=4, overlap=2, seed=5, start_from_reference=start
    )
    assert latents.shape == expected.shape == (num_frames, 4, height // 8, width // 8)
    torch.testing.assert_close(latents, expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_euler_scheduler_matches_its_formula(pipe: TCANPipeline) -> None:
    """Euler's method for dx / dsigma = eps with sigma = sqrt((1 - a) / a) (Karras et al., arXiv 2206.00364)."""
    euler = TCANPipeline(pipe.vae, pipe.tcan, sampler(pipe.scheduler, "EulerDiscreteScheduler"))
    euler.model_info = pipe.model_info
    image, poses = random_image(), dance(3)
    latents = euler(
        image, poses, retarget="none", generator=torch.Generator().manual_seed(5), output_type="latent",
        steps=2, guidance_scale=1, window=3, overlap=0, ptm=False,
    ).frames  # fmt: skip
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    sigma = [((1 - alphas[t]) / alphas[t]).sqrt().item() for t in (501, 1)] + [0.0]
    pose = torch.from_numpy(draw_poses(poses, SIZE, SIZE, 2)).movedim(-1, 1)[None] / 255
    x = torch.randn(1, 3, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(5))
    x *= (sigma[0] ** 2 + 1) ** 0.5
    for t, now, then in zip((501, 1), sigma, sigma[1:], strict=False):
        eps = pipe.tcan(x / (now**2 + 1) ** 0.5, torch.tensor([t]), pose, pipe.encode(image))
        x = x + (then - now) * eps
    torch.testing.assert_close(latents, x[0], atol=2e-4, rtol=2e-4)


def test_every_compatible_scheduler_is_deterministic(pipe: TCANPipeline) -> None:
    names = [kind.__name__ for kind in pipe.scheduler.compatibles]
    names = [name for name in names if name not in ("EDMEulerScheduler", "DPMSolverSDEScheduler")]
    assert len(names) >= 10
    tcan = tiny_tcan().eval()
    for name in names:
        other = TCANPipeline(pipe.vae, tcan, sampler(pipe.scheduler, name))
        other.model_info = pipe.model_info
        other.set_progress_bar_config(disable=True)
        runs = [
            other(
                random_image(), dance(2), retarget="none", generator=torch.Generator().manual_seed(5), window=2, overlap=0,
                steps=2, guidance_scale=1, output_type="latent",
            ).frames
            for _ in range(2)
        ]  # fmt: skip
        assert runs[0].isfinite().all() and torch.equal(*runs), name


def test_loading_restores_the_noise_schedule(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    info = json.loads((folder / "tcan.json").read_text())
    info["schedule"] = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    (folder / "tcan.json").write_text(json.dumps(info))
    config = TCANPipeline.from_pretrained(folder).scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)


@pytest.mark.parametrize("num_frames", [1, 3, 5])
def test_output_has_one_frame_per_pose(pipe: TCANPipeline, num_frames: int) -> None:
    output = pipe(random_image(), dance(num_frames), retarget="none", steps=1, window=4, overlap=1)
    assert output.frames.shape == (num_frames, SIZE, SIZE, 3)
    assert output.frames.min() >= 0 and output.frames.max() <= 1


def test_rectangular_output_as_pil_images(pipe: TCANPipeline) -> None:
    wide = pipe(
        random_image(),
        dance(2),
        retarget="none",
        steps=1,
        height=64,
        width=128,
        output_type="pil",
    )
    assert [frame.size for frame in wide.frames] == [(128, 64)] * 2
    with pytest.raises(UserError, match="multiples of 8"):
        pipe(random_image(), dance(1), height=100)


def test_overrides_replace_fields_of_the_sampling_config(pipe: TCANPipeline) -> None:
    @dataclass
    class Extended(SamplingConfig):
        name: str = ""

    def latents(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        output = pipe(
            random_image(), dance(3), retarget="none", generator=generator, output_type="latent", **options
        )
        return output.frames

    expected = latents(steps=2, window=4, overlap=1, guidance_scale=3.0)
    config = Extended(steps=1, window=4, overlap=1, guidance_scale=3.0, name="custom")
    assert torch.equal(latents(sampling=config, steps=2), expected)
    assert config.steps == 1
    with pytest.raises(UserError, match="overlap = 4"):
        latents(window=4)
    with pytest.raises(TypeError, match="num_steps"):
        latents(num_steps=2)


def test_output_depends_on_seed_image_poses_and_options(pipe: TCANPipeline) -> None:
    def frames(image: np.ndarray, poses: np.ndarray, seed: int, **overrides: object) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = dict(retarget="none", steps=1, window=4, overlap=1, output_type="latent") | overrides
        return pipe(image, poses, generator=generator, **options).frames

    poses = dance(4)
    first = frames(random_image(), poses, 0)
    assert torch.equal(first, frames(random_image(), poses, 0))
    moved = poses.copy()
    moved[:, 4, 0] += 8
    assert not torch.allclose(first, frames(random_image(1), poses, 0))
    assert not torch.allclose(first, frames(random_image(), moved, 0))
    assert not torch.allclose(first, frames(random_image(), poses, 1))
    without = frames(random_image(), poses, 0, ptm=False)
    assert not torch.allclose(first, without)
    assert not torch.allclose(first, frames(random_image(), poses, 0, ptm_strength=2))
    assert torch.equal(without, frames(random_image(), poses, 0, ptm_strength=0))
    assert torch.equal(without, frames(random_image(), poses, 0, ptm_limit=0))
    assert torch.equal(first, frames(random_image(), poses, 0, ptm_limit=SIZE // 8))
    assert not torch.allclose(first, frames(random_image(), poses, 0, controlnet_scale=0))
    assert not torch.allclose(first, frames(random_image(), poses, 0, loop=True))
    assert not torch.allclose(first, frames(random_image(), poses, 0, guidance_scale=1))


def test_retargeting_fits_the_poses_to_the_character(pipe: TCANPipeline) -> None:
    """A character of twice the size in an image of twice the size is the same character in the output."""
    image = np.repeat(np.repeat(random_image(), 2, axis=0), 2, axis=1)
    character = dance(1)[0]
    character[:, :2] *= 2
    driving = np.repeat(dance(1), 3, axis=0)  # bones of constant length, so their estimated lengths are exact
    driving[:, :, 0] += np.arange(3)[:, None]
    output = pipe(image, driving, character=character, steps=1)
    np.testing.assert_allclose(output.poses, driving, atol=1e-3)

    driving[0, 4, :2] = driving[0, 3, :2] + 0.5 * (
        driving[1, 4, :2] - driving[1, 3, :2]
    )  # foreshortened forearm
    lengths = {}
    for method in ("robust", "paper"):
        poses = pipe(image, driving, character=character, retarget=method, steps=1).poses
        lengths[method] = np.linalg.norm(poses[1, 4, :2] - poses[1, 3, :2])
    assert lengths["paper"] == pytest.approx(1.1 * lengths["robust"], rel=1e-3)  # its limit of stretching


def test_driving_frames_without_pose_network_are_a_user_error(pipe: TCANPipeline) -> None:
    with pytest.raises(UserError, match="the driving video: this pipeline has no pose network"):
        pipe(random_image(), np.stack([random_image()]))


class KnownPoses:
    """A `PoseDetector` that returns known poses, in some of the frames only."""

    fingerprint = "0" * 16

    def __init__(self, poses: np.ndarray, detected: list[bool]) -> None:
        self.people = [
            pose[None] if found else pose[:0].reshape(0, 18, 3)
            for pose, found in zip(poses, detected, strict=True)
        ]

    def detect(self, frames: np.ndarray, batch_size: int = 16, zoom: float = 1.0) -> list[np.ndarray]:
        return self.people


def test_poses_of_frames_without_a_person_are_interpolated(pipe: TCANPipeline) -> None:
    poses, frames = dance(10), np.zeros((10, SIZE, SIZE, 3), np.uint8)
    detecting = TCANPipeline(
        pipe.vae, pipe.tcan, pipe.scheduler, KnownPoses(poses, [False] * 2 + [True] * 6 + [False] * 2)
    )
    found = detecting.detect_poses(frames, "the video")
    np.testing.assert_allclose(found[:3], poses[[2, 2, 2]])
    np.testing.assert_allclose(found[7:], poses[[7, 7, 7]])
    nobody = TCANPipeline(pipe.vae, pipe.tcan, pipe.scheduler, KnownPoses(poses, [False] * 10))
    with pytest.raises(UserError, match="the video: no person found"):
        nobody.detect_poses(frames, "the video")


def test_float_image_and_tensor_output_equal_uint8_image_and_array(pipe: TCANPipeline) -> None:
    """A float image in [0, 1] is neither black nor refused; "pt" is the array as a tensor `[F, 3, H, W]`."""

    def frames(image: Any, output_type: str) -> Any:
        generator = torch.Generator().manual_seed(0)
        options = dict(retarget="none", steps=1, window=2, overlap=0, guidance_scale=1)
        return pipe(image, dance(2), generator=generator, output_type=output_type, **options).frames

    expected = frames(random_image(), "np")
    tensor = frames(random_image().astype(np.float32) / 255, "pt")
    assert tensor.dtype == torch.float32 and tensor.shape == (2, 3, SIZE, SIZE)
    np.testing.assert_array_equal(tensor.numpy(), expected.transpose(0, 3, 1, 2))


def test_latents_returned_by_the_callback_replace_the_latents(pipe: TCANPipeline) -> None:
    """Doubled after the last step: the result is doubled. Padded frames (3 of 5 + 3) stay, other returns are ignored."""
    options = dict(retarget="none", steps=2, window=4, overlap=0, guidance_scale=1, output_type="latent")

    def latents(callback: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            random_image(), dance(5), generator=generator, callback_on_step_end=callback, **options
        ).frames

    def double_at_the_end(_: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * (2 if step == 1 else 1)}

    expected = latents(None)
    assert torch.equal(latents(double_at_the_end), 2 * expected)
    assert torch.equal(latents(lambda *_: None), expected)
    assert torch.equal(latents(lambda *arguments: arguments[-1]), expected)
    assert not torch.equal(
        latents(lambda *arguments: {"latents": arguments[-1]["latents"] + 1}), expected + 1
    )


def test_invalid_arguments_are_refused_before_denoising(pipe: TCANPipeline) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a step ran")

    for options, reason in (
        ({"decode_batch": 0}, "decode_batch = 0"),
        ({"output_type": "numpy"}, "output_type = 'numpy'"),
        ({"generator": 0}, "generator: type int"),
        ({"retarget": False}, "retarget = False: unknown; use one of robust, paper, none"),
        ({"guidance_scale": float("nan")}, "guidance_scale = nan"),
        ({"poses": np.zeros((2, 17, 3))}, "the driving poses: shape"),
        ({"image": random_image().astype(np.float32)}, "the image: float values from 0 to 255"),
    ):
        arguments = {"image": random_image(), "poses": dance(2), "retarget": "none", "steps": 1} | options
        with pytest.raises(UserError, match=reason):
            pipe(**arguments, callback_on_step_end=fail)


def test_detected_character_chooses_the_crop_of_the_image(
    pipe: TCANPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """The character at the right side of a wide image gives the result of the square that was cut around it by hand."""
    wide = np.zeros((SIZE, 4 * SIZE, 3), np.uint8)
    wide[:, 2 * SIZE : 3 * SIZE] = random_image()
    character = dance(1)
    character[..., 0] += 2 * SIZE + 1  # its center is at x = 161
    detecting = TCANPipeline(pipe.vae, pipe.tcan, pipe.scheduler, KnownPoses(character, [True]))
    detecting.model_info = pipe.model_info
    outputs = [
        source(image, dance(2), steps=1, window=2, overlap=0, generator=torch.Generator().manual_seed(0), **known)
        for source, image, known in (
            (detecting, wide, {}),
            (pipe, wide[:, 129:193], {"character": character[0] - np.float32([129, 0, 0])}),
        )
    ]  # fmt: skip
    np.testing.assert_array_equal(outputs[0].frames, outputs[1].frames)
    np.testing.assert_array_equal(outputs[0].poses, outputs[1].poses)
    assert "the image: cropped to 129,0,193,64 around the person" in caplog.text


def test_save_and_load_preserve_weights_and_info(pipe: TCANPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    restored = TCANPipeline.from_pretrained(tmp_path / "saved")
    assert restored.model_info == pipe.model_info
    loaded = restored.tcan.parts()
    for part, weights in pipe.tcan.parts().items():
        assert all(torch.equal(value, loaded[part][name]) for name, value in weights.items())


def test_images_are_cropped_to_the_aspect_ratio() -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 255
    assert fit_image(wide, 32, 32).min() > 240


def test_denoising_ignores_a_schedule_that_training_moved_to_another_device(pipe: TCANPipeline) -> None:
    options = dict(steps=2, window=2, overlap=0, start_from_reference=True)
    first, second = (
        torch.Generator().manual_seed(0),
        torch.Generator().manual_seed(0),
    )
    expected = pipe.denoise(random_image(), dance(2), generator=first, **options)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to("meta")
    assert torch.equal(pipe.denoise(random_image(), dance(2), generator=second, **options), expected)


def test_decode_needs_no_no_grad(pipe: TCANPipeline) -> None:
    latents = torch.zeros(3, pipe.vae.config.latent_channels, 8, 8)
    pipe.vae.requires_grad_(True)
    try:
        batches = list(pipe.decode(latents, batch=2))
    finally:
        pipe.vae.requires_grad_(False)
    assert [batch.shape for batch in batches] == [(2, 64, 64, 3), (1, 64, 64, 3)]


def test_moving_the_pipeline_moves_the_pose_network(pipe: TCANPipeline, pretrained_folder: Path) -> None:
    copied = TCANPipeline(
        copy.deepcopy(pipe.vae),
        copy.deepcopy(pipe.tcan),
        pipe.scheduler,
        OpenPose.from_pretrained(pretrained_folder / "pose"),
    ).to("meta")
    assert copied.device.type == copied.pose_detector.device.type == "meta"
    assert {parameter.device.type for parameter in copied.pose_detector.network.parameters()} == {"meta"}


OPTIONS: dict[str, Any] = dict(retarget="none", window=2, overlap=0, output_type="latent")


def seeded(pipe: TCANPipeline, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(random_image(), dance(2), generator=generator, **{**OPTIONS, "steps": 2, **options}).frames


def test_pipeline_of_components_gives_the_same_result(pipe: TCANPipeline) -> None:
    copied = TCANPipeline(**pipe.components)
    assert (copied.height, copied.width) == (SIZE, SIZE)
    assert torch.equal(seeded(copied), seeded(pipe))
    assert torch.equal(seeded(pipe, steps=7, num_inference_steps=2), seeded(pipe))


def test_interrupt_ends_the_denoising_after_the_step(pipe: TCANPipeline) -> None:
    steps = []

    def interrupt(pipe: TCANPipeline, step: int, timestep: int, tensors: dict[str, Tensor]) -> None:
        steps.append((step, sorted(tensors)))
        pipe._interrupt = True
        assert pipe.interrupt

    seeded(pipe, callback_on_step_end=interrupt, callback_on_step_end_tensor_inputs=["noise_pred"])
    assert steps == [(0, ["noise_pred"])]
    steps.clear()
    seeded(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(step))
    assert steps == [0, 1]  # the interruption does not last


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_inference_steps": 0}, "steps = 0: must be from 1"),
        ({"num_inference_steps": -1}, "steps = -1: must be from 1"),
        ({"num_inference_steps": 1.5}, "steps = 1.5: must be an integer"),
        ({"guidance_scale": float("inf")}, "guidance_scale = inf: must be finite"),
        ({"guidance_scale": "7"}, "guidance_scale = 7"),
        ({"window": 33}, "window = 33: the model's motion modules have 32 positions; set at most 32"),
        ({"height": 0}, "height 0, width 64: must be multiples of 8"),
        ({"width": -64}, "height 64, width -64: must be multiples of 8"),
        ({"height": 64.5}, "height 64.5"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "unknown 'prompt'; use latents, noise_pred"),
    ],
)
def test_options_out_of_range_are_user_errors(pipe: TCANPipeline, options: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        seeded(pipe, **options)


def test_decode_batch_of_zero_is_a_user_error(pipe: TCANPipeline) -> None:
    with pytest.raises(UserError, match="decode_batch = 0"):
        next(pipe.decode(torch.zeros(1, 4, 8, 8), 0))


def test_simultaneous_calls_of_one_pipeline_do_not_share_a_schedule(pipe: TCANPipeline) -> None:
    """A call inside the callback of another one changes neither result."""
    expected, inner = seeded(pipe), []
    outer = seeded(pipe, callback_on_step_end=lambda *_: inner.append(seeded(pipe, steps=1)))
    assert torch.equal(outer, expected) and torch.equal(inner[0], seeded(pipe, steps=1))


def test_threads_can_share_the_networks(pipe: TCANPipeline) -> None:
    """Two pipelines of the same networks, in two threads, with different temperature maps."""
    pipes = pipe, TCANPipeline(**pipe.components)
    strengths = (1.0, 8.0) * 2
    expected = [seeded(pipe, ptm_strength=strength) for strength in strengths[:2]] * 2
    assert not torch.equal(*expected[:2])
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda i: seeded(pipes[i % 2], ptm_strength=strengths[i]), range(4))
    for result, single in zip(results, expected, strict=True):
        assert torch.equal(result, single)


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_does_not_change_the_result(pipe: TCANPipeline, model_folder: Path, kind: str) -> None:
    """Sequential offloading leaves no weight in the modules between calls, so a missed hook fails on the meta device."""
    offloaded = TCANPipeline(copy.deepcopy(pipe.vae), copy.deepcopy(pipe.tcan), pipe.scheduler)
    offloaded.set_progress_bar_config(disable=True)
    if kind == "model":
        offloaded.enable_model_cpu_offload(device="cpu")
    else:  # as `enable_sequential_cpu_offload` does, which names the device cpu:0, for which accelerate has no support
        for network in (offloaded.vae, offloaded.tcan):
            cpu_offload(network, torch.device("cpu"))
        assert {parameter.device.type for parameter in offloaded.tcan.parameters()} == {"meta"}
    for output_type in ("latent", "np"):
        expected = seeded(pipe, output_type=output_type)
        np.testing.assert_array_equal(seeded(offloaded, output_type=output_type), expected)


@pytest.mark.parametrize(
    "method", ["encode", "decode", "appearance", "embed_pose", "pose_residuals", "denoise"]
)
def test_every_call_of_the_pipeline_triggers_the_offloading_hooks(pipe: TCANPipeline, method: str) -> None:
    """accelerate's hooks are on `forward`; the meta device stands for a GPU, which tests lack."""
    network = copy.deepcopy(pipe.vae if method in ("encode", "decode") else pipe.tcan)
    cpu_offload_with_hook(network, torch.device("meta"))  # as `enable_model_cpu_offload` does
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    noisy, pose = torch.zeros(1, 2, 4, 8, 8, device="meta"), torch.zeros(1, 2, 3, 64, 64, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    arguments: dict[str, tuple] = {
        "encode": (pose[0],),
        "decode": (noisy[0],),
        "appearance": (noisy[0, :1], t),
        "embed_pose": (pose,),
        "pose_residuals": (noisy, t, pose),
        "denoise": (noisy, t, None, None),
    }
    with torch.no_grad(), suppress(RuntimeError):  # memory-efficient modules do not run on the meta device
        getattr(network, method)(*arguments[method])
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_dtype_can_be_a_name(model_folder: Path) -> None:
    assert TCANPipeline.from_pretrained(model_folder, torch_dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UserError, match="torch_dtype = int8: unknown; use float32"):
        TCANPipeline.from_pretrained(model_folder, torch_dtype="int8")


def test_variant_chooses_the_weights_files(
    model_folder: Path, pretrained_folder: Path, tmp_path: Path
) -> None:
    """A folder with a VAE in two variants, of different values."""
    vae = AutoencoderKL.from_pretrained(pretrained_folder / "vae")
    vae.save_pretrained(tmp_path / "vae")
    vae.half().save_pretrained(tmp_path / "vae", variant="fp16")
    TCANPipeline.from_pretrained(model_folder, vae=str(tmp_path / "vae"))
    with pytest.raises(UserError, match="was trained on another vae"):
        TCANPipeline.from_pretrained(model_folder, vae=str(tmp_path / "vae"), variant="fp16")


def test_vae_slicing_and_tiling_reach_the_vae(pipe: TCANPipeline) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = np.concatenate(list(pipe.decode(latents)))
    pipe.enable_vae_slicing()
    np.testing.assert_allclose(np.concatenate(list(pipe.decode(latents))), expected, atol=1e-5)
    pipe.disable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling and not pipe.vae.use_slicing
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_tiling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusion_pipeline_loads_the_model_folder(
    model_folder: Path, pretrained_folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    export_model(model_folder, tmp_path / "model", pose=str(pretrained_folder / "pose"))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model", trust_remote_code=True, torch_dtype=dtype)
    expected = TCANPipeline.from_pretrained(model_folder, torch_dtype=dtype)
    assert (
        type(loaded) is TCANPipeline
        and loaded.dtype == dtype
        and (loaded.height, loaded.width) == (SIZE, SIZE)
    )
    assert isinstance(loaded.pose_detector, OpenPose)
    assert dict(loaded.scheduler.config) == dict(expected.scheduler.config)
    assert torch.equal(seeded(loaded), seeded(expected))
