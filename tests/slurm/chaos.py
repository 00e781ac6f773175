"""One training on four nodes of a real Slurm, and everything that goes wrong on clusters: `make chaos`.

Random events hit a training: a rank killed -9, a node's slurmd killed, the signals of time limits and of preemption, a
requeue, a full disk, a corrupt newest checkpoint. It must end by itself at the planned step with the losses, to the
last bit, of a training that nothing hit; as one MLflow run; with no process and no partial file left.
With SLURM_TEST_NET=net the nodes have networks of their own, and are cut off as well.
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fvdm import checkpoint as ckpt
from tests.data_fixtures import make_shards
from tests.slurm.cluster import Cluster, ranks
from tests.test_train import losses, words

NODES = 4
BETWEEN = 60  # steps from one event to the next, some five seconds
EVERY = 25  # steps between checkpoints
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", ""}


class Chaos:
    """A training under attack."""

    def __init__(self, cluster: Cluster, folder: Path, events: int, seed: int) -> None:
        self.cluster, self.folder, self.events = cluster, folder.resolve(), events
        self.random = random.Random(seed)
        self.steps = (events + 1) * BETWEEN
        self.run = self.folder / "runs" / "run"
        self.kinds = [self.kill_rank, self.kill_slurmd, self.time_limit, self.preemption, self.requeue, self.corrupt]
        self.kinds += [self.fill_disk] if os.path.ismount(self.folder / "runs") else []
        self.kinds += [self.partition] if os.environ.get("SLURM_TEST_NET") == "net" else []
        self.job = ""

    def start(self, latents: Path) -> None:
        """Submit the training."""
        more = ["--steps", self.steps, "--checkpoint.every", EVERY, "--engine.timeout", 60]
        more += ["--previews.every", 200, "--previews.steps", 3]
        # Slow enough that a disk may be full for some seconds and the end is still far.
        more += ["--data.batch_size", 4 * NODES, "--engine.micro_batch", 1]
        options = ["--nodes", NODES, "--cpus-per-task", 1, "--time", 60, "--max-restarts", 50, "--config", "c.yaml"]
        (self.folder / "c.yaml").write_text("name: run\n")
        arguments = [*options, *words(latents, self.folder, "run", *more)]
        reference = [*options, *words(latents, self.folder / "undisturbed", "run", *more)]
        (self.folder / "undisturbed").mkdir()
        done = self.cluster.run(
            "launchers/slurm_train.py", "--cluster", "local", *reference, cwd=self.folder, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        done = self.cluster.run("launchers/slurm_train.py", "--cluster", "slurm", *arguments, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        self.job = re.findall(r"^job (\d+)", done.stdout, re.MULTILINE)[0]

    def step(self) -> int:
        """The newest step in the journal."""
        journal = self.run / "events.jsonl"
        found = re.findall(r'"step": (\d+)', journal.read_text(errors="replace")) if journal.exists() else []
        return max(map(int, found), default=0)

    def kill_rank(self) -> str:
        """Like the kernel's out-of-memory killer."""
        while not (alive := ranks(self.run / "jobs")):
            assert self.watch(), "the job has ended"
        victim = self.random.choice(alive)
        with contextlib.suppress(Exception):
            victim.kill()
        return f"of {len(alive)}"

    def kill_slurmd(self) -> str:
        """A node that Slurm no longer hears; it comes back later."""
        node = f"node{self.random.randint(1, NODES)}"
        self.cluster("kill", node)
        time.sleep(self.random.uniform(1, 20))
        self.cluster("start", node)
        return node

    def partition(self) -> str:
        """A node that nobody reaches for a while, its ranks alive."""
        node = f"node{self.random.randint(1, NODES)}"
        self.cluster("cut", node)
        time.sleep(self.random.uniform(5, 30))
        self.cluster("mend", node)
        return node

    def time_limit(self) -> str:
        """The signal that Slurm sends ahead of a time limit."""
        return self.cluster.run("scancel", "--signal=USR2", self.job).stderr

    def preemption(self) -> str:
        """The signal that Slurm sends when a more important job wants the nodes."""
        return self.cluster.run("scancel", "--signal=TERM", self.job).stderr

    def requeue(self) -> str:
        """An administrator's requeue: the ranks get no time to save."""
        return self.cluster.run("scontrol", "requeue", self.job).stderr

    def corrupt(self) -> str:
        """A bit flips in the newest checkpoint, and then the training needs it."""
        found = ckpt.checkpoints(self.run / "checkpoints")
        if not found:
            return self.kill_rank()
        path = self.random.choice(sorted(found[-1].iterdir()))
        with contextlib.suppress(OSError), path.open("rb+") as file:  # It may just be pruned.
            file.seek(self.random.randrange(path.stat().st_size))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        return f"{path.parent.name}/{path.name} {self.kill_rank()}"

    def fill_disk(self) -> str:
        """No byte is free for some seconds."""
        ballast = self.folder / "runs" / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        time.sleep(self.random.uniform(2, 8))
        ballast.unlink()
        return ""

    def watch(self) -> bool:
        """A look at the job, following it to a new number; False when it has ended."""
        state = self.cluster.state(self.job)
        outcome = self.run / "jobs" / f"{self.job}_outcome.txt"
        if state in ENDED and outcome.exists() and re.match(r"again \d+", outcome.read_text()):
            self.job = outcome.read_text().split()[1]
            return True
        time.sleep(0.5)
        return state not in ENDED

    def attack(self) -> int:
        """Hit the training until it ends; how many events there were."""
        done, startup = 0, False
        while self.watch():
            if done == self.events or not (startup or self.step() >= (done + 1) * BETWEEN - self.random.randint(0, 20)):
                continue
            if startup:
                time.sleep(self.random.uniform(0, 12))
            event, at = self.random.choice(self.kinds), self.step()
            detail = " ".join(event().split())
            done += 1
            startup = self.random.random() < 0.25  # the next comes while the job starts again
            print(f"event {done:2d} at step {at:3d}: {event.__name__} {detail}", flush=True)
        return done

    def check(self, done: int) -> None:
        """All that must be true at the end."""
        log = (self.run / "jobs" / f"{self.job}_0_log.out").read_text(errors="replace")[-3000:]
        assert done == self.events, f"the training ended after {done} events\n{log}"
        newest = ckpt.newest(self.run / "checkpoints")
        assert newest is not None
        assert ckpt.read_state(newest)["step"] == self.steps, log
        wanted = losses(self.folder / "undisturbed", "run")
        for line in (self.run / "events.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # of a line that a kill cut short
                event = json.loads(line)
                loss = event.get("metrics", {}).get("loss/mean")
                assert loss is None or loss == wanted[event["step"]], f"step {event['step']}: {loss}"
        assert set(losses(self.folder, "run")) == set(wanted)
        left = [*(self.run / "checkpoints").glob(".tmp-*"), *self.run.rglob("*.tmp")]
        assert not left, left
        assert not ranks(self.run / "jobs")
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        runs = client.search_runs([client.get_experiment_by_name("fvdm").experiment_id])
        assert [run.info.status for run in runs] == ["FINISHED"]
        history = client.get_metric_history(runs[0].info.run_id, "loss/mean")
        assert {m.step: m.value for m in history} == wanted


def chaos(folder: Path, events: int, seed: int) -> None:
    """Train under `events` random events in `folder`, on a cluster of its own, and check the end."""
    latents = make_shards(folder / "latents", [12, 9, 10, 30, 8, 11, 6], labels=True)
    (folder / "runs").mkdir()
    # Before the nodes start: they have mounts of their own, copied from the machine's.
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder / "runs")]
    mounted = subprocess.run(mount).returncode == 0
    if not mounted:
        print("no small disk can be mounted here (not root): the disk will not fill up")
    cluster = Cluster(NODES + 1, "chaos", 18000)
    try:
        training = Chaos(cluster, folder, events, seed)
        began = time.monotonic()
        training.start(latents)
        training.check(training.attack())
        minutes = (time.monotonic() - began) / 60
        print(f"{events} events, {training.steps} steps, the losses of the undisturbed training: {minutes:.1f} minutes")
    finally:
        cluster("down")
        if mounted:
            subprocess.run(["umount", "-l", str(folder / "runs")])


def main() -> None:
    """`python -m tests.slurm.chaos --events 30`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"{options.events} events, --seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        chaos(Path(folder), options.events, options.seed)


if __name__ == "__main__":
    sys.exit(main())
