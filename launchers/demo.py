"""The complete pipeline, small: real clips -> latents -> ZeRO-2 training on two ranks -> videos -> FVD -> MLflow.

Runs the very commands that a user would type, prints each, and ends by saying where to look. On a machine with a
single GPU, which two ranks cannot share, one rank trains. Options are settings of its training run, as
launchers/slurm_train.py takes them.
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from data_prep.installed import require_packages

    require_packages()

from fvdm import config as settings
from launchers.config import TrainJobConfig

RUN = Path("runs/demo")
TASKS = {
    "generate": [],
    "image-to-video": ["--given", "demo/clips/bigbuckbunny-0080.mp4"],
    "interpolate": ["--given", "demo/clips/carphone_pristine-0040.mp4"],
    "long": ["--length", "64", "--num", "1"],
}
FVD_CLIPS = "32"
SIZE = "64"  # pixels
HELD_OUT = "demo/latents-held-out"
LOSS = "validation/loss"
CONFIG = ["--config", "configs/demo.yaml"]


@dataclass(frozen=True)
class DemoConfig:
    """The demo has no settings of its own."""


def commands(extra: list[str]) -> dict[str, list[str]]:
    """What the demo runs, in order: a title and a command each."""
    import torch

    python = sys.executable
    encode = ["data_prep/encode_latents.py", "--size", SIZE]
    nodes = "1" if torch.cuda.device_count() == 1 else "2"
    train = ["launchers/slurm_train.py", "--cluster", "local", "--nodes", nodes, *CONFIG]
    train += ["--validation.path", HELD_OUT, "--validation.every", "1000"]
    generate = ["-m", "fvdm", "generate", "--checkpoint", str(RUN), "--steps", "25"]
    fvd = ["benchmarks/fvd.py", "--protocol", "even", "--real", "demo/clips", "--fake", "demo/videos/fvd"]
    fvd += ["--fake-pattern", "generate-*.mp4"]
    tasks = {
        f"task {task}": [*generate, "--task", task, "--out", f"demo/videos/{task}", "--num", "4", *words]
        for task, words in TASKS.items()
    }
    steps = {
        "real clips": ["data_prep/demo_clips.py", "--out", "demo/clips", "--held-out", "demo/held-out"],
        "latents": [*encode, "--videos", "demo/clips", "--out", "demo/latents"],
        "latents of the held-out clips": [*encode, "--videos", "demo/held-out", "--out", HELD_OUT],
        "training": [*train, *extra],
        **tasks,
        "samples for FVD": [*generate, "--out", "demo/videos/fvd", "--num", FVD_CLIPS, "--seed", "1000"],
        "FVD": [*fvd, "--clips", FVD_CLIPS, "--size", SIZE, "--run", str(RUN), "--out", "demo/fvd"],
    }
    return {title: [python, *words] for title, words in steps.items()}


def held_out_losses(run: Path) -> list[tuple[int, float]]:
    """Steps and held-out losses of a run, in the order of its steps."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    found = {event["step"]: event["metrics"][LOSS] for event in events if LOSS in event.get("metrics", {})}
    return sorted(found.items())


def main() -> None:
    """Run every step; stop at the first that fails."""
    own, extra = settings.split_words(DemoConfig, sys.argv[1:])
    try:
        settings.parse(DemoConfig, own, __doc__, prog="python launchers/demo.py")
        settings.parse(TrainJobConfig, [*CONFIG, *extra])
    except ValueError as error:
        settings.fail(error)
    from fvdm.tracking.pages import where_to_look

    began = time.monotonic()
    for title, command in commands(extra).items():
        shown = ["python", *command[1:]]
        print(f"\n== {title}  [{time.monotonic() - began:.0f} s]\n$ {shlex.join(shown)}", flush=True)
        code = subprocess.run(command).returncode
        if code:
            print(f"\nthe demo stopped at: {title} (exit code {code}); to continue, type make demo", file=sys.stderr)
            raise SystemExit(code)
    result = json.loads(Path("demo/fvd/fvd.json").read_text())
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes.")
    print(f"  videos   {Path('demo/videos').resolve()}")
    losses = held_out_losses(RUN)
    if losses:  # A run of before that is complete has none.
        (first, start), (last, end) = losses[0], losses[-1]
        print(f"  loss     {start:.3f} at step {first}, {end:.3f} at step {last}, on clips that were held out")
    print(f"  FVD      {result['fvd']:.1f} ({result['clips']} clips: far too few to compare with published numbers)")
    print(f"  MLflow   {where_to_look(RUN)}")


if __name__ == "__main__":
    main()
