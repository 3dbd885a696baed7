"""Image embeddings of CLIP and DINO from a local folder in transformers' layout."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

from tcan.errors import UserError, first_line
from tcan.weights.common import quiet

CLIP = ("clip", "clip_vision_model")
DINO = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")


class ImageEmbedding(nn.Module):
    """Normalized embeddings of images: CLIP's projected embedding, or the class token of DINO."""

    def __init__(self, folder: Path) -> None:
        """Load the model and its image processor.

        Raises:
            UserError: the folder is not a complete model of CLIP or DINO with an image processor.
        """
        super().__init__()
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder}: config.json is missing or unreadable ({first_line(error)}); give a folder in transformers' layout"
            ) from error
        if kind not in CLIP + DINO:
            raise UserError(
                f"{folder}: a model of type {kind}; give a folder with CLIP or DINO ({', '.join(CLIP + DINO)})"
            )
        self.is_clip = kind in CLIP
        architecture = CLIPVisionModelWithProjection if self.is_clip else AutoModel
        try:
            with quiet():
                self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
                self.model, info = architecture.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32
                )
        except Exception as error:  # transformers raises many types on incomplete folders
            raise UserError(
                f"{folder}: unreadable ({first_line(error)}); give the complete folder of the model"
            ) from error
        # The class token does not pass the pooler, which DINO's files lack.
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
        if missing or info["mismatched_keys"]:
            names = ", ".join([*missing, *map(str, info["mismatched_keys"])][:3])
            raise UserError(
                f"{folder}: missing or mismatched weights: {names}; give the complete folder of the model"
            )
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, frames: np.ndarray) -> Tensor:
        """Return the embeddings `[F, D]`, of length 1, of uint8 RGB frames `[F, H, W, 3]`."""
        inputs = self.processor(list(frames), return_tensors="pt")["pixel_values"].to(self.model.device)
        output = self.model(pixel_values=inputs)
        embeddings = output.image_embeds if self.is_clip else output.last_hidden_state[:, 0]
        return nn.functional.normalize(embeddings.float(), dim=-1)
