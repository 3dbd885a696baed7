"""The page: layout, and the events of its components."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.app.handlers import WAITING, Handlers
from pipelines.config.animate import AnimateConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
"""Only in a checkout of the repository."""
QUEUED = {"concurrency_id": "device", "concurrency_limit": 1, "api_visibility": "private"}
"""Options of the events that use the device: they wait for each other."""
AT_ONCE = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
DELETE_CACHE = (60, 3600)
"""Period of the deletion of old files, and their age, in seconds."""
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto !important}
h1 {font-size: 1.6em; font-weight: 700; margin: 0}
h2 {font-size: 1.2em; font-weight: 700; margin: 0}
.problem {color: var(--error-text-color); font-weight: 600}
.verdict, .verdict tr, .verdict td {border: none !important}
.verdict td {padding: 2px 16px 2px 0 !important; vertical-align: top}
#video button[aria-label^="Trim"] {display: none}  /* downloads a program from another host */
#image-message:not(:has(p)), #video-message:not(:has(p)), #message:not(:has(p)) {display: none}
"""


def build_page(handlers: Handlers, description: str) -> gr.Blocks:
    """The page. Call `launch` of the result with `css=CSS`."""
    with gr.Blocks(title="TCAN Studio", analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        gr.HTML(f"<h1>TCAN Studio</h1><p>{html.escape(description)}</p>", padding=False)
        with gr.Row():
            with gr.Column():
                with gr.Row():
                    image = gr.Image(
                        label="Image of a person",
                        sources=["upload", "clipboard"],
                        type="filepath",
                        height=250,
                        elem_id="image",
                    )
                    # The path also of files that Pillow cannot open, for the message of `read_image`.
                    image.preprocess = lambda file: file and file.path
                    image_poses = _output(gr.Image, "Detected poses", "image-poses", 250, visible=False)
                image_message, person = _choice("image")
                _examples(image, "dancer.png", "creature.png")
            with gr.Column():
                with gr.Row():
                    video = gr.Video(label="Driving video", sources=["upload"], height=250, elem_id="video")
                    video_poses = _output(gr.Video, "Detected poses", "video-poses", 250, visible=False)
                video_message, driving_person = _choice("video")
                _examples(video, "dance.mp4")
        gr.HTML("<h2>Check of the poses</h2>", padding=False)
        with gr.Row():
            verdict = gr.HTML(WAITING, elem_id="verdict", padding=False)
            sheet = _output(gr.Image, "Retargeted poses", "sheet", 380, visible=False)
        gr.HTML("<h2>Animation</h2>", padding=False)
        settings = _settings(handlers.studio.config.animate, handlers.studio.config.seed)
        with gr.Row():
            animate = gr.Button("Animate", variant="primary", interactive=False, scale=3, elem_id="animate")
            cancel = gr.Button("Cancel", elem_id="cancel")
        message = gr.HTML(elem_id="message", padding=False)
        with gr.Row():
            comparison = _output(gr.Video, "Image, pose, result", "comparison", 300, scale=3)
            result = _output(gr.Video, "Result", "result", 300)

        checked = [verdict, sheet, animate]
        people = [person, driving_person]
        image_outputs, video_outputs = (
            [image_message, image_poses, person],
            [video_message, video_poses, driving_person],
        )
        reading = [
            image.change(handlers.read_image, image, [*image_outputs, *checked], **QUEUED),
            video.change(handlers.read_video, video, [*video_outputs, *checked], **QUEUED),
        ]
        for choice in people:
            choice.input(handlers.preview, people, checked, **AT_ONCE)
        outputs = [message, comparison, result]
        running = animate.click(handlers.animate, settings, outputs, show_progress_on=[comparison], **QUEUED)
        cancel.click(handlers.cancel, None, message, cancels=[*reading, running], **AT_ONCE)
        page.unload(handlers.close)
    handlers.kept_files = set().union(*(block.keep_in_cache for block in page.blocks.values()))
    return page


def _output(component: type, label: str, name: str, height: int, **options: Any) -> Any:
    """An image or video that the user cannot change. The share button of Gradio would need another host."""
    if component is gr.Video:
        options |= {"buttons": ["download"], "loop": True}
    else:
        options |= {"buttons": ["download", "fullscreen"]}
    return component(label=label, elem_id=name, height=height, interactive=False, **options)


def _choice(name: str) -> tuple[Any, Any]:
    """Message and choice of people, below an input."""
    message = gr.HTML(elem_id=f"{name}-message", padding=False)
    people = gr.Dropdown(
        ["1"],
        value=["1"],
        multiselect=True,
        visible=False,
        label="Person",
        info="Number in the detected poses. Of several people, the n-th of the image moves as the n-th of the video.",
        elem_id=f"{name}-person",
    )
    return message, people


def _examples(component: Any, *names: str) -> None:
    if EXAMPLES.is_dir():
        files = [[str(EXAMPLES / name)] for name in names]
        gr.Examples(files, component, cache_examples=False, api_visibility="private")


def _settings(options: AnimateConfig, seed: int) -> list:
    """Inputs of `Handlers.animate`."""
    ptm = options.ptm_strength if options.ptm else 0
    with gr.Row():
        return [
            gr.Slider(
                1, max(50, options.steps), options.steps, step=1, label="Denoising steps", elem_id="steps"
            ),
            gr.Slider(
                1,
                max(15, options.guidance_scale),
                options.guidance_scale,
                step=0.1,
                label="Guidance scale",
                info="1: off, in half the time",
            ),
            gr.Slider(0, max(3, ptm), ptm, step=0.1, label="Temperature map (PTM)", info="0: off"),
            gr.Number(seed, label="Seed", precision=0, minimum=0),
        ]
