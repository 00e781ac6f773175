"""The former name of `fvdm register`; models that version 0.1 registered import `answer` from it."""

from fvdm.cli.main import run_old_module
from fvdm.serving.registry import predict as answer

__all__ = ["answer"]

if __name__ == "__main__":
    run_old_module("fvdm.registry", "register")
