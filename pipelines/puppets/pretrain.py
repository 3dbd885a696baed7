"""Train the mini preset's weights from scratch on the distribution `wide` of the puppet world.

    python -m pipelines.puppets.pretrain --out tcan/mini --work ~/tcan-pretrain

Renders the frames, then trains VAE, pose network, UNet, ControlNet and motion modules, in this order. Seeded and
resumable: rerun the command to resume from the latest checkpoints in the work folder. Requires hours on two CPU cores.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.puppets.corpus import Corpus
from pipelines.puppets.mini_diffusion import (
    Samples,
    new_scheduler,
    new_text_encoder,
    train_controlnet,
    train_motion,
    train_unet,
)
from pipelines.puppets.mini_pose import train_pose
from pipelines.puppets.mini_vae import encode, train_vae
from tcan.weights import encode_empty_prompt

PARTS = ("vae", "pose", "unet", "controlnet", "motion")


def save(module: nn.Module, folder: Path) -> None:
    """Write fp16 safetensors in diffusers' layout, and round the module to fp16, so that later parts use these weights."""
    module.half().save_pretrained(folder)
    module.float().requires_grad_(False).eval()


def pretrain(out: Path, work: Path, last: str = PARTS[-1]) -> None:
    """Train the parts up to `last` and write them to `out`. Parts finished in the work folder are loaded instead."""
    parts = PARTS[: PARTS.index(last) + 1]
    corpus = Corpus(work / "corpus")
    vae = seeded(train_vae, corpus, work)
    save(vae, out / "vae")
    if "pose" in parts:
        save(seeded(train_pose, corpus, work), out / "pose")
    if "unet" in parts:
        text_encoder = seeded(new_text_encoder)
        save(text_encoder, out / "text_encoder")
        prompt = encode_empty_prompt(text_encoder)
        new_scheduler().save_pretrained(out / "scheduler")
        samples = Samples(
            corpus,
            encode(vae, corpus.images.frames, work / "image-latents.pt"),
            encode(vae, corpus.clips.frames, work / "clip-latents.pt"),
        )
        unet = seeded(train_unet, samples, prompt, work)
        save(unet, out / "unet")
    if "controlnet" in parts:
        controlnet = seeded(train_controlnet, samples, unet, prompt, work)
        save(controlnet, out / "controlnet")
    if "motion" in parts:
        save(seeded(train_motion, samples, unet, prompt, work), out / "motion_adapter")


def seeded(make: Callable[..., Any], *arguments: Any) -> Any:
    """Call `make` with the global seed 0, so that initial weights do not depend on the parts trained before."""
    torch.manual_seed(0)
    return make(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("tcan/mini"), help="Output folder of the pretrained models."
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="Folder of rendered frames and checkpoints, reused when the command is rerun.",
    )
    parser.add_argument(
        "--last", choices=PARTS, default=PARTS[-1], help="Last part to train; default: all parts."
    )
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.work, arguments.last)


if __name__ == "__main__":
    main()
