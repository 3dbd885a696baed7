"""What a person sees of the command line: help, the configuration's way in, and one line for what can be mended."""

import errno
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from pipelines import cli
from pipelines.config import PRESETS, Config, load_config
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
    found = []
    for item in fields(config):
        if is_dataclass(item.type):
            found += keys(item.type, f"{prefix}{item.name}.")
        else:
            found.append(f"{prefix}{item.name}")
    return found


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr, after checking that it is one and the status is 2."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.removesuffix("\n")
    assert "\n" not in line and line.startswith("tcan: error: ")
    return line.removeprefix("tcan: error: ")


def test_help_is_quick_and_names_every_command() -> None:
    heavy = "import sys; from pipelines import cli; cli.main(['--help']); print(sorted({'torch', 'ray', 'mlflow', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
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
        assert f"  {command} " in done.stdout


def test_help_of_the_demo_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    words = text.split()
    for key in keys(Config):
        assert f"--{key}" in words, key
        explanation = text.partition(f"--{key} ")[2].partition("(type:")[0].split(maxsplit=1)
        assert len(explanation) == 2, f"{key} is not explained"


def test_help_of_a_job_leaves_out_what_only_others_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["animate", "--help"])
    text = capsys.readouterr().out
    read = {section for section in cli.COMMANDS["animate"].sections if f"--{section}." in text}
    assert read == {"pretrained", "animate", "tracking"}
    assert "--seed" in text and "--train." not in text and "--preprocess." not in text


def test_help_shows_the_values_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", "sd15", "--help"])
    assert "(type: int, default: 512)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_holds_what_it_says(preset: str) -> None:
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
    assert load_config("--config", str(file)).size == 128  # from mini


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {wrokers: 2}", "no such key: train.wrokers; did you mean train.workers?"),
        ("sede: 2", "no such key: sede; did you mean seed?"),
        ("seed: two", "seed: expected int, got two"),
        ("train.workers: 2", "write train.workers as train: {workers: ...}, a key inside another"),
        ("train: 5", "train must hold keys and values"),
        ("- seed", "must hold keys and values, such as `seed: 1`"),
        ("seed: [", "not YAML: "),
        ("seed: 1\nsize: 64\nseed: 2", "not YAML: seed is given twice, first in line 1, again in "),
        ("train:\n  workers: 1\n  workers: 1", "not YAML: workers is given twice, first in line 2, again"),
    ],
)
def test_bad_configuration_file(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    line = error_of(capsys, "ui", "--config", str(file))
    assert line.startswith(f"{file}: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian x", "no such command: trian; did you mean train?"),
        ("train d --out o --train.wrokers 2", "no such key: --train.wrokers; did you mean --train.workers?"),
        ("train d --out o --train.workers=many", "train.workers: expected int, got many"),
        ("train d --out o --stage 3", "stage: expected Literal['1', '2', 'all'], got 3"),
        ("train d", "missing: --out; tcan train --help explains"),
        ("pose dance.mp4", "missing: --out; tcan pose --help explains"),
        ("preprocess videos", "missing: OUT; tcan preprocess --help explains"),
        ("ui there", "unexpected argument: there; tcan ui --help lists what it takes"),
        ("ui --config sd51", "--config sd51: No such file or directory; give mini, sd15 or a YAML file"),
        ("train d --out o --train.workers 0", "train.workers = 0: must be at least 1"),
        (
            "train d --out o --train.frames 1",
            "train.frames = 1: must be at least 2, one frame has no motion to learn from",
        ),
        (
            "train d --out o --train.zero_terminal_snr true",
            "train.zero_terminal_snr: needs train.prediction_type v_prediction",
        ),
        ("weights chek x", "action: expected Literal['check'], got chek"),
        ("weights check", "missing: PATHS; tcan weights --help explains"),
        ("weights check no/such/thing", "no/such/thing: no such file or folder"),
        (
            "export --model nothing --out x",
            "nothing: no model folder (no readable tcan.json in it); give what tcan train wrote",
        ),
        ("ui --size 100", "size = 100: must be above 0 and a multiple of 64, such as 128 or 512"),
        (
            "preprocess v o --preprocess.canvas 100",
            "preprocess.canvas = 100: must be above 0 and a multiple of 8, such as 576",
        ),
        (
            "preprocess v o --preprocess.canvas 120",
            "preprocess.canvas = 120: must be at least size = 128, which training takes of it",
        ),
        ("ui --animate.guidance_scale -1", "animate.guidance_scale = -1.0: must not be below 0"),
        (
            "preprocess v o --preprocess.commit_seconds -1",
            "preprocess.commit_seconds = -1.0: must not be below 0",
        ),
        ("train d --out o --train.pose_jitter 50", "train.pose_jitter = 50.0: must be from 0 to 1"),
        ("preprocess v ./v/", "./v/: is the folder of the videos; give another one for the dataset"),
        ("ui --seed -1", "seed = -1: must be from 0 to 2^63 - 1"),
        (
            "ui --animate.steps 5000",
            "animate.steps = 5000: must be from 1 to 1000, the levels of noise there are",
        ),
    ],
)
def test_bad_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, *arguments.split()) == message


def test_an_empty_path_is_no_path(capsys: pytest.CaptureFixture[str]) -> None:
    """What the shell makes of a variable that is not set."""
    empty = "is empty; is a variable of the shell not set?"
    assert error_of(capsys, "preprocess", "videos", "") == f"out: {empty}"
    assert error_of(capsys, "train", "dataset", "--out", "") == f"--out: {empty}"
    assert error_of(capsys, "export", "--model=", "--out=x") == f"--model: {empty}"
    assert error_of(capsys, "preprocess", "a", "b", "--submit", "").startswith("--submit : no Ray cluster")


def test_a_place_where_nothing_can_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = str(write_video(tmp_path / "a.mp4", 20))
    assert error_of(capsys, "preprocess", video, "/proc/dataset").startswith(
        "/proc/dataset: cannot be written: no such file or directory"
    )
    out = str(tmp_path / "out")
    assert error_of(capsys, "preprocess", video, out, "--limit=-1").startswith(
        "--limit -1: must be at least 0"
    )


def test_exit_status_and_streams_of_the_real_command(tmp_path: Path) -> None:
    done = tcan("ui", "--tracking.folder", "nowhere", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tcan: error: no runs are recorded in ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with open("/dev/full", "wb", buffering=0) as full:  # the kernel's always-full device
            full.write(b"x")
    except OSError as error:
        assert error.errno == errno.ENOSPC
        message = cli.user_message(error)
    assert message is not None and message.startswith("the disk is full")


def test_what_ray_wraps_is_found(ray_cluster: None) -> None:
    import ray

    @ray.remote
    def fails(mendable: bool) -> None:
        raise UserError("the file is broken") if mendable else ValueError("a bug")

    for mendable, message in ((True, "the file is broken"), (False, None)):
        try:
            ray.get(fails.remote(mendable))
        except Exception as error:
            assert cli.user_message(error) == message


def test_workers_ended_for_their_memory_are_one_line() -> None:
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    ended = OutOfMemoryError("5 worker(s) were killed due to the node running low on memory.")
    for error in (ended, ControllerError(ended), WorkerGroupError("failed", {0: ended})):
        message = cli.user_message(error)
        assert message is not None and message.startswith("a machine's main memory is full")


def test_a_bug_keeps_its_traceback() -> None:
    assert cli.user_message(ValueError("a bug")) is None
    assert cli.user_message(OSError(errno.ENOENT, "a bug")) is None


def test_memory_of_a_stage_is_printed_by_zero_stage_and_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--stage", "1", "--size", "64", "--gpus", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split() and line.split()[0] in ("1", "4")]
    assert [row[:2] for row in rows] == [[gpus, zero] for gpus in "14" for zero in "0123"]
    for row in rows:
        *parts, total, saving = map(float, row[2:])
        assert abs(sum(parts) - total) < 0.03 and saving <= total
    assert error_of(capsys, "memory", "--gpus", "0") == "--gpus 0: must be at least 1"
