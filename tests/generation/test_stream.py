"""A video without an end, from the command's own path: what is held does not grow with it."""

import gc
import tracemalloc
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fvdm.diffusion import tasks
from fvdm.diffusion.tasks import TASKS, Task, rolling, rolling_blocks
from fvdm.distributed import Ranks
from fvdm.generation import videos as command
from fvdm.generation.config import GenerateCommand
from fvdm.generation.inputs import read_source
from fvdm.generation.pipeline import load
from fvdm.media.vae import VAE
from tests.generation.test_pipeline import FRAMES, SIDE, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("stream"))


@pytest.fixture(autouse=True)
def unreported(monkeypatch):
    """MLflow is another test's business."""
    monkeypatch.setattr(command, "report", lambda *args: None)


def held():
    """Bytes of all tensors, those that share memory counted once; and what numpy, PIL and Python hold."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
    return sum(storages.values()), tracemalloc.get_traced_memory()[0]


def tensors():
    """Those that hold memory: a compiler's, which other tests leave behind, are of other types."""
    return [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]


def settings(run, out, **changes):
    wanted = {"task": "stream", "num": 2, "steps": 6, "formats": "mp4,gif,webm,frames"}
    return GenerateCommand(str(run), out=str(out), **wanted | changes)


@pytest.mark.slow
def test_a_long_stream_holds_no_more_than_a_short_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SHOWN", 16)
    decode, seen = VAE.decode, {"frames": 0}

    def spy(self, latents):
        seen["frames"] += 1
        if seen["frames"] in (40, 100):
            seen[seen["frames"]] = held()
        return decode(self, latents)

    monkeypatch.setattr(VAE, "decode", spy)
    tracemalloc.start()
    command.run(settings(run, tmp_path / "out", length=110), Ranks())
    tracemalloc.stop()
    assert seen["frames"] == 110
    frames = 2 * 3 * SIDE**2  # bytes, of both videos
    tensors, others = (after - before for before, after in zip(seen[40], seen[100], strict=True))
    assert tensors <= command.COLUMNS * frames, "no more than the picture of all shows"
    assert others < 30 * frames, "sixty frames came"
    for seed in (0, 1):
        with Image.open(tmp_path / "out" / f"stream-{seed:05d}.gif") as gif:
            assert gif.n_frames == 110
    for name in ("stream-00000", "stream-00000.mp4", "stream-00001.webm"):
        assert len(read_source(str(tmp_path / "out" / name), SIDE).frames) == 110
    assert len(read_source(str(tmp_path / "out" / "stream.mp4"), SIDE).frames) == 16, "side by side"
    with Image.open(tmp_path / "out" / "stream.png") as picture:
        assert picture.size == (8 * SIDE, 2 * SIDE)


def test_no_matrix_of_a_whole_stream_is_made_but_to_be_shown(run, tmp_path, monkeypatch, capsys):
    lengths = []

    def noted(want):
        lengths.append(want.length)
        return rolling(want)

    monkeypatch.setitem(TASKS, "stream", TASKS["stream"]._replace(plan=noted))
    config = settings(run, tmp_path / "out", length=20, formats="frames", num=1)
    command.run(config, Ranks())
    assert lengths == [FRAMES]
    command.run(replace(config, show_schedule=True, length=40), Ranks())
    assert lengths == [FRAMES, 40]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("row"))
    assert len(row.split()) == 2 + 40


def test_the_files_hold_what_python_gets(run, tmp_path):
    config = settings(run, tmp_path / "out", length=20, formats="frames", seed=3)
    command.run(config, Ranks())
    made = load(run).generate("stream", num=2, steps=6, length=20, seed=3)
    for k in (0, 1):
        assert torch.equal(read_source(str(tmp_path / "out" / f"stream-{3 + k:05d}"), SIDE).frames, made[k])


def test_another_task_without_an_end_walks_its_own_matrix(run, monkeypatch):
    """Slower by a row for each frame: what comes of it is what its own wide matrix says."""

    def slow(want):
        return replace(want, delay=3)

    other = Task(lambda want: rolling(slow(want)), length=20, endless=lambda want: rolling_blocks(slow(want)))
    monkeypatch.setitem(tasks.TASKS, "slow-stream", other)
    trained = load(run)
    whole = trained.generate("stream", delay=3, length=20, steps=6)
    assert torch.equal(trained.generate("slow-stream", steps=6), whole)
    assert not torch.equal(trained.generate("stream", length=20, steps=6), whole)
