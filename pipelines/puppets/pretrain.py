"""Train the mini preset's weights from scratch on the distribution `wide` of the puppet world.

    python -m pipelines.puppets.pretrain --out tcan/mini --work ~/tcan-pretrain

Renders the frames, then trains VAE, pose network, UNet, ControlNet and motion modules, in this order. Seeded and
resumable: rerun the command to resume from the latest checkpoints in the work folder. Requires hours on two CPU cores.

With a GPU, more images fit into a step, and a duration replaces the numbers of steps of the recipe:

    python -m pipelines.puppets.pretrain --out weights/ --work work/ --device cuda --batch 12 --characters 40000 \
      --clips 4000 --minutes 60

OUT/training.log contains the losses and the metrics on held-out characters.
"""

import argparse
import dataclasses
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.puppets import corpus, mini_diffusion
from pipelines.puppets.fit import Setting, print_line
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
from tcan.errors import UserError
from tcan.weights import encode_empty_prompt

SHARES = {"vae": 0.1, "pose": 0.05, "unet": 0.55, "controlnet": 0.15, "motion": 0.15}
"""Parts in the order of their training, with their share of the time."""
PARTS = tuple(SHARES)


def save(module: nn.Module, folder: Path) -> None:
    """Write fp16 safetensors in diffusers' layout, and round the module to fp16, so that later parts use these weights."""
    module.half().save_pretrained(folder)
    module.float().requires_grad_(False).eval()


def pretrain(
    out: Path,
    work: Path,
    setting: Setting,
    last: str = PARTS[-1],
    characters: int = corpus.CHARACTERS,
    clips: int = corpus.CLIPS,
) -> None:
    """Train the parts up to `last` and write them to `out`. Parts finished in the work folder are loaded instead.

    Args:
        characters, clips: numbers of rendered characters and clips. The clips are rendered in other processes while the parts
            before the motion modules are trained.

    Raises:
        UserError: the corpus is smaller than a batch, or the work folder has one of another size; see `fit`.
    """
    for name, count, least in (
        ("characters", characters, mini_diffusion.IMAGES),
        ("clips", clips, mini_diffusion.CLIPS),
    ):
        if count < setting.batch * least:
            raise UserError(
                f"--{name} {count}: a step of --batch {setting.batch} has {setting.batch * least}; set --{name} to at "
                "least this number, or --batch to a smaller one"
            )
    parts = PARTS[: PARTS.index(last) + 1]
    folder = work / "corpus"
    images = corpus.image_corpus(folder, characters)
    # Not a fork, which would copy a process that uses a GPU.
    renderer = get_context("spawn").Process(target=corpus.clip_corpus, args=(folder, clips, characters))
    if "motion" in parts:
        renderer.start()

    def of(part: str) -> Setting:
        minutes = setting.minutes
        return dataclasses.replace(setting, minutes=minutes and minutes * SHARES[part])

    vae = seeded(train_vae, images, work, of("vae"))
    save(vae, out / "vae")
    if "pose" in parts:
        save(seeded(train_pose, images, work, of("pose")), out / "pose")
    if "unet" in parts:
        text_encoder = seeded(new_text_encoder)
        save(text_encoder, out / "text_encoder")
        prompt = encode_empty_prompt(text_encoder)
        new_scheduler().save_pretrained(out / "scheduler")
        samples = Samples(images, encode(vae, images.frames, work / "image-latents.pt"))
        unet = seeded(train_unet, samples, prompt, work, of("unet"))
        save(unet, out / "unet")
    if "controlnet" in parts:
        controlnet = seeded(train_controlnet, samples, unet, prompt, work, of("controlnet"))
        save(controlnet, out / "controlnet")
    if "motion" in parts:
        renderer.join()
        rendered = corpus.clip_corpus(folder, clips, characters)
        samples = Samples(rendered, encode(vae, rendered.frames, work / "clip-latents.pt"))
        save(seeded(train_motion, samples, unet, prompt, work, of("motion")), out / "motion_adapter")


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
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Device.")
    parser.add_argument("--batch", type=int, default=1, help="Factor of the number of images per step.")
    parser.add_argument(
        "--minutes",
        type=float,
        help="Duration of the training without rendering, instead of the numbers of steps of the recipe.",
    )
    parser.add_argument(
        "--characters", type=int, default=corpus.CHARACTERS, help="Number of rendered characters."
    )
    parser.add_argument("--clips", type=int, default=corpus.CLIPS, help="Number of rendered clips.")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU available; use auto or cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "training.log", "a", buffering=1) as file:

        def log(line: str) -> None:
            print_line(line)
            file.write(f"{line}\n")

        setting = Setting(device, arguments.batch, arguments.minutes, log)
        try:
            pretrain(
                arguments.out, arguments.work, setting, arguments.last, arguments.characters, arguments.clips
            )
        except UserError as error:
            parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
