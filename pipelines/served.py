"""A model of MLflow's registry as `mlflow.pyfunc` loads it: files in, frames out.

model = mlflow.pyfunc.load_model("models:/tcan@latest")
frames = model.predict([{"image": "hero.png", "driving": "dance.mp4"}])[0]  # uint8 [F, H, W, 3]
"""

from typing import Any

import numpy as np
import pandas as pd

from tcan.pipeline import TCANPipeline
from tcan.video import read_picture, read_video


class ServedModel:
    def __init__(self, folder: str):
        self._pipeline = TCANPipeline.from_pretrained(folder)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[np.ndarray]:
        """Per row with the paths `image` (a picture) and `driving` (a video) the frames, uint8 RGB `[F, H, W, 3]`.

        params: of `TCANPipeline.__call__`, such as num_inference_steps.
        """
        rows = model_input.to_dict("records") if isinstance(model_input, pd.DataFrame) else model_input
        results = []
        for row in rows:
            frames = self._pipeline(
                read_picture(row["image"]), read_video(row["driving"])[0], **(params or {})
            ).frames
            results.append((np.asarray(frames) * 255).round().astype(np.uint8))
        return results


def _load_pyfunc(path: str) -> ServedModel:
    """What MLflow calls, with the model folder."""
    return ServedModel(path)
