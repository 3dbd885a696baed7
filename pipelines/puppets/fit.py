"""Resumable training loop for the mini weights: Muon and AdamW, with EMA.

It uses plain PyTorch, because it produces only the pretrained models of the preset. `pipelines.train` trains TCAN.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tcan.atomic_write import atomic_write

EMA_DECAY = 0.995
SAVE_EVERY = 100  # steps


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices with the Newton-Schulz iterations of Muon (Jordan et al., 2024).

    Args:
        matrices: `[N, rows, columns]`.
    """
    # Coefficients of Muon's quintic polynomial: fast, inexact convergence of the singular values.
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum SGD with orthogonalized updates (Muon), for weights of two or more dimensions.

    `torch.optim.Muon` accepts only two-dimensional weights. Here, convolutions are reshaped to `[out, in * kh * kw]`.
    Weights of equal shape are orthogonalized in one batch, which reduces the cost on a CPU.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            updates: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(buffer, group["momentum"]).flatten(1)
                updates.setdefault((nesterov.shape[0], nesterov.shape[1]), []).append((parameter, nesterov))
            for (rows, columns), pairs in updates.items():
                directions = orthogonalize(torch.stack([update for _, update in pairs]))
                # 0.2 sqrt(max) matches the update size of AdamW, so both use one learning rate (Moonlight, 2025).
                scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for (parameter, _), direction in zip(pairs, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction.view_as(parameter), alpha=-scale)


def learning_rate_factor(step: int, steps: int, warm_up: int = 30) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last 60 % of the steps."""
    return min((step + 1) / warm_up, 1.0, (steps - step) / (0.6 * steps))


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    work: Path,
    evaluate: Callable[[int, nn.Module], str] | None = None,
) -> nn.Module:
    """Train the parameters of `module` that require gradients, and return the EMA module.

    The loss must depend on the step only, so that an interrupted run resumes with identical results.

    Args:
        name: name of the part. The run resumes from the checkpoint `work/name.pt` if it exists.
        loss_at: step -> scalar loss of `module` on the batch of that step.
        steps: number of optimizer steps.
        lr: peak learning rate of both optimizers.
        work: folder of the checkpoint.
        evaluate: (step, EMA module) -> text to print after every checkpoint, such as metrics.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    optimizers = [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(vectors, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    average = copy.deepcopy(module).requires_grad_(False).eval()
    averaged = [
        (a, p) for (a, p) in zip(average.parameters(), module.parameters(), strict=True) if p.requires_grad
    ]
    start = 0
    checkpoint = work / f"{name}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved["step"]
        for tensor, value in zip(trained, saved["trained"], strict=True):
            tensor.data.copy_(value)
        for (tensor, _), value in zip(averaged, saved["average"], strict=True):
            tensor.data.copy_(value)
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        print(f"{name}: resumes from step {start} of {steps}", flush=True)

    start_time, total = time.time(), 0.0
    for step in range(start, steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_factor(step, steps)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, parameter in averaged:
                mean.lerp_(parameter, 1 - decay)
        total += loss.item()
        if (step + 1) % 25 == 0:
            step_time = (time.time() - start_time) / (step + 1 - start)
            print(f"{name}: step {step + 1}/{steps} loss {total / 25:.4f} {step_time:.2f} s/step", flush=True)
            total = 0.0
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                "step": step + 1,
                "trained": [p.data for p in trained],
                "average": [mean.data for mean, _ in averaged],
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            with atomic_write(checkpoint) as partial:
                torch.save(state, partial)
            if evaluate is not None:
                print(f"{name}: step {step + 1} {evaluate(step + 1, average)}", flush=True)
    return average
