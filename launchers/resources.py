"""What a job asks of the cluster: settings that are left to the machine, and the parameters of the sbatch file."""

import collections
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from launchers.config import Resources

ROOT = Path(__file__).resolve().parents[1]
USUAL_GPUS, USUAL_CORES = 8, 8  # of a node, and of a GPU, where Slurm cannot be asked
TIMEOUT = 10.0  # seconds in which Slurm's controller answers


def resolve(resources: Resources) -> Resources:
    """Fill in what was left to the machine; print what was chosen, and why.

    Raises:
        ValueError: if Slurm is asked for and not there, or the machine has too few GPUs.
    """
    cluster = "slurm" if resources.dry_run else resources.cluster
    if cluster == "slurm" and not resources.dry_run and not shutil.which("sbatch"):
        raise ValueError("there is no sbatch on this machine; run this on a login node, or use --cluster local")
    if cluster == "auto":
        problem = why_no_slurm()
        cluster = "local" if problem else "slurm"
        print(f"{problem}: running on this machine (--cluster local)" if problem else "Slurm is here: submitting to it")
    if resources.array and cluster == "local":
        raise ValueError("--array needs Slurm; on this machine, run one job after the other")
    gpus, cores = resources.gpus_per_node, resources.cpus_per_task
    if gpus < 0 and cluster == "local":
        gpus = _gpus_here(resources.nodes)
    elif gpus < 0:
        gpus, node_cores = ask_nodes(resources.partition)
        # Slurm would give one core to a rank, and its data loader would starve it.
        cores = cores or node_cores // max(1, gpus)
    return replace(resources, cluster=cluster, gpus_per_node=gpus, cpus_per_task=cores)


def why_no_slurm() -> str:
    """Why jobs cannot be submitted from this machine; empty where they can."""
    if not shutil.which("sbatch"):
        return "no Slurm here"
    try:
        asked = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return f"Slurm's controller has not answered in {TIMEOUT:.0f} s"
    return "Slurm's controller does not answer" if asked.returncode else ""


def sbatch_parameters(resources: Resources, name: str, folder: Path) -> dict[str, Any]:
    """What submitit writes into the sbatch file of a job whose files lie in `folder`."""
    options = {key: getattr(resources, key) for key in ("account", "qos", "constraint", "exclude", "dependency")}
    options |= {key: getattr(resources, key) for key in ("partition", "mem", "nodelist")}
    for word in resources.sbatch:
        key, _, value = word.lstrip("-").partition("=")
        options[key] = value
    after = shlex.join([sys.executable, str(ROOT / "launchers" / "after.py")])
    places = shlex.join([str(folder.resolve()), str(resources.max_restarts)])
    binds = {"gpu-bind": resources.gpu_bind, "cpu-bind": resources.cpu_bind}
    parameters: dict[str, Any] = {
        "job_name": name,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.ranks_per_node,
        "time": resources.minutes,
        "signal_delay_s": resources.warn,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own would be refused where keys are kept
        # Without it srun waits forever for the peers of a rank that was killed.
        "srun_args": ["--kill-on-bad-exit=1", *(f"--{key}={value}" for key, value in binds.items() if value)],
        "setup": [
            f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            # srun no longer takes it over from sbatch.
            "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
            # A cancelled job's shell gets the signal too; it must live until the ranks have saved.
            "trap : TERM",
            f"{after} begin {places}",
            f"{after} watch {places} &",
        ],
        "teardown": [f"{after} end {places} $?"],
        "additional_parameters": {key: value for key, value in options.items() if value} | {"requeue": True},
    }
    if resources.gpus_per_node:
        kind = f"{resources.gpu_type}:" if resources.gpu_type else ""
        parameters["gpus_per_node"] = f"{kind}{resources.gpus_per_node}"
    if resources.cpus_per_task:
        parameters["cpus_per_task"] = resources.cpus_per_task
    return parameters


def ask_nodes(partition: str) -> tuple[int, int]:
    """GPUs and CPU cores that most nodes of a Slurm partition have; usual numbers where there is no Slurm to ask."""
    command = ["sinfo", "-h", "-N", "-o", "%P %c %G"]
    listed = None
    if shutil.which("sinfo"):
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if listed is None or listed.returncode:
        print(f"no Slurm to ask: taking {USUAL_GPUS} GPUs a node, {USUAL_CORES} cores each", file=sys.stderr)
        return USUAL_GPUS, USUAL_GPUS * USUAL_CORES
    nodes: collections.Counter[tuple[int, int]] = collections.Counter()
    for line in listed.stdout.splitlines():
        name, cores, kinds = line.split(None, 2)
        # The default partition is marked by a star.
        if name.rstrip("*") == partition or (not partition and name.endswith("*")):
            gpus = sum(map(int, re.findall(r"gpu(?::[^:,(]+)?:(\d+)", kinds)))
            nodes[gpus, int(cores.rstrip("+"))] += 1
    return nodes.most_common(1)[0][0] if nodes else (0, 0)


def _gpus_here(nodes: int) -> int:
    import torch

    here = torch.cuda.device_count()
    if here and nodes > here:
        raise ValueError(
            f"--nodes {nodes} --cluster local: each is a rank with a GPU of its own, and this machine has {here}; "
            f"use --nodes {here}{' or fewer' if here > 1 else ''}"
        )
    return 1 if here else 0
