"""The event listeners of the page."""

import html
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from pipelines.app.studio import Cancelled, DetectedPeople, Progress, Session, Studio
from pipelines.match import Motion, contact_sheet, finding_text, problems
from pipelines.user_message import user_message
from tcan.video import write_image

WAITING = "<p>The check appears when there are an image and a driving video.</p>"
PROGRESS = gr.Progress()
"""As a default of an argument: Gradio passes the progress of the event."""


class Handlers:
    """The event listeners of the page. Each returns the values of its output components.

    Args:
        folder: of the results, one subfolder per session.
    """

    def __init__(self, studio: Studio, folder: Path) -> None:
        self.studio, self.folder = studio, folder
        self.sessions: dict[str, Session] = {}
        self.kept_files: set[str] = set()
        """Files of the page itself, such as the examples."""

    def session(self, request: gr.Request) -> Session:
        key = str(request.session_hash)
        return self.sessions.setdefault(key, Session(self.folder / key))

    def read_image(self, path: str | None, request: gr.Request) -> tuple:
        """Returns: message, overlay, person, and the values of `preview`."""
        session = self.session(request)
        session.character, shown, problem = None, None, Message()
        if path is not None:
            session.uploads.add(Path(path))
            with _caught(problem, path):
                session.character, shown = self.studio.read_image(Path(path), session)
        return problem.html, _shown(shown), _choices(session.character), *self._first_preview(session)

    def read_video(self, path: str | None, request: gr.Request, progress: gr.Progress = PROGRESS) -> tuple:
        """Returns: message, overlay, person, and the values of `preview`."""
        session = self.session(request)
        session.driver, shown, problem = None, None, Message()
        if path is not None:
            session.uploads.add(Path(path))
            with _caught(problem, path), self._deleted_if_closed(session):
                session.driver, shown = self.studio.read_video(Path(path), session, _reporter(progress))
        return problem.html, _shown(shown), _choices(session.driver), *self._first_preview(session)

    def preview(self, person: list[str], driving_person: list[str], request: gr.Request) -> tuple:
        """Returns: verdict, sheet, button."""
        return self._preview(self.session(request), person, driving_person)

    def _first_preview(self, session: Session) -> tuple:
        return self._preview(session, ["1"], ["1"])

    def _preview(self, session: Session, person: list[str], driving_person: list[str]) -> tuple:
        session.motion, verdict = None, WAITING
        if session.character is not None and session.driver is not None:
            problem = Message()
            with _caught(problem):
                session.motion = self.studio.match(session.character, session.driver, person, driving_person)
            verdict = problem.html if session.motion is None else _verdict(session.motion)
        sheet = None
        if session.motion is not None:
            sheet = session.new_folder() / "retargeted-poses.png"
            write_image(contact_sheet(session.motion), sheet)
        return verdict, _shown(sheet), gr.update(interactive=session.motion is not None)

    def animate(
        self,
        steps: float,
        guidance: float,
        ptm: float,
        seed: float | None,
        request: gr.Request,
        progress: gr.Progress = PROGRESS,
    ) -> tuple:
        """Returns: message, comparison, result."""
        session, problem = self.session(request), Message()
        sampling = {
            "steps": int(steps),
            "guidance_scale": float(guidance),
            "ptm": ptm > 0,
            "ptm_strength": float(ptm),
        }
        with _caught(problem), self._deleted_if_closed(session):
            result, comparison = self.studio.animate(session, sampling, int(seed or 0), _reporter(progress))
            return "", str(comparison), str(result)
        return problem.html, None, None

    def cancel(self, request: gr.Request) -> str:
        """Returns: message."""
        self.session(request).job.cancel()
        return "<p>Cancelled.</p>"

    def close(self, request: gr.Request) -> None:
        """Cancel the job of a closed page, and delete its files."""
        session = self.sessions.pop(str(request.session_hash), None)
        if session is None:
            return
        session.closed = True
        session.job.cancel()
        shutil.rmtree(session.folder, ignore_errors=True)
        # Gradio stores files of equal content once.
        others = set().union(*(other.uploads for other in self.sessions.values()))
        for path in session.uploads - others:
            if str(path) not in self.kept_files:
                path.unlink(missing_ok=True)

    def close_all(self) -> None:
        """Cancel the jobs of all pages."""
        for session in self.sessions.values():
            session.job.cancel()

    @staticmethod
    @contextmanager
    def _deleted_if_closed(session: Session) -> Iterator[None]:
        """Delete the files that a job wrote although its page was closed meanwhile."""
        try:
            yield
        finally:
            if session.closed:
                shutil.rmtree(session.folder, ignore_errors=True)


@dataclass
class Message:
    """The message of an error that the user can fix, if there was one."""

    html: str = ""


@contextmanager
def _caught(message: Message, path: str | None = None) -> Iterator[None]:
    """Context in which errors that the user can fix become the message, without the folder of the uploaded file."""
    try:
        yield
    except Cancelled as event:
        message.html = f"<p>{html.escape(str(event))}</p>"
    except Exception as error:
        text = user_message(error)
        if text is None:
            raise
        text = text if path is None else text.replace(f"{Path(path).parent}/", "")
        message.html = f'<p class="problem" role="alert">{html.escape(text)}</p>'


def _reporter(progress: gr.Progress) -> Progress:
    return lambda done, total, text: progress((done, total), desc=text)


def _shown(path: Path | None) -> dict:
    """The file of a component that is visible only if it has one."""
    return gr.update(value=path and str(path), visible=path is not None)


def _choices(found: DetectedPeople | None) -> dict:
    """Choice of people, visible only if there are several."""
    numbers = [str(number + 1) for number in range(found.count if found else 1)]
    return gr.update(choices=numbers, value=["1"], visible=len(numbers) > 1)


def _verdict(motion: Motion) -> str:
    """Table of all findings."""
    rows = [
        f"<tr><td>{'<span class=problem>problem</span>' if finding.problem else 'ok'}</td><td>{finding.check}</td>"
        f"<td>{html.escape(finding_text(motion, index, finding))}</td></tr>"
        for index, finding in motion.findings
    ]
    count = len(problems(motion))
    summary = "No problems found." if not count else f"{count} problem{'s' if count > 1 else ''} found."
    return f"<p>{len(motion.poses)} frames. {summary}</p><table class=verdict>{''.join(rows)}</table>"
