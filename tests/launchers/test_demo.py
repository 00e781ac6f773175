"""launchers/demo.py: what it holds out, and the losses that it prints."""

import json

import numpy as np

from data_prep.demo_clips import VIDEOS, cut_clips
from launchers import demo
from tests.data_fixtures import carried


def frames_of(path):
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_held_out_clips_are_the_ends_of_the_videos_and_share_no_frame_with_the_others(tmp_path):
    number = cut_clips(tmp_path / "clips", held_out=tmp_path / "held-out")
    assert number == len(list((tmp_path / "clips").iterdir()))
    for name in VIDEOS:
        stem, length = carried(name).stem, len(frames_of(carried(name)))
        (held_out,) = (tmp_path / "held-out").glob(f"{stem}-*.mp4")
        first = int(held_out.stem.rpartition("-")[2])
        assert first + 24 == length
        starts = [int(path.stem.rpartition("-")[2]) for path in (tmp_path / "clips").glob(f"{stem}-*.mp4")]
        assert max(starts) + 24 <= first
        assert len(frames_of(held_out)) == 24
    given = [word for words in demo.TASKS.values() for word in words if word.endswith(".mp4")]
    assert all((tmp_path / word.removeprefix("demo/")).exists() for word in given)


def test_the_losses_at_both_ends_are_those_of_the_journal(tmp_path):
    events = [{"step": 0, "metrics": {"validation/loss": 1.0}}, {"step": 1, "metrics": {"loss/mean": 0.9}}]
    events += [{"tags": {}}, {"step": 4, "metrics": {"validation/loss": 0.25, "validation/loss_one_t": 0.2}}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert demo.held_out_losses(tmp_path) == [(0, 1.0), (4, 0.25)]
    words = demo.commands([])["training"]
    assert words[words.index("--validation.path") + 1] == demo.HELD_OUT
    assert np.isfinite(float(words[words.index("--validation.every") + 1]))
