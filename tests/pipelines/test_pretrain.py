"""Pretraining of the mini weights: resumable, and as long as requested."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.puppets import fit as fit_module
from pipelines.puppets import mini_diffusion, mini_pose, mini_vae, pretrain
from pipelines.puppets.fit import RECIPE, Batch, Setting, fit
from tcan.errors import UserError


class Interrupted(Exception):
    pass


def train(
    work: Path,
    steps: int = 7,
    setting: Setting = RECIPE,
    stop_at: int | None = None,
    evaluate: Callable | None = None,
) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))

    def batch_at(step: int) -> Batch:
        return {
            "x": torch.randn(16, 4, generator=torch.Generator().manual_seed(step)),
            "name": "not a tensor",
        }

    def loss_of(step: int, batch: Batch) -> Tensor:
        if step == stop_at:
            raise Interrupted
        assert batch["name"] == "not a tensor"
        return (module(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()

    return fit(
        "part", module, batch_at, loss_of, steps=steps, lr=0.01, work=work, setting=setting, evaluate=evaluate
    )


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in module.parameters()])


def test_interrupted_training_resumes_with_identical_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(fit_module, "SAVE_EVERY", 2)
    work, other = tmp_path / "a", tmp_path / "b"
    work.mkdir()
    other.mkdir()
    complete = train(work, evaluate=lambda step, average: f"metric {step}")
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["2", "4", "6", "7"]
    with pytest.raises(Interrupted):
        train(other, stop_at=5)
    resumed = train(other, steps=999)  # the number of steps is that of the start
    assert "part: resumes from step 4 of 7" in capsys.readouterr().out
    assert torch.equal(weights(resumed), weights(complete))
    assert torch.equal(weights(train(other)), weights(complete))  # finished: loaded


def test_training_improves_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(tmp_path, steps=200)
    losses = [float(line.split()[4]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 8 and losses[-1] < 0.2 * losses[0]


def test_duration_sets_the_number_of_steps_and_the_measurement_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, measured = tmp_path / "a", tmp_path / "b"
    one.mkdir()
    measured.mkdir()
    lines: list[str] = []
    short = train(measured, setting=Setting(minutes=1e-9, log=lines.append))  # at least one step
    assert torch.equal(weights(short), weights(train(one, steps=1)))
    assert lines[0].startswith("part: 1 steps of ")

    times = iter([0.0, 100.0, 100.0 + 8 * 0.5, *[200.0] * 9])  # 0.5 s per step, after the first one
    monkeypatch.setattr(fit_module.time, "time", lambda: next(times))
    (tmp_path / "c").mkdir()
    train(tmp_path / "c", setting=Setting(minutes=0.1, log=lines.append))
    assert torch.load(tmp_path / "c" / "part.pt", weights_only=True)["steps"] == 12


def test_other_batch_size_than_that_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(UserError, match="was written with --batch 1, not 2; set the same value"):
        train(tmp_path, setting=Setting(batch=2))


@pytest.mark.slow
def test_all_parts_are_the_same_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in (
        (mini_vae, "STEPS", 3), (mini_pose, "STEPS", 2), (mini_vae, "HELD_OUT_CHARACTERS", 1),
        (mini_pose, "HELD_OUT_CHARACTERS", 1), (mini_diffusion, "IMAGES", 4), (mini_diffusion, "CLIPS", 2),
        (mini_diffusion, "STEPS", {"unet": 3, "controlnet": 2, "motion": 2}), (fit_module, "SAVE_EVERY", 1),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    lines: list[str] = []
    setting = Setting(batch=2, log=lines.append)

    def run(name: str) -> None:
        pretrain.pretrain(tmp_path / name, tmp_path / f"{name}-work", setting, characters=60, clips=4)

    run("complete")
    noise_loss, calls = mini_diffusion.noise_loss, 0

    def interrupted(*arguments: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:  # in the UNet
            raise Interrupted
        return noise_loss(*arguments)

    monkeypatch.setattr(mini_diffusion, "noise_loss", interrupted)
    with pytest.raises(Interrupted):
        run("interrupted")
    monkeypatch.setattr(mini_diffusion, "noise_loss", noise_loss)
    run("interrupted")
    assert "unet: resumes from step 2 of 3" in lines
    for part in ("vae", "pose", "unet", "controlnet", "motion_adapter"):
        (file,) = (tmp_path / "complete" / part).glob("*.safetensors")
        expected, actual = load_file(file), load_file(tmp_path / "interrupted" / part / file.name)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
