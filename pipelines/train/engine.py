"""The DeepSpeed engine around TCAN, and what it trains in fp32, by parameter, whatever ZeRO stage shards it.

DeepSpeed's universal checkpoint is for ZeRO 1 to 3 only, is made from a checkpoint in a pass of its own, and leaves some
files for every parameter: thousands of small ones. Ours is made of the pieces that each worker holds anyway, with where
in its parameter each belongs: no worker waits for another, and any number of workers and any ZeRO stage can read it.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.config import StageConfig, TrainConfig
from tcan.errors import UserError

WEIGHT, MOMENTS, AVERAGE = "weight", ("exp_avg", "exp_avg_sq"), "ema"


class AdamW(torch.optim.AdamW):
    """AdamW that also keeps an average of the weights, and can leave a step out.

    As a state of the optimizer the average is sharded, offloaded and kept in fp32 by DeepSpeed like the moments.
    """

    def __init__(self, params: Any, ema_decay: float, **options: Any):
        super().__init__(params, fused=True, **options)
        self.ema_decay = ema_decay
        self.leave_out = False
        """While True, `step` changes nothing."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*MOMENTS, AVERAGE) if self.ema_decay else MOMENTS

    @torch.no_grad()
    def start(self, weights: list[Tensor]) -> None:
        """Makes the state of all weights at once: else each comes with its first step, and nothing can be loaded before."""
        for weight in weights:
            self.state[weight] = {"step": torch.zeros((), device=weight.device)} | {
                key: weight.detach().clone() if key == AVERAGE else torch.zeros_like(weight)
                for key in self.keys
            }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.leave_out:
            return
        super().step(closure)
        if self.ema_decay:
            for group in self.param_groups:
                for weight in group["params"]:
                    state = self.state[weight]
                    steps = state["step"]  # on the device: no step waits for it
                    # Short at first, so that the start's weights don't stay in it.
                    decay = ((1 + steps) / (10 + steps)).clamp(max=self.ema_decay)
                    state[AVERAGE].lerp_(weight, 1 - decay)


def make_engine(
    model: nn.Module, config: TrainConfig, stage: StageConfig, workers: int, given: Mapping[str, Any]
) -> Any:
    """A DeepSpeed engine around the model; the optimizer knows only what requires gradients.

    given: what `read_settings` returned. Called by all workers.
    """
    import deepspeed  # here, since it looks for its accelerator when imported

    # Else it probes compilers, and on a CPU compiles an all-reduce for inference: a minute for what training never uses.
    deepspeed.ops.__compatible_ops__ = {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(
        trained, config.ema_decay, lr=stage.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
    )
    optimizer.leave_out = True  # some of DeepSpeed's wrappers take a first step with gradients of zero
    settings = deepspeed_settings(config, stage, workers, given)
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns that it has not tested this optimizer
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    optimizer.leave_out = False
    optimizer.state.clear()
    if config.zero_stage == 3:
        optimizer.start(engine.optimizer.fp32_partitioned_groups_flat)
    else:
        optimizer.start([weight for group in optimizer.param_groups for weight in group["params"]])
    if link := getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None):
        link()  # what it does itself after the first step
    return engine


# --- settings --------------------------------------------------------------------------------------------------------


def read_settings(path: str | None) -> dict[str, Any]:
    """The user's DeepSpeed JSON; without one, {}. Raises UserError when it can't be read."""
    if path is None:
        return {}
    try:
        given = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"train.deepspeed = {path}: cannot be read ({error}); give a DeepSpeed JSON"
        ) from None
    if not isinstance(given, dict):
        raise UserError(f"train.deepspeed = {path}: must hold a DeepSpeed configuration, a JSON object")
    return given


def deepspeed_settings(
    config: TrainConfig, stage: StageConfig, workers: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Ours merged with the user's: theirs may add anything and say "auto", but not contradict.

    Raises UserError that names the contradictions.
    """
    ours = {
        "train_batch_size": stage.batch_size,
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": stage.batch_size // (stage.micro_batch * workers),
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": config.zero_stage},
    }
    mended_by = {
        "train_batch_size": "train.stageN.batch_size",
        "train_micro_batch_size_per_gpu": "train.stageN.micro_batch",
        "gradient_accumulation_steps": "train.stageN.batch_size, micro_batch and train.workers",
        "gradient_clipping": "train.clip_norm",
        "bf16.enabled": "train.precision",
        "fp16.enabled": "train.precision (fp32 or bf16)",
        "zero_optimization.stage": "train.zero_stage",
    }
    conflicts = [
        f"{key} (set train.stageN.lr, warmup_steps and train.weight_decay)"
        for key in ("optimizer", "scheduler")
        if key in given
    ]
    merged = _merge(ours, given, "", conflicts, mended_by)
    if conflicts:
        raise UserError(
            f"train.deepspeed = {config.deepspeed} contradicts the configuration: {'; '.join(conflicts)}; "
            "change that, or leave these keys out of the JSON"
        )
    if not config.gpus_per_worker:
        # A buffer against the fragmentation of a GPU's memory, through which all gradients are copied.
        zero = merged["zero_optimization"]
        merged["zero_optimization"] = {"contiguous_gradients": zero["stage"] == 3} | zero
    quiet = {
        "steps_per_print": 1 << 30,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return quiet | merged


def _merge(
    ours: Mapping[str, Any],
    given: Mapping[str, Any],
    prefix: str,
    conflicts: list[str],
    mended_by: Mapping[str, str],
) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in given.items():
        if isinstance(ours.get(key), Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(ours[key], value, f"{prefix}{key}.", conflicts, mended_by)
        elif key not in ours:
            merged[key] = value
        elif value not in ("auto", ours[key]):
            conflicts.append(
                f"{prefix}{key} is {value}, not {ours[key]} (set {mended_by.get(prefix + key, key)})"
            )
    return merged


# --- what is trained, in fp32 ----------------------------------------------------------------------------------------


def trained(engine: Any) -> list[tuple[str, nn.Parameter]]:
    """The names and parameters that the stage trains, in the same order on every worker."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def state_keys(engine: Any) -> tuple[str, ...]:
    """What is kept of each trained parameter: the weight, the optimizer's moments, the average if there is one."""
    return (WEIGHT, *engine.basic_optimizer.keys)


def own_piece(engine: Any, parameter: nn.Parameter, key: str) -> tuple[int, Tensor]:
    """What this worker holds of the fp32 weight, or of a state of the optimizer, and writes into a checkpoint: the place
    in the flat parameter at which it begins, and it, flat. The workers' pieces together are the parameter, once."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    rank, workers = dist.get_rank(), dist.get_world_size()
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal pieces, of which the last are padded
        start = min(rank * parameter.ds_tensor.numel(), parameter.ds_numel)
        piece = (
            safe_get_local_fp32_param(parameter)
            if key == WEIGHT
            else safe_get_local_optimizer_state(parameter, key)
        )
        return start, piece.detach().flatten()[: parameter.ds_numel - start]
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: cut somewhere, or with one worker alone
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, torch.empty(0)
        piece = mapping.get_hp_fragment(None if key == WEIGHT else key)
        return mapping.lp_fragment_address.start, piece.detach()
    whole = get_state(engine, parameter, key).flatten()  # ZeRO-0: all have all
    start, end = (whole.numel() * part // workers for part in (rank, rank + 1))
    return start, whole[start:end]


def get_state(engine: Any, parameter: nn.Parameter, key: str) -> Tensor:
    """The fp32 weight, or a state of the optimizer, in the parameter's shape. Called by all workers together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if _is_sharded(parameter):
        value = (
            safe_get_full_fp32_param(parameter)
            if key == WEIGHT
            else safe_get_full_optimizer_state(parameter, key)
        )
        return value.detach()
    master = _master(engine, parameter)
    return (master if key == WEIGHT else engine.basic_optimizer.state[master][key]).detach()


def set_state(engine: Any, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """The other way, from a tensor of any shape; the module's own weights follow with `refresh`."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    value = value.to(engine.device, torch.float32)
    if hasattr(parameter, "ds_id"):  # ZeRO-3; DeepSpeed's own way fails where the last share is padded
        size = parameter.ds_tensor.numel()
        flat = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        share = flat.narrow(0, size * dist.get_rank(), size)
        if key == WEIGHT:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, key)
    elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
        if key == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
    else:
        get_state(engine, parameter, key).copy_(value.view_as(parameter))


def optimizer_steps(engine: Any) -> int:
    """Steps that the optimizer has taken: fewer than there were, if some were left out."""
    return int(next(iter(engine.basic_optimizer.state.values()))["step"])


def set_optimizer_steps(engine: Any, steps: int) -> None:
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(steps)


@torch.no_grad()
def refresh(engine: Any, key: str = WEIGHT) -> None:
    """Makes the module's weights, in its own precision, those of the optimizer (or their average)."""
    import deepspeed

    for _, parameter in trained(engine):
        value = get_state(engine, parameter, key)
        sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            if not sharded or dist.get_rank() == 0:
                parameter.copy_(value)


@contextmanager
def averaged(engine: Any) -> Iterator[None]:
    """Within, the module's weights are their average, where one is kept. Called by all workers together."""
    if AVERAGE not in state_keys(engine):
        yield
        return
    # With ZeRO-0 in fp32 the module's weights are the optimizer's own: nothing else would remember them.
    own = [p for _, p in trained(engine) if not _is_sharded(p) and _master(engine, p) is p]
    weights = [p.detach().clone() for p in own]
    refresh(engine, AVERAGE)
    yield
    with torch.no_grad():
        for parameter, weight in zip(own, weights, strict=True):
            parameter.copy_(weight)
    refresh(engine)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """ZeRO-0: the fp32 weight behind a bf16 one, else the weight itself."""
    if parameter.dtype == torch.float32:
        return parameter
    for low, full in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        for a, b in zip(low, full, strict=True):
            if a is parameter:
                return b
    raise KeyError("the optimizer has no such parameter")
