"""The former name of `fvdm.training.loop`; kept for one release."""

from fvdm.training.loop import main

if __name__ == "__main__":
    main()
