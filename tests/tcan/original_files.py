"""Keys and shapes of the original checkpoints around SD1.5, and files with these keys and shapes.

The keys come from the modules of the projects: CompVis' latent diffusion, ControlNet, AnimateDiff, CLIP. Each tensor is
one distinct value expanded to its full shape, so that a checkpoint of gigabytes is a small file.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
TIME, TEXT = 1280, 768


def pair(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def resnet(at: str, old: int, new: int) -> Shapes:
    shapes = pair(f"{at}.in_layers.0", old) | pair(f"{at}.in_layers.2", new, old, 3, 3)
    shapes |= pair(f"{at}.emb_layers.1", new, TIME)
    shapes |= pair(f"{at}.out_layers.0", new) | pair(f"{at}.out_layers.3", new, new, 3, 3)
    return shapes | (pair(f"{at}.skip_connection", new, old, 1, 1) if old != new else {})


def attention(at: str, width: int, context: int) -> Shapes:
    shapes: Shapes = {f"{at}.to_q.weight": (width, width)}
    shapes |= {f"{at}.to_{p}.weight": (width, context) for p in "kv"}
    return shapes | pair(f"{at}.to_out.0", width, width)


def feed_forward(at: str, width: int) -> Shapes:
    return pair(f"{at}.net.0.proj", 8 * width, width) | pair(f"{at}.net.2", width, 4 * width)


def spatial(at: str, width: int) -> Shapes:
    block = f"{at}.transformer_blocks.0"
    shapes = pair(f"{at}.norm", width) | pair(f"{at}.proj_in", width, width, 1, 1)
    shapes |= attention(f"{block}.attn1", width, width) | attention(f"{block}.attn2", width, TEXT)
    shapes |= feed_forward(f"{block}.ff", width)
    shapes |= pair(f"{block}.norm1", width) | pair(f"{block}.norm2", width) | pair(f"{block}.norm3", width)
    return shapes | pair(f"{at}.proj_out", width, width, 1, 1)


def encoder_blocks() -> tuple[Shapes, list[int]]:
    """Time embedding, input and middle blocks, and the skip channels of each input block."""
    shapes = pair("time_embed.0", TIME, 320) | pair("time_embed.2", TIME, TIME)
    shapes |= pair("input_blocks.0.0", 320, 4, 3, 3)
    skips, number = [320], 1
    for level, width in enumerate((320, 640, 1280, 1280)):
        for _ in range(2):
            shapes |= resnet(f"input_blocks.{number}.0", skips[-1], width)
            if level < 3:
                shapes |= spatial(f"input_blocks.{number}.1", width)
            skips.append(width)
            number += 1
        if level < 3:
            shapes |= pair(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    shapes |= resnet("middle_block.0", 1280, 1280) | spatial("middle_block.1", 1280)
    return shapes | resnet("middle_block.2", 1280, 1280), skips


def unet() -> Shapes:
    shapes, skips = encoder_blocks()
    channels, number = 1280, 0
    for level, width in ((3, 1280), (2, 1280), (1, 640), (0, 320)):
        for i in range(3):
            at = f"output_blocks.{number}"
            shapes |= resnet(f"{at}.0", channels + skips.pop(), width)
            channels = width
            if level < 3:
                shapes |= spatial(f"{at}.1", width)
            if level and i == 2:
                shapes |= pair(f"{at}.{1 if level == 3 else 2}.conv", width, width, 3, 3)
            number += 1
    return shapes | pair("out.0", 320) | pair("out.2", 4, 320, 3, 3)


def controlnet() -> Shapes:
    shapes, skips = encoder_blocks()
    for i, width in enumerate(skips):
        shapes |= pair(f"zero_convs.{i}.0", width, width, 1, 1)
    hint = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    for i in range(8):
        shapes |= pair(f"input_hint_block.{2 * i}", hint[i + 1], hint[i], 3, 3)
    return shapes | pair("middle_block_out.0", 1280, 1280, 1, 1)


def vae() -> Shapes:
    def block(at: str, old: int, new: int) -> Shapes:
        shapes = pair(f"{at}.norm1", old) | pair(f"{at}.conv1", new, old, 3, 3)
        shapes |= pair(f"{at}.norm2", new) | pair(f"{at}.conv2", new, new, 3, 3)
        return shapes | (pair(f"{at}.nin_shortcut", new, old, 1, 1) if old != new else {})

    def middle(at: str) -> Shapes:
        shapes = block(f"{at}.block_1", 512, 512) | block(f"{at}.block_2", 512, 512)
        shapes |= pair(f"{at}.attn_1.norm", 512)
        for name in ("q", "k", "v", "proj_out"):
            shapes |= pair(f"{at}.attn_1.{name}", 512, 512, 1, 1)
        return shapes

    widths, shapes = (128, 256, 512, 512), pair("encoder.conv_in", 128, 3, 3, 3)
    old = 128
    for level, width in enumerate(widths):
        for i in range(2):
            shapes |= block(f"encoder.down.{level}.block.{i}", old, width)
            old = width
        if level < 3:
            shapes |= pair(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    shapes |= middle("encoder.mid") | pair("encoder.norm_out", 512) | pair("encoder.conv_out", 8, 512, 3, 3)
    shapes |= pair("decoder.conv_in", 512, 4, 3, 3) | middle("decoder.mid")
    for level in (3, 2, 1, 0):
        for i in range(3):
            shapes |= block(f"decoder.up.{level}.block.{i}", old, widths[level])
            old = widths[level]
        if level:
            shapes |= pair(f"decoder.up.{level}.upsample.conv", old, old, 3, 3)
    shapes |= pair("decoder.norm_out", 128) | pair("decoder.conv_out", 3, 128, 3, 3)
    return shapes | pair("quant_conv", 8, 8, 1, 1) | pair("post_quant_conv", 4, 4, 1, 1)


def text_encoder() -> Shapes:
    at = "text_model.embeddings"
    shapes: Shapes = {
        f"{at}.token_embedding.weight": (49408, 768),
        f"{at}.position_embedding.weight": (77, 768),
    }
    for i in range(12):
        at = f"text_model.encoder.layers.{i}"
        for name in ("q", "k", "v", "out"):
            shapes |= pair(f"{at}.self_attn.{name}_proj", 768, 768)
        shapes |= pair(f"{at}.layer_norm1", 768) | pair(f"{at}.layer_norm2", 768)
        shapes |= pair(f"{at}.mlp.fc1", 3072, 768) | pair(f"{at}.mlp.fc2", 768, 3072)
    return shapes | pair("text_model.final_layer_norm", 768)


def motion_modules(middle: bool = True) -> Shapes:
    shapes: Shapes = {}
    modules = [
        (f"down_blocks.{i}.motion_modules.{j}", w)
        for i, w in enumerate((320, 640, 1280, 1280))
        for j in (0, 1)
    ]
    modules += [
        (f"up_blocks.{i}.motion_modules.{j}", w)
        for i, w in enumerate((1280, 1280, 640, 320))
        for j in (0, 1, 2)
    ]
    for module, width in modules + [("mid_block.motion_modules.0", 1280)] * middle:
        at, block = f"{module}.temporal_transformer", f"{module}.temporal_transformer.transformer_blocks.0"
        shapes |= (
            pair(f"{at}.norm", width)
            | pair(f"{at}.proj_in", width, width)
            | pair(f"{at}.proj_out", width, width)
        )
        for i in (0, 1):
            shapes |= attention(f"{block}.attention_blocks.{i}", width, width)
            shapes |= {f"{block}.attention_blocks.{i}.pos_encoder.pe": (1, 32, width)}
            shapes |= pair(f"{block}.norms.{i}", width)
        shapes |= feed_forward(f"{block}.ff", width) | pair(f"{block}.ff_norm", width)
    return shapes


def tensors(shapes: Shapes, first: int = 1) -> dict[str, Tensor]:
    """The value `first + i` at full shape for the i-th key; position tables with their real values."""
    return {
        name: positions(*shape[1:])
        if name.endswith(".pe")
        else torch.full((), float(first + i)).expand(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def positions(frames: int, width: int) -> Tensor:
    t, c = torch.arange(frames)[:, None], torch.arange(0, width, 2)
    angle = t * torch.exp(-c / width * torch.log(torch.tensor(10000.0)))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[None]


def checkpoint() -> Shapes:
    """A complete SD1.5 file, including the keys that are ignored."""
    shapes: Shapes = {}
    for prefix, part in (
        ("model.diffusion_model.", unet()),
        ("first_stage_model.", vae()),
        ("cond_stage_model.transformer.", text_encoder()),
    ):
        shapes |= {prefix + name: shape for name, shape in part.items()}
    shapes |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)}
    tables = (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
    )
    tables += ("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
    tables += (
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    )
    return shapes | dict.fromkeys(tables, (1000,)) | {"model_ema.decay": (), "model_ema.num_updates": ()}


def write_sparse_safetensors(shapes: Shapes, path: Path) -> None:
    """Write fp16 zeros as a sparse file, which uses almost no disk space."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod()) if shape else 2
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def values(state: dict[str, Tensor]) -> Iterator[float]:
    """The single value of each tensor."""
    for tensor in state.values():
        yield tensor.flatten()[0].item()
