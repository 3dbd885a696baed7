"""A model of MLflow's registry as `mlflow.pyfunc` loads it: files in, frames out.

model = mlflow.pyfunc.load_model("models:/tcan@latest")
frames = model.predict([{"image": "hero.png", "driving": "dance.mp4"}], params={"seed": 1})[0]  # uint8 [F, H, W, 3]
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

from tcan.pipeline import TCANPipeline
from tcan.video import read_image, read_video


class AnimationModel:
    def __init__(self, folder: str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pipeline = TCANPipeline.from_pretrained(folder, device=device)

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any]) -> list[np.ndarray]:
        """Per row with the paths `image` (a image) and `driving` (a video) the frames, uint8 RGB `[F, H, W, 3]`.

        params: seed, and those of `TCANPipeline.__call__` that the model was registered with: num_inference_steps,
        guidance_scale, start_from_reference, by default as `tcan animate` would have had them at its training.
        """
        options = dict(params)
        seed = options.pop("seed")
        results = []
        for row in model_input.to_dict("records"):
            image, (video, _) = read_image(row["image"]), read_video(row["driving"])
            generator = torch.Generator().manual_seed(seed)
            frames = self._pipeline(image, video, generator=generator, **options).frames
            results.append((np.asarray(frames) * 255).round().astype(np.uint8))
        return results


def _load_pyfunc(path: str) -> AnimationModel:
    """What MLflow calls, with the model folder."""
    return AnimationModel(path)
