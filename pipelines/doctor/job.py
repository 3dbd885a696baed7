"""`tcan doctor`: check the machine, load every network, and prove with numbers that they are the right ones.

tcan doctor
tcan doctor --config sd15 --pretrained.unet model.safetensors
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ray
import torch

from pipelines.config import Config
from pipelines.doctor import animation, denoising, environment, motion, networks, pose, training, vae
from pipelines.doctor.finding import Finding
from pipelines.doctor.report import line, summary, write_report
from pipelines.doctor.sample import PUPPET_SIZE, make_sample
from pipelines.doctor.subject import Subject
from pipelines.inference import create_folder
from pipelines.user_message import user_message
from tcan.errors import first_line
from tcan.weights import MINI_MODEL

Run = Callable[[Subject], Finding]


@dataclasses.dataclass(frozen=True)
class Check:
    """A check, and the networks without which it cannot run."""

    name: str
    run: Run
    parts: Sequence[str] = ()


MACHINE = (
    Check("python", environment.python),
    Check("gpu", environment.gpu),
    Check("memory", environment.memory),
    Check("disk", environment.disk),
    Check("shared memory", environment.shared_memory),
    Check("decoders", environment.decoders),
    Check("deepspeed", environment.deepspeed),
)
SERVICES = (Check("ray", environment.ray), Check("tracking", environment.tracking))
LOADING = (
    *(Check(f"load {part}", networks.loading(part)) for part in networks.PARTS),
    Check("compatibility", networks.compatibility),
)
PROOFS = (
    Check("vae", vae.reconstruction, ("vae",)),
    Check("unet", denoising.noise_prediction, denoising.PARTS),
    Check("scaling factor", denoising.scaling_factor, denoising.PARTS),
    Check("text_encoder", denoising.empty_prompt, denoising.PARTS),
    Check("controlnet", denoising.pose_control, (*denoising.PARTS, "controlnet")),
    Check("pose", pose.joints, ("pose",)),
    Check("motion_adapter", motion.agreement, motion.PARTS),
    Check("training, stage 1", training.stage1, training.PARTS),
    Check("training, stage 2", training.stage2, training.PARTS),
    Check("animation", animation.short_video, animation.PARTS),
)


def doctor(config: Config, model: str | None, out: Path) -> int:
    """Run all checks, print each finding, and write the report. Returns the exit status: 1 if a check failed, else 0.

    Args:
        model: trained model of the animation, in the forms of `--model`; None: that of the package for the mini networks,
            else the untrained networks.

    Raises:
        UserError: `out` cannot be created.
    """
    create_folder(out)
    if model is None and set(vars(config.pretrained).values()) == {"mini"}:
        model = str(MINI_MODEL)
    findings = []
    for finding in _findings(config, model):
        findings.append(finding)
        print(line(finding), flush=True)
    path = write_report(findings, config, make_sample(config.size).name, out)
    print(f"\n{summary(findings)}\n\nreport: {path}", flush=True)
    return int(any(finding.status == "failed" for finding in findings))


def _findings(config: Config, model: str | None) -> Iterator[Finding]:
    """Findings of the services, from this process; of the others, from a GPU of the cluster if only that has one."""
    from pipelines.cluster import disconnect, is_local

    yield from examine(make_subject(config, model), SERVICES)
    if is_local() or not ray.is_initialized():
        disconnect()  # the memory that Ray occupies is needed by the other checks
    elif not torch.cuda.is_available() and ray.cluster_resources().get("GPU"):
        yield from examine_on_cluster(config, model, (*MACHINE, *LOADING, *PROOFS), num_gpus=1)
        return
    yield from examine(make_subject(config, model), (*MACHINE, *LOADING, *PROOFS))


def examine_on_cluster(
    config: Config, model: str | None, checks: Sequence[Check], num_gpus: int
) -> Iterator[Finding]:
    """Like `examine`, in a task on a node with this number of free GPUs. Findings arrive one by one."""

    def task() -> Iterator[Finding]:
        yield from examine(make_subject(config, model), checks)

    remote = ray.remote(num_gpus=num_gpus, num_returns="streaming", max_retries=0)(task)
    for reference in remote.remote():
        yield ray.get(reference)


def make_subject(config: Config, model: str | None) -> Subject:
    """The subject before its networks are loaded. Without a GPU, its device is the CPU, whatever the configuration."""
    wanted = config.animate.device
    if not torch.cuda.is_available():
        wanted = "cpu"
    elif wanted == "auto":
        wanted = "cuda"
    return Subject(config, torch.device(wanted), make_sample(config.size), model)


def examine(subject: Subject, checks: Sequence[Check]) -> Iterator[Finding]:
    """Run checks one after another; an error of a check is its finding, and never ends the others."""
    for check in checks:
        if reason := _blocker(subject, check):
            yield Finding(check.name, "failed", f"not run: {reason[0]}", advice=reason[1])
            continue
        began = time.monotonic()
        try:
            finding = check.run(subject)
        except Exception as error:
            finding = _failure(check.name, error)
        yield dataclasses.replace(finding, seconds=time.monotonic() - began)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _blocker(subject: Subject, check: Check) -> tuple[str, str] | None:
    """Why a check cannot run, and what to do; None if it can."""
    if missing := [part for part in check.parts if part not in subject.networks]:
        return f"{', '.join(missing)} not loaded", f"fix {', '.join(f'load {part}' for part in missing)}"
    if check.parts and subject.config.size >= PUPPET_SIZE and subject.device.type == "cpu":
        if subject.config.animate.device == "cpu":
            return None
        return (
            "no GPU",
            "use a machine with a GPU, or pass --animate.device cpu to run it on the CPU, which takes hours",
        )
    return None


def _failure(name: str, error: Exception) -> Finding:
    if isinstance(error, torch.OutOfMemoryError):
        return Finding(
            name, "failed", "out of GPU memory", advice="stop other programs on the GPU; see tcan memory"
        )
    message = user_message(error)
    if message is None:
        return Finding(name, "failed", f"{type(error).__name__}: {first_line(error)}"[:300])
    found, separator, advice = message.rpartition("; ")
    return Finding(name, "failed", found if separator else message, advice=advice if separator else "")
