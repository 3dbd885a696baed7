"""The temporal ControlNet: the frozen one for a picture, and until its temporal layers have learned."""

import torch

from tcan.model import TCAN
from tcan.temporal import temporal_layers, temporal_state_dict


def frozen_residuals(bases: dict, inputs: dict) -> list[torch.Tensor]:
    frames = inputs["noisy"].shape[1]
    down, middle = bases["controlnet"](
        inputs["noisy"].flatten(0, 1),
        inputs["timestep"].repeat_interleave(frames),
        bases["empty_prompt"].expand(inputs["noisy"].shape[0] * frames, -1, -1),
        controlnet_cond=inputs["pose"].flatten(0, 1),
        return_dict=False,
    )
    return [*down, middle]


def residuals(model: TCAN, inputs: dict) -> list[torch.Tensor]:
    down, middle = model.pose_residuals(inputs["noisy"], inputs["timestep"], inputs["pose"])
    return [*down, middle]


@torch.no_grad()
def test_a_picture_gets_the_frozen_controlnets_residuals(bases: dict, model: TCAN, batch) -> None:
    inputs = batch(2, 1)
    expected = frozen_residuals(bases, inputs)
    assert all(torch.equal(a, b) for a, b in zip(residuals(model, inputs), expected, strict=True))


@torch.no_grad()
def test_a_clip_does_until_the_temporal_layers_have_learned(bases: dict, fresh: TCAN, batch) -> None:
    inputs = batch(2, 3)
    expected = frozen_residuals(bases, inputs)
    assert all(torch.equal(a, b) for a, b in zip(residuals(fresh, inputs), expected, strict=True))


@torch.no_grad()
def test_temporal_layers_act_at_down_factors_4_and_8_alone(bases: dict, model: TCAN, batch) -> None:
    assert {name.rsplit(".", 2)[0] for name in temporal_layers(model.controlnet)} == {
        "down_blocks.2",
        "down_blocks.3",
    }
    inputs = batch(1, 3)
    for mine, frozen in zip(residuals(model, inputs), frozen_residuals(bases, inputs), strict=True):
        # latents of 8 x 16: grids 8, 4 are before the first temporal layer; 2's first (the downsampler's) as
        # well
        if mine.shape[-2] > 2:
            assert torch.equal(mine, frozen)
    assert not torch.equal(residuals(model, inputs)[-1], frozen_residuals(bases, inputs)[-1])


@torch.no_grad()
def test_scale_multiplies_the_residuals(model: TCAN, batch) -> None:
    inputs = batch(1, 3)
    down, middle = model.pose_residuals(inputs["noisy"], inputs["timestep"], inputs["pose"], scale=0.5)
    for scaled, whole in zip([*down, middle], residuals(model, inputs), strict=True):
        torch.testing.assert_close(scaled, whole / 2, rtol=1e-12, atol=0)


def test_frozen_weights_keep_their_names(bases: dict, model: TCAN) -> None:
    frozen = bases["controlnet"].state_dict()
    mine = model.controlnet.state_dict()
    assert mine.keys() - temporal_state_dict(model.controlnet).keys() == frozen.keys()
    assert all(torch.equal(value, mine[key]) for key, value in frozen.items())
