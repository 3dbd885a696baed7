"""Command line: help, configuration sources, and one-line user errors."""

import errno
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from pipelines import cli
from pipelines.config import Config
from pipelines.config.parser import PRESETS, load_config
from pipelines.user_message import user_message
from tcan.errors import UserError
from tests.pipelines.faults import write_video


def tcan(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )


def keys(config: type, prefix: str = "") -> list[str]:
    names = []
    for item in fields(config):
        if is_dataclass(item.type):
            names += keys(item.type, f"{prefix}{item.name}.")
        else:
            names.append(f"{prefix}{item.name}")
    return names


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that fails; check the exit status 2 and the single line on stderr, and return its message."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.removesuffix("\n")
    assert "\n" not in line and line.startswith("tcan: error: ")
    return line.removeprefix("tcan: error: ")


HEAVY = "sorted({'torch', 'ray', 'mlflow', 'diffusers'} & set(sys.modules))"


def test_help_lists_every_command_without_heavy_imports() -> None:
    code = f"import sys; from pipelines import cli; cli.main(['--help']); print({HEAVY})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
    for command in [
        "preprocess",
        "dataset",
        "train",
        "animate",
        "pose",
        "evaluate",
        "export",
        "weights",
        "memory",
        "demo",
        "ui",
    ]:
        assert f"  {command} " in process.stdout


def test_configuration_modules_have_no_heavy_imports() -> None:
    code = f"import sys, pipelines.config, pipelines.config.parser; print({HEAVY})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_help_of_demo_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    words = text.split()
    for key in keys(Config):
        if key.startswith("study."):  # the only section that the demo does not use
            continue
        assert f"--{key}" in words, key
        explanation = text.partition(f"--{key} ")[2].partition("(type:")[0].split(maxsplit=1)
        assert len(explanation) == 2, f"{key} has no help text"


def test_help_hides_sections_that_the_command_does_not_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["animate", "--help"])
    text = capsys.readouterr().out
    sections = {section for section in cli.COMMANDS["animate"].sections if f"--{section}." in text}
    assert sections == {"pretrained", "draw", "animate", "tracking"}
    assert "--seed" in text and "--train." not in text and "--preprocess." not in text


def test_help_shows_values_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", "sd15", "--help"])
    assert "(type: int, default: 512)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_sets_its_yaml_values(preset: str) -> None:
    config = load_config("--config", preset)
    values = yaml.safe_load(PRESETS[preset].read_text())
    assert config.size == values["size"]
    assert config.train.stage1.steps == values["train"]["stage1"]["steps"]


def test_file_overrides_preset_and_command_line_overrides_both(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 7\ntrain: {max_failures: 5}\ntracking: {experiment: mine}\n")
    config = load_config("--train.max_failures", "9", "--config", "sd15", "--config", str(file))
    assert (config.size, config.seed, config.train.max_failures, config.tracking.experiment) == (
        512,
        7,
        9,
        "mine",
    )
    assert load_config("--config", str(file)).size == 128  # mini is the default preset


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {wrokers: 2}", "unknown key train.wrokers; did you mean train.workers?"),
        ("sede: 2", "unknown key sede; did you mean seed?"),
        ("seed: two", "seed: expected int, got two"),
        ("train.workers: 2", "train.workers: not a nested key; write train: {workers: ...}"),
        ("train: 5", "train = 5: not a section; write train: {KEY: VALUE}"),
        ("- seed", "no keys and values; write e.g. `seed: 1`"),
        ("seed: [", "invalid YAML: "),
        ("seed: 1\nsize: 64\nseed: 2", "invalid YAML: duplicate key seed: first in line 1, again in "),
        ("train:\n  workers: 1\n  workers: 1", "invalid YAML: duplicate key workers: first in line 2, again"),
    ],
)
def test_invalid_configuration_file_is_a_user_error(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    line = error_of(capsys, "ui", "--config", str(file))
    assert line.startswith(f"{file}: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian x", "unknown command trian; did you mean train?"),
        ("train d --out o --train.wrokers 2", "unknown key --train.wrokers; did you mean --train.workers?"),
        (
            "train d --out o --train.workers=many",
            "train.workers: expected int, got many; see tcan train --help",
        ),
        (
            "train d --out o --stage 3",
            "stage: expected Literal['1', '2', 'all'], got 3; see tcan train --help",
        ),
        ("train d", "missing --out; see tcan train --help"),
        ("pose dance.mp4", "missing --out; see tcan pose --help"),
        ("preprocess videos", "missing OUT; see tcan preprocess --help"),
        ("ui there", "unexpected argument there; see tcan ui --help"),
        ("ui --config sd51", "--config sd51: No such file or directory; pass mini, sd15 or a YAML file"),
        ("train d --out o --train.workers 0", "train.workers = 0: must be at least 1; set e.g. 1"),
        (
            "train d --out o --train.clip_frames 1",
            "train.clip_frames = 1: must be at least 2; set e.g. 16",
        ),
        (
            "train d --out o --train.zero_terminal_snr true",
            "train.zero_terminal_snr = True: requires v_prediction, not epsilon; set train.prediction_type v_prediction",
        ),
        ("ui --port 65536", "--port 65536: must be from 1 to 65535; set e.g. 5000"),
        ("ui --train.stage2.lr 0", "train.stage2.lr = 0.0: must be above 0; set e.g. 1e-05"),
        ("ui --train.drop_reference 1.5", "train.drop_reference = 1.5: must be from 0 to 1; set e.g. 0.1"),
        ("ui --train.ema_decay 1", "train.ema_decay = 1.0: must be at least 0 and below 1; set e.g. 0.999"),
        ("ui --train.max_grad_norm .nan", "train.max_grad_norm = nan: must be at least 0; set e.g. 1"),
        (
            "ui --train.min_workers 3",
            "train.min_workers = 3: must be from 1 to train.workers = 2; change one of them",
        ),
        ("weights chek x", "action: expected Literal['check'], got chek; see tcan weights --help"),
        ("weights check", "missing PATHS; see tcan weights --help"),
        ("weights check no/such/thing", "no/such/thing: no such file or folder; check the path"),
        (
            "export --model nothing --out x",
            "nothing: not a model folder (no readable tcan.json); pass the model folder of tcan train",
        ),
        ("ui --size 100", "size = 100: must be above 0 and a multiple of 64; set e.g. 512"),
        (
            "preprocess v o --preprocess.canvas 100",
            "preprocess.canvas = 100: must be above 0 and a multiple of 8; set e.g. 576",
        ),
        (
            "preprocess v o --preprocess.buckets [512x512,704x380]",
            "preprocess.buckets: 704x380 is not HEIGHTxWIDTH in multiples of 8; set e.g. [512x512, 704x384]",
        ),
        (
            "preprocess v o --preprocess.buckets []",
            "preprocess.buckets = []: must contain different sizes; set e.g. [512x512, 704x384]",
        ),
        (
            "preprocess v o --preprocess.buckets auto --preprocess.canvas 160",
            "preprocess.canvas = 160: has no effect with preprocess.buckets, which sets the sizes; unset one of them",
        ),
        (
            "preprocess v o --preprocess.canvas 120",
            "preprocess.canvas = 120: must be at least size = 128, the side of the training crops; change one of them",
        ),
        (
            "preprocess v o --preprocess.fps 1e9",
            "preprocess.fps = 1000000000.0: must be from 0.1 to 1000; set e.g. 25",
        ),
        ("ui --animate.guidance_scale -1", "animate.guidance_scale = -1.0: must be at least 0; set e.g. 7.5"),
        (
            "preprocess v o --preprocess.commit_seconds -1",
            "preprocess.commit_seconds = -1.0: must be at least 0; set e.g. 60",
        ),
        (
            "train d --out o --train.pose_jitter 50",
            "train.pose_jitter = 50.0: must be from 0 to 1; set e.g. 0.01",
        ),
        ("preprocess v ./v/", "./v/: is the folder of the videos; give another folder for the dataset"),
        ("ui --seed -1", "seed = -1: must be from 0 to 2^63 - 1; set e.g. 0"),
        (
            "ui --animate.steps 5000",
            "animate.steps = 5000: must be from 1 to 1000, the number of noise levels; set e.g. 25",
        ),
    ],
)
def test_invalid_arguments_are_a_user_error(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(capsys, *arguments.split()) == message


def test_empty_path_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A shell expands an unset variable to an empty argument."""
    empty = "empty value; check that the shell variable is set"
    assert error_of(capsys, "preprocess", "videos", "") == f"out: {empty}"
    assert error_of(capsys, "train", "dataset", "--out", "") == f"--out: {empty}"
    assert error_of(capsys, "export", "--model=", "--out=x") == f"--model: {empty}"
    assert error_of(capsys, "preprocess", "a", "b", "--submit", "").startswith("--submit : no Ray cluster")


def test_unwritable_output_folder_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = str(write_video(tmp_path / "a.mp4", 20))
    assert error_of(capsys, "preprocess", video, "/proc/dataset").startswith(
        "/proc/dataset: cannot be written: no such file or directory"
    )
    out = str(tmp_path / "out")
    assert error_of(capsys, "preprocess", video, out, "--limit=-1").startswith(
        "--limit -1: must be at least 0"
    )


def test_user_error_of_the_process_has_status_2_and_empty_stdout(tmp_path: Path) -> None:
    process = tcan("ui", "--tracking.folder", "nowhere", folder=tmp_path)
    assert process.returncode == 2
    assert process.stdout == ""
    assert "nowhere: no recorded runs" in process.stderr and process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_user_error() -> None:
    try:
        with open("/dev/full", "wb", buffering=0) as full:  # every write fails with ENOSPC
            full.write(b"x")
    except OSError as error:
        assert error.errno == errno.ENOSPC
        message = user_message(error)
    assert message is not None and message.startswith("the disk is full")


def test_user_error_in_a_ray_task_is_unwrapped(ray_cluster: None) -> None:
    import ray

    @ray.remote
    def fail(is_user_error: bool) -> None:
        raise UserError("a.mp4: the file is broken; re-encode it") if is_user_error else ValueError("a bug")

    for is_user_error, message in ((True, "a.mp4: the file is broken; re-encode it"), (False, None)):
        try:
            ray.get(fail.remote(is_user_error))
        except Exception as error:
            assert user_message(error) == message


def test_out_of_memory_kill_by_ray_is_a_user_error() -> None:
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    killed = OutOfMemoryError("5 worker(s) were killed due to the node running low on memory.")
    for error in (killed, ControllerError(killed), WorkerGroupError("failed", {0: killed})):
        message = user_message(error)
        assert message is not None and message.startswith(
            "Ray killed workers because a machine ran out of main memory"
        )


def test_bug_has_no_user_message() -> None:
    assert user_message(ValueError("a bug")) is None
    assert user_message(OSError(errno.ENOENT, "a bug")) is None


def test_memory_prints_a_stage_by_gpus_and_zero_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--stage", "1", "--size", "64", "--gpus", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split() and line.split()[0] in ("1", "4")]
    assert [row[:2] for row in rows] == [[gpus, zero] for gpus in "14" for zero in "0123"]
    for row in rows:
        *parts, total, saving = map(float, row[2:])
        assert abs(sum(parts) - total) < 0.03 and saving <= total
    assert error_of(capsys, "memory", "--gpus", "0").startswith("--gpus 0: must be at least 1")


@pytest.mark.parametrize("job", ["animate", "preprocess"])
def test_memory_counts_the_configured_pose_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    """Their weights have the sizes of OpenPose's files, in bytes, and of the ONNX files."""
    section = {"animate": "draw", "preprocess": "preprocess"}[job]
    sources = [tmp_path / "openpose", tmp_path / "onnx"]
    for source in sources:
        source.mkdir()
    for name, size in (("boxes.onnx", 2**30), ("points.onnx", 2**29)):
        with (sources[1] / name).open("wb") as file:
            file.truncate(size)
    options = [f"--{section}.hands", "true", f"--{section}.face", "true"]
    found = []
    for source in sources:
        assert cli.main(["memory", "--job", job, f"--pretrained.pose={source}", *options]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        found.append({row[0]: row[1:] for row in rows if row and row[0] in ("pose", "hands", "face", "ONNX")})
    files = {"pose": 209267595, "hands": 147341049, "face": 153718792}
    assert {name: float(row[0]) for name, row in found[0].items()} == {
        name: round(size / 2**30, 2) for name, size in files.items()
    }
    assert min(float(row[1]) for row in found[0].values()) > 0.01
    assert found[1] == {"ONNX": ["1.50", "not", "estimated"]}


def test_file_name_with_a_leading_dash_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-x.json").write_text("[]")
    Path("--y.png").write_text("")
    assert "-x.json: not a weights file" in error_of(capsys, "weights", "check", "-x.json")
    message = error_of(
        capsys, "animate", "--image", "--y.png", "--out", "o.mp4", "--poses", "-x.json", "--model", "m"
    )
    assert "unknown key" not in message and "expected one argument" not in message
