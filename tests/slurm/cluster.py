"""The test cluster, from Python: see cluster.sh."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = "needs Slurm: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
QUIET = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "MLFLOW_ENABLE_TELEMETRY": "false"}


def installed() -> bool:
    """Whether Slurm's daemons and clients are on this machine."""
    return all(shutil.which(name, path=PATH) for name in NEEDED)


def can_cut() -> bool:
    """Whether nodes may have networks of their own here, and be cut off: root may make them, but not everywhere."""
    links = "ip link add probe0 type bridge && ip link add probe1 type veth peer name probe2"
    probe = f"unshare --net sh -c '{links}' && ip netns add slurm-probe && ip netns del slurm-probe"
    done = subprocess.run(["sh", "-c", probe], env=os.environ | {"PATH": PATH}, capture_output=True)
    return done.returncode == 0


class Cluster:
    """A running cluster; its environment is that of the clients.

    Args:
        nodes: number of nodes.
        name: of its folder.
        port: its first.
        net: how far the nodes are apart, see cluster.sh.
    """

    def __init__(self, nodes: int, name: str = "test", port: int = 17000, net: str = "") -> None:
        own = {"SLURM_TEST_DIR": f"/tmp/slurm-{name}", "SLURM_TEST_PORT": str(port)}
        own |= {"SLURM_TEST_NET": net} if net else {}
        self.env = os.environ | QUIET | own
        self("up", str(nodes))
        exported = self("env")
        self.env["PATH"] = PATH
        for name, value in re.findall(r"export (\w+)=(.*)", exported):
            self.env[name] = value.replace("$PATH", self.env["PATH"])

    def __call__(self, *words: str) -> str:
        """Run cluster.sh."""
        done = subprocess.run([str(SCRIPT), *words], env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"cluster.sh {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, *words: object, cwd: Path = ROOT, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a client command, or a script of the project when the first word ends with .py."""
        command = [str(word) for word in words]
        if command[0].endswith(".py"):
            command = [sys.executable, str(ROOT / command[0]), *command[1:]]
        return subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=timeout)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by name; empty when the job is forgotten."""
        for _ in range(10):  # A busy controller has forgotten nothing.
            shown = self.run("scontrol", "show", "job", "-o", number)
            if shown.returncode == 0 or "Invalid job id" in shown.stderr:
                break
            time.sleep(1)
        return dict(re.findall(r"(\S+?)=(\S*)", shown.stdout))

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.job(number).get("JobState", "")

    def said(self, number: str) -> str:
        """What Slurm's daemons wrote of the job, in the order of time."""
        logs = Path(self.env["SLURM_TEST_DIR"], "log").glob("*.log")
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if number in line]
        return "\n".join(sorted(lines))

    def wait(self, number: str, states: set[str], seconds: float = 240) -> str:
        """Wait until the job is in one of the states; a requeued one starts after some seconds (cred_expire)."""
        end = time.monotonic() + seconds
        while (state := self.state(number)) not in states:
            assert time.monotonic() < end, f"job {number} is {state}, not one of {states}\n{self.said(number)}"
            time.sleep(0.5)
        return state


def ranks(folder: Path) -> list[psutil.Process]:
    """The rank processes of jobs whose files lie in `folder`, by rank; not the processes that read ahead for them."""
    found = []
    for process in psutil.process_iter(["cmdline", "status", "ppid"]):
        line = process.info["cmdline"] or [""]
        mine = "submitit.core._submit" in line and str(folder) in " ".join(line) and not line[0].endswith("srun")
        if mine and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)

    def rank(process: psutil.Process) -> int:
        try:
            return int(process.environ().get("SLURM_PROCID", -1))
        except psutil.Error:
            return -1

    pids = {process.pid for process in found}
    return sorted((process for process in found if process.info["ppid"] not in pids), key=rank)
