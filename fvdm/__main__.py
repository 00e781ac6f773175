"""`python -m fvdm`: the console command `fvdm` where it is not on the PATH."""

from fvdm.cli.main import main

if __name__ == "__main__":
    main()
