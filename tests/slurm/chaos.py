"""One training run on four nodes of a real Slurm, and everything that goes wrong on clusters: `make chaos`.

Events hit a training run: a rank killed -9 or hung, or killed while its node is cut off, a node's slurmd killed,
Slurm's controller away, the signals of time limits and of preemption, a requeue, a full disk, a corrupt newest
checkpoint, a node cut off. It must end by itself at the planned step with the losses, to the last bit, of a run that
nothing hit; as one MLflow run; with no process and no partial file left. A seed fixes which events come when; only
those that have happened count. A full disk needs root, to mount a small one; a node is cut off where root may make
network namespaces.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from fvdm.checkpoints.find import checkpoints, newest
from fvdm.checkpoints.read import read_state
from tests.data_fixtures import make_shards
from tests.runs import losses, words
from tests.slurm.cluster import Cluster, can_cut, ranks

NODES = 4
EVERY = 10  # steps between checkpoints
BETWEEN = 60  # steps from one event to the next, some ten seconds
AT_START = 0.25  # share of the events that come while the job starts again
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", ""}
# What has no test of its own and does not take long, and the others.
SHORT = ("kill_slurmd", "corrupt", "fill_disk")
KINDS = (*SHORT, "outage", "hang", "kill_rank", "time_limit", "preemption", "requeue", "partition", "kill_and_cut")
CUTS = ("partition", "kill_and_cut")  # need networks of their own


class Refused(Exception):
    """There was nothing to hit, or Slurm did not take it: the event has not happened."""


class Event(NamedTuple):
    """Something that will go wrong.

    Attributes:
        kind: a method of `Chaos`.
        step: it waits for this step of the training.
        delay: or it comes so many seconds after the event before, while the job starts again.
        seed: of what it draws itself.
    """

    kind: str
    step: int
    delay: float | None
    seed: int


def schedule(kinds: Sequence[str], events: int, seed: int, between: int = BETWEEN) -> list[Event]:
    """What happens when: a function of its arguments, in which no kind comes again before all others have come."""
    draw = random.Random(seed)
    drawn: list[Event] = []
    bag: list[str] = []
    for number in range(events):
        bag = bag or draw.sample(kinds, len(kinds))
        delay = draw.uniform(0, 12) if number and draw.random() < AT_START else None
        step = (number + 1) * between - draw.randint(0, 10)
        drawn.append(Event(bag.pop(), step, delay, draw.getrandbits(32)))
    return drawn


class Chaos:
    """A training run under attack."""

    def __init__(self, cluster: Cluster, folder: Path, events: list[Event], undisturbed: Path, between: int) -> None:
        self.cluster, self.folder, self.events = cluster, folder.resolve(), events
        self.undisturbed = undisturbed.resolve()
        self.steps = (len(events) + 1) * between
        self.run = self.folder / "runs" / "run"
        self.job = ""

    def start(self, latents: Path) -> None:
        """Submit the training."""
        more = ["--steps", self.steps, "--checkpoint.every", EVERY, "--engine.timeout", 40]
        more += ["--data.workers", 1, "--previews.every", 100, "--previews.steps", 3]
        # Slow enough that a disk may be full for some seconds and the end is still far.
        more += ["--data.batch_size", 8 * NODES, "--engine.micro_batch", 1]
        options = ["--nodes", NODES, "--cpus-per-task", 1, "--time", 60, "--max-restarts", 50, "--config", "c.yaml"]
        (self.folder / "c.yaml").write_text("name: run\n")
        arguments = [*options, *words(latents, self.folder, "run", *more)]
        if not self.undisturbed.exists():
            self.undisturbed.mkdir()
            reference = ["--cluster", "local", *options, *words(latents, self.undisturbed, "run", *more)]
            done = self.cluster.run("launchers/slurm_train.py", *reference, cwd=self.folder, timeout=1800)
            assert done.returncode == 0, done.stdout + done.stderr
        done = self.cluster.run("launchers/slurm_train.py", "--cluster", "slurm", *arguments, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        self.job = re.findall(r"^job (\d+)", done.stdout, re.MULTILINE)[0]

    def step(self) -> int:
        """The newest step in the journal."""
        journal = self.run / "events.jsonl"
        found = re.findall(r'"step": (\d+)', journal.read_text(errors="replace")) if journal.exists() else []
        return max(map(int, found), default=0)

    def kill_rank(self, draw: random.Random) -> str:
        """Like the kernel's out-of-memory killer."""
        self.rank(draw).kill()
        return ""

    def hang(self, draw: random.Random) -> str:
        """A rank that is there and does nothing more."""
        self.rank(draw).suspend()
        return ""

    def rank(self, draw: random.Random) -> psutil.Process:
        """One of the ranks."""
        alive = ranks(self.run / "jobs")
        if not alive:
            raise Refused("there is no rank")
        return draw.choice(alive)

    def node(self, draw: random.Random) -> str:
        """One of the job's nodes."""
        listed = self.cluster.job(self.job).get("NodeList", "")
        if not listed.startswith("node"):
            raise Refused("the job has no nodes")
        return draw.choice(self.cluster.run("scontrol", "show", "hostnames", listed).stdout.split())

    def kill_slurmd(self, draw: random.Random) -> str:
        """A node that Slurm no longer hears; it comes back later."""
        node = self.node(draw)
        self.cluster("kill", node)
        time.sleep(draw.uniform(1, 20))
        self.cluster("start", node)
        return node

    def partition(self, draw: random.Random) -> str:
        """A node that nobody reaches for a while, its ranks alive."""
        node = self.node(draw)
        with self.cut(node):
            time.sleep(draw.uniform(5, 30))
        return node

    def kill_and_cut(self, draw: random.Random) -> str:
        """A rank killed at the same time as its node is cut off: srun may never hear of its end."""
        victim = self.rank(draw)
        node = victim.environ()["SLURMD_NODENAME"]
        with self.cut(node):
            victim.kill()
            time.sleep(18)
        return node

    @contextlib.contextmanager
    def cut(self, node: str) -> Iterator[None]:
        """Nobody reaches the node meanwhile."""
        self.cluster("cut", node)
        try:
            yield
        finally:
            self.cluster("restore", node)

    def outage(self, draw: random.Random) -> str:
        """Slurm's controller is away when a rank fails, and comes back."""
        victim = self.rank(draw)
        self.cluster("kill", "slurmctld")
        victim.kill()
        time.sleep(draw.uniform(5, 20))
        self.cluster("start", "slurmctld")
        return ""

    def time_limit(self, draw: random.Random) -> str:
        """The signal that Slurm sends ahead of a time limit."""
        return self.tell("scancel", "--signal=USR2")

    def preemption(self, draw: random.Random) -> str:
        """The signal that Slurm sends when a more important job wants the nodes."""
        return self.tell("scancel", "--signal=TERM")

    def requeue(self, draw: random.Random) -> str:
        """An administrator's requeue: the ranks get no time to save."""
        return self.tell("scontrol", "requeue")

    def tell(self, *command: str) -> str:
        """Tell Slurm something about the job while it runs."""
        if self.cluster.state(self.job) != "RUNNING":
            raise Refused("the job does not run")
        done = self.cluster.run(*command, self.job)
        if done.returncode or done.stderr.strip():
            raise Refused(done.stderr)
        return ""

    def corrupt(self, draw: random.Random) -> str:
        """A bit flips in the newest checkpoint, and then the training needs it."""
        found = checkpoints(self.run / "checkpoints")
        if not found:
            raise Refused("there is no checkpoint")
        victim = self.rank(draw)
        path = draw.choice(sorted(found[-1].iterdir()))
        with path.open("rb+") as file:
            file.seek(draw.randrange(path.stat().st_size))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        victim.kill()
        return f"{path.parent.name}/{path.name}"

    def fill_disk(self, draw: random.Random) -> str:
        """No byte is free for some seconds."""
        ballast = self.folder / "runs" / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        time.sleep(draw.uniform(2, 8))
        ballast.unlink()
        return ""

    def watch(self) -> bool:
        """A look at the job, following it to a new number; False when it has ended."""
        state = self.cluster.state(self.job)
        outcome = self.run / "jobs" / f"{self.job}_outcome.txt"
        if state in ENDED and outcome.exists() and re.match(r"again \d+", outcome.read_text()):
            self.job = outcome.read_text().split()[1]
            return True
        if state == "PENDING":
            self.resume_nodes()
        time.sleep(0.5)
        return state not in ENDED

    def resume_nodes(self) -> None:
        """What an administrator does.

        Slurm drains nodes whose word of a job's end it missed while it was away, or that still have the job when it
        starts there again after a cut; in the second case it also holds the job.
        """
        for line in self.cluster.run("sinfo", "-h", "-N", "-o", "%n %T").stdout.splitlines():
            node, state = line.split()
            if state.startswith("drained"):
                self.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
        if "held" in self.cluster.run("squeue", "-h", "-j", self.job, "-o", "%r").stdout:
            self.cluster.run("scontrol", "release", self.job)

    def attack(self) -> list[str]:
        """Hit the training until it ends; the kinds of the events that have happened."""
        done: list[str] = []
        for event in self.events:
            if event.delay is not None:
                time.sleep(event.delay)
            while event.delay is None and self.step() < event.step:
                if not self.watch():
                    return done
            at, detail = self.step(), None
            while detail is None:
                try:
                    detail = getattr(self, event.kind)(random.Random(event.seed))
                except (Refused, psutil.Error, OSError):  # Tried again: a rank may just end, a file just be pruned.
                    if not self.watch():
                        return done
            done.append(event.kind)
            print(f"event {len(done):2d} at step {at:3d}: {event.kind} {detail}", flush=True)
        while self.watch():
            pass
        return done

    def check(self, done: list[str]) -> None:
        """All that must be true at the end."""
        text = "".join(path.read_text(errors="replace") for path in (self.run / "jobs").glob("*_0_log.out"))
        for reason in re.findall(r"^.*(?:srun waits for|: starting job).*$", text, re.MULTILINE):
            print(reason[:150], flush=True)
        log = (self.run / "jobs" / f"{self.job}_0_log.out").read_text(errors="replace")[-3000:]
        planned = [event.kind for event in self.events]
        assert done == planned, f"the training ended after {done}, before {planned[len(done) :]}\n{log}"
        checkpoint = newest(self.run / "checkpoints")
        assert checkpoint is not None
        assert read_state(checkpoint)["step"] == self.steps, log
        wanted = losses(self.undisturbed, "run")
        for line in (self.run / "events.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # of a line that a kill cut short
                event = json.loads(line)
                loss = event.get("metrics", {}).get("loss/mean")
                assert loss is None or loss == wanted[event["step"]], f"step {event['step']}: {loss}"
        assert set(losses(self.folder, "run")) == set(wanted)
        left = [*self.run.rglob(".tmp-*"), *self.run.rglob("*.tmp")]
        assert not left, left
        assert not ranks(self.run / "jobs")
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        runs = client.search_runs([client.get_experiment_by_name("fvdm").experiment_id])
        assert [run.info.status for run in runs] == ["FINISHED"]
        history = client.get_metric_history(runs[0].info.run_id, "loss/mean")
        assert {m.step: m.value for m in history} == wanted


def chaos(
    folder: Path,
    events: int,
    seed: int,
    kinds: Sequence[str] = KINDS,
    undisturbed: Path | None = None,
    between: int = BETWEEN,
) -> None:
    """Train under `events` events (0: one of each kind) in `folder`, on a cluster of its own, and check the end.

    The run that nothing hits is trained in `undisturbed`, unless it is there. Events are `between` steps apart.
    """
    latents = make_shards(folder / "latents", [12, 9, 10, 30, 8, 11, 6], labels=True)
    (folder / "runs").mkdir()
    # Before the nodes start: they have mounts of their own, copied from the machine's.
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder / "runs")]
    mounted = subprocess.run(mount).returncode == 0
    cut = bool(set(CUTS) & set(kinds)) and can_cut()
    possible = [kind for kind in kinds if {"fill_disk": mounted}.get(kind, cut or kind not in CUTS)]
    if missing := set(kinds) - set(possible):
        print(f"not possible here, as it needs root: {', '.join(sorted(missing))}")
    drawn = schedule(possible, events or len(possible), seed, between)
    # Of this process alone: another one on the machine has its own.
    cluster = Cluster(NODES + 1, f"chaos-{os.getpid()}", 18000 + 20 * (os.getpid() % 90), "net" if cut else "")
    try:
        training = Chaos(cluster, folder, drawn, undisturbed or folder / "undisturbed", between)
        began = time.monotonic()
        training.start(latents)
        training.check(training.attack())
        minutes = (time.monotonic() - began) / 60
        print(f"{len(drawn)} events, {training.steps} steps, the losses of the undisturbed training: {minutes:.1f} min")
    finally:
        cluster("down")
        if mounted:
            subprocess.run(["umount", "-l", str(folder / "runs")])


def main() -> None:
    """`python -m tests.slurm.chaos --events 30`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--seed", type=int, nargs="+", default=[int(time.time())], help="one run for each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seed:
            print(f"{options.events} events, --seed {seed}", flush=True)
            (Path(folder) / str(seed)).mkdir()
            chaos(Path(folder) / str(seed), options.events, seed, undisturbed=Path(folder) / "undisturbed")


if __name__ == "__main__":
    sys.exit(main())
