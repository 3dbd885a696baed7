"""Video lists of preprocessing, and what a rerun does with them."""

import os
from pathlib import Path

import pytest

from pipelines.preprocess.job import plan
from pipelines.preprocess.shards import Contents
from pipelines.preprocess.sources import Source, identify, list_sources
from tcan.errors import UserError


def test_list_sources_accepts_folder_pattern_list_and_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "deep/er/b.MKV", "odd [1].mp4", "c.txt", "d.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)

    def names(source: str) -> list[str]:
        return [os.path.relpath(path, tmp_path) for path in list_sources(source)]

    assert names(str(tmp_path)) == ["a.mp4", "deep/er/b.MKV", "odd [1].mp4"]
    assert names(str(tmp_path / "**/*.MKV"))[0] == "deep/er/b.MKV"
    assert names(str(tmp_path / "odd [1].mp4")) == ["odd [1].mp4"]
    (tmp_path / "list.txt").write_text(f"# comment\n\na.mp4\n{tmp_path}/d.json\nmissing.mp4\na.mp4\n")
    assert names(str(tmp_path / "list.txt")) == ["a.mp4", "d.json", "missing.mp4"]
    (tmp_path / "windows.txt").write_bytes(
        f"\ufeffa.mp4\r\n#\r\nfile://{tmp_path}/odd%20[1].mp4\r\n".encode()
    )
    assert names(str(tmp_path / "windows.txt")) == ["a.mp4", "odd [1].mp4"]


def test_missing_or_empty_sources_raise_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("# nothing\n")
    for source, message in {
        "nowhere": "no such file or folder",
        "empty": "no videos in this folder",
        "*.mp4": "no file matches",
        "list.txt": "names no videos",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            list_sources(str(tmp_path / source))
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_unreadable_file_is_listed_with_its_problem(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    (tmp_path / "a.mp4").chmod(0)
    assert "cannot be read" in str(identify([str(tmp_path / "a.mp4")], {})[0].problem)


def test_plan_skips_finished_sources_by_path_and_content() -> None:
    done = Contents(
        videos={"1": "/a"},
        rejected={
            ("/bad", "2"): ("decode", ""),
            ("/gone", None): ("list", ""),
            ("/copy", "5"): ("duplicate", "/original"),
        },
    )
    sources = [
        Source("/a", "1"),  # done
        Source("/original", "5"),  # no longer recorded as rejected, although its duplicate still is
        Source("/copy", "5"),  # done
        Source("/bad", "2"),  # done
        Source("/bad too", "2"),
        Source("/gone", problem="no such file"),  # done
        Source("/bad", "3"),  # content changed
        Source("/moved", "1"),
        Source("/new", "4"),
        Source("/new too", "4"),
    ]
    pending, rejected = plan(sources, done)
    assert [(source.path, source.video_id) for source in pending] == [
        ("/original", "5"),
        ("/bad", "3"),
        ("/new", "4"),
    ]
    assert [(source.path, stage, reason) for source, stage, reason in rejected] == [
        ("/bad too", "duplicate", "/bad"),
        ("/moved", "duplicate", "/a"),
        ("/new too", "duplicate", "/new"),
    ]
