"""The page of the playground: its controls, and what happens when they are used. The only place that imports gradio."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from fvdm.diffusion.solvers import SOLVERS
from fvdm.diffusion.tasks import TASKS
from fvdm.diffusion.timesteps import SPACINGS
from fvdm.generation.config import GenerationConfig
from fvdm.generation.pipeline import Trained
from fvdm.media.writing import write_mp4
from fvdm.playground.config import PlayConfig
from fvdm.playground.schedules import FrameTimes, frame_times, from_frame_times, image
from fvdm.playground.session import Request, Snapshot, command_line, plan_of, read_given, run, write_schedule

FPS = 8.0
COLUMNS = 8  # frames side by side in the image of a clip
SHARED = 9  # controls that both schedules share
HAND = "custom"  # the task whose schedule is drawn by hand
HEADERS = ["frame", "given", "start", "stop", "noise %"]
CSS = """
.gradio-container {max-width: 1380px !important}
#clip-a img, #clip-b img {image-rendering: pixelated}
"""
INTRO = """# FVDM playground
Every frame has a timestep of its own. A **schedule** says how the timesteps fall, from noise (white) to clean (black):
a column per frame, a row per step. Frames that you give are blue. Choose a task, or choose *custom* and edit the
table."""


class Page:
    """The page, for one model."""

    def __init__(self, model: Trained, config: PlayConfig) -> None:
        self.model, self.config = model, config
        self.num_timesteps = model.diffusion.num_timesteps

    def build(self) -> gr.Blocks:
        """Lay out the page and connect its controls."""
        with gr.Blocks(title="FVDM playground", analytics_enabled=False) as page:
            gr.Markdown(INTRO)
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=360):
                    shared = self._shared()
                    first = self._schedule("A", "image-to-video")
                    compare = gr.Checkbox(
                        False, label="Compare with a second schedule, from the same seed", elem_id="compare"
                    )
                    with gr.Group(visible=False) as second_group:
                        second = self._schedule("B", "generate")
                with gr.Column(scale=3, min_width=360):
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Cancel", elem_id="cancel")
                    status = gr.Markdown("Press *Generate*.", elem_id="status")
                    outputs = [status, *self._result("A")]
                    with gr.Group(visible=False) as result_group:
                        outputs += self._result("B")
            compare.change(
                lambda on: (gr.update(visible=on), gr.update(visible=on)),
                compare,
                [second_group, result_group],
                api_visibility="private",
            )
            inputs = [*shared, *first, compare, *second]
            event = go.click(self.generate, inputs, outputs, api_visibility="private", concurrency_id="model")
            stop.click(lambda: "Cancelled.", None, status, cancels=[event], queue=False, api_visibility="private")
            for controls in (first, second):
                self._connect(shared, controls)
        page.queue(max_size=self.config.max_waiting, default_concurrency_limit=1, api_open=False)
        return page

    def _shared(self) -> list[Any]:
        """Controls that both schedules share: given files, steps, solver, spacing, seed, class, guidance, prompts."""
        files = gr.File(
            file_count="multiple",
            file_types=["image", "video"],
            type="filepath",
            elem_id="given",
            height=120,
            label="Given images or a video, in the order of the frames",
        )
        with gr.Row():
            steps = gr.Slider(1, self.config.max_steps, 20, step=1, label="steps", elem_id="steps")
            seed = gr.Number(0, precision=0, minimum=0, label="seed", elem_id="seed")
        with gr.Row():
            solver = gr.Dropdown(list(SOLVERS), value="unipc", label="solver")
            spacing = gr.Dropdown(
                [("the solver's own", ""), *((name, name) for name in SPACINGS)], value="", label="spacing"
            )
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
        gr.Markdown(f"### Schedule {name}")
        with gr.Row():
            chosen = gr.Dropdown(list(TASKS), value=task, label="task", elem_id=f"task-{name.lower()}")
            length = gr.Number(0, precision=0, minimum=0, label="frames of the video (0: the task's own)")
        with gr.Row():
            frames = gr.Textbox("", label="frame indices", placeholder="0,5,-1 or 4:12")
            strength = gr.Slider(0, 1, 0.6, step=0.05, label="strength (edit)")
        picture = gr.Image(
            interactive=False, show_label=False, buttons=[], height=200, elem_id=f"schedule-{name.lower()}"
        )
        with gr.Accordion("Draw it by hand", open=False):
            table = gr.Dataframe(
                headers=HEADERS,
                datatype=["number", "bool", "number", "number", "number"],
                type="array",
                column_count=5,
                interactive=True,
                static_columns=[0],
                elem_id=f"table-{name.lower()}",
            )
        return [chosen, length, frames, strength, table, picture]

    def _result(self, name: str) -> list[Any]:
        """What is shown of one clip: its frames step by step, the video, the command line, the schedule's file."""
        key = name.lower()
        clip = gr.Image(interactive=False, label=f"Clip {name}", height=300, buttons=[], elem_id=f"clip-{key}")
        video = gr.Video(
            interactive=False, autoplay=True, loop=True, height=240, label=f"Video {name}", elem_id=f"video-{key}"
        )
        command = gr.Code(language="shell", label="The command that makes the same clip", elem_id=f"command-{key}")
        file = gr.File(label="The schedule", height=60, visible=False, elem_id=f"file-{key}")
        return [clip, video, command, file]

    def _connect(self, shared: list[Any], controls: list[Any]) -> None:
        """Redraw the schedule when a control changes; fill the table when another task is chosen."""
        chosen, length, frames, strength, table, picture = controls
        inputs = [*shared, chosen, length, frames, strength, table]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        for control in (shared[0], shared[1], shared[3], shared[4], length, frames, strength):
            control.change(self.redraw, inputs, [picture, table], **quiet)
        chosen.change(self.redraw, inputs, [picture, table], **quiet)
        table.input(self.edit, inputs, [chosen, picture], **quiet)
        gr.on(None, self.redraw, inputs, [picture, table], **quiet)

    def redraw(self, *values: Any) -> tuple[Any, Any]:
        """The image of the schedule, and the table that draws the same."""
        try:
            request = self.request(values[:SHARED], values[SHARED : SHARED + 5])
            schedule, given = plan_of(self.model, request)
        except ValueError as error:
            return gr.update(value=None, label=str(error), show_label=True), gr.skip()
        shown = gr.update(value=image(schedule, given, self.num_timesteps), show_label=False)
        if request.config.task == HAND:
            return shown, gr.skip()
        times = frame_times(schedule, given, self.num_timesteps)
        return shown, [[k, t.given, t.start, t.stop, round(t.noise, 1)] for k, t in enumerate(times)]

    def edit(self, *values: Any) -> tuple[Any, Any]:
        """After an edit of the table: the task is `custom`, and its image."""
        values = (*values[:SHARED], HAND, *values[SHARED + 1 :])
        return HAND, self.redraw(*values)[0]

    def generate(self, *values: Any) -> Iterator[list[Any]]:
        """Sample schedule A and, if asked for, schedule B; yields the outputs after each step.

        Raises:
            gr.Error: with the sentence of a user's mistake.
        """
        shared, schedules = values[:SHARED], values[SHARED:]
        first, compare, second = schedules[:5], schedules[6], schedules[7:12]
        shown: list[Any] = ["", *[None] * 8]
        try:
            for place, controls in enumerate((first, second) if compare else (first,)):
                request = self.request(shared, controls)
                for snapshot in run(self.model, request, threading.Event()):
                    shown[0] = f"**{'AB'[place]}**: step {snapshot.step}"
                    shown[1 + 4 * place] = strip(snapshot)
                    if snapshot.done:
                        shown[2 + 4 * place : 5 + 4 * place] = self.finished(request, snapshot)
                    yield shown
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        shown[0] = "Done."
        yield shown

    def finished(self, request: Request, snapshot: Snapshot) -> list[Any]:
        """The video, the command line and the schedule file of a finished clip."""
        folder = Path(tempfile.mkdtemp(prefix="fvdm-play-"))
        video = folder / f"{request.config.task}-{request.config.seed:05d}.mp4"
        write_mp4(snapshot.frames, video, FPS)
        hand = request.config.task == HAND
        return [
            str(video),
            command_line(self.config.checkpoint, request),
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
        return Request(config, read_given(paths, self.model.size), tuple(Path(path).name for path in paths))

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


def _is_true(value: Any) -> bool:
    return value is True or str(value).strip().lower() in ("true", "1", "yes")


def strip(snapshot: Snapshot) -> Any:
    """A clip's frames in rows of eight, as one image."""
    frames = snapshot.frames
    rest = -len(frames) % COLUMNS
    padded = torch.cat([frames, frames.new_full((rest, *frames.shape[1:]), 255)])
    rows = [torch.cat(list(row), dim=2) for row in padded.split(COLUMNS)]
    return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()


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
        max_file_size="64mb",
        show_error=True,
    )
    if block:
        page.block_thread()
    return page
