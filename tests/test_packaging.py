"""The wheel contains everything that `tcan` needs, and works outside the repository."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tcan
from tcan.video import read_video

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **variables: str) -> str:
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | variables)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == tcan.__version__
    assert re.match(
        r"# Changelog\n\n## (Unreleased|" + re.escape(tcan.__version__) + ")",
        (ROOT / "CHANGELOG.md").read_text(),
    )


@pytest.mark.slow
def test_wheel_animates_outside_the_repository(tmp_path: Path) -> None:
    source, installed, work = (tmp_path / name for name in ("source", "installed", "work"))
    work.mkdir()
    tracked = run(
        "git", "ls-files", "-z", "tcan", "pipelines", "pyproject.toml", "README.md", "LICENSE", cwd=ROOT
    )
    for name in filter(None, tracked.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(source), cwd=work)
    (wheel,) = work.glob("tcan-*.whl")
    run(*pip, "install", "--no-deps", "--no-compile", "--target", str(installed), str(wheel), cwd=work)
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    packaged = {name for name in tracked.split("\0") if name.startswith(("tcan/", "pipelines/"))}
    assert packaged - files == {"tcan/README.md"}

    # The dependencies are those of this environment; its editable tcan comes after PYTHONPATH.
    variables = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    origin = "import pipelines.cli, tcan; print(tcan.__file__, pipelines.cli.__file__)"
    assert run(sys.executable, "-c", origin, cwd=work, **variables).split() == [
        f"{installed}/tcan/__init__.py",
        f"{installed}/pipelines/cli.py",
    ]
    script = str(installed / "bin" / "tcan")
    assert run(script, "--version", cwd=work, **variables) == f"tcan {tcan.__version__}\n"
    run(
        script, "animate", "--image", str(ROOT / "examples/dancer.png"), "--poses", str(ROOT / "examples/dance.json"),
        "--out", "dancer.mp4", "--animate.steps=1", "--animate.guidance_scale=1", cwd=work, **variables,
    )  # fmt: skip
    frames, fps = read_video(work / "dancer.mp4")
    assert frames.shape == (24, 128, 128, 3) and fps == 24
