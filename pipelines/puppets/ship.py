"""Copy a trained mini model into the package, in fp16: the model of `tcan animate` without `--model`.

python -m pipelines.puppets.ship demo/run/model tcan/mini/trained
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tcan.atomic_write import atomic_write
from tcan.weights import MODEL_FILE, read_model_info


def ship(model: Path, out: Path) -> None:
    """Write the trained weights of a model folder as fp16; ids of MLflow runs, which exist on one machine, are dropped.

    Raises:
        UserError: `model` is not a model folder.
    """
    info = {key: value for key, value in read_model_info(model).items() if not key.startswith("mlflow")}
    with atomic_write(out) as partial:
        for file in sorted(model.glob("*/*")):
            target = partial / file.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                weights = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
                with safe_open(file, "pt") as opened:
                    save_file(weights, target, opened.metadata())  # the LoRA's rank and alpha
            else:
                shutil.copy(file, target)
        (partial / MODEL_FILE).write_text(json.dumps(info, indent=2) + "\n")


if __name__ == "__main__":
    ship(Path(sys.argv[1]), Path(sys.argv[2]))
