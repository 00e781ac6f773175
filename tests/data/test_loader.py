"""The data of a training: order, epochs, ranks, resuming, and the processes that read ahead."""

import itertools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdm.data.loader import batches, draw_frames
from fvdm.data.shards import LatentShards
from tests.data_fixtures import make_shards
from tests.loading import LENGTHS, config, sequence, take


def test_what_the_folder_says(shards):
    assert len(shards) == 11
    assert shards.frames.tolist() == LENGTHS
    assert shards.classes == ("a", "b")
    assert shards.latent_shape == (4, 4, 4)
    assert shards.labels.tolist() == [0, 1] * 5 + [0]
    assert [info.samples for info in shards.shards] == [3, 3, 3, 2]


def test_a_batch(folder, shards):
    batch = take(1, shards, config(folder), seed=5)[0]
    assert batch.x_0.shape == (4, 16, 4, 4, 4)
    assert batch.x_0.dtype == torch.float32
    assert batch.y.tolist() == [int(key) % 2 for key in batch.keys]
    assert batch.consumed == 4
    assert batch.skipped == 0
    # frame i of video v holds v + i / 1000, negated in the mirrored twin: which video, which frames, which twin
    value = batch.x_0[:, :, 0, 0, 0]
    assert value[:, 0].abs().round().tolist() == [int(key) for key in batch.keys]
    steps = (value.abs().diff(dim=1) * 1000).round()
    for step, key in zip(steps, batch.keys, strict=True):
        assert (step - min(3, (LENGTHS[int(key)] - 1) // 15)).abs().max() <= 8  # float16 of numbers up to 10
    assert (batch.x_0.std(dim=(2, 3, 4)) < 1e-2).all()


def test_flips_only_if_asked_and_stored(folder, shards, tmp_path):
    signs = torch.cat([batch.x_0[:, 0, 0, 0, 0] for batch in take(30, shards, config(folder))]).sign()
    assert 0.35 < (signs < 0).float().mean() < 0.65
    plain = torch.cat([batch.x_0[:, 0, 0, 0, 0] for batch in take(8, shards, config(folder, flip=False))])
    assert (plain > -0.01).all()
    other = make_shards(tmp_path / "plain", [16] * 4, flip=False, labels=False)
    batch = take(1, LatentShards(other), config(other))[0]
    assert batch.y is None
    assert (batch.x_0 > -0.01).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_once_an_epoch_over_any_ranks(folder, shards, workers):
    for ranks in (1, 2, 4):
        streams = [
            take(22, shards, config(folder, workers=workers), rank=rank, world_size=ranks, seed=1)
            for rank in range(ranks)
        ]
        keys = [key for step in zip(*streams, strict=True) for batch in step for key in batch.keys]
        assert len(keys) == 88  # 8 epochs of 11
        for epoch in range(8):
            assert sorted(keys[11 * epoch : 11 * (epoch + 1)]) == shards.keys


def test_the_same_global_batches_for_1_2_and_4_ranks(folder, shards):
    one = sequence(shards, config(folder), 1, 12)
    assert sequence(shards, config(folder), 2, 12) == one
    assert sequence(shards, config(folder, workers=3), 4, 12) == one
    assert sequence(shards, config(folder), 1, 12, seed=4) != one


def test_resume_in_the_middle_of_an_epoch(folder, shards):
    whole = sequence(shards, config(folder), 1, 12)
    assert take(5, shards, config(folder))[-1].consumed == 20
    for ranks in (1, 2, 4):
        first = sequence(shards, config(folder, workers=1), 2, 5)
        rest = sequence(shards, config(folder), ranks, 7, start=20)
        assert first + rest == whole


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(4, 9), min_size=1, max_size=9),
    per_shard=st.integers(1, 4),
    share=st.integers(1, 3),
    ranks=st.integers(1, 4),
    stop=st.integers(0, 6),
    seed=st.integers(0, 2**63),
)
def test_order_and_resume_for_any_shards_and_ranks(tmp_path_factory, lengths, per_shard, share, ranks, stop, seed):
    folder = make_shards(tmp_path_factory.mktemp("shards"), lengths, per_shard=per_shard)
    shards = LatentShards(folder)
    size = share * ranks
    setting = config(folder, batch_size=size, frames=4)
    whole = sequence(shards, setting, 1, 8, seed=seed)
    some = sequence(shards, setting, ranks, stop, seed=seed)
    rest = sequence(shards, setting, ranks, 8 - stop, start=stop * size, seed=seed)
    assert some + rest == whole
    keys = [key for step in take(8, shards, setting, seed=seed) for key in step.keys]
    for first in range(0, len(keys) - len(lengths) + 1, len(lengths)):
        assert sorted(keys[first : first + len(lengths)]) == shards.keys
    shutil.rmtree(folder)


@given(available=st.integers(1, 200), frames=st.integers(1, 32), stride=st.integers(1, 8), seed=st.integers(0, 9))
def test_frames_are_even_and_inside(available, frames, stride, seed):
    if frames > available:
        return
    drawn = draw_frames(available, frames, stride, np.random.default_rng(seed))
    assert drawn.shape == (frames,)
    assert drawn[0] >= 0
    assert drawn[-1] < available
    steps = set(np.diff(drawn).tolist())
    assert len(steps) <= 1
    if steps:
        step = steps.pop()
        assert step == stride or (step < stride and (frames - 1) * (step + 1) + 1 > available)


def test_the_last_frame_can_be_drawn():
    random = np.random.default_rng(0)
    drawn = [draw_frames(50, 16, 3, random) for _ in range(100)]
    assert {0, 49} <= {int(frame) for frames in drawn for frame in frames}


def test_short_videos_are_left_out_with_a_warning(folder, shards, caplog):
    keys = {key for batch in take(6, shards, config(folder, frames=20)) for key in batch.keys}
    assert keys == {f"{video:09d}" for video, length in enumerate(LENGTHS) if length >= 20}
    assert "4 of 11 videos are shorter than 20 frames" in caplog.text
    with pytest.raises(ValueError, match=r"None of the 11 videos .* has 100 frames; the longest has 90"):
        batches(shards, config(folder, frames=100))


def test_settings_out_of_range_are_refused(folder, shards):
    for changes in ({"frames": 0}, {"stride": 0}, {"batch_size": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match=f"data.{next(iter(changes))} is"):
            config(folder, **changes)
    with pytest.raises(ValueError, match="batch_size 4 cannot be shared by 3 ranks"):
        batches(shards, config(folder), world_size=3)


def test_workers_shrug_off_signals_and_end_with_the_run(folder):
    """SIGUSR2 and SIGTERM to a worker change nothing; when the training process is killed, its workers end."""
    code = (
        "import itertools, sys\n"
        "from fvdm.data.loader import *\n"
        f"s = LatentShards({str(folder)!r}); c = DataConfig({str(folder)!r}, batch_size=4, workers=2)\n"
        "for batch in batches(s, c):\n"
        "    print(batch.consumed, flush=True); sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    import psutil

    assert int(process.stdout.readline()) == 4
    workers = psutil.Process(process.pid).children()
    assert len(workers) >= 2
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        for worker in workers:
            worker.send_signal(number)
    for step in range(2, 30):
        process.stdin.write("\n")
        process.stdin.flush()
        assert int(process.stdout.readline()) == 4 * step
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_closing_the_iterator_ends_the_workers(folder, shards):
    import psutil

    before = len(psutil.Process().children())
    stream = batches(shards, config(folder, workers=2))
    next(stream)
    assert len(psutil.Process().children()) >= before + 2
    stream.close()
    del stream
    deadline = time.monotonic() + 10
    while len(psutil.Process().children()) > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(psutil.Process().children()) <= before


def test_a_killed_worker_is_told_as_such(folder, shards):
    """Not as the trouble with a disk or a network that the broken pipe to it would look like."""
    import multiprocessing

    data = batches(shards, config(folder, workers=1))
    next(data)
    (worker,) = multiprocessing.active_children()

    def read_on():  # The signal of the worker's end may arrive at once.
        worker.kill()
        list(itertools.islice(data, 100))

    with pytest.raises(RuntimeError, match=r"DataLoader worker|reads ahead"):
        read_on()


def test_an_exception_in_the_middle_ends_the_process_though_workers_read_ahead(folder):
    code = (
        "from fvdm.data.loader import *; from fvdm.data.shards import LatentShards\n"
        f"s = LatentShards({str(folder)!r}); c = DataConfig({str(folder)!r}, batch_size=4, workers=2)\n"
        "for batch in batches(s, c): raise RuntimeError('in the middle')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "RuntimeError: in the middle"
