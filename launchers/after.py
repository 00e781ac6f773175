"""What the sbatch file runs around the ranks: prepares a start, watches srun, and decides whether the job starts again.

    after.py begin FOLDER MAX_RESTARTS
    after.py watch FOLDER MAX_RESTARTS           in the background, beside srun
    after.py end FOLDER MAX_RESTARTS CODE        CODE: what srun returned

A job starts again when a signal stopped it while Slurm still lets it run (a time limit ahead, a preemption), and when
a rank failed; not when the user cancelled it, nor when a setting is wrong. All decisions need only Python's standard
library; they take no time unless Slurm's controller does not answer, which is then asked again for some minutes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from os import environ
from pathlib import Path

TIMEOUT = 600.0  # seconds in which Slurm's controller may come back
WATCH_EVERY = 10.0  # seconds between two looks at the steps of the job
MISSING_LOOKS = 3  # in a row without a step, after which srun is taken to wait for nobody
CLOSE_TIMEOUT = 15.0  # seconds for an MLflow server that does not answer; after a scancel, Slurm leaves 30
NO_ANSWER = re.compile(
    r"contact|timed out|refused|reset by|Zero Bytes|[Cc]ommunication|Transport|standby|temporarily|[Rr]esol|route|down"
)
FIRST_FAILURE = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.+)$", re.MULTILINE)
EXCEPTION = re.compile(r"^\s*(?:\[rank\d+\]:\s*)?(\w[\w.]*(?:Error|Exception|Interrupt)\b.*)$", re.MULTILINE)
STATUS = {"done": "FINISHED", "cancelled": "KILLED", "error": "FAILED", "failed": "FAILED"}


class Files:
    """The files in a job's folder by which its parts report to each other.

    Attributes:
        error: the sentence of a rank that found a mistake of the user's.
        cause: the sentence of a rank that knows why all must end, where another start may help: a disk, a hung rank.
        again: exists when a signal has stopped the ranks and work is left.
        outcome: how the job ended, for its followers: done, again, cancelled, error or failed, and a sentence.
        progress: names the folder whose newest checkpoint shows how far the job has come.
        failures: a line of JSON for each failure.
        mark: size of each log when this start of the job began, as JSON.
        log: what the job and rank 0 print.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self.folder, self.job = folder, job
        self.error = folder / f"{job}_error.txt"
        self.cause = folder / f"{job}_cause.txt"
        self.again = folder / f"{job}_again"
        self.outcome = folder / f"{job}_outcome.txt"
        self.progress = folder / f"{job}_progress.txt"
        self.failures = folder / f"{job}_failures.jsonl"
        self.mark = folder / f"{job}_mark"
        self.log = folder / f"{job}_0_log.out"

    def log_of(self, rank: int) -> Path:
        """What a rank prints."""
        return self.folder / f"{self.job}_{rank}_log.out"

    def printed(self, log: Path) -> str:
        """What this start of the job has printed to a log."""
        sizes = json.loads(self.mark.read_text()) if self.mark.exists() else {}
        return log.read_bytes()[sizes.get(log.name, 0) :].decode(errors="replace") if log.exists() else ""

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that the job trains; None for other work, or before rank 0 has started."""
        return Path(self.progress.read_text()).parent if self.progress.exists() else None


def ask(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of Slurm's; retry while the controller does not answer, which says nothing about the job."""
    started, pause, failed = time.monotonic(), 1.0, False
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(command, 1, "", f"{command[0]} timed out")
        seconds = time.monotonic() - started
        if done.returncode == 0 or not NO_ANSWER.search(done.stderr) or seconds > TIMEOUT:
            if failed and not done.returncode:
                print(f"Slurm answers again after {seconds:.0f} s", flush=True)
            return done
        if not failed:
            print(f"{' '.join(done.stderr.split())}: retrying for up to {TIMEOUT / 60:.0f} minutes", flush=True)
        failed = True
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def job_id() -> str:
    """This job's number, as the names of its files have it."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]


def begin(files: Files) -> None:
    """Remove what an earlier start of the job has left."""
    for path in (files.error, files.cause, files.again, files.outcome, *files.folder.glob(f"{files.job}_port-*")):
        path.unlink(missing_ok=True)
    sizes = {log.name: log.stat().st_size for log in files.folder.glob(f"{files.job}_*_log.out")}
    _write(files.mark, json.dumps(sizes))


def watch(shell: int, pause: Callable[[float], None] = time.sleep) -> None:
    """End srun when it waits for ranks that are gone: on a node that is cut off, the message of their end may be lost.

    Args:
        shell: process that runs the sbatch file, the parent of srun.
        pause: waits so many seconds.
    """
    seen, missing = False, 0
    while os.getppid() == shell:
        pause(WATCH_EVERY)
        listed = ask("squeue", "-h", "-s", "-j", environ["SLURM_JOB_ID"], "-o", "%i")
        if listed.returncode:
            continue
        running = bool(re.search(r"\.\d+\s*$", listed.stdout, re.MULTILINE))
        seen, missing = seen or running, 0 if running else missing + 1
        if seen and missing >= MISSING_LOOKS:
            for process in children(shell, "srun"):
                print(f"srun waits for ranks that have ended {missing * WATCH_EVERY:.0f} s ago: ending it", flush=True)
                os.kill(process, signal.SIGKILL)
            return


def children(parent: int, name: str) -> list[int]:
    """Processes of this node with a parent and a name, the newest last."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        if head.partition("(")[2] == name and rest.split()[1] == str(parent):
            found.append(int(stat.parent.name))
    return sorted(found)


def end(files: Files, max_restarts: int, code: int) -> int:
    """Decide, report it, do it. Returns the exit code of the job."""
    if files.error.exists():
        return _finish(files, "error", files.error.read_text().strip(), 2)
    stopped = files.again.exists()
    if code == 0 and not stopped:
        return _finish(files, "done", "", 0)
    if not _still_running():
        return _finish(files, "cancelled", "", 0 if stopped else 1)
    if stopped:
        return _again(files, "stopped in time, with a checkpoint")
    cause = failure(files, code)
    count = _count_failure(files, cause)
    if count > max_restarts:
        sentence = f"{cause}. Failure {count} without a new checkpoint between: not started again (--max-restarts)"
        return _finish(files, "failed", sentence, 1)
    return _again(files, f"{cause}; start {count} of at most {max_restarts} without a new checkpoint")


def failure(files: Files, code: int) -> str:
    """Why a start has failed: what a rank has found out; else who failed first and how, in the order that srun saw."""
    found = FIRST_FAILURE.search(files.printed(files.log))
    cause = files.cause.read_text().strip() if files.cause.exists() else ""
    if cause and (not found or "exit code" in found[3]):  # Else a rank was killed, and the others met the consequences.
        return f"{cause}. The log: {files.log}"
    if not found:
        return f"the ranks ended with exit code {code}"
    node, rank, ending = found[1], int(re.split("[,-]", found[2])[0]), found[3]
    log = files.log_of(rank)
    sentence = f"rank {rank} on {node} failed first: {ending}"
    exceptions = EXCEPTION.findall(files.printed(log)) if "exit code" in ending else []
    sentence += f" ({exceptions[-1][:300]})" if exceptions else ""
    return f"{sentence}. Its log: {log}"


def _count_failure(files: Files, cause: str) -> int:
    """Write the failure down; how many there were in a row with the same newest checkpoint."""
    folder = Path(files.progress.read_text()) if files.progress.exists() else None
    newest = max((path.name for path in folder.glob("step-*")), default="") if folder else ""
    before = files.failures.read_text().splitlines() if files.failures.exists() else []
    lines = [*before, json.dumps({"time": time.time(), "cause": cause, "checkpoint": newest})]
    _write(files.failures, "".join(line + "\n" for line in lines))
    others = (i for i, line in enumerate(reversed(lines)) if json.loads(line)["checkpoint"] != newest)
    return next(others, len(lines))


def _write(path: Path, text: str) -> None:
    """Leave a note; a full disk takes none, and must not keep the job from starting again."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_text(text)
        temporary.rename(path)
    except OSError as error:
        print(f"{path} cannot be written: {error}", flush=True)
        temporary.unlink(missing_ok=True)


def _still_running() -> bool:
    """Whether Slurm still lets the job run: a cancelled one is already completing, as is one out of time.

    Only Slurm's own answer ends a job: without an answer, the job continues.
    """
    shown = ask("scontrol", "show", "job", "-o", environ["SLURM_JOB_ID"])
    state = re.search(r"JobState=(\w+)", shown.stdout)
    return state[1] == "RUNNING" if state else "Invalid job id" not in shown.stderr


def _finish(files: Files, what: str, sentence: str, code: int) -> int:
    if sentence:
        print(f"error: {sentence}", flush=True)
    _write(files.outcome, f"{what} {sentence}\n")
    close_mlflow_run(files.run_folder, STATUS[what])
    return code


def close_mlflow_run(run: Path | None, status: str) -> None:
    """End the MLflow run of a training run whose processes may not have reported their end. Never fails.

    Args:
        run: the run's folder.
        status: FINISHED, FAILED or KILLED; a run that has reported its own end keeps that.
    """
    if run is None or not run.is_dir():
        return
    try:
        from fvdm.tracking.closing import close_run

        if not close_run(run, status, CLOSE_TIMEOUT):
            print(f"MLflow has not taken the end of {run.name}: its next start sends it", flush=True)
    except Exception as error:  # Whatever is wrong with MLflow, the outcome of the job stands.
        print(f"the MLflow run of {run.name} could not be closed: {' '.join(str(error).split())}", flush=True)


def _again(files: Files, why: str) -> int:
    """Start the job again: requeue it, or submit its file once more where Slurm does not requeue."""
    files.again.unlink(missing_ok=True)
    print(f"{why}: starting job {files.job} again", flush=True)
    _write(files.outcome, "again\n")
    requeue = ask("scontrol", "requeue", files.job)
    if requeue.returncode == 0 or not _still_running():  # The request was heard, and its answer lost.
        return 0
    if "SLURM_ARRAY_JOB_ID" in environ:  # Its file would submit the whole array.
        messages = " ".join(requeue.stderr.split())
        return _finish(files, "failed", f"Slurm does not requeue this job of an array: {messages}", 1)
    submitted = ask("sbatch", "--parsable", str(files.folder / f"{files.job}_submission.sh"))
    if submitted.returncode:
        messages = " ".join(f"{requeue.stderr} {submitted.stderr}".split())
        return _finish(files, "failed", f"Slurm neither requeues nor takes the job again: {messages}", 1)
    new = submitted.stdout.strip().partition(";")[0]
    # The new job waits a minute for its pickle.
    for kind in ("submitted.pkl", "submission.sh", "failures.jsonl"):
        source = files.folder / f"{files.job}_{kind}"
        if source.exists():
            shutil.copyfile(source, files.folder / f"{new}_{kind}")
    print(f"Slurm does not requeue job {files.job}: it continues as job {new}", flush=True)
    _write(files.outcome, f"again {new}\n")
    return 0


def main() -> int:
    """Run one part; see the text above."""
    part, folder, max_restarts, *code = sys.argv[1:]
    files = Files(Path(folder), job_id())
    if part == "begin":
        begin(files)
    elif part == "watch":
        watch(os.getppid())
    else:
        return end(files, int(max_restarts), int(code[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
