"""What a run was made by: the user, the command, the state of the code, the packages, the machine."""

import getpass
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch


def _git(*words: str) -> str:
    """The output of a git command in the checkout that this code lies in; empty outside one."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, errors="replace").stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def git_commit() -> str:
    """The commit of the code that runs, with `-dirty` where files differ from it; empty outside a checkout."""
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()


def git_patch() -> str:
    """The difference of the code that runs from its commit, as a patch; without files that git does not know."""
    return _git("diff", "HEAD", "--", ":/")


def environment() -> dict[str, Any]:
    """The commit, the versions of all packages, and the machine."""
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "packages": dict(sorted({d.name: d.version for d in distributions() if d.name}.items())),
    }


def user_name() -> str:
    """Who runs this; the number of the user where it has no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def command_line() -> str:
    """What was typed. The ranks of a job are not started by hand: their launcher leaves its words in FVDM_COMMAND."""
    typed = os.environ.get("FVDM_COMMAND")
    if typed:
        return typed
    program, *words = sys.argv
    path = Path(program)
    if path.name == "fvdm" or path.parts[-2:] == ("fvdm", "__main__.py"):
        return shlex.join(["fvdm", *words])
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name:
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *words])
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        program = str(path.relative_to(Path.cwd()))
    return shlex.join(["python", program, *words])


def source_tags() -> dict[str, str]:
    """MLflow's tags of who made a run with which command."""
    command = command_line()[:5000]
    # MLflow shows the name of a "job" as it is, and of a "local" source only what stands after the last slash.
    return {"mlflow.user": user_name(), "mlflow.source.name": command, "mlflow.source.type": "JOB"}
