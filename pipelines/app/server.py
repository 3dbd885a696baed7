"""`tcan app`: a local web page for the trained model."""

import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import Config
from pipelines.port import check_port
from tcan.errors import UserError

if TYPE_CHECKING:
    from pipelines.app.studio import Studio


def serve(model: str, config: Config, host: str, port: int, max_frames: int, max_upload_mb: int) -> None:
    """Serve the page at `http://HOST:PORT` until interrupted; then delete all uploads and results.

    Args:
        model: see `pipelines.inference.find_model`.
        max_frames: maximum number of frames of a driving video.
        max_upload_mb: maximum size of an uploaded file in MB.

    Raises:
        UserError: Gradio is not installed; an invalid value; the port cannot be used; see `pipelines.inference`.
    """
    for name, value in {"max_frames": max_frames, "max_upload_mb": max_upload_mb}.items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1; set e.g. 100")
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="tcan-app-") as folder:
        _configure_gradio(folder)
        try:
            import gradio
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise UserError("tcan app: Gradio is not installed; run pip install 'tcan[app]'") from None

        from starlette.middleware import Middleware

        from pipelines.app.handlers import Handlers
        from pipelines.app.page import CSS, build_page
        from pipelines.app.studio import Studio
        from pipelines.inference import find_model, load_pipeline

        path = find_model(model, config)
        studio = Studio(load_pipeline(path, config), config, max_frames)
        handlers = Handlers(studio, Path(folder) / "results")
        page = build_page(handlers, _description(model, studio, max_upload_mb))
        try:
            page.queue(api_open=False).launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=f"{max_upload_mb}mb",
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                theme=gradio.themes.Default(font="sans-serif", font_mono="monospace"),
                css=CSS,
                app_kwargs={"middleware": [Middleware(OnlyThisHost)]},
            )
            print(f"tcan app: http://{host}:{port} (stop with Ctrl-C)", flush=True)
            threading.Event().wait()
        finally:
            handlers.close_all()
            page.close(verbose=False)


def _configure_gradio(folder: str) -> None:
    """Before Gradio is imported: its temporary folder, no requests to other hosts, no proxy for its own address."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("GRADIO_HEARTBEAT_INTERVAL", "2")  # seconds after which a closed page is noticed
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "localhost")))


class OnlyThisHost:
    """ASGI middleware: browsers load nothing from other hosts, whatever Gradio's components request."""

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _description(model: str, studio: "Studio", max_upload_mb: int) -> str:
    pipe = studio.pipe
    return (
        f"Animate the person of an image with the motion of a video. Model: {model}, {pipe.width} x {pipe.height} pixels, on "
        f"{pipe.device.type.upper()}. Driving videos: at most {studio.max_frames} frames. Files: at most "
        f"{max_upload_mb} MB, deleted when the page is closed."
    )
