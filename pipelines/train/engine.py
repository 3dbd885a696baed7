"""The DeepSpeed engine around TCAN, and the fp32 state of its trained parameters, whatever the ZeRO stage.

DeepSpeed's universal checkpoint supports only ZeRO 1 to 3, needs a conversion pass, and stores several files per
parameter, thousands of small ones. These checkpoints consist of the local shards of each worker, with their offset in the
parameter: no worker waits for another, and any number of workers and any ZeRO stage can load them.
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

WEIGHT, MOMENTS, EMA = "weight", ("exp_avg", "exp_avg_sq"), "ema"


class AdamW(torch.optim.AdamW):
    """AdamW with an exponential moving average (EMA) of the weights, and with steps that can be skipped.

    The EMA is optimizer state, so DeepSpeed shards and offloads it and keeps it in fp32 like the moments.
    """

    def __init__(self, params: Any, ema_decay: float, **options: Any):
        super().__init__(params, fused=True, **options)
        self.ema_decay = ema_decay
        self.skip = False
        """While True, `step` changes nothing."""
        self.found_inf: Tensor | None = None
        """float32 scalar on the parameters' device: if it is 1, `step` changes nothing. torch's fused AdamW reads it on the
        device, so a step can be skipped without a host synchronization."""

    @property
    def state_keys(self) -> tuple[str, ...]:
        return (*MOMENTS, EMA) if self.ema_decay else MOMENTS

    @torch.no_grad()
    def init_state(self, weights: list[Tensor]) -> None:
        """Create the state of all weights, which torch creates in the first step, so that a checkpoint can be loaded."""
        for weight in weights:
            self.state[weight] = {"step": torch.zeros((), device=weight.device)} | {
                key: weight.detach().clone() if key == EMA else torch.zeros_like(weight)
                for key in self.state_keys
            }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.skip:
            return
        super().step(closure)
        if self.ema_decay:
            for group in self.param_groups:
                for weight in group["params"]:
                    state = self.state[weight]
                    steps = state["step"]  # on the device, without a synchronization
                    # A short average at first, so that the initial weights do not dominate it.
                    decay = ((1 + steps) / (10 + steps)).clamp(max=self.ema_decay)
                    change = 1 - decay if self.found_inf is None else (1 - decay) * (1 - self.found_inf)
                    state[EMA].lerp_(weight, change)


def create_engine(
    model: nn.Module, config: TrainConfig, stage: StageConfig, workers: int, given: Mapping[str, Any]
) -> Any:
    """A DeepSpeed engine around the model; the optimizer contains only the parameters that require gradients.

    given: the user's DeepSpeed settings (`read_settings`). Called by all workers.
    """
    import deepspeed  # here, because the import looks for an accelerator

    # Otherwise it probes compilers, and on a CPU compiles an all-reduce for inference: a minute for an unused operation.
    deepspeed.ops.__compatible_ops__ = {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(
        trained, config.ema_decay, lr=stage.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
    )
    optimizer.skip = True  # some of DeepSpeed's wrappers run a first step with zero gradients
    settings = deepspeed_settings(config, stage, workers, given)
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns that this optimizer is untested
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    optimizer.skip = False
    optimizer.state.clear()
    if config.zero_stage == 3:
        optimizer.init_state(engine.optimizer.fp32_partitioned_groups_flat)
    else:
        optimizer.init_state([weight for group in optimizer.param_groups for weight in group["params"]])
    if link_state := getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None):
        link_state()  # DeepSpeed does this itself only after the first step
    return engine


def optimizer_step(engine: Any, bad: Tensor) -> Tensor:
    """The optimizer step after the last backward pass. Called by all workers.

    bad: bool scalar on the device of the parameters; if True, the step changes nothing.

    Returns:
        the norm of the gradient over all workers, a scalar on the device. If it is NaN or inf, the step has changed nothing.
    """
    norm = None
    if engine.optimizer is engine.basic_optimizer:
        # ZeRO-0 in fp32: DeepSpeed neither returns nor checks the norm.
        gradients = [p.grad for _, p in trained_parameters(engine) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bad = bad | ~norm.isfinite()
    engine.basic_optimizer.found_inf = bad.float()
    engine.step()  # skips the step if the norm that it computes is NaN or inf
    if norm is None:
        norm = torch.as_tensor(engine.get_global_grad_norm(), device=bad.device)
    return norm


# --- settings --------------------------------------------------------------------------------------------------------


def read_settings(path: str | None) -> dict[str, Any]:
    """The user's DeepSpeed JSON; {} without one.

    Raises:
        UserError: the file cannot be read, or is no JSON object.
    """
    if path is None:
        return {}
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"train.deepspeed = {path}: cannot be read ({error}); pass a DeepSpeed JSON file"
        ) from None
    if not isinstance(given, dict):
        raise UserError(f"train.deepspeed = {path}: not a JSON object; pass a DeepSpeed configuration")
    return given


def deepspeed_settings(
    config: TrainConfig, stage: StageConfig, workers: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings of the configuration merged with the user's, which may add keys and say "auto" but not contradict.

    Raises:
        UserError: the contradictions and the keys to change instead.
    """
    assert stage.micro_batch != "auto"
    ours = {
        "train_batch_size": stage.batch_size,
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": stage.batch_size // (stage.micro_batch * workers),
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": config.zero_stage},
    }
    set_by = {
        "train_batch_size": "train.stageN.batch_size",
        "train_micro_batch_size_per_gpu": "train.stageN.micro_batch",
        "gradient_accumulation_steps": "train.stageN.batch_size, micro_batch and train.workers",
        "gradient_clipping": "train.max_grad_norm",
        "bf16.enabled": "train.precision",
        "data_types.grad_accum_dtype": "train.precision",
        "fp16.enabled": "train.precision (fp32 or bf16)",
        "zero_optimization.stage": "train.zero_stage",
    }
    conflicts = [
        f"{key} (set train.stageN.lr, warmup_steps and train.weight_decay)"
        for key in ("optimizer", "scheduler")
        if key in given
    ]
    if config.precision == "bf16" and config.zero_stage >= 2:
        # By default DeepSpeed sums the gradients of accumulation steps in bf16, whose rounding loses small ones. ZeRO 0
        # does not support another type, and ZeRO 1 then replaces its optimizer by one without partitioned updates.
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    merged = _merge(ours, given, "", conflicts, set_by)
    if conflicts:
        raise UserError(
            f"train.deepspeed = {config.deepspeed} contradicts the configuration: {'; '.join(conflicts)}; "
            "change the configuration, or remove these keys from the JSON"
        )
    if not config.gpus_per_worker:
        # The contiguous buffer prevents fragmentation of GPU memory, but costs a copy of all gradients.
        zero = merged["zero_optimization"]
        merged["zero_optimization"] = {"contiguous_gradients": zero["stage"] == 3} | zero
    else:
        # Reduce gradients on a side stream while the backward pass continues; DeepSpeed's default is only ZeRO 3.
        merged["zero_optimization"] = {"overlap_comm": True} | merged["zero_optimization"]
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
    set_by: Mapping[str, str],
) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in given.items():
        if isinstance(ours.get(key), Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(ours[key], value, f"{prefix}{key}.", conflicts, set_by)
        elif key not in ours:
            merged[key] = value
        elif value not in ("auto", ours[key]):
            conflicts.append(
                f"{prefix}{key} is {value}, not {ours[key]} (set {set_by.get(prefix + key, key)})"
            )
    return merged


# --- trained parameters, in fp32 ----------------------------------------------------------------------------------------


def trained_parameters(engine: Any) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that the stage trains, in the same order on every worker."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def state_keys(engine: Any) -> tuple[str, ...]:
    """Keys of the state of a trained parameter: the weight, the optimizer's moments, and the EMA if enabled."""
    return (WEIGHT, *engine.basic_optimizer.state_keys)


def local_shard(engine: Any, parameter: nn.Parameter, key: str) -> tuple[int, Tensor]:
    """This worker's shard of the fp32 weight or of an optimizer state: its offset in the flat parameter, and the flat
    shard. The shards of all workers together are the parameter, without overlap.
    """
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    rank, workers = dist.get_rank(), dist.get_world_size()
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal shards, the last ones padded
        start = min(rank * parameter.ds_tensor.numel(), parameter.ds_numel)
        shard = (
            safe_get_local_fp32_param(parameter)
            if key == WEIGHT
            else safe_get_local_optimizer_state(parameter, key)
        )
        return start, shard.detach().flatten()[: parameter.ds_numel - start]
    if hasattr(
        parameter, "_hp_mapping"
    ):  # ZeRO-1 and 2: split at any offset; no mapping on the other workers
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, torch.empty(0)
        shard = mapping.get_hp_fragment(None if key == WEIGHT else key)
        return mapping.lp_fragment_address.start, shard.detach()
    full = get_state(engine, parameter, key).flatten()  # ZeRO-0: replicated on all workers
    start, end = (full.numel() * part // workers for part in (rank, rank + 1))
    return start, full[start:end]


def get_state(engine: Any, parameter: nn.Parameter, key: str) -> Tensor:
    """The fp32 weight or an optimizer state, in the parameter's shape. Called by all workers."""
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
    """Set the fp32 weight or an optimizer state from a tensor of any shape; then call `copy_to_module`."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    value = value.to(engine.device, torch.float32)
    if hasattr(
        parameter, "ds_id"
    ):  # ZeRO-3; DeepSpeed's setter for full tensors fails if the last shard is padded
        size = parameter.ds_tensor.numel()
        flat = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        shard = flat.narrow(0, size * dist.get_rank(), size)
        if key == WEIGHT:
            safe_set_local_fp32_param(parameter, shard)
        else:
            safe_set_local_optimizer_state(parameter, shard, key)
    elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
        if key == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
    else:
        get_state(engine, parameter, key).copy_(value.view_as(parameter))


def optimizer_steps(engine: Any) -> int:
    """Number of steps of the optimizer, without skipped steps."""
    return int(next(iter(engine.basic_optimizer.state.values()))["step"])


def set_optimizer_steps(engine: Any, steps: int) -> None:
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(steps)


@torch.no_grad()
def copy_to_module(engine: Any, key: str = WEIGHT) -> None:
    """Copy the optimizer's fp32 weights (or the EMA) to the module, in the module's precision."""
    import deepspeed

    for _, parameter in trained_parameters(engine):
        value = get_state(engine, parameter, key)
        sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            if not sharded or dist.get_rank() == 0:
                parameter.copy_(value)


@contextmanager
def ema_weights(engine: Any) -> Iterator[None]:
    """Context in which the module has the EMA weights, if EMA is enabled. Called by all workers."""
    if EMA not in state_keys(engine):
        yield
        return
    # With ZeRO-0 in fp32 the module's weights are the optimizer's: there is no other copy to restore them from.
    shared = [p for _, p in trained_parameters(engine) if not _is_sharded(p) and _master(engine, p) is p]
    weights = [p.detach().clone() for p in shared]
    copy_to_module(engine, EMA)
    yield
    with torch.no_grad():
        for parameter, weight in zip(shared, weights, strict=True):
            parameter.copy_(weight)
    copy_to_module(engine)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """ZeRO-0: the fp32 master of a bf16 weight, else the weight itself."""
    if parameter.dtype == torch.float32:
        return parameter
    for low, full in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        for a, b in zip(low, full, strict=True):
            if a is parameter:
                return b
    raise KeyError("the optimizer has no such parameter")
