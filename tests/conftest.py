import contextlib
import os
import signal
from collections import Counter

import hypothesis
import pytest

os.environ.setdefault("MLFLOW_ENABLE_TELEMETRY", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # The workers share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says nothing on a busy machine.
hypothesis.settings.register_profile("fvdm", deadline=None)
hypothesis.settings.load_profile("fvdm")

# A test run in the background or under nohup inherits signals that are ignored, and so would the commands under test.
with contextlib.suppress(ValueError):  # not in the main thread
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """Seven short videos' latents, to train on."""
    from tests.data_fixtures import make_shards  # Not above: it loads torch, which reads the number of threads then.

    return make_shards(tmp_path_factory.mktemp("latents"), [12, 9, 10, 30, 8, 11, 6], labels=True)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The path of a real video of 40 frames."""
    from tests.data_fixtures import real_frames, write_video

    return str(write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", real_frames()[:40]))


@pytest.fixture(scope="session")
def undisturbed(latents, tmp_path_factory):
    """Eight steps of a training on two ranks, in one go."""
    from tests.runs import train, words

    folder = tmp_path_factory.mktemp("undisturbed")
    train(2, words(latents, folder, "run", "--steps", 8), folder)
    return folder


@pytest.fixture
def refusal(capsys):
    """A function: what a command says of words that it refuses, with exit code 2."""

    def of(main, words):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return of


def pytest_collection_modifyitems(items):
    """Order the files so that no worker ends long after the others: those with many slow tests start first.

    The tests on a Slurm cluster start before all: they wait more than they compute, beside the other workers.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: ("slurm" not in item.path.parts, -slow[item.path]))
