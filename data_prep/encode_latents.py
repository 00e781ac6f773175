"""Encode a folder of videos to WebDataset shards of VAE latents.

    python data_prep/encode_latents.py                                            # the clips of the demo
    python data_prep/encode_latents.py --videos DIR --out DIR --size 256 --vae stabilityai/sd-vae-ft-ema

To resume, type the same command again: it continues where it was stopped. Exit status: 0 all videos encoded, 3
some rejected (see rejected.jsonl), 2 nothing usable or wrong usage.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from data_prep.installed import require_packages

    require_packages()

from data_prep.config import DEMO_CLIPS, EncodeConfig, StrictError, resolve
from data_prep.job import exit_status
from fvdm import config as settings
from fvdm.files import LockHeldError, lock
from fvdm.tracking.config import check_uri, tracking_uri

if TYPE_CHECKING:
    from data_prep.encoder import Models
    from data_prep.planning import EncodePlan
    from data_prep.reporting import EncodeReport

PROG = "python data_prep/encode_latents.py"


def main(config: EncodeConfig) -> int:
    """Runs the command; returns the exit status.

    Raises:
        ValueError: wrong usage, or nothing usable.
        StrictError: a video cannot be used, and `config.strict`.
    """
    from data_prep.encoder import Models, check_device, open_models
    from data_prep.planning import make_plan
    from data_prep.reporting import EncodeReport
    from data_prep.slurm_jobs import queued

    demo = not config.videos
    config = resolve(config)
    if config.mlflow != "none":
        check_uri(tracking_uri(config.mlflow))
    if demo:
        _make_demo_clips(config)
    with _lock_folder(Path(config.out)):
        jobs = queued(config)
        if config.cluster == "local":
            check_device(config)
        models = open_models(config if config.here else replace(config, device="cpu", precision="float32"))
        plan = make_plan(config, models.vae, models.text, replace_idle=not jobs)
        if not config.here:
            models = Models(models.vae)  # a text encoder may be large
        with EncodeReport(config, plan) as report:
            return _run(config, plan, models, report, jobs)


def _make_demo_clips(config: EncodeConfig) -> None:
    """Cuts the clips of the demo, and says what was chosen."""
    from data_prep.demo_clips import cut_clips

    if not any(Path(DEMO_CLIPS).glob("*.mp4")):
        cut_clips(Path(DEMO_CLIPS))
    print(
        f"There is no --videos, so this encodes the clips of the demo, {DEMO_CLIPS}, to {config.out}: with the VAE "
        f"{config.vae}, at {config.size} pixels, on {config.device}. It takes some seconds.\n"
        f"For your own videos: {PROG} --videos DIR --size 256 --vae stabilityai/sd-vae-ft-ema"
    )


def _run(
    config: EncodeConfig, plan: "EncodePlan", models: "Models", report: "EncodeReport", jobs: Sequence[object]
) -> int:
    """Makes the shards that are not complete yet, then the manifest; returns the exit status."""
    from data_prep.encoding import encode_shards
    from data_prep.jobs import run_jobs
    from data_prep.manifest import finish
    from data_prep.shards import Work

    work = Work(Path(config.out), plan)
    if not jobs:
        finished = (work.out / "manifest.json").exists()
        again = work.retry(Path(config.videos), everything=config.strict and not finished)
        if again:
            print(f"{config.out}: tries {again} rejected videos again")
    frames = 0
    try:
        if all(work.complete(shard) for shard in plan.shards):
            print("Every shard is complete.")
        else:
            report.start(work, plan.shards)
            if config.here:
                frames = encode_shards(config, work, plan.shards, models, report).frames
            else:
                frames = run_jobs(config, work, report, jobs)
    finally:
        report.end_bar()
        rejected = work.write_rejected()
    if config.strict and rejected:
        raise StrictError(rejected[0]["source"], rejected[0]["reason"])
    if not all(work.complete(shard) for shard in plan.shards):
        raise ValueError("Some shards are not made, though no job has failed: start the same command again.")
    manifest = finish(config, work.out, plan, models.vae, len(rejected))
    print(report.finish(manifest, frames))
    if not manifest.shards:
        raise ValueError(f"No video of {len(plan.sources)} could be used; {config.out}/rejected.jsonl says why.")
    print(f"To see what is in it, type: python data_prep/inspect_shards.py {config.out}")
    return 3 if rejected else 0


@contextmanager
def _lock_folder(out: Path) -> Iterator[None]:
    """Makes the folder and holds its lock: a second run is refused with a sentence."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--out {str(out)!r} is a file, or lies below one: name a folder.") from None
    with ExitStack() as held:
        try:
            held.enter_context(lock(out / ".lock", timeout=0))
        except LockHeldError:
            raise ValueError(
                f"Another encode_latents.py is writing to {str(out)!r}: wait for it, or stop it."
            ) from None
        yield


def run(words: Sequence[str] | None = None) -> int:
    """The command with its words; prints user errors as one sentence, and returns the exit status."""
    return exit_status(lambda: main(settings.parse(EncodeConfig, words, __doc__, prog=PROG)))


if __name__ == "__main__":
    sys.exit(run())
