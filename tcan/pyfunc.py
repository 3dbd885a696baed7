"""The loader of models in the MLflow registry, for `mlflow.pyfunc`. A registered model contains a copy of the package `tcan`, so
that it can be used where TCAN Studio is not installed.

model = mlflow.pyfunc.load_model("models:/tcan@latest")
frames = model.predict([{"image": "hero.png", "driving": "dance.mp4"}], params={"seed": 1})[0]  # uint8 [F, H, W, 3]
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tcan.pipeline import TCANPipeline
from tcan.pixels import to_uint8
from tcan.video import read_image, read_video

if TYPE_CHECKING:
    import pandas as pd  # a dependency of MLflow


class AnimationModel:
    def __init__(self, folder: str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pipeline = TCANPipeline.from_pretrained(folder, device=device)

    def predict(self, model_input: "pd.DataFrame", params: dict[str, Any]) -> list[np.ndarray]:
        """Animate each row: paths `image` and `driving` (a video) -> frames, uint8 RGB `[F, H, W, 3]`.

        params: `seed`, `retarget` and fields of `tcan.sampling.SamplingConfig`. MLflow adds the defaults of the model's signature,
        which are the values of `tcan animate` at the time of training.
        """
        overrides = dict(params)
        seed = overrides.pop("seed")
        results = []
        for row in model_input.to_dict("records"):
            image, (video, _) = read_image(row["image"]), read_video(row["driving"])
            generator = torch.Generator().manual_seed(seed)
            frames = self._pipeline(image, video, generator=generator, **overrides).frames
            results.append(to_uint8(np.asarray(frames)))
        return results


def _load_pyfunc(path: str) -> AnimationModel:
    """Entry point of MLflow; `path` is the model folder."""
    return AnimationModel(path)
