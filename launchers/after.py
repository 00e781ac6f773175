"""What the sbatch file runs before and after the ranks: clears the way, then decides whether the job starts again.

    after.py begin FOLDER MAX_RESTARTS
    after.py end FOLDER MAX_RESTARTS CODE        CODE: what srun returned

It starts again when it was told to stop while Slurm still lets it run (a time limit ahead, a preemption), and when a
rank failed; not when the user cancelled it, nor when a setting is wrong. Needs nothing but Python, and no second: but
where Slurm's controller does not answer, it is asked again for some minutes.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from os import environ
from pathlib import Path

PATIENCE = 600.0  # seconds in which Slurm's controller may come back
SILENT = re.compile(
    r"contact|timed out|refused|reset by|Zero Bytes|[Cc]ommunication|Transport|standby|temporarily|[Rr]esol|route|down"
)
FIRST_CAUSE = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.+)$", re.MULTILINE)


class Files:
    """The files by which the parts of one job tell each other how it went, in the job's folder.

    Attributes:
        error: the sentence of a rank that found a mistake of the user's.
        cause: the sentence of a rank that knows why all must end, and that another start may help: a disk, a hung rank.
        again: there when the ranks have stopped as they were told and work is left.
        outcome: what became of the job, for who follows it: done, again, cancelled, error or failed, and a sentence.
        progress: names the folder whose newest checkpoint tells how far the job has come.
        failures: a line of JSON for each failure.
        mark: where in the log this start of the job begins.
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


def ask(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of Slurm's, again and again while the controller does not answer, which is no verdict."""
    began, pause = time.monotonic(), 1.0
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(command, 1, "", f"{command[0]} timed out")
        if done.returncode == 0 or not SILENT.search(done.stderr) or time.monotonic() - began > PATIENCE:
            return done
        print(f"{' '.join(done.stderr.split())}: asking again in {pause:.0f} s", flush=True)
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
    _write(files.mark, str(files.log.stat().st_size if files.log.exists() else 0))


def end(files: Files, max_restarts: int, code: int) -> int:
    """Decide, say it, do it. Returns the exit code of the job."""
    if files.error.exists():
        return _finish(files, "error", files.error.read_text().strip(), 2)
    stopped = files.again.exists()
    if code == 0 and not stopped:
        return _finish(files, "done", "", 0)
    if not _may_go_on():
        return _finish(files, "cancelled", "", 0 if stopped else 1)
    if stopped:
        return _again(files, "stopped in time, with a checkpoint")
    cause = first_cause(files, code)
    count = _count_failure(files, cause)
    if count > max_restarts:
        sentence = f"{cause}. Failure {count} without a new checkpoint between: not started again (--max-restarts)"
        return _finish(files, "failed", sentence, 1)
    return _again(files, f"{cause}; start {count} of at most {max_restarts} without a new checkpoint")


def first_cause(files: Files, code: int) -> str:
    """What a rank has found out; else who failed first and how, as srun said it, in the order of time."""
    text = files.log.read_bytes()[int(files.mark.read_text()) :] if files.mark.exists() else b""
    found = FIRST_CAUSE.search(text.decode(errors="replace"))
    known = files.cause.read_text().strip() if files.cause.exists() else ""
    if known and (not found or "exit code" in found[3]):  # Else a rank was killed, and the others met the consequences.
        return f"{known}. The log: {files.log}"
    if not found:
        return f"the ranks ended with exit code {code}"
    node, rank, how = found[1], int(re.split("[,-]", found[2])[0]), found[3]
    log = files.log_of(rank)
    sentence = f"rank {rank} on {node} failed first: {how}"
    if "exit code" in how and log.exists():
        said = [
            line.strip()
            for line in log.read_text(errors="replace").splitlines()
            if re.match(r"\w[\w.]*(Error|Exception|Interrupt)\b", line.strip())
        ]
        sentence += f" ({said[-1][:300]})" if said else ""
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


def _may_go_on() -> bool:
    """Whether the job is still Slurm's to run: a cancelled one is already completing, as is one out of time.

    Only Slurm's own word ends a job: where there is none, the job goes on.
    """
    shown = ask("scontrol", "show", "job", "-o", environ["SLURM_JOB_ID"])
    state = re.search(r"JobState=(\w+)", shown.stdout)
    return state[1] == "RUNNING" if state else "Invalid job id" not in shown.stderr


def _finish(files: Files, what: str, sentence: str, code: int) -> int:
    if sentence:
        print(f"error: {sentence}", flush=True)
    _write(files.outcome, f"{what} {sentence}\n")
    return code


def _again(files: Files, why: str) -> int:
    """Start the job again: requeue it, or submit its file once more where Slurm does not requeue."""
    files.again.unlink(missing_ok=True)
    print(f"{why}: starting job {files.job} again", flush=True)
    _write(files.outcome, "again\n")
    requeue = ask("scontrol", "requeue", files.job)
    if requeue.returncode == 0 or not _may_go_on():  # It was heard at the first time, and its answer lost.
        return 0
    if "SLURM_ARRAY_JOB_ID" in environ:  # Its file would submit the whole array.
        said = " ".join(requeue.stderr.split())
        return _finish(files, "failed", f"Slurm does not requeue this job of an array: {said}", 1)
    submitted = ask("sbatch", "--parsable", str(files.folder / f"{files.job}_submission.sh"))
    if submitted.returncode:
        said = " ".join(f"{requeue.stderr} {submitted.stderr}".split())
        return _finish(files, "failed", f"Slurm neither requeues nor takes the job again: {said}", 1)
    new = submitted.stdout.strip().partition(";")[0]
    # The new job waits a minute for its pickle.
    for kind in ("submitted.pkl", "submission.sh", "failures.jsonl"):
        source = files.folder / f"{files.job}_{kind}"
        if source.exists():
            shutil.copyfile(source, files.folder / f"{new}_{kind}")
    print(f"Slurm does not requeue job {files.job}: it goes on as job {new}", flush=True)
    _write(files.outcome, f"again {new}\n")
    return 0


def main() -> int:
    """Run one half; see the text above."""
    half, folder, max_restarts, *code = sys.argv[1:]
    files = Files(Path(folder), job_id())
    if half == "begin":
        begin(files)
        return 0
    return end(files, int(max_restarts), int(code[0]))


if __name__ == "__main__":
    sys.exit(main())
