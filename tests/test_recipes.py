"""The recipes of docs/architecture.md, section "Change it": their code runs and does what the text says."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel

from pipelines import evaluate, metrics_table
from pipelines.evaluate import Evaluated
from pipelines.preprocess.person_crop import crop_around
from pipelines.puppets.world import sample_clip
from tcan.model import TCAN, diffusion_loss
from tcan.pose import PoseDetector
from tests.tiny import tiny_batch, tiny_networks

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


@pytest.fixture
def recipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names after the code of the recipe with this title was executed."""
    monkeypatch.setattr(metrics_table, "TABLE", metrics_table.TABLE)
    monkeypatch.setattr(evaluate, "compute_metrics", evaluate.compute_metrics)
    section = PAGE.read_text().split(f"### {request.param}\n")[1].split("\n### ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"np": np}
    exec(code, names)
    return names


@pytest.mark.parametrize("recipe", ["Add a pose detector"], indirect=True)
def test_pose_detector(recipe: dict[str, Any]) -> None:
    assert isinstance(recipe["detector"], PoseDetector)
    assert (recipe["height"], recipe["width"], len(recipe["people"])) == (64, 48, 4)
    np.testing.assert_array_equal(recipe["people"][3][0, 0], [24, 16, 1])


@pytest.mark.parametrize("recipe", ["Add a metric"], indirect=True)
def test_metric(recipe: dict[str, Any]) -> None:
    clip = sample_clip("dance", 0, 2, 64)
    poses = clip.keypoints
    video = Evaluated(
        Path("a.mp4"), 24, clip.frames, poses, clip.frames, clip.frames[:, ::-1].copy(), poses, None
    )
    evaluate.compute_metrics([video])
    (row,) = [
        row for row in metrics_table.table(evaluate.means([video.metrics])).splitlines() if "sharpness" in row
    ]
    value = f"{video.metrics['sharpness']:.2f}"
    assert row.split()[3] == value and row.endswith(f"source {value}")  # the result is the source upside down
    assert recipe["sharpness"](np.zeros_like(clip.frames)) == 0


@pytest.mark.parametrize("recipe", ["Add a filter to preprocessing"], indirect=True)
def test_filter(recipe: dict[str, Any]) -> None:
    keypoints = sample_clip("dance", 0, 4, 64).keypoints
    inverted = keypoints * [1, -1, 1] + [0, 64, 0]
    assembler = recipe["UprightOnly"](
        None, [], min_person_fraction=0.8, min_person_height=0.0, validation_fraction=0.1
    )
    assert assembler._filter_person(keypoints, crop_around(keypoints, 64, 64, (64, 64))) is None
    reason = assembler._filter_person(inverted, crop_around(inverted, 64, 64, (64, 64)))
    assert reason == "person upside down: in 100% of the frames"


@pytest.mark.parametrize("recipe", ["Add a conditioning signal"], indirect=True)
def test_conditioning_signal(recipe: dict[str, Any]) -> None:
    networks, batch = tiny_networks(), tiny_batch(2, 3)
    torch.manual_seed(0)
    plain = TCAN(**networks, lora_rank=2)
    second = ControlNetModel.from_unet(networks["unet"], conditioning_embedding_out_channels=(4, 4, 4, 4))
    both = recipe["TwoSignals"](**networks, lora_rank=2, second_controlnet=second)
    inputs = {"noisy": batch["latents"], "timestep": batch["timestep"]}
    pose, signal = batch["pose"], batch["pose"].flip(-1)

    def residuals(model: TCAN, pose: torch.Tensor) -> torch.Tensor:
        down, middle = model.pose_residuals(**inputs, pose=pose)
        return torch.cat([*(part.flatten() for part in down), middle.flatten()])

    with torch.no_grad():
        before = residuals(plain, pose)
        torch.testing.assert_close(residuals(both, torch.cat([pose, signal], 2)), before)  # zero convolutions
        torch.nn.init.normal_(second.controlnet_mid_block.weight)
        torch.nn.init.normal_(second.controlnet_cond_embedding.conv_out.weight)
        first, other = (residuals(both, torch.cat([pose, part], 2)) for part in (signal, 1 - signal))
    assert not torch.allclose(first, before) and not torch.allclose(first, other)


@pytest.mark.parametrize("recipe", ["Use another base model"], indirect=True)
def test_base_model_with_the_architecture_of_sd21(recipe: dict[str, Any]) -> None:
    torch.manual_seed(0)
    unet = recipe["unet"]
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    tcan = TCAN(unet, controlnet, recipe["adapter"], torch.randn(1, 4, 24), lora_rank=2)
    batch = tiny_batch(2, 3)
    for stage in (1, 2):
        tcan.set_stage(stage)
        loss = diffusion_loss(tcan, recipe["schedule"], **batch)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None for p in tcan.parameters() if p.requires_grad)
        tcan.zero_grad()
