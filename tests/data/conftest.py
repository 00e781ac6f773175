import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of eleven videos, two classes and the flipped copies."""
    from tests.data_fixtures import make_shards  # Not above: it loads torch, which reads the number of threads then.
    from tests.loading import LENGTHS

    return make_shards(tmp_path_factory.mktemp("shards"), LENGTHS)


@pytest.fixture(scope="module")
def shards(folder):
    from fvdm.data.shards import LatentShards

    return LatentShards(folder)
