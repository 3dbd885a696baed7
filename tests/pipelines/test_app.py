"""`tcan app`: its errors, the choice of people, and the page in a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from pipelines.app.studio import Cancelled, Job, Session, Studio, duration
from pipelines.config.parser import load_config
from pipelines.inference import load_pipeline
from tcan.errors import UserError
from tcan.video import read_image, read_video, write_image, write_video
from tcan.weights import MINI_MODEL
from tests.pipelines.test_cli import error_of

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKS = ["frame", "limbs", "scale", "missing", "flips"]


def test_app_without_gradio_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # restored afterwards
    monkeypatch.setitem(sys.modules, "gradio", None)  # its import raises ModuleNotFoundError
    message = error_of(capsys, "app", f"--port={free_port()}")
    assert message == "tcan app: Gradio is not installed; run pip install 'tcan[app]'"


def test_unusable_options_are_user_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        message = error_of(capsys, "app", f"--port={port}")
        assert message == f"port {port} is in use; set another one with --port"
    # 192.0.2.1 is reserved for documentation (RFC 5737).
    assert error_of(capsys, "app", "--host=192.0.2.1").startswith("--host 192.0.2.1: not an address of")
    assert error_of(capsys, "app", "--port=0").startswith("--port 0: must be from 1 to 65535")
    assert error_of(capsys, "app", "--max_frames=0").startswith("--max_frames 0: must be at least 1")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    message = error_of(capsys, "app", f"--port={free_port()}", f"--model={tmp_path}/model")
    assert message.startswith(f"{tmp_path}/model: ")


def test_durations_are_rounded() -> None:
    assert [duration(s) for s in (0.2, 12.4, 100, 3900)] == ["1 s", "12 s", "2 min", "1 h 5 min"]


@pytest.fixture(scope="module")
def studio() -> Studio:
    config = load_config()
    return Studio(load_pipeline(MINI_MODEL, config), config, max_frames=40)


def test_chosen_person_gets_the_motion(studio: Studio, tmp_path: Path) -> None:
    two = np.concatenate([read_image(EXAMPLES / "dancer.png"), read_image(EXAMPLES / "creature.png")], axis=1)
    write_image(two, tmp_path / "two.png")
    session = Session(tmp_path)
    found, overlay = studio.read_image(tmp_path / "two.png", session)
    driver, _ = studio.read_video(EXAMPLES / "dance.mp4", session, lambda *_: None)
    assert (found.count, driver.count) == (2, 1) and read_image(overlay).shape == (360, 720, 3)
    # The result has the aspect ratio of the image, which is 2:1, and the poses begin at the neck of the chosen person.
    necks = []
    for person in ("1", "2"):
        motion = studio.match(found, driver, [person], ["1"])
        assert motion.characters is not None and [f.check for _, f in motion.findings] == CHECKS
        assert motion.image.shape == (96, 192, 3)
        necks.append((motion.characters[0, 1, :2], motion.poses[0, 0, 1, :2]))
    assert necks[0][0][0] < 96 < necks[1][0][0]
    for of_image, of_motion in necks:
        np.testing.assert_allclose(of_motion, of_image, atol=1)
    with pytest.raises(UserError, match="people: 2 selected in the image, 1 in the driving video"):
        studio.match(found, driver, ["1", "2"], ["1"])


def test_job_that_waits_for_the_device_can_be_cancelled(studio: Studio, tmp_path: Path) -> None:
    session, raised = Session(tmp_path), threading.Event()

    def read() -> None:
        with pytest.raises(Cancelled, match=r"Cancelled before its start\."):
            studio.read_image(EXAMPLES / "dancer.png", session)
        raised.set()

    with studio._use_device(Job()):
        waiting = session.job
        thread = threading.Thread(target=read)
        thread.start()
        while session.job is waiting:
            assert thread.is_alive()
        assert not raised.wait(0.3)
        session.job.cancel()
        assert raised.wait(10)
    studio.read_image(EXAMPLES / "dancer.png", session)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@dataclass
class Server:
    """A running `tcan app`."""

    url: str
    log: Path
    temporary: Path
    process: subprocess.Popen

    def files(self) -> set[str]:
        """Names of all temporary files."""
        return {path.name for path in self.temporary.glob("tcan-app-*/**/*") if path.is_file()}


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """A headless Chromium, which resolves no other host than this one."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        pytest.skip("requires chromium and chromedriver (apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1900"):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def server(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("app")
    port, log = free_port(), folder / "log.txt"
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "app",
        f"--port={port}",
        "--max_frames=40",
        "--max_upload_mb=1",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(folder)}
        )
    server = Server(f"http://127.0.0.1:{port}", log, folder, process)
    wait(lambda: f"tcan app: {server.url}" in log.read_text() or process.poll() is not None, 300)
    assert process.poll() is None, log.read_text()
    yield server
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def short_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 8 frames of the example."""
    path = tmp_path_factory.mktemp("videos") / "short.mp4"
    frames, fps = read_video(EXAMPLES / "dance.mp4", 8)
    write_video(frames, path, fps)
    return path


def wait(condition: Callable[[], Any], seconds: float = 180) -> Any:
    """The first true value of the condition. Elements that Gradio replaces meanwhile do not count."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    ignored = [StaleElementReferenceException]
    return WebDriverWait(None, seconds, 0.1, ignored).until(lambda _: condition())


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)
        wait(lambda: self.find_all("#video input[type=file]"))

    def find_all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def find(self, selector: str) -> Any:
        return wait(lambda: self.find_all(selector))[0]

    def text(self, selector: str) -> str:
        return self.find(selector).get_attribute("textContent").strip()

    def upload(self, name: str, path: Path) -> None:
        self.find(f"#{name} input[type=file]").send_keys(str(path))

    def upload_inputs(self, video: Path) -> None:
        self.upload("image", EXAMPLES / "dancer.png")
        self.upload("video", video)
        wait(lambda: self.find("#animate").is_enabled())

    def set_steps(self, steps: int) -> None:
        field = self.find("#steps input[type=number]")
        self.driver.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
            field,
            str(steps),
        )

    def requested_hosts(self) -> set[str]:
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = (e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent")
        return {match[1] for url in urls if (match := re.match(r"\w+://([^/]+)", url))}


@pytest.mark.slow
def test_uploaded_image_dances_as_the_uploaded_video(driver: Any, server: Server, tmp_path: Path) -> None:
    page = Page(driver, server.url)
    page.upload_inputs(EXAMPLES / "dance.mp4")
    rows = [row.text.split()[:2] for row in page.find_all("#verdict tr")]
    assert rows == [["ok", check] for check in CHECKS]
    assert page.find("#sheet img").is_displayed() and page.find("#video-poses video").is_displayed()
    page.set_steps(1)
    page.find("#animate").click()
    videos = {}
    for name in ("result", "comparison"):
        url = page.find(f"#{name} video").get_attribute("src")
        (tmp_path / f"{name}.mp4").write_bytes(requests.get(url, timeout=60).content)
        videos[name] = read_video(tmp_path / f"{name}.mp4")
    (result, fps), (comparison, _) = videos["result"], videos["comparison"]
    _, driving_fps = read_video(EXAMPLES / "dance.mp4")
    assert result.shape == (24, 128, 128, 3) and fps == driving_fps
    assert comparison.shape == (24, 128, 384, 3)
    for part, expected in (
        (comparison[0, :, :128], read_image(EXAMPLES / "dancer.png")),
        (comparison[:, :, 256:], result),
    ):
        assert np.abs(part.astype(float) - expected).mean() < 4  # after lossy coding
    assert page.requested_hosts() == {server.url.removeprefix("http://")}
    # The same server under another name: the browser blocks it as another host.
    fetch = "fetch(arguments[0], {mode: 'no-cors'}).then(() => arguments[1]('loaded'), () => arguments[1]('blocked'))"
    other = server.url.replace("127.0.0.1", "localhost")
    assert [driver.execute_async_script(fetch, url) for url in (server.url, other)] == ["loaded", "blocked"]


@pytest.mark.slow
def test_cancel_ends_the_denoising(driver: Any, server: Server, short_video: Path) -> None:
    page = Page(driver, server.url)
    page.upload_inputs(short_video)
    page.set_steps(50)
    page.find("#animate").click()
    wait(lambda: re.search(r"denoising, about \d+ (s|min) left", page.text("#comparison")))
    page.find("#cancel").click()
    wait(lambda: page.text("#message") == "Cancelled.")
    step = wait(lambda: re.search(r"animation cancelled after step (\d+) of 50", server.log.read_text()))
    assert int(step[1]) < 10
    page.set_steps(1)
    page.find("#animate").click()
    page.find("#result video")  # the device is free again


@pytest.mark.slow
def test_unusable_files_are_explained_in_one_line(driver: Any, server: Server, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    write_video(np.zeros((41, 32, 32, 3), np.uint8), tmp_path / "long.mp4", 10)
    page = Page(driver, server.url)
    page.upload("image", tmp_path / "text.png")
    page.upload("video", tmp_path / "long.mp4")
    unreadable = "text.png: cannot be read as an image (damaged or unsupported format); use another file"
    wait(lambda: page.text("#image-message") == unreadable)
    wait(
        lambda: page.text("#video-message").startswith(
            "long.mp4: 41 frames (4 s), more than the maximum of 40; cut"
        )
    )
    assert not page.find("#animate").is_enabled()
    (tmp_path / "large.mp4").write_bytes(bytes(2**20 + 1))
    page.find("#video button[aria-label=Clear]").click()
    page.upload("video", tmp_path / "large.mp4")
    wait(lambda: "exceed the maximum allowed size of 1.0 Mb" in page.find("body").text)
    with (tmp_path / "large.mp4").open("rb") as file:  # the server does not rely on the page
        assert (
            requests.post(f"{server.url}/gradio_api/upload", files={"files": file}, timeout=60).status_code
            == 413
        )
    assert server.process.poll() is None and "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_closed_page_ends_its_job_and_files_are_deleted(
    driver: Any, server: Server, short_video: Path
) -> None:
    page = Page(driver, server.url)
    page.upload_inputs(short_video)
    assert {"short.mp4", "short-poses.mp4", "retargeted-poses.png"} <= server.files()
    page.set_steps(49)
    page.find("#animate").click()
    wait(lambda: "left" in page.text("#comparison"))
    driver.get("about:blank")
    wait(lambda: re.search(r"animation cancelled after step \d+ of 49", server.log.read_text()))
    wait(lambda: server.files() == {path.name for path in EXAMPLES.iterdir()} - {"dance.json"})
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(180) == 130
    assert not list(server.temporary.glob("tcan-app-*"))
