"""What one process of an encoding does, and how the commands end."""

import errno
import io
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from signal import SIGINT

from data_prep.config import EncodeConfig, StrictError
from fvdm.interrupts import Interrupted, interrupts

ROOT = Path(__file__).resolve().parents[1]
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def run_job(config: EncodeConfig, number: int) -> int:
    """One of `config.jobs` jobs: makes every jobs-th shard of the plan that the command has written.

    Args:
        config: the settings, resolved.
        number: of the job, from 0.

    Returns:
        0 when the shards are made, 3 if `config.strict` and a video cannot be used.
    """
    from data_prep.encoder import open_models
    from data_prep.encoding import encode_shards
    from data_prep.planning import read_plan
    from data_prep.reporting import FrameCount
    from data_prep.shards import Work

    out = Path(config.out)
    plan = read_plan(out / "plan.json")
    config = replace(config, precision=plan.settings["precision"])
    work, count = Work(out, plan), FrameCount(out, number)
    shards = plan.shards[number :: config.jobs]
    count(encode_shards(config, work, shards, open_models(config), count), last=True)
    return 0 if all(work.complete(shard) for shard in shards) else 3


def exit_status(work: Callable[[], int], *, signals: bool = True) -> int:
    """Does the work of a command, and returns its exit status.

    A user's mistake or a full disk is one sentence and status 2, a stop by `--strict` 3, a signal 128 and its number;
    without `signals`, they do what they do anyway.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with interrupts() if signals else nullcontext():
            return work()
    except KeyboardInterrupt as error:
        signal = error if isinstance(error, Interrupted) else Interrupted(SIGINT)
        command = shlex.join(["python", *sys.argv])
        print(f"\nstopped by {signal.name}; what is done is kept. To continue, type: {command}", file=sys.stderr)
        return signal.exit_status
    except StrictError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        path = f" {error.filename}" if error.filename else ""
        advice = "What is done is kept; fix that and start the same command again."
        print(f"error: cannot write{path}: {error.strerror}. {advice}", file=sys.stderr)
    return 2


def python_path() -> str:
    """PYTHONPATH by which a job finds this project, installed or not."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
