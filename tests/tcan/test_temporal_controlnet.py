"""The temporal ControlNet: the frozen one for a image, and until its temporal layers have learned."""

import torch

from tcan.model import TCAN
from tcan.temporal import temporal_layers, temporal_state_dict


def frozen_residuals(pretrained: dict, inputs: dict) -> list[torch.Tensor]:
    frames = inputs["noisy"].shape[1]
    down, middle = pretrained["controlnet"](
        inputs["noisy"].flatten(0, 1),
        inputs["timestep"].repeat_interleave(frames),
        pretrained["empty_prompt"].expand(inputs["noisy"].shape[0] * frames, -1, -1),
        controlnet_cond=inputs["pose"].flatten(0, 1),
        return_dict=False,
    )
    return [*down, middle]


def residuals(model: TCAN, inputs: dict) -> list[torch.Tensor]:
    down, middle = model.pose_residuals(inputs["noisy"], inputs["timestep"], inputs["pose"])
    return [*down, middle]


@torch.no_grad()
def test_a_image_gets_the_frozen_controlnets_residuals(pretrained: dict, model: TCAN, batch) -> None:
    inputs = batch(2, 1)
    expected = frozen_residuals(pretrained, inputs)
    assert all(torch.equal(a, b) for a, b in zip(residuals(model, inputs), expected, strict=True))


@torch.no_grad()
def test_a_clip_does_until_the_temporal_layers_have_learned(pretrained: dict, fresh: TCAN, batch) -> None:
    inputs = batch(2, 3)
    expected = frozen_residuals(pretrained, inputs)
    assert all(torch.equal(a, b) for a, b in zip(residuals(fresh, inputs), expected, strict=True))


@torch.no_grad()
def test_temporal_layers_act_at_down_factors_4_and_8_alone(pretrained: dict, model: TCAN, batch) -> None:
    assert {name.rsplit(".", 2)[0] for name in temporal_layers(model.controlnet)} == {
        "down_blocks.2",
        "down_blocks.3",
    }
    inputs = batch(1, 3)
    for mine, frozen in zip(residuals(model, inputs), frozen_residuals(pretrained, inputs), strict=True):
        # latents of 8 x 16: grids 8, 4 are before the first temporal layer; 2's first (the downsampler's) as
        # well
        if mine.shape[-2] > 2:
            assert torch.equal(mine, frozen)
    assert not torch.equal(residuals(model, inputs)[-1], frozen_residuals(pretrained, inputs)[-1])


@torch.no_grad()
def test_scale_multiplies_the_residuals(model: TCAN, batch) -> None:
    inputs = batch(1, 3)
    down, middle = model.pose_residuals(inputs["noisy"], inputs["timestep"], inputs["pose"], scale=0.5)
    for scaled, whole in zip([*down, middle], residuals(model, inputs), strict=True):
        torch.testing.assert_close(scaled, whole / 2, rtol=1e-12, atol=0)


def test_frozen_weights_keep_their_names(pretrained: dict, model: TCAN) -> None:
    frozen = pretrained["controlnet"].state_dict()
    mine = model.controlnet.state_dict()
    assert mine.keys() - temporal_state_dict(model.controlnet).keys() == frozen.keys()
    assert all(torch.equal(value, mine[key]) for key, value in frozen.items())
