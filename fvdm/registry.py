"""The former name of `fvdm register`; kept for one release."""

from fvdm.cli.main import run_old_module

if __name__ == "__main__":
    run_old_module("fvdm.registry", "register")
