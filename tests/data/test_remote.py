"""Training data behind a slow server, larger than the caches of two nodes; the server goes away; a run is resumed."""

import http.server
import itertools
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

from fvdm.data.cache import ShardCache
from fvdm.data.config import DataConfig
from fvdm.data.loader import batches
from fvdm.data.shards import LatentShards
from fvdm.files import atomic_write, lock
from tests.data_fixtures import make_clip_shards
from tests.runs import wait_until

SHARDS, PER_SHARD, LANES = 100, 16, 8
STEPS = SHARDS * PER_SHARD // LANES  # of one lane epoch
LATENCY = 0.02  # seconds


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves one folder under the name of each node, late, unless it is away; counts the shards that it gives."""

    def do_GET(self):
        _, node, name = self.path.split("/")
        time.sleep(LATENCY)
        if time.monotonic() < self.server.back_at:
            self.close_connection = True
            return
        if name.endswith(".tar"):
            self.server.given[node, name] += 1
        self.path = f"/{name}"
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    clips = [(0, 1)] * (SHARDS * PER_SHARD)
    return make_clip_shards(tmp_path_factory.mktemp("clips"), clips, per_shard=PER_SHARD, buckets=((5, 4, 6),))


@pytest.fixture
def server(folder):
    handler = type("Here", (Handler,), {"__init__": lambda self, *a: Handler.__init__(self, *a, directory=str(folder))})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.given, server.back_at = Counter(), 0.0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def setting(**changes):
    return replace(DataConfig("", frames=5, batch_size=LANES, workers=0, lanes=LANES, shuffle_window=1), **changes)


class Node:
    """The ranks of one node and their common cache of a fifth of the data."""

    def __init__(self, name, ranks, server, folder, cache, start=0, **changes):
        size = sum(path.stat().st_size for path in folder.glob("*.tar"))
        self.name, self.limit, self.cache = name, size / 5, cache / name
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        self.streams = [
            batches(
                LatentShards(url, cache=str(self.cache), cache_gb=self.limit / 1e9),
                setting(**changes),
                rank=rank,
                world_size=4,
                local_world_size=len(ranks),
                seed=5,
                start=start,
            )
            for rank in ranks
        ]
        self.read = Counter()

    def step(self):
        found = {}
        for stream in self.streams:
            batch = next(stream)
            self.read.update(vars(batch.read))
            found |= {
                p: (k, x.numpy().tobytes()) for p, k, x in zip(batch.positions, batch.keys, batch.x_0, strict=True)
            }
        assert self.used() <= self.limit
        return found

    def used(self):
        with lock(self.cache / ".room.lock"):  # nothing comes or goes meanwhile
            paths = [path for path in self.cache.glob("*.tar*") if not path.name.endswith(".lock")]
            return sum(path.stat().st_size for path in paths)

    def cached(self, shards):
        return {s.name for s in shards.shards if (self.cache / f"{s.sha256}.tar").exists()}

    def given(self, server):
        """How often the server was asked for each shard by this node."""
        return {name: count for (of, name), count in server.given.copy().items() if of == self.name}

    def pinned(self):
        return {name for path in self.cache.glob("pins-*") for name in path.read_text().split()}

    def close(self):
        for stream in self.streams:
            stream.close()


def none_twice_an_epoch(node, given, epochs, shards):
    """What was given once more is for the next epoch: it is in the cache, or on its way there."""
    more = {name for name, count in given.items() if count > epochs}
    assert max(given.values()) <= epochs + 1
    wait_until(lambda: more <= node.cached(shards), seconds=60)


def local_steps(folder, steps):
    """What one rank reads from a local disk."""
    stream = itertools.islice(batches(LatentShards(folder), setting(), seed=5), steps)
    return [{p: (k, x.numpy().tobytes()) for p, k, x in zip(b.positions, b.keys, b.x_0, strict=True)} for b in stream]


@pytest.mark.slow
def test_two_nodes_with_small_caches_behind_a_slow_server(folder, server, tmp_path):
    expected = local_steps(folder, 2 * STEPS + 60)
    nodes = [Node("a", (0, 1), server, folder, tmp_path), Node("b", (2, 3), server, folder, tmp_path)]
    shards = LatentShards(folder)
    for step in range(2 * STEPS):
        if step == 70:
            server.back_at = time.monotonic() + 10  # away for ten seconds
        assert {**nodes[0].step(), **nodes[1].step()} == expected[step]
        if step + 1 in (STEPS, 2 * STEPS):
            for node in nodes:
                epochs = (step + 1) // STEPS
                given = node.given(server)
                assert len(given) <= SHARDS / 2 + 1
                none_twice_an_epoch(node, given, epochs, shards)
                assert sum(given.values()) <= epochs * (SHARDS / 2 + 1) + len(node.cached(shards))
    for node in nodes:
        assert node.read["fetches"] >= SHARDS / 2
        assert node.read["bytes_fetched"] > 4 * node.limit
        assert node.read["seconds_waited"] > 0
        assert node.read["hits"] > node.read["misses"] > 0
        node.close()
    # The same job again, as three nodes' worth of nothing but the position, which another number of ranks takes up.
    again = Node("a", (0, 1, 2, 3), server, folder, tmp_path, start=2 * STEPS * LANES)
    for step in range(2 * STEPS, 2 * STEPS + 60):
        assert again.step() == expected[step]
    again.close()


@pytest.mark.slow
def test_processes_that_read_ahead_share_the_cache(folder, server, tmp_path):
    expected = local_steps(folder, STEPS)
    nodes = [Node(name, ranks, server, folder, tmp_path, workers=2) for name, ranks in (("a", (0, 1)), ("b", (2, 3)))]
    for step in range(STEPS):
        assert {**nodes[0].step(), **nodes[1].step()} == expected[step]
    for node in nodes:
        none_twice_an_epoch(node, node.given(server), 1, LatentShards(folder))
        node.close()


def test_a_rank_that_starts_late_finds_its_share_of_the_cache_free(folder, server, tmp_path):
    node = Node("a", (0, 1), server, folder, tmp_path)
    early, late = node.streams
    next(early)
    while not all((node.cache / name).exists() for name in node.pinned()):  # rank 0 fetches what its share holds
        time.sleep(0.01)
    for _ in range(40):  # a rank that took the whole cache would have it removed for the other, and fetch it again
        next(late)
    for _ in range(40):
        next(early)
    assert max(server.given.values()) == 1
    node.close()


def test_a_cache_that_is_much_too_small_loses_nothing(folder, server, tmp_path, caplog):
    expected = local_steps(folder, 40)
    node = Node("a", (0, 1, 2, 3), server, folder, tmp_path)
    node.close()
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    url = f"http://127.0.0.1:{server.server_port}/a"
    shards = LatentShards(url, cache=str(tmp_path / "small"), cache_gb=2.5 * size / 1e9)
    for step, batch in enumerate(itertools.islice(batches(shards, setting(), seed=5), 40)):
        assert dict(zip(batch.positions, batch.keys, strict=True)) == {p: k for p, (k, _) in expected[step].items()}
    assert "data.cache_gb" in caplog.text
    assert "too small for the shards that are read at the same time" in caplog.text


def files(cache):
    return sorted(path.name for path in cache.folder.glob("*.tar"))


def writer(size):
    def fetch(path):
        path.write_bytes(b"x" * size)
        return size

    return fetch


def test_what_is_pinned_stays_and_the_oldest_of_the_rest_goes(tmp_path):
    cache, other = ShardCache(tmp_path, 1000), ShardCache(tmp_path, 1000)
    for number in range(4):
        cache.get(f"{number}.tar", 250, writer(250))
    other.pin("rank1", ["0.tar"])
    cache.pin("rank0", ["1.tar"])
    assert cache.ranks() == 2
    cache.get("2.tar", 250, writer(250))  # used again: 3 is the oldest now
    assert cache.prefetch("4.tar", 250, writer(250))
    assert files(cache) == ["0.tar", "1.tar", "2.tar", "4.tar"]
    assert not cache.prefetch("5.tar", 600, writer(600))  # no room without the pinned ones
    assert files(cache) == ["0.tar", "1.tar", "2.tar", "4.tar"]
    assert cache.prefetch("6.tar", 500, writer(500))
    assert files(cache) == ["0.tar", "1.tar", "6.tar"]
    cache.pin("rank0", ["1.tar", "6.tar"])
    cache.get("7.tar", 500, writer(500))  # needed now: the least recently used goes, pinned or not
    assert "7.tar" in files(cache)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 1000
    other.pin("rank1", [])
    assert cache.ranks() == 1
    cache.get("8.tar", 5000, writer(5000))  # larger than the cache
    assert files(cache) == ["8.tar"]


def test_a_file_that_is_fetched_now_takes_its_room_already(tmp_path):
    cache = ShardCache(tmp_path, 1000)
    reserved = []

    def fetch(path):
        reserved.append(cache.prefetch("1.tar", 600, writer(600)))
        return writer(600)(path)

    cache.get("0.tar", 600, fetch)
    assert reserved == [False]
    assert files(cache) == ["0.tar"]
    assert cache.counters.take().fetches == 1
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "2.tar"):
        raise RuntimeError
    assert cache.prefetch("3.tar", 400, writer(400))
