"""The console command `fvdm`: each command has a file of its name."""

import sys
from collections.abc import Sequence
from importlib import import_module

from fvdm import config as settings

COMMANDS = {
    "generate": "make videos with a trained model",
    "convert": "convert a checkpoint of Latte or of the official FVDM code",
    "checkpoint": "list, verify and export the checkpoints of a run",
    "plan": "estimate the memory, compute and traffic of a training run",
    "register": "log a trained model to MLflow and register it",
    "play": "sample with timestep schedules on a page in the browser",
    "ui": "look at the runs in MLflow's pages",
}
USAGE = "usage: fvdm COMMAND [OPTIONS]\n\n" + "".join(f"  {name:11s} {text}\n" for name, text in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names; `fvdm COMMAND --help` explains its options."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE + "\n`fvdm COMMAND --help` explains the options of a command.")
        raise SystemExit(0 if words else 2)
    name, *rest = words
    if name not in COMMANDS:
        settings.fail(f"there is no command {name!r}; choose one of {', '.join(COMMANDS)}")
    import_module(f"fvdm.cli.{name}").main(rest)


def run_old_module(module: str, command: str) -> None:
    """Run a command by the name it had up to version 0.1, and say its new name.

    Args:
        module: what was run with `python -m`, such as `fvdm.generate`.
        command: what to type instead, such as `generate`.
    """
    print(f"python -m {module} will go away in the next release; type: fvdm {command}", file=sys.stderr)
    main([command, *sys.argv[1:]])
