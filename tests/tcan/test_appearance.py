"""Reference features: definition, truncation of the appearance UNet, and use with a single UNet."""

import copy

import torch

from tcan.appearance import capture_features, install_appearance, reference_blocks
from tcan.attention import Appearance
from tcan.model import TCAN


@torch.no_grad()
def test_features_are_the_hidden_states_after_norm1(pretrained: dict, fresh: TCAN, batch) -> None:
    inputs, unet = batch(2, 1), pretrained["unet"]
    expected: list[torch.Tensor] = []
    blocks = [
        *unet.mid_block.attentions[0].transformer_blocks,
        *(
            b
            for up in unet.up_blocks[1:]
            for attention in up.attentions
            for b in attention.transformer_blocks
        ),
    ]
    hooks = [b.norm1.register_forward_hook(lambda _, __, out: expected.append(out)) for b in blocks]
    unet(inputs["reference_latent"], inputs["timestep"], pretrained["empty_prompt"].expand(2, -1, -1))
    for hook in hooks:
        hook.remove()
    features = fresh.appearance(inputs["reference_latent"], inputs["timestep"])
    assert len(features) == len(expected) == 1 + 3 * 2
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_appearance_unet_is_the_unet_without_layers_after_the_last_feature(
    pretrained: dict, fresh: TCAN
) -> None:
    complete, truncated = pretrained["unet"].state_dict(), fresh.appearance_unet.state_dict()
    assert all(torch.equal(value, complete[name]) for name, value in truncated.items())
    last = "up_blocks.3.attentions.1."
    block = last + "transformer_blocks.0."
    removed = (
        *(block + part for part in ("attn1", "attn2", "norm2", "norm3", "ff")),
        last + "proj_out",
        "conv_",
    )
    assert complete.keys() - truncated.keys() == {
        n for n in complete if n.startswith(removed) and not n.startswith("conv_in")
    }


@torch.no_grad()
def test_one_unet_can_capture_and_use_features(pretrained: dict, batch) -> None:
    inputs, original = batch(2, 1), pretrained["unet"]
    unet = copy.deepcopy(original)
    assert install_appearance(unet) == len(reference_blocks(unet)) == 7
    prompt, noisy, t = pretrained["empty_prompt"].expand(2, -1, -1), inputs["noisy"][:, 0], inputs["timestep"]
    expected = original(noisy, t, prompt).sample
    torch.testing.assert_close(unet(noisy, t, prompt).sample, expected, rtol=0, atol=1e-12)
    features = capture_features(unet, inputs["reference_latent"], t, prompt)
    appearance = Appearance(features, torch.tensor([True, False]))
    out = unet(noisy, t, prompt, cross_attention_kwargs={"appearance": appearance}).sample
    torch.testing.assert_close(out[1], expected[1], rtol=0, atol=1e-12)
    assert (out[0] - expected[0]).abs().max() > 1e-3
