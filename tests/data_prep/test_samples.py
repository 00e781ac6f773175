"""Arrays and samples that are written piece by piece have the bytes of those written at once, in little memory."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from data_prep import samples
from data_prep.samples import Array, VideoMoments, copy_members, make_sample, tar_writer, write_sample
from fvdm.media.layouts import Source

SOURCE = Source("a.mp4", "file", 3)


@pytest.mark.parametrize("spool", [0, 10, 2**20])
@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_an_array_reads_as_numpy_writes_it(tmp_path, monkeypatch, spool, dtype):
    monkeypatch.setattr(samples, "SPOOL", spool)
    data = np.arange(5 * 6 * 2 * 3).astype(dtype).reshape(5, 6, 2, 3)
    array = Array(tmp_path)
    for first, end in ((0, 1), (1, 3), (3, 5)):
        array.append(data[first:end])
    expected = io.BytesIO()
    np.save(expected, data)
    for size in (1, 7, 1000):
        assert array.rewind() == len(expected.getvalue())
        found = b""
        while block := array.read(size):
            found += block
        assert found == expected.getvalue()
    assert not list(tmp_path.iterdir())
    array.close()


@pytest.mark.parametrize("copies", [1, 2])
def test_a_sample_in_pieces_is_the_one_that_webdataset_writes(tmp_path, copies):
    """Its own writer takes bytes alone; the members, their order and their headers are the same."""
    moments = np.random.default_rng(0).normal(size=(copies, 50, 8, 4, 4)).astype(np.float16)
    stored = VideoMoments(copies, tmp_path)
    for first in range(0, 50, 7):
        stored.append(moments[:, first : first + 7])
    piecewise, at_once, copied = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with tar_writer(piecewise) as writer:
        write_sample(writer, stored.sample(7, SOURCE, 25.0))
    sample = make_sample(7, SOURCE, 25.0, moments[0], moments[1] if copies == 2 else None)
    for name, value in sample.items():
        if isinstance(value, Array):
            value.rewind()
            sample[name] = value.read(2**30)
    with tar_writer(at_once) as writer:
        writer.write(sample)
    assert piecewise.getvalue() == at_once.getvalue()
    metadata = json.loads(sample["json"])
    assert metadata["sha256"] == hashlib.sha256(moments.tobytes()).hexdigest()
    assert metadata["frames"] == 50
    with tarfile.open(fileobj=io.BytesIO(at_once.getvalue())) as tar, tar_writer(copied) as writer:
        copy_members(tar, tar, writer)
    assert copied.getvalue() == at_once.getvalue()


LONG = """
import sys
from pathlib import Path
import numpy as np
from benchmarks.process_memory import peak
from data_prep.planning import EncodePlan, ShardPlan
from data_prep.samples import VideoMoments
from data_prep.shards import Work
from fvdm.media.layouts import Source

folder = Path(sys.argv[1])
shard = ShardPlan("train-000000.tar", "train", 0, 1)
plan = EncodePlan("/v", {}, "ffs", [], [Source("a.mp4", "file")], [1], [], [shard])
work = Work(folder, plan)
work.folder.mkdir()
chunk = np.ones((2, 100, 8, 16, 16), np.float16)
before = peak()
moments = VideoMoments(2, work.folder)
for _ in range(300):
    moments.append(chunk)
work.keep(plan.shards[0], 0, moments.sample(0, plan.sources[0], 25.0))
work.assemble(plan.shards[0])
assert work._take_apart(plan.shards[0], {}) is None
print(round(peak() - before))
"""


def test_the_memory_of_a_long_video_does_not_grow_with_its_length(tmp_path):
    """Moments of 30,000 frames, 246 MB, through a part, a shard, and parts again."""
    done = subprocess.run([sys.executable, "-c", LONG, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50e6, "bytes"
