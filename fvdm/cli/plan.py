"""`fvdm plan --config configs/ucf101_xl.yaml --nodes 4 --gpus-per-node 8`: estimate what a training run needs.

Counted from the shapes, not measured: parameters, bytes per rank under ZeRO-2, arithmetic per clip, bytes on the wire,
and from a GPU's data sheet the time of a step and what fits. `--config` takes the settings of a training run; or name
its data with --data.path, or say everything by the options below, which override both.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fvdm import config as settings
from fvdm.training.config import PlanConfig, TrainConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        config = settings.parse(PlanConfig, with_training_config(words), __doc__, prog="fvdm plan")
        from fvdm.training.plan import report

        print("\n".join(report(config)))
    except ValueError as error:
        settings.fail(error)


def with_training_config(words: list[str]) -> list[str]:
    """The words with `--config FILE` of a training run replaced by the settings in it that matter to the plan.

    A file of the plan's own settings stays as it is.

    Raises:
        ValueError: if a setting in the file is wrong.
    """
    joined = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    path = joined[-1] if joined else words[words.index("--config") + 1] if "--config" in words[:-1] else ""
    if not path or not Path(path).is_file():
        return words
    import yaml

    content = yaml.safe_load(Path(path).read_text())
    if not isinstance(content, dict) or content.keys() <= {field.name for field in fields(PlanConfig)} - {"data"}:
        return words
    needed = [f"--{name}={value}" for name, value in (("name", "plan"), ("data.path", "-"))]
    config = settings.parse(TrainConfig, [*needed, "--config", path])
    values = {
        "model": config.model,
        "batch_size": config.data.batch_size,
        "frames": config.data.frames,
        "micro_batch": config.engine.micro_batch,
        "activation_checkpointing": config.activation_checkpointing,
        "precision": config.engine.precision,
        **{f"lora.{name}": value for name, value in vars(config.lora).items() if name != "targets"},
    }
    data = config.data.path
    if "://" in data or Path(data).exists():
        values["data.path"] = data
    elif data != "-":
        print(f"note: {data} is not there yet, so channels and size are the model's or your options", file=sys.stderr)
    rest = [
        word for k, word in enumerate(words) if not word.startswith("--config") and words[max(k - 1, 0)] != "--config"
    ]
    targets = ["--lora.targets", *config.lora.targets] if config.lora.targets else []
    return [*(f"--{name}={value}" for name, value in values.items()), *targets, *rest]
