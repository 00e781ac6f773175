import os

import pytest

from tests.slurm import cluster as slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real Slurm of five nodes; each worker of xdist has its own."""
    if not slurm.installed():
        pytest.skip(slurm.MISSING)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    started = slurm.Cluster(5, f"test-{worker}", 17000 + 20 * worker)
    before = os.environ.copy()
    os.environ.update(started.env)  # for what the tests call in this process
    yield started
    os.environ.clear()
    os.environ.update(before)
    started("down")
