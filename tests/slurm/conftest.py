import os

import pytest

from tests.slurm import cluster as slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real Slurm of five nodes."""
    if not slurm.installed():
        pytest.skip(slurm.MISSING)
    started = slurm.Cluster(5)
    before = os.environ.copy()
    os.environ.update(started.env)  # for what the tests call in this process
    yield started
    os.environ.clear()
    os.environ.update(before)
    started("down")
