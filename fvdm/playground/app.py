"""The page of the playground: its controls, and what happens when they are used. The only place that imports gradio."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from fvdm.diffusion.solvers import SOLVERS
from fvdm.diffusion.tasks import TASKS
from fvdm.diffusion.timesteps import SPACINGS
from fvdm.generation.config import GenerationConfig
from fvdm.generation.pipeline import Trained
from fvdm.media.writing import write_mp4
from fvdm.playground.config import PlayConfig
from fvdm.playground.schedules import FrameTimes, frame_times, from_frame_times, image
from fvdm.playground.session import (
    CancelledError,
    Request,
    Snapshot,
    command_line,
    given_images,
    missing_given,
    plan_of,
    request_of,
    run,
    strip,
    write_schedule,
)
from fvdm.playground.waiting import RequestQueue

SHARED = 9  # controls that both schedules share
HAND = "custom"  # the task whose schedule is drawn by hand
HEADERS = ["frame", "given", "start", "stop", "noise"]
SETTINGS = {"frames": ("any-frame", "infill", "edit"), "strength": ("edit",)}  # the tasks that read a setting
CSS = """
.gradio-container {max-width: 1380px !important}
#clip-a img, #clip-b img {image-rendering: pixelated; width: 100%}
input[type=checkbox] {border: 1px solid #7c7f8a !important}
.scroll-top-button {display: none}  /* It lies on the last cell. */
"""
INTRO = """# FVDM playground
Every frame has a timestep of its own. A **schedule** says how the timesteps fall, from noise (white) to clean (black):
a column per frame, a row per step. Frames that you give are blue, and below each stands the image that it takes. Choose
a task, or draw the schedule by hand in its table; then press *Generate*."""
EMPTY = gr.update(value=None, visible=False)


class Page:
    """The page, for one model."""

    def __init__(self, model: Trained, config: PlayConfig) -> None:
        self.model, self.config = model, config
        self.num_timesteps = model.diffusion.num_timesteps
        self.queue = RequestQueue(config.max_waiting)

    def build(self) -> gr.Blocks:
        """Lay out the page and connect its controls."""
        with gr.Blocks(title="FVDM playground", analytics_enabled=False) as page:
            gr.Markdown(INTRO)
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=360):
                    shared = self._shared()
                    first = self._schedule("A", "generate")
                    compare = gr.Checkbox(
                        False, label="Compare with a second schedule, from the same seed", elem_id="compare"
                    )
                    with gr.Column(visible=False) as second_group:
                        second = self._schedule("B", "pyramid")
                with gr.Column(scale=3, min_width=360):
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Cancel", elem_id="cancel")
                    status = gr.Markdown("Press *Generate*.", elem_id="status")
                    with gr.Row(equal_height=False):
                        with gr.Column(min_width=280):
                            outputs = [status, *self._result("A")]
                        with gr.Column(min_width=280, visible=False) as second_result:
                            outputs += self._result("B")
            compare.change(
                lambda on: (gr.update(visible=on), gr.update(visible=on)),
                compare,
                [second_group, second_result],
                api_visibility="private",
            )
            inputs = [*shared, *first[:5], compare, *second[:5]]
            # Gradio's own queue and cancelling are not used: cancelling a running request ends in an error at times.
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            go.click(self.generate, inputs, outputs, concurrency_limit=None, **quiet)
            stop.click(self.cancel, None, None, queue=False, **quiet)
            page.unload(self.cancel)
            for controls in (first, second):
                self._connect(page, shared, controls)
        page.queue(api_open=False)
        return page

    def _shared(self) -> list[Any]:
        """Controls that both schedules share: given files, steps, solver, spacing, seed, class, guidance, prompts."""
        files = gr.File(
            file_count="multiple",
            file_types=["image", "video"],
            type="filepath",
            elem_id="given",
            height=160,
            allow_reordering=True,
            label="Given images or video, in order",
        )
        with gr.Row():
            steps = gr.Slider(1, self.config.max_steps, 20, step=1, label="steps", elem_id="steps")
            seed = gr.Number(0, precision=0, minimum=0, label="seed", elem_id="seed")
        with gr.Row():
            solver = gr.Dropdown(list(SOLVERS), value="unipc", label="solver")
            spacing = gr.Dropdown([("default", ""), *((name, name) for name in SPACINGS)], value="", label="spacing")
        has_text = self.model.text is not None
        with gr.Row(visible=has_text):
            prompt = gr.Textbox("", label="prompt", lines=2, elem_id="prompt")
            negative = gr.Textbox("", label="negative prompt (needs guidance)", lines=2, elem_id="negative-prompt")
        with gr.Row(visible=has_text or bool(self.model.classes)):
            class_ = gr.Dropdown(
                [("one drawn from the seed", ""), *((c, c) for c in self.model.classes)],
                value="",
                label="class",
                visible=bool(self.model.classes),
            )
            guidance = gr.Slider(1, 15, 1, step=0.5, label="guidance")
        return [files, steps, seed, solver, spacing, class_, guidance, prompt, negative]

    def _schedule(self, name: str, task: str) -> list[Any]:
        """Controls of one schedule: its task and settings, and the table for drawing by hand."""
        key = name.lower()
        gr.Markdown(f"### Schedule {name}")
        with gr.Row():
            chosen = gr.Dropdown(list(TASKS), value=task, label="task", elem_id=f"task-{key}")
            length = gr.Number(0, precision=0, minimum=0, label="length (0: default)")
        with gr.Row():
            frames = gr.Textbox("", label="frame indices", placeholder="0,5,-1 or 4:12", visible=False)
            strength = gr.Slider(0, 1, 0.6, step=0.05, label="strength", visible=False)
        picture = gr.Image(interactive=False, show_label=False, buttons=[], format="png", elem_id=f"schedule-{key}")
        note = gr.Markdown("", elem_id=f"note-{key}")
        with gr.Accordion("Draw it by hand", open=False):
            gr.Markdown(
                "The steps at which each frame starts and stops to fall, and the noise it starts from, in percent."
            )
            table = gr.Dataframe(
                headers=HEADERS,
                datatype=["number", "bool", "number", "number", "number"],
                type="array",
                column_count=5,
                interactive=True,
                static_columns=[0],
                max_height=760,
                elem_id=f"table-{key}",
            )
        return [chosen, length, frames, strength, table, picture, note]

    def _result(self, name: str) -> list[Any]:
        """What is shown of one clip: its frames step by step, the video, the command line, the schedule's file."""
        key = name.lower()
        gr.Markdown(f"### Clip {name}")
        clip = gr.Image(interactive=False, show_label=False, buttons=[], format="png", elem_id=f"clip-{key}")
        video = gr.Video(
            interactive=False,
            autoplay=True,
            loop=True,
            height=260,
            show_label=False,
            buttons=["download"],
            visible=False,
            elem_id=f"video-{key}",
        )
        command = gr.Code(
            language="shell",
            label="The same clip by command",
            lines=1,
            wrap_lines=True,
            show_line_numbers=False,
            visible=False,
            elem_id=f"command-{key}",
        )
        file = gr.File(label="The schedule that the command names", height=60, visible=False, elem_id=f"file-{key}")
        return [clip, video, command, file]

    def _connect(self, page: gr.Blocks, shared: list[Any], controls: list[Any]) -> None:
        """Redraw the schedule when a control changes; fill the table when another task is chosen."""
        chosen, length, frames, strength, table, picture, note = controls
        inputs = [*shared, chosen, length, frames, strength, table]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        events = [shared[k].change for k in (0, 1, 3, 4)] + [c.change for c in (chosen, length, frames, strength)]
        gr.on([page.load, *events], self.redraw, inputs, [picture, note, table], trigger_mode="always_last", **quiet)
        chosen.change(settings_of, chosen, [frames, strength], **quiet)
        table.input(self.edit, inputs, [chosen, picture, note], trigger_mode="always_last", **quiet)

    def redraw(self, *values: Any) -> tuple[Any, Any, Any]:
        """The image of the schedule, what is missing or wrong, and the table that draws the same."""
        try:
            request = self.request(values[:SHARED], values[SHARED : SHARED + 5])
            schedule, given = plan_of(self.model, request)
            images = given_images(self.model, request)
        except ValueError as error:
            return None, str(error), gr.skip()
        shown, note = image(schedule, given, self.num_timesteps, images), missing_given(self.model, request)
        if request.config.task == HAND:
            return shown, note, gr.skip()
        times = frame_times(schedule, given, self.num_timesteps)
        return shown, note, [[k, t.given, t.start, t.stop, round(t.noise, 1)] for k, t in enumerate(times)]

    def edit(self, *values: Any) -> tuple[Any, Any, Any]:
        """After an edit of the table: the task is `custom`, its image, and what is missing."""
        values = (*values[:SHARED], HAND, *values[SHARED + 1 :])
        return (HAND, *self.redraw(*values)[:2])

    def cancel(self, session: gr.Request) -> None:
        """Cancel what a session has asked for; also when its tab is closed."""
        self.queue.cancel(str(session.session_hash))

    def generate(self, session: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Sample schedule A and, if asked for, schedule B; yields the outputs after each step.

        Raises:
            gr.Error: with the sentence of a user's mistake.
        """
        shared, schedules = values[:SHARED], values[SHARED:]
        first, compare, second = schedules[:5], schedules[5], schedules[6:11]
        shown: list[Any] = ["", *[None, EMPTY, EMPTY, EMPTY] * 2]
        try:
            requests = [self.request(shared, controls) for controls in ((first, second) if compare else (first,))]
            for missing in filter(None, (missing_given(self.model, request) for request in requests)):
                raise ValueError(missing)
            with self.queue.enter(str(session.session_hash)) as turn:
                while (ahead := self.queue.ahead(turn)) and not turn.cancelled.is_set():
                    shown[0] = f"Waiting: {ahead} request{'s' if ahead > 1 else ''} before yours."
                    yield shown
                    self.queue.wait(turn, ahead)
                for place, request in enumerate(requests):
                    yield from self.sample(place, request, turn.cancelled, shown)
        except CancelledError:
            shown[0] = "Cancelled."
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        else:
            shown[0] = "Done."
        yield shown

    def sample(self, place: int, request: Request, cancelled: threading.Event, shown: list[Any]) -> Iterator[list[Any]]:
        """Sample one of the schedules; fills its part of the outputs `shown`, and yields them after each step."""
        steps = len(plan_of(self.model, request)[0]) - 1
        for snapshot in run(self.model, request, cancelled):
            shown[0] = f"**{'AB'[place]}**: step {snapshot.step} of {steps}"
            shown[1 + 4 * place] = strip(snapshot)
            if snapshot.done:
                shown[2 + 4 * place : 5 + 4 * place] = self.finished(request, snapshot)
            yield shown

    def finished(self, request: Request, snapshot: Snapshot) -> list[Any]:
        """The video, the command line and the schedule file of a finished clip."""
        folder = Path(tempfile.mkdtemp(prefix="fvdm-play-"))
        video = folder / f"{request.config.task}-{request.config.seed:05d}.mp4"
        write_mp4(snapshot.frames, video, request.fps)
        hand = request.config.task == HAND
        return [
            gr.update(value=str(video), visible=True),
            gr.update(value=command_line(self.config.checkpoint, request), visible=True),
            gr.update(value=request.config.schedule or None, visible=hand),
        ]

    def request(self, shared: Any, controls: Any) -> Request:
        """The request that the controls stand for.

        Raises:
            ValueError: if a value is out of range.
        """
        files, steps, seed, solver, spacing, class_, guidance, prompt, negative = shared
        task, length, frames, strength, table = controls
        if not 1 <= int(steps or 0) <= self.config.max_steps:
            raise ValueError(f"steps is {steps}: choose 1 to {self.config.max_steps}")
        if int(length or 0) > self.config.max_frames:
            raise ValueError(f"a video of {length} frames: choose at most {self.config.max_frames}")
        paths = list(files or [])
        settings: dict[str, Any] = {"frames": frames or "", "strength": strength, "length": int(length or 0)}
        if task == HAND:
            settings = self.by_hand(table, int(steps))
        elif TASKS[task].length:
            settings["length"] = settings["length"] or min(TASKS[task].length, self.config.max_frames)
        config = GenerationConfig(
            task=task,
            num=1,
            seed=int(seed or 0),
            steps=int(steps),
            solver=solver,
            spacing=spacing or "",
            class_=class_ or "",
            guidance=float(guidance or 1),
            prompt=prompt or "",
            negative_prompt=negative or "",
            **settings,
        )
        return request_of(self.model, config, paths)

    def by_hand(self, table: Any, steps: int) -> dict[str, Any]:
        """Settings of the task `custom` for the schedule in the table, which is written to a file of its own."""
        try:
            rows = [FrameTimes(int(row[2]), int(row[3]), float(row[4]), _is_true(row[1])) for row in table]
        except (TypeError, ValueError):
            raise ValueError("the table has an empty cell, or text where a number belongs") from None
        if len(rows) > self.config.max_frames:
            raise ValueError(f"a schedule of {len(rows)} frames: draw at most {self.config.max_frames}")
        schedule = from_frame_times(rows, steps, self.num_timesteps)
        path = Path(tempfile.mkdtemp(prefix="fvdm-play-")) / "schedule.csv"
        write_schedule(schedule, path)
        given = ",".join(str(k) for k, row in enumerate(rows) if row.given)
        return {"schedule": str(path), "frames": given}


def settings_of(task: str) -> list[Any]:
    """Shows the settings that a task reads, in the order of `SETTINGS`."""
    return [gr.update(visible=task in tasks) for tasks in SETTINGS.values()]


def _is_true(value: Any) -> bool:
    return value is True or str(value).strip().lower() in ("true", "1", "yes")


def serve(model: Trained, config: PlayConfig, *, block: bool = True) -> Any:
    """Serve the page until interrupted; returns at once, with the server, unless `block`."""
    page = Page(model, config).build()
    page.launch(
        server_name=config.host,
        server_port=config.port or None,
        inbrowser=config.open_browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_threads=config.max_waiting + 24,  # A request that waits holds one.
        max_file_size="64mb",
        show_error=True,
    )
    if block:
        page.block_thread()
    return page
