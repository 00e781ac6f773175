"""`fvdm generate --checkpoint runs/demo --task image-to-video --given cat.png`: videos from a model.

docs/tasks.md shows every task. Under torchrun the ranks share the samples and write the same files.
"""

import logging
import os
import shlex
import sys
from collections.abc import Sequence

from fvdm import config as settings
from fvdm.generation.config import GenerateCommand
from fvdm.interrupts import Interrupted, interrupts


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with interrupts():
            _generate(argv)
    except Interrupted as signal:
        command = shlex.join(["fvdm", *sys.argv[1:]])
        print(
            f"\nstopped by {signal.name}; videos that are complete are kept. To make all of them, type: {command}",
            file=sys.stderr,
        )
        raise SystemExit(signal.exit_status) from None


def _generate(argv: Sequence[str] | None) -> None:
    try:
        config = settings.parse(GenerateCommand, argv, __doc__, prog="fvdm generate")
        import torch.distributed as dist

        from fvdm.distributed import Ranks, from_environment
        from fvdm.generation.videos import run

        ranks = from_environment() if "RANK" in os.environ else Ranks()
        if ranks.world_size > 1:
            dist.init_process_group("gloo")
        run(config, ranks)
    except ValueError as error:
        settings.fail(error)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
