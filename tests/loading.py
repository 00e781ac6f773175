"""Batches of small shards, for the tests of what is read and of what is damaged."""

import itertools
from dataclasses import replace

from fvdm.data.config import DataConfig
from fvdm.data.loader import batches

LENGTHS = [20, 17, 60, 16, 33, 48, 16, 47, 18, 21, 90]  # 11 videos in uneven shards of 3, 3, 3, 2


def config(folder, **changes):
    return replace(DataConfig(str(folder), batch_size=4, workers=0), **changes)


def take(n, *args, **kwargs):
    return list(itertools.islice(batches(*args, **kwargs), n))


def sequence(shards, config, ranks, steps, start=0, seed=3):
    """The global batches: per step the set of (key, sum of the clip), whatever the ranks."""
    streams = [take(steps, shards, config, rank=r, world_size=ranks, seed=seed, start=start) for r in range(ranks)]
    return [
        {(key, float(x.double().sum())) for batch in step for key, x in zip(batch.keys, batch.x_0, strict=True)}
        for step in zip(*streams, strict=True)
    ]
