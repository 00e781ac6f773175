"""Batches in lanes: clips of several shapes, images, captions; over any ranks, micro-batches and starts."""

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdm.data.config import DataConfig
from fvdm.data.loader import batches
from fvdm.data.sequence import SampleSequence, resolve_lanes
from fvdm.data.shards import LatentShards
from tests.data_fixtures import make_clip_shards, make_shards
from tests.loading import LENGTHS, config, sequence, take

BUCKETS = ((5, 4, 6), (5, 6, 4), (1, 4, 4))
CLIPS = [((0, 0, 1, 2, 0)[v % 5], v % 4) for v in range(60)]  # 36, 12 and 12 samples; 0 to 3 captions


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = make_clip_shards(tmp_path_factory.mktemp("clips"), CLIPS, per_shard=7, buckets=BUCKETS)
    return LatentShards(folder)


def setting(**changes):
    return replace(DataConfig("", frames=5, batch_size=4, workers=0), **changes)


def global_steps(shards, config, ranks, steps, start=0, seed=3, step_size=None):
    """Per step of the optimizer, what all ranks read: position -> (key, clip, condition)."""
    step_size = step_size or config.batch_size
    parts = step_size // config.batch_size
    streams = [
        batches(shards, config, rank=r, world_size=ranks, seed=seed, start=start, step_size=step_size)
        for r in range(ranks)
    ]
    found = []
    for _ in range(steps):
        step = {}
        for stream in streams:
            for batch in itertools.islice(stream, parts):
                rows = zip(batch.positions, batch.keys, batch.x_0, batch.y, strict=True)
                step |= {p: (key, x.numpy().tobytes(), y.numpy().tobytes(), x.shape) for p, key, x, y in rows}
        assert len(step) == step_size
        assert batch.consumed == max(step) + 1
        found.append(step)
    return found


def test_a_step_is_from_one_bucket_and_every_sample_comes_once(shards):
    seen = {0: [], 1: [], 2: []}
    shapes = []
    for batch in take(60, shards, setting(), seed=1):
        b, f, c, h, w = batch.x_0.shape
        assert (b, c) == (4, 4)
        bucket = BUCKETS.index((f, h, w))
        shapes.append(bucket)
        seen[bucket] += batch.keys
        assert {CLIPS[int(key)][0] for key in batch.keys} == {bucket}
    assert np.bincount(shapes).tolist() == [36, 12, 12]  # four epochs, in proportion
    for bucket, keys in seen.items():
        expected = sorted(f"{v:09d}" for v, (own, _) in enumerate(CLIPS) if own == bucket)
        for first in range(0, len(keys), len(expected)):
            assert sorted(keys[first : first + len(expected)]) == expected


def test_clips_flips_captions_and_conditions(shards):
    signs, captions = [], {}
    for batch in take(120, shards, setting(), seed=1):
        assert batch.x_0.dtype == batch.y.dtype == torch.float32
        assert batch.y.shape == (4, 4, 3)  # padded to the most tokens
        for x, y, key in zip(batch.x_0, batch.y, batch.keys, strict=True):
            v = int(key)
            first = float(x[0, 0, 0, 0])
            signs.append(np.sign(first))
            assert abs(abs(first) - v) < 0.05
            if len(x) > 1:  # a prefix of the clip, frame by frame
                assert ((x.abs().diff(dim=0) * 1000).round() - 1).abs().max() <= 32  # float16 of numbers up to 60
            tokens = int((y != 0).any(1).sum())
            if v and CLIPS[v][1]:
                captions.setdefault(v, set()).add(tokens)
                assert torch.allclose(y[:tokens], torch.full((tokens, 3), v + (tokens - 1) / 10), rtol=1e-3)
            elif v:
                assert torch.equal(y[0], torch.full((3,), -1.0))  # the empty prompt
            assert not y[tokens:].any()
    assert 0.4 < np.mean(np.array(signs) < 0) < 0.6
    assert {1, 2, 3} == set().union(*(found for v, found in captions.items() if CLIPS[v][1] == 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_steps_for_any_ranks_and_micro_batches(shards, workers):
    one = global_steps(shards, setting(batch_size=8), 1, 12)
    for ranks in (1, 2, 4, 8):
        for micro in (ranks, 8):
            own = setting(batch_size=micro, lanes=8, workers=workers if ranks == 2 else 0)
            assert global_steps(shards, own, ranks, 12, step_size=8) == one


@settings(max_examples=25, deadline=None)
@given(
    stop=st.integers(0, 11),
    first=st.sampled_from([1, 2, 4]),
    then=st.sampled_from([1, 2, 4]),
    lanes=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**63),
)
def test_resume_at_another_world_size_in_the_middle_of_an_epoch(shards, stop, first, then, lanes, seed):
    own = setting(batch_size=4, lanes=lanes)
    whole = global_steps(shards, own, 1, 12, seed=seed, step_size=8)
    begun = global_steps(shards, own, first, stop, seed=seed, step_size=8)
    rest = global_steps(shards, own, then, 12 - stop, start=8 * stop, seed=seed, step_size=8)
    assert begun + rest == whole


def test_lanes_over_videos_of_the_former_format(tmp_path):
    shards = LatentShards(make_shards(tmp_path, LENGTHS))
    plain, lanes = config(tmp_path), config(tmp_path, lanes=4)
    assert sequence(shards, plain, 1, 8) != sequence(shards, lanes, 1, 8)
    assert sequence(shards, replace(plain, lanes=0), 1, 8) == sequence(shards, plain, 1, 8)
    assert sequence(shards, lanes, 4, 8) == sequence(shards, lanes, 1, 8)
    keys = [key for batch in take(11, shards, lanes) for key in batch.keys]
    assert {keys.count(key) for key in shards.keys} == {4}


def test_the_default_order(shards, tmp_path):
    videos = LatentShards(make_shards(tmp_path, LENGTHS))
    remote = LatentShards(f"pipe:cat {tmp_path}/train-{{000000..000003}}.tar", cache=str(tmp_path / "cache"))
    assert resolve_lanes(setting(), videos, 8) == 0
    assert resolve_lanes(setting(), remote, 8) == resolve_lanes(setting(), shards, 8) == 8
    assert resolve_lanes(setting(lanes=0), remote, 8) == 0
    assert resolve_lanes(setting(lanes=4), videos, 8) == 4


def test_lanes_that_cannot_work(shards):
    with pytest.raises(ValueError, match=r"data.batch_size 4 must be a multiple of data.lanes 3"):
        batches(shards, setting(lanes=3))
    with pytest.raises(ValueError, match=r"data.lanes 2 cannot be shared by 4 ranks"):
        batches(shards, setting(lanes=2), world_size=4)
    with pytest.raises(ValueError, match=r"have 3 buckets, and data.lanes 0 is for one"):
        batches(shards, setting(lanes=0))
    for changes in ({"lanes": -1}, {"shuffle_window": 0}, {"cache_gb": -1}):
        with pytest.raises(ValueError, match=f"data.{next(iter(changes))} is"):
            setting(**changes)


def test_a_shorter_clip_is_a_prefix_and_clips_that_are_too_short_are_left_out(shards, caplog):
    for batch in take(20, shards, setting(frames=3, flip=False)):
        if batch.x_0.shape[1] > 1:
            assert batch.x_0.shape[1] == 3
            assert batch.x_0[:, 0, 0, 0, 0].round().int().tolist() == [int(key) for key in batch.keys]
    images = {key for batch in take(20, shards, setting(frames=6)) for key in batch.keys}
    assert images == {f"{v:09d}" for v, (bucket, _) in enumerate(CLIPS) if bucket == 2}
    assert "48 of 60 videos are shorter than 6 frames" in caplog.text


def test_shards_ahead_of_a_rank_cover_what_it_reads_next(shards):
    order = SampleSequence(shards, setting(lanes=4), 3, 4)
    for rank, world in ((0, 1), (1, 2), (3, 4)):
        for step in (0, 7, 20):
            distances = {shard: distance for distance, shard in order.ahead(step, rank, world)}
            stream = batches(shards, setting(lanes=4), rank=rank, world_size=world, seed=3, start=4 * step)
            for batch in itertools.islice(stream, 6):
                for key in batch.keys:
                    shard = int(key) // 7
                    assert shard in distances
                    # Up to a step of each bucket, and one lane's samples.
                    assert distances[shard] <= batch.consumed - 4 * step + 4 * len(BUCKETS) + 4


def test_importing_the_data_package_leaves_other_children_alone(tmp_path):
    """At its end the program waits for its own daemon, as multiprocessing does, and nothing kills that before."""
    code = (
        "import multiprocessing, signal, sys, time\n"
        "import fvdm.data.loader\n"
        "def child(path):\n"
        "    def end(*_):\n"
        "        open(path, 'w').write('ended in order'); sys.exit()\n"
        "    signal.signal(signal.SIGTERM, end); ready.set(); time.sleep(60)\n"
        "multiprocessing.set_start_method('fork'); ready = multiprocessing.Event()\n"
        f"process = multiprocessing.Process(target=child, args=({str(tmp_path / 'sign')!r},), daemon=True)\n"
        "process.start(); ready.wait()\n"
        "raise SystemExit(4)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 4, done.stderr
    assert (tmp_path / "sign").read_text() == "ended in order"
