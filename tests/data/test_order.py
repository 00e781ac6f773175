"""The order of samples, as arithmetic: guarantees for every world size, mixing, buckets, and seed streams."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdm.data.order import (
    BucketSchedule,
    LaneOrder,
    PermutationOrder,
    Stream,
    epoch_order,
    rank_positions,
    stream,
)

SHARDS, SAMPLES, LANES = 1000, 256, 64
WORLDS = (1, 2, 4, 8, 16, 32, 64)


@pytest.fixture(scope="module")
def order():
    return LaneOrder(0, np.full(SHARDS, SAMPLES), LANES, window=4)


def lane_samples(order, lane, epoch):
    passed = order.epoch(lane, epoch)
    return passed.shard.astype(np.int64) * SAMPLES + passed.number


def test_every_sample_comes_once_a_lane_epoch(order):
    n = SHARDS * SAMPLES
    for epoch in range(3):
        seen = np.concatenate([lane_samples(order, lane, epoch) for lane in range(LANES)])
        assert np.array_equal(np.sort(seen), np.arange(n))
    first, second = (lane_samples(order, 5, epoch) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(first), np.sort(second))
    # The positions follow the lanes: position p is lane p % C, place p // C.
    for position in (0, 5, 64, 12_345, n - 1, n, 2 * n + 17):
        lane, (epoch, place) = position % LANES, divmod(position // LANES, n // LANES)
        sample = order.at(position)
        assert sample.epoch == epoch
        assert sample.shard * SAMPLES + sample.number == lane_samples(order, lane, epoch)[place]


def test_every_world_size_reads_the_same_batches(order):
    batch = 2 * LANES
    for step in (0, 1, 777, 5000):
        expected = sorted(order.at(p) for p in range(step * batch, (step + 1) * batch))
        for world in WORLDS:
            parts = [rank_positions(step * batch, batch, LANES, rank, world) for rank in range(world)]
            assert {len(part) for part in parts} == {batch // world}
            assert sorted(order.at(p) for part in parts for p in part.tolist()) == expected


@pytest.mark.parametrize("nodes", WORLDS)
def test_a_node_needs_its_share_of_the_shards_in_the_whole_run(order, nodes):
    """Whatever the ranks per node: a node reads neighbouring lanes."""
    share = LANES // nodes
    needed = []
    for node in range(nodes):
        lanes = range(node * share, (node + 1) * share)
        shards = {int(s) for lane in lanes for epoch in range(4) for s in np.unique(order.epoch(lane, epoch).shard)}
        assert shards == order.shards_of(lanes)
        assert len(shards) <= min(SHARDS, math.ceil(SHARDS / nodes) + 1)
        needed.append(len(shards))
    assert max(needed) <= math.ceil(SHARDS / nodes) + share  # what was asked for, with room
    if nodes < LANES:
        assert max(needed) <= SHARDS / nodes + share


def test_the_ranks_of_a_node_read_neighbouring_lanes():
    for world in WORLDS:
        for rank in range(world):
            lanes = {p % LANES for p in rank_positions(3 * LANES, 2 * LANES, LANES, rank, world).tolist()}
            assert lanes == set(range(rank * LANES // world, (rank + 1) * LANES // world))


def test_few_shards_are_needed_at_a_time_and_each_once_an_epoch(order):
    """Of one node of four: the shards between their first and their last use, over one lane epoch."""
    lanes = range(16, 32)
    spans = {}
    for lane in lanes:
        passed = order.epoch(lane, 0)
        for shard, first, last in zip(passed.shards, passed.first, passed.last, strict=True):
            spans.setdefault(int(shard), []).append((int(first), int(last)))
    n = SHARDS * SAMPLES // LANES
    live = np.zeros(n)
    for uses in spans.values():
        begin, end = min(first for first, _ in uses), max(last for _, last in uses)
        live[begin : end + 1] += 1
        # Neighbouring lanes need a shard that they share at the same time: at an end of the epoch.
        assert len(uses) == 1 or end - begin <= 6 * SAMPLES
    assert live.max() <= 16 * (order.window / SAMPLES * 2 + 2)
    assert live.mean() <= 16 * (order.window / SAMPLES + 2)


def autocorrelation(ranks, lag):
    """Of the places in one epoch of samples that are neighbours in the storage."""
    return float(np.corrcoef(ranks[:-lag], ranks[lag:])[0, 1])


def test_how_well_lanes_mix_against_a_full_permutation(order):
    """The numbers in docs/data.md. Batches of 64: shards per batch, and how soon a shard is read again."""
    n = SHARDS * SAMPLES
    full = PermutationOrder(0, np.full(SHARDS, SAMPLES))
    permuted = epoch_order(0, 0, n) // SAMPLES
    lanes = np.stack([order.epoch(lane, 0).shard for lane in range(LANES)], 1).ravel()
    assert [order.at(p).shard for p in range(500)] == lanes[:500].tolist()
    assert [full.at(p).shard for p in range(500)] == permuted[:500].tolist()
    distinct, windows = {}, {}
    for name, shards in (("full", permuted), ("lanes", lanes)):
        distinct[name] = np.mean([len(np.unique(batch)) for batch in shards.reshape(-1, LANES)])
        windows[name] = np.mean([len(np.unique(part)) for part in shards[: n // 6400 * 6400].reshape(-1, 6400)])
    assert 61 < distinct["full"] < 63
    assert distinct["lanes"] > 63.5  # a batch of 64 is from 64 different shards
    assert windows["full"] > 995  # 100 batches see nearly all shards
    assert 250 < windows["lanes"] < 400  # a third of them
    # Samples that lie side by side in a shard are read far apart, though not as far as in a permutation.
    position = np.empty(n, dtype=np.int64)
    position[np.concatenate([lane_samples(order, lane, 0) for lane in range(LANES)])] = np.concatenate(
        [np.arange(n // LANES)] * LANES
    )
    apart = np.median(np.abs(np.diff(position)))
    assert 250 < apart < 700


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    lanes=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    window=st.floats(0, 5),
    seed=st.integers(0, 2**64),
)
def test_any_shards_and_lanes(counts, lanes, window, seed):
    """Fewer samples than lanes, empty shards, one shard: each lane epoch has each sample once."""
    order = LaneOrder(seed, np.array(counts), lanes, window, least=1)
    expected = sorted((shard, number) for shard, count in enumerate(counts) for number in range(count))
    assert lanes % order.parts == 0
    for epoch in range(3):
        seen = [
            (int(s), int(k))
            for lane in range(order.parts)
            for passed in [order.epoch(lane, epoch)]
            for s, k in zip(passed.shard, passed.number, strict=True)
        ]
        assert sorted(seen) == expected
    places = [order.place(position) for position in range(6 * lanes * max(1, order.n))]
    for lane in range(order.parts):
        of_lane = [(epoch, place) for at, epoch, place in places if at == lane]
        assert of_lane == sorted(of_lane)  # a lane is read from front to back, no place twice
        assert len(set(of_lane)) == len(of_lane)
    for shard in {order.at(p).shard for p in range(2 * lanes)}:
        assert counts[shard]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    lanes=st.sampled_from([1, 2, 4]),
    start=st.integers(0, 200),
    seed=st.integers(0, 99),
)
def test_shards_ahead_are_those_that_come(counts, lanes, start, seed):
    order = LaneOrder(seed, np.array(counts), lanes, 1.5, least=1)
    ahead = order.ahead(np.arange(start, start + lanes))
    distances = {shard: distance for distance, shard in ahead}
    assert len(distances) == len(ahead)
    shortest = min(end - begin for begin, end in map(order.bounds, range(order.parts)))
    for position in range(start, start + lanes * max(1, shortest // order.share)):
        assert distances[order.at(position).shard] <= position - start + lanes
    assert [distance for distance, _ in ahead] == sorted(distance for distance, _ in ahead)


@pytest.mark.parametrize("n", [1, 63, 64, 128, 1000, 5000])
def test_few_samples_come_equally_often(n):
    order = LaneOrder(0, np.full(n, 1), 64, window=4)
    assert order.parts == max(1, min(64, 2 ** int(math.log2(max(1, n // 64)))))
    counts = np.bincount([order.at(position).shard for position in range(20 * n)], minlength=n)
    assert counts.min() >= 18
    assert counts.max() <= 22


def test_a_corrupt_sample_is_followed_by_others_of_its_lane(order):
    position = 64 * 3999 + 7  # the last place but one of its lane epoch
    followers = [order.at(position, skip) for skip in range(3)]
    assert len(set(followers)) == 3
    assert {sample.epoch for sample in followers} == {0}
    own = set(zip(order.epoch(7, 0).shard.tolist(), order.epoch(7, 0).number.tolist(), strict=True))
    assert {(sample.shard, sample.number) for sample in followers} <= own


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6), batch=st.sampled_from([1, 8, 64]))
def test_buckets_come_in_proportion_and_from_the_step_alone(sizes, batch):
    schedule = BucketSchedule(sizes, batch)
    steps = 3 * schedule.period
    done = np.zeros(len(sizes), dtype=int)
    share = schedule.steps / schedule.period
    for step in range(steps):
        bucket, before = schedule(step)
        assert before == done[bucket]
        done[bucket] += 1
        assert np.abs(done - share * (step + 1)).max() <= len(sizes)
    assert np.array_equal(done, 3 * schedule.steps)
    exact = np.array(sizes) * schedule.period / sum(sizes)
    assert (schedule.steps >= 1).all()
    assert (np.abs(schedule.steps - exact) <= len(sizes)).all()


def test_order_is_pinned_across_versions():
    assert epoch_order(0, 0, 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert epoch_order(7, 3, 10).tolist() == [7, 1, 9, 6, 0, 4, 2, 8, 3, 5]
    assert sorted(epoch_order(1, 1, 1000)) == list(range(1000))
    assert not np.array_equal(epoch_order(1, 1, 1000), epoch_order(1, 2, 1000))
    order = LaneOrder(7, np.array([3, 2, 4, 3]), lanes=2, window=1, least=1)
    shards = [0, 0, 0, 1, 2, 1, 2, 3, 2, 3, 2, 3]
    assert [order.at(position).shard for position in range(12)] == shards
    assert [order.at(position).number for position in range(12)] == [1, 2, 0, 1, 0, 0, 2, 0, 3, 1, 1, 2]
    schedule = BucketSchedule([50, 30, 20], 10)
    assert [schedule(step)[0] for step in range(10)] == [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]


def test_each_purpose_has_a_stream_of_its_own():
    """`SeedSequence([s, e])` and `SeedSequence([s, e, 0])` are the same; these are not, for any keys."""
    keys = [
        (s, kind, *key) for s in (0, 1, 2**40) for kind in Stream for key in ((), (0,), (0, 0), (1,), (0, 1), (1, 0))
    ]
    first = {tuple(stream(*key).random_raw(2).tolist()) for key in keys}
    assert len(first) == len(keys)
    former = np.random.Philox(np.random.SeedSequence([3, 4])).random_raw(2)
    assert np.array_equal(former, np.random.Philox(np.random.SeedSequence([3, 4, 0])).random_raw(2))
