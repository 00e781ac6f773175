"""Trained models in MLflow: `fvdm register --checkpoint runs/demo`; a training run does the same at its end.

    import mlflow, pandas

    model = mlflow.pyfunc.load_model("models:/demo/1")
    clips = model.predict(pandas.DataFrame({"task": ["generate"], "seed": [7], "steps": [50]}))  # uint8 (1 f 3 h w)

A model is the averaged weights in the form of `save_pretrained`, and fvdm/serving/pyfunc.py, which predicts with them.
"""

import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fvdm import __version__
from fvdm.checkpoints.find import resolve
from fvdm.checkpoints.layout import STEP
from fvdm.checkpoints.read import read_state
from fvdm.generation.config import GenerationConfig
from fvdm.generation.inputs import read_source
from fvdm.generation.pipeline import Trained
from fvdm.media.vae import load_vae
from fvdm.models.export import export_model
from fvdm.models.inference import read_inference_config
from fvdm.models.loading import config_from, read_backbone
from fvdm.serving.config import RegistryConfig
from fvdm.tracking.logged_model import LoggedModel
from fvdm.tracking.provenance import git_commit
from fvdm.tracking.tracker import Tracker, run_of

PACKAGES = ("av", "diffusers", "einops", "jsonargparse", "mlflow", "numpy", "pillow", "safetensors", "torch")
KINDS: dict[type, str] = {str: "string", int: "long", float: "double"}
EXAMPLE = [{"task": "generate", "seed": 0, "steps": 50}]


def columns() -> dict[str, str]:
    """Columns of the table that a model takes, name -> MLflow type: settings of `GenerationConfig`, and `given`."""
    own = {
        field.name.rstrip("_"): KINDS[type(field.default)]
        for field in fields(GenerationConfig)
        if type(field.default) in KINDS
    }
    return {k: v for k, v in own.items() if k not in ("num", "batch_size", "schedule")} | {"given": "binary"}


def signature(size: tuple[int, int]) -> dict[str, list[dict[str, Any]]]:
    """What a model takes and returns, in MLflow's form.

    Args:
        size: height and width of a frame in pixels.
    """
    inputs = [{"name": name, "type": kind, "required": name == "task"} for name, kind in columns().items()]
    clips = {"dtype": "uint8", "shape": [-1, -1, 3, *size]}
    return {"inputs": inputs, "outputs": [{"type": "tensor", "tensor-spec": clips}]}


def predict(trained: Trained, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """A clip for each row.

    Args:
        trained: from `fvdm.load`.
        rows: settings by `columns`, a missing one has its default; `given` is the content of an image or of a
            video file.

    Returns:
        uint8 `(n f 3 h w)`.

    Raises:
        ValueError: if a row does not fit the model, or the clips are not of one length; names the row.
    """
    clips: list[Tensor] = []
    for number, row in enumerate(rows, start=1):
        values = {"class_" if name == "class" else name: value for name, value in row.items() if name != "given"}
        try:
            given = frames_of(row["given"], trained.frame_size) if "given" in row else None
            clips.append(trained.generate(values.pop("task", "generate"), given=given, **values)[0])
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        if len(clips[-1]) != len(clips[0]):
            raise ValueError(
                f"row {number} makes {len(clips[-1])} frames, row 1 {len(clips[0])}: ask for one length at a time"
            )
    return torch.stack(clips).numpy()


def frames_of(content: bytes, size: int | tuple[int, int]) -> Tensor:
    """Frames, uint8 `(n 3 h w)`, of the content of an image or of a video file.

    Raises:
        ValueError: if it is neither.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            suffix = ".png" if getattr(image, "n_frames", 1) == 1 else ".mp4"
    except (UnidentifiedImageError, Image.DecompressionBombError):
        suffix = ".mp4"
    with tempfile.NamedTemporaryFile(prefix="given-", suffix=suffix) as file:
        file.write(content)
        file.flush()
        return read_source(file.name, size).frames


@dataclass(frozen=True)
class Packed:
    """A folder of `save_pretrained`, with everything that is needed to use it.

    Attributes:
        folder: where it lies.
        step: training step; 0 if unknown.
        size: height and width of a frame in pixels.
    """

    folder: Path
    step: int
    size: tuple[int, int]


def pack(checkpoint: Path, root: Path) -> Packed:
    """Put a checkpoint's averaged weights into a folder, with its VAE where that is a folder.

    Args:
        checkpoint: of a run; a folder of `save_pretrained` stays where it is.
        root: the folder is made in here, unless it is there.

    Raises:
        ValueError: if the checkpoint cannot be read, or the folder not be written.
    """
    if (checkpoint / "config.json").is_file():
        network = read_backbone(checkpoint).config
        factor = load_vae(read_inference_config(checkpoint, network).vae).factor
        _, height, width = network.latent_shape
        return Packed(checkpoint, 0, (height * factor, width * factor))
    state = read_state(checkpoint)
    _, height, width = config_from(state["network"]).latent_shape
    size = (state["size"], state["size"] * width // height)
    packed = Packed(root / STEP.format(state["step"]), state["step"], size)
    if not packed.folder.exists():
        export_model(checkpoint, packed.folder)
    return packed


def log_model(tracker: Tracker, checkpoint: Path, root: Path, name: str) -> str:
    """Hand a checkpoint's model to the tracker, to be logged and registered.

    Args:
        tracker: of the run that it is logged to.
        checkpoint: see `pack`.
        root: see `pack`; stays on disk until the model is sent.
        name: in the registry; characters that MLflow takes in no name are replaced.

    Returns:
        The name in the registry.

    Raises:
        ValueError: see `pack`.
    """
    packed = pack(checkpoint, root)
    registered = re.sub(r"[/:]", "-", name)
    tracker.log_model(
        LoggedModel(
            folder=str(packed.folder.resolve()),
            code=str(Path(__file__).with_name("pyfunc.py").resolve()),
            name=STEP.format(packed.step),
            registered=registered,
            step=packed.step,
            signature=signature(packed.size),
            example=EXAMPLE,
            requirements=[f"{package}=={version(package).partition('+')[0]}" for package in PACKAGES],
            metadata={"fvdm": __version__, "git_commit": git_commit(), "step": packed.step},
        )
    )
    return registered


def register(config: RegistryConfig) -> str:
    """Log and register a model; returns a message for the terminal.

    Raises:
        ValueError: if there is no such model, or MLflow refuses it.
    """
    path = Path(config.checkpoint)
    checkpoint = path if (path / "config.json").is_file() else resolve(path)
    inside = checkpoint.parent.name == "checkpoints"
    name = config.name or (checkpoint.parent.parent if inside else checkpoint).resolve().name
    root = Path(config.out or Path("registered") / name)
    tracker = Tracker(
        root / ".tracking", config.tracking, f"register-{name}", tags={"kind": "register"}, run_id=run_of(checkpoint)
    )
    try:
        registered = log_model(tracker, checkpoint, root, name)
    finally:
        tracker.close()
    if tracker.refused:
        raise ValueError(f"MLflow did not take the model of {checkpoint}; the line above says why")
    if tracker.unsent():
        return f"{registered}: not registered yet; type the same command again when MLflow answers"
    return f'{registered}: registered; use it with mlflow.pyfunc.load_model("models:/{registered}/latest")'
