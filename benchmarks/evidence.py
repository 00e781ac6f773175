"""The claims of the paper put to the test; see benchmarks/evidence/__main__.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.evidence.__main__ import main

    main()
