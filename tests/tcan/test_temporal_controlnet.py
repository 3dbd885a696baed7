"""Temporal ControlNet: equal to the frozen ControlNet for single images and before training."""

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
def test_single_images_have_the_frozen_controlnets_residuals(pretrained: dict, model: TCAN, batch) -> None:
    inputs = batch(2, 1)
    expected = frozen_residuals(pretrained, inputs)
    assert all(torch.equal(a, b) for a, b in zip(residuals(model, inputs), expected, strict=True))


@torch.no_grad()
def test_untrained_temporal_layers_do_not_change_the_residuals(pretrained: dict, fresh: TCAN, batch) -> None:
    inputs = batch(2, 3)
    expected = frozen_residuals(pretrained, inputs)
    assert all(torch.equal(a, b) for a, b in zip(residuals(fresh, inputs), expected, strict=True))


@torch.no_grad()
def test_temporal_layers_are_only_at_down_factors_4_and_8(pretrained: dict, model: TCAN, batch) -> None:
    assert {name.rsplit(".", 2)[0] for name in temporal_layers(model.controlnet)} == {
        "down_blocks.2",
        "down_blocks.3",
    }
    inputs = batch(1, 3)
    for temporal, frozen in zip(residuals(model, inputs), frozen_residuals(pretrained, inputs), strict=True):
        # Latents of 8 x 16: the grids of height 8 and 4 precede the first temporal layer.
        if temporal.shape[-2] > 2:
            assert torch.equal(temporal, frozen)
    assert not torch.equal(residuals(model, inputs)[-1], frozen_residuals(pretrained, inputs)[-1])


@torch.no_grad()
def test_scale_multiplies_the_residuals(model: TCAN, batch) -> None:
    inputs = batch(1, 3)
    down, middle = model.pose_residuals(inputs["noisy"], inputs["timestep"], inputs["pose"], scale=0.5)
    for scaled, full in zip([*down, middle], residuals(model, inputs), strict=True):
        torch.testing.assert_close(scaled, full / 2, rtol=1e-12, atol=0)


def test_frozen_weights_and_their_names_are_unchanged(pretrained: dict, model: TCAN) -> None:
    frozen = pretrained["controlnet"].state_dict()
    state = model.controlnet.state_dict()
    assert state.keys() - temporal_state_dict(model.controlnet).keys() == frozen.keys()
    assert all(torch.equal(value, state[key]) for key, value in frozen.items())
