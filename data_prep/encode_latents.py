"""Turns a folder of videos into WebDataset shards of VAE latents.

    python data_prep/encode_latents.py --videos DIR --out DIR [--vae builtin] [--size 128]

Killed at any moment and started again with the same command, it goes on. Exit status: 0 all videos encoded, 3
some rejected (see rejected.jsonl), 2 nothing usable or wrong usage.
"""

import errno
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.options import EncodeConfig, Stopped, check, encoders, parse, print_any_name, workers
from fvdm.files import LockHeldError, lock

if TYPE_CHECKING:
    from data_prep.encoder import Progress
    from data_prep.reporting import Report
    from data_prep.shards import Plan, ShardPlan, Work
    from fvdm.media.vae import VAE


def main(config: EncodeConfig) -> int:
    """Runs the command; returns the exit status.

    Raises:
        ValueError: wrong usage, or nothing usable.
        Stopped: a video cannot be used, and `config.strict`.
    """
    from data_prep.planning import check_device, make_plan, open_vae
    from data_prep.reporting import Report

    check(config)
    if config.job is not None:
        return job(config, config.job)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--out {config.out!r} is a file, or lies below one: name a folder.") from None
    with _alone(out):
        if config.cluster == "local":
            check_device(config)
        vae = open_vae(config if _here(config) else replace(config, device="cpu", precision="float32"))
        plan = make_plan(config, vae)
        params = {**vars(config), **plan.settings, "layout": plan.layout, "videos": plan.videos}
        report = Report(out, config.mlflow, config.experiment, params)
        status = "FAILED"
        try:
            code = _run(config, plan, vae, report)
            status = "FINISHED"
            return code
        except KeyboardInterrupt:
            status = "KILLED"
            print("Interrupted; the same command goes on where this one was.", file=sys.stderr)
            return 130
        finally:
            report.close(status)


def _here(config: EncodeConfig) -> bool:
    """Whether this process encodes, and no job does."""
    return config.jobs == 1 and config.cluster == "local"


def _run(config: EncodeConfig, plan: "Plan", vae: "VAE", report: "Report") -> int:
    """Makes the shards that are not whole yet, then the manifest; returns the exit status."""
    from data_prep.jobs import queued, run_jobs
    from data_prep.shards import Work

    work = Work(Path(config.out), plan)
    jobs = queued(config)
    if not jobs:
        finished = (work.out / "manifest.json").exists()
        again = work.retry(Path(config.videos), everything=config.strict and not finished)
        if again:
            print(f"{config.out}: tries {again} rejected videos again")
    frames = 0
    try:
        if all(work.whole(shard) for shard in plan.shards):
            print("Every shard is whole.")
        elif _here(config):
            frames = _encode_here(config, work, plan.shards, vae, report)
        else:
            frames = run_jobs(config, work, report, jobs)
    finally:
        rejected = work.write_rejected()
    if config.strict and rejected:
        raise Stopped(rejected[0]["source"], rejected[0]["reason"])
    if not all(work.whole(shard) for shard in plan.shards):
        raise ValueError("Some shards are not made, though no job has failed: start the same command again.")
    return _finish(config, plan, vae, report, frames, len(rejected))


def job(config: EncodeConfig, number: int) -> int:
    """One of `config.jobs` jobs: makes every jobs-th shard of the plan that the command has written."""
    from data_prep.planning import open_vae, read_plan
    from data_prep.shards import Work

    plan = read_plan(Path(config.out) / "plan.json")
    config = replace(config, precision=plan.settings["precision"])  # this machine may have another default
    shards = plan.shards[number :: config.jobs]
    work = Work(Path(config.out), plan)
    _encode_here(config, work, shards, open_vae(config), None)
    return 0 if all(work.whole(shard) for shard in shards) else 3


def _encode_here(
    config: EncodeConfig, work: "Work", shards: "list[ShardPlan]", vae: "VAE", report: "Report | None"
) -> int:
    """Encodes in this process, with a progress bar unless it is one of several jobs; returns the frames."""
    from data_prep.encoder import encode_shards
    from data_prep.reporting import FrameCount, progress_bar

    count = None if config.job is None else FrameCount(work.out, config.job)
    videos = [video for shard in shards for video in work.missing(shard)]
    before = sum(map(work.done, shards))
    shown = 0
    with progress_bar(sum(work.plan.estimates[video] for video in videos), "frames", hidden=report is None) as bar:

        def show(progress: "Progress") -> bool:
            nonlocal shown
            for name, reason in progress.rejected[shown:]:
                bar.write(f"rejected {name!a}: {reason}", file=sys.stderr)
            shown = len(progress.rejected)
            if report:
                rate = progress.videos / report.seconds
                bar.set_postfix_str(f"{progress.videos} videos, {rate:.2f} videos/s, {shown} rejected", refresh=False)
                bar.update(progress.frames - bar.n)
                ended = progress.videos + shown
                report.update(ended, before + ended, progress.frames)
            if count:
                count.update(progress.frames)
            return not (config.strict and shown)

        progress = encode_shards(
            Path(config.videos),
            work,
            shards,
            vae,
            decoders=min(workers(config), max(1, len(videos))),
            encoders=encoders(config),
            timeout=config.timeout,
            report=show,
        )
    if count:
        count.update(progress.frames, last=True)
    return progress.frames


def _finish(config: EncodeConfig, plan: "Plan", vae: "VAE", report: "Report", frames: int, rejected: int) -> int:
    """Writes the manifest, prints the summary and returns the exit status."""
    from data_prep.planning import latent_shape
    from data_prep.shards import finish
    from fvdm.data.former import FORMAT

    about = {
        "format": FORMAT,
        "vae": config.vae,
        "vae_identity": vae.identity,
        "normalisation": vae.normalisation.to_dict(),
        "latent_shape": latent_shape(config, vae),
        "size": config.size,
        "dtype": config.dtype,
        "flip": plan.settings["preprocess"]["flip"],
        "preprocess": plan.settings["preprocess"],
        "rejected": rejected,
    }
    manifest = finish(Path(config.out), plan, about)
    print(report.finish(Path(config.out), manifest, frames))
    if not manifest.shards:
        raise ValueError(f"No video of {len(plan.sources)} could be used; {config.out}/rejected.jsonl says why.")
    return 3 if rejected else 0


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the folder's lock: a second run on this machine is refused with a sentence."""
    with ExitStack() as held:
        try:
            held.enter_context(lock(out / ".lock", timeout=0))
        except LockHeldError:
            raise ValueError(
                f"Another encode_latents.py is writing to {str(out)!r}: wait for it, or stop it."
            ) from None
        yield


def run(config: EncodeConfig) -> int:
    """Runs the command, prints user errors as one sentence; returns the exit status."""
    print_any_name()
    try:
        return main(config)
    except Stopped as error:
        print(f"encode_latents.py: {error}", file=sys.stderr)
        return 3
    except ValueError as error:
        print(f"encode_latents.py: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(
            f"encode_latents.py: cannot write: {error.strerror}. What is done is kept; mend that and start the "
            "same command again.",
            file=sys.stderr,
        )
    return 2


if __name__ == "__main__":
    sys.exit(run(parse(__doc__)))
