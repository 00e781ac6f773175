"""The Markdown description of a run, which MLflow shows on its overview page."""

import bisect
import hashlib
import itertools
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote

from fvdm.tracking.journal import ENDS

TAG = "mlflow.note.content"
TABLE = 4000  # characters; MLflow cuts a description after 8000, in the middle of a row
OUTCOMES = {
    "FINISHED": "Finished",
    "FAILED": "Failed",
    "KILLED": "Stopped before its end",
}


def digest(text: str) -> str:
    """A short hash, to see whether somebody has edited the description."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def training_description(flat: Mapping[str, Any], command: str, **facts: Any) -> str:
    """The description of a training run: what is trained on what, and the commands that continue from it.

    Args:
        flat: the settings by dotted name.
        command: what was typed.
        **facts: what the settings alone do not say: `parameters` (their number), `latent_shape` (c h w), `videos`,
            `classes`, `vae`, `ranks`.
    """
    folder = f"{flat['runs']}/{flat['name']}"
    model = f"**{flat['model']}**"
    if "parameters" in facts:
        model += f" ({facts['parameters'] / 1e6:,.1f} M parameters)"
    data = f"`{flat['data.path']}`"
    if "videos" in facts:
        data += f" ({facts['videos']:,} videos, split {flat['data.split']})"
    clips = f"clips of {flat['data.frames']} frames at stride {flat['data.stride']}"
    if "latent_shape" in facts:
        clips += f", latents of {' × '.join(map(str, facts['latent_shape']))}"
    if facts.get("vae"):
        clips += f" from the VAE `{facts['vae']}`"
    ranks = f" on {facts['ranks']} rank{'s' * (facts['ranks'] > 1)}" if "ranks" in facts else ""
    text = f"{model} trained on {data}: {clips}. {flat['steps']:,} steps of {flat['data.batch_size']} clips{ranks}"
    text += f", p = {flat['p']:g}"
    text += f", {facts['classes']} classes." if facts.get("classes") else ", no class labels."
    made = f"{folder}/samples"
    return text + commands(
        {
            "continue": command,
            "sample": shlex.join(["fvdm", "generate", "--checkpoint", folder, "--num", "16", "--out", made]),
            "measure": shlex.join(["python", "benchmarks/fvd.py", "--real", "VIDEOS", "--fake", made, "--run", folder]),
            "export": shlex.join(["fvdm", "checkpoint", "export", folder, f"exported/{flat['name']}"]),
        }
    )


def commands(table: Mapping[str, str]) -> str:
    """A list of what to do and what to type for it."""
    return "\n\n" + "\n".join(f"- {what}: `{_line(command)}`" for what, command in table.items() if command)


def render(
    start: Mapping[str, Any],
    events: Iterable[Mapping[str, Any]],
    run_id: str,
    artifacts: str,
    images: Iterable[str],
    named: Callable[[str], str],
) -> str:
    """The description of a run at this moment.

    Args:
        start: see `fvdm.tracking.delivery.Sender`.
        events: the whole journal.
        run_id: the run.
        artifacts: link to its page of artifacts.
        images: paths of the images that MLflow has.
        named: the name in MLflow of a metric or a series of images.
    """
    story = _Story()
    for event in events:
        story.add(event)
    text, _, rest = (start.get("description") or _plain(start)).partition("\n\n")
    parts = [f"{text} {story.outcome()}"]
    if story.figures:
        parts.append(_table(story.figures))
    parts.append(rest)
    page, _, mode = artifacts.partition("?")
    shown = []
    for key, step in story.images.items():
        path = _image(images, named(key), step)
        if path:
            shown.append(
                f"**{named(key)}**, step {step:,}\n\n![{key}](get-artifact?path={quote(path)}&run_uuid={run_id})"
            )
    parts += shown[-4:]
    videos = [f"[{name}]({page}{quote(name)}?{mode})" for name in story.videos.values()]
    if videos:
        parts.append("Newest videos: " + ", ".join(videos[-8:]))
    return "\n\n".join(part for part in parts if part)


def _table(figures: Mapping[str, float]) -> str:
    """The figures as a table of no more than `TABLE` characters; a line counts those that are left out."""
    rows = [f"| {_line(name)} | {value:.4g} |\n" for name, value in figures.items()]
    sizes = list(itertools.accumulate(map(len, rows)))
    shown = bisect.bisect_right(sizes, TABLE)
    more = f"\nand {len(rows) - shown} more figures" if shown < len(rows) else ""
    return "| figure | value |\n|---|---|\n" + "".join(rows[:shown]) + more


class _Story:
    """What a journal tells: the last numbers, how the run ended, its newest images and videos."""

    def __init__(self) -> None:
        self.first = self.last = 0
        self.seconds = 0.0
        self.status = ""
        self.step, self.loss = 0, ""
        self.figures: dict[str, float] = {}
        self.images: dict[str, int] = {}
        self.videos: dict[str, str] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        now = int(event.get("time", 0))
        self.first = self.first or now
        if "start" not in event and self.last:
            self.seconds += (now - self.last) / 1000
        self.last = now
        self.status = str(event.get("status", "RUNNING"))
        if "metrics" in event and event["step"]:
            self.step = max(self.step, event["step"])
            loss = event["metrics"].get("loss/mean")
            self.loss = f", loss {loss:.4f}" if loss is not None else self.loss
        self.figures |= event.get("figures", {})
        if "image" in event:
            self.images[event["key"]] = event["step"]
        name = str(event.get("artifact", "")).rpartition("/")[2]
        if name.endswith((".mp4", ".webm")):
            self.videos[name] = f"{event['to']}/{name}" if event["to"] else name

    def outcome(self) -> str:
        """How the run ended, or when it was started."""
        reached = f" at step {self.step:,}{self.loss}" if self.step else ""
        if self.status in ENDS:
            return f"**{OUTCOMES[self.status]}**{reached}, {_moment(self.last)}, after {duration(self.seconds)}."
        return f"**Running** since {_moment(self.first)}." if self.first else ""


def duration(seconds: float) -> str:
    """A duration in words, such as `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join([f"{value} {unit}" for value, unit in units if value][:2]) or "0 s"


def _plain(start: Mapping[str, Any]) -> str:
    tags = start.get("tags", {})
    kind, name = tags.get("kind", "run"), start.get("name", "")
    return f"**{kind}** {name.removeprefix(f'{kind} ')}" + commands({"repeat": tags.get("mlflow.source.name", "")})


def _moment(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(milliseconds / 1000))


def _image(paths: Iterable[str], key: str, step: int) -> str:
    """The image of a series at a step: `images/KEY+step+STEP+timestamp+...png`, with `~` for the slashes of the key."""
    start = f"images/{key.replace('/', '~')}+step+{step}+"
    found = [path for path in sorted(paths) if path.startswith(start) and path.endswith(".png")]
    return found[-1] if found else ""


def _line(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
