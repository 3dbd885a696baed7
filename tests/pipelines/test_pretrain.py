"""Pretraining of the mini weights: resumable, and as long as requested."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.puppets import corpus, mini_diffusion, mini_pose, mini_vae, pretrain
from pipelines.puppets import fit as fit_module
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
    expected_steps: int | None = 7,
    nan_at: int | None = None,
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
        assert expected_steps in (None, batch["steps"])
        if step == nan_at:
            return (module(batch["x"]) * float("nan")).mean()
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
    monkeypatch.setattr(fit_module, "SAVE_SECONDS", 0)
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


def test_number_of_threads_that_prepare_batches_does_not_change_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    expected = train(tmp_path / "one")
    monkeypatch.setattr(fit_module, "PREFETCHED", {"cpu": 5})
    assert torch.equal(weights(train(tmp_path / "many")), weights(expected))


def test_checkpoints_are_at_least_a_minute_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(fit_module, "SAVE_EVERY", 2)
    now = 0.0

    def evaluate(step: int, average: nn.Module) -> str:
        return f"metric {step}"

    def time() -> float:  # called once at the start, after steps 2, 4 and 6, and after a checkpoint
        nonlocal now
        now += 25
        return now

    monkeypatch.setattr(fit_module.time, "time", time)
    train(tmp_path, evaluate=evaluate)
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["6", "7"]


def test_checkpoint_remains_if_the_loss_is_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "SAVE_EVERY", 2)
    monkeypatch.setattr(fit_module, "SAVE_SECONDS", 0)
    with pytest.raises(
        UserError,
        match=r"part: step 6: the loss is nan; rerun .* resume from .*/part\.pt, on a GPU with --device cpu",
    ):
        train(tmp_path, nan_at=5)
    assert torch.load(tmp_path / "part.pt", weights_only=True)["step"] == 4


def test_training_improves_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(tmp_path, steps=200, expected_steps=200)
    losses = [float(line.split()[4]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 8 and losses[-1] < 0.2 * losses[0]


def test_duration_sets_the_number_of_steps_and_the_measurement_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, measured = tmp_path / "a", tmp_path / "b"
    one.mkdir()
    measured.mkdir()
    lines: list[str] = []
    short = train(
        measured, setting=Setting(minutes=1e-9, log=lines.append), expected_steps=None
    )  # at least one step
    assert torch.equal(weights(short), weights(train(one, steps=1, expected_steps=1)))
    assert lines[0].startswith("part: 1 steps of ")

    for threads in (1, 3):  # 0.5 s per step, after the first step of each thread
        monkeypatch.setattr(fit_module, "PREFETCHED", {"cpu": threads})
        times = iter([0.0, 100.0, 100.0 + 8 * threads * 0.5, *[200.0] * 9])
        monkeypatch.setattr(fit_module.time, "time", lambda times=times: next(times))
        work = tmp_path / str(threads)
        work.mkdir()
        train(work, setting=Setting(minutes=0.1, log=lines.append), expected_steps=None)
        assert torch.load(work / "part.pt", weights_only=True)["steps"] == 12


def test_other_batch_size_than_that_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(UserError, match="was written with --batch 1, not 2; set the same value"):
        train(tmp_path, setting=Setting(batch=2))


def test_work_folder_with_a_corpus_of_another_size_is_refused(tmp_path: Path) -> None:
    np.testing.assert_array_equal(
        corpus.image_corpus(tmp_path, 2).frames, corpus.image_corpus(tmp_path, 2).frames
    )
    with pytest.raises(UserError, match="contains 2 images, not 3; set the same number"):
        corpus.image_corpus(tmp_path, 3)


def test_corpus_smaller_than_a_batch_is_refused_before_rendering(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--characters 60: a step of --batch 2 has 64; set --characters to"):
        pretrain.pretrain(tmp_path / "out", tmp_path / "work", Setting(batch=2), characters=60)
    with pytest.raises(UserError, match="--clips 5: a step of --batch 2 has 6; set --clips to"):
        pretrain.pretrain(tmp_path / "out", tmp_path / "work", Setting(batch=2), clips=5)
    assert not list(tmp_path.iterdir())


def test_command_names_a_user_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["pretrain", "--out", str(tmp_path), "--work", str(tmp_path)]
    for more in (["--clips", "2"], ["--device", "cuda"]):
        monkeypatch.setattr("sys.argv", [*arguments, *more])
        with pytest.raises(SystemExit) as raised:
            pretrain.main()
        error = capsys.readouterr().err.splitlines()[-1]
        assert raised.value.code == 2 and " ".join(more) in error, error


def test_interrupted_encoding_leaves_no_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, frames = mini_vae.new_vae().eval(), np.zeros((2, 16, 16, 3), np.uint8)

    def interrupted(tensor: Tensor, path: Path) -> None:
        Path(path).write_bytes(b"a part")
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(Interrupted):
            mini_vae.encode(vae, frames, tmp_path / "latents.pt")
    assert not list(tmp_path.iterdir())
    assert mini_vae.encode(vae, frames, tmp_path / "latents.pt").shape == (2, 16, 2, 2)


def test_batch_without_pose_images_is_otherwise_the_same() -> None:
    rendered = corpus.render(range(mini_diffusion.IMAGES), 2, 17)
    samples = mini_diffusion.Samples(rendered, torch.zeros(mini_diffusion.IMAGES, 2, 16, 2, 2))
    drawn, plain = (samples.images_at(3, 4, drawn=drawn) for drawn in (True, False))
    assert drawn.pop("pose").amax() > 0
    assert drawn.keys() == plain.keys()
    assert all(torch.equal(torch.as_tensor(drawn[key]), torch.as_tensor(plain[key])) for key in plain)


@pytest.mark.slow
def test_all_parts_are_the_same_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in (
        (mini_vae, "STEPS", 3), (mini_pose, "STEPS", 2), (mini_vae, "HELD_OUT_CHARACTERS", 1),
        (mini_pose, "HELD_OUT_CHARACTERS", 1), (mini_diffusion, "IMAGES", 4), (mini_diffusion, "CLIPS", 2),
        (mini_diffusion, "STEPS", {"unet": 3, "controlnet": 2, "motion": 2}), (fit_module, "SAVE_EVERY", 1),
        (fit_module, "SAVE_SECONDS", 0),
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
