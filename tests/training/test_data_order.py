"""What a run keeps of its data from one start to the next: the order of its samples, and the count of corrupt ones."""

import json

import pytest

from tests.data_fixtures import make_clip_shards, make_shards
from tests.models.test_wan import diffusers_model
from tests.runs import losses, state, train, words


@pytest.fixture(scope="module")
def by_lanes(latents, tmp_path_factory):
    """8 steps in 4 lanes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("lanes")
    train(1, words(latents, folder, "run", "--steps", 8, "--data.lanes", 4), folder)
    return folder


@pytest.mark.slow
def test_a_run_in_lanes_resumes_with_other_ranks_and_keeps_its_lanes(latents, undisturbed, by_lanes, tmp_path):
    """Also where the setting is left out, or another, at a later start."""
    for ranks, steps, lanes in ((2, 3, ["--data.lanes", 4]), (4, 5, []), (1, 8, ["--data.lanes", 2])):
        output = train(ranks, words(latents, tmp_path, "run", "--steps", steps, *lanes), tmp_path)[0]
        assert ("data.lanes stays 4" in output) == (lanes[-1:] == [2])
    record, _ = state(tmp_path, "run")
    assert record["lanes"] == 4
    expected = losses(by_lanes, "run")
    assert expected != losses(undisturbed, "run")
    assert list(losses(tmp_path, "run").values()) == pytest.approx(list(expected.values()), rel=1e-4)


@pytest.mark.slow
def test_a_run_that_began_in_one_permutation_goes_on_in_it(latents, undisturbed, tmp_path):
    train(2, words(latents, tmp_path, "run", "--steps", 3), tmp_path)
    output = train(2, words(latents, tmp_path, "run", "--steps", 8, "--data.lanes", 4), tmp_path)[0]
    assert "data.lanes stays 0" in output
    assert losses(tmp_path, "run") == losses(undisturbed, "run")


@pytest.mark.slow
def test_the_count_of_corrupt_samples_outlives_a_start(tmp_path):
    folder = make_shards(tmp_path / "latents", [9] * 8)
    shard = folder / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    for at in range(0, len(data), 512):
        data[at] ^= 1
    shard.write_bytes(data)
    counts = {}
    for ranks, steps in ((2, 4), (1, 8)):
        train(ranks, words(folder, tmp_path, "run", "--steps", steps, "--data.corrupt", "skip"), tmp_path)
        counts[steps] = state(tmp_path, "run")[0]["progress"]["corrupt"]
    assert 4 <= counts[4] < counts[8]
    events = [json.loads(line) for line in (tmp_path / "runs/run/events.jsonl").read_text().splitlines()]
    logged = [event["metrics"]["data/corrupt_samples"] for event in events if "data/corrupt_samples" in str(event)]
    assert logged == sorted(logged)
    assert (logged[3], logged[-1]) == (counts[4], counts[8])
    train(1, words(folder, tmp_path, "alone", "--steps", 8, "--data.corrupt", "skip"), tmp_path)
    assert state(tmp_path, "alone")[0]["progress"]["corrupt"] == counts[8]


@pytest.mark.slow
def test_buckets_images_and_captions_resume_with_other_ranks_in_the_middle_of_an_epoch(tmp_path):
    """The float32 losses are those of the unbroken run, to the last bit."""
    clips = [(0, 1), (1, 2), (0, 0), (1, 0), (0, 3), (0, 1), (1, 1), (0, 2)]
    folder = make_clip_shards(tmp_path / "latents", clips, buckets=((5, 4, 6), (1, 4, 4)))
    diffusers_model(text_dim=3).save_pretrained(tmp_path / "wan")
    more = ["--diffusion.objective", "flow", "--diffusion.learned_variance", "false", "--data.frames", "5"]
    # Without clipping, sums of two ranks are those of two micro-batches: a norm is summed in order.
    more += ["--engine.micro_batch", "2", "--engine.grad_clip_start", "1000", "--model", f"wan:{tmp_path}/wan"]
    train(1, words(folder, tmp_path, "unbroken", *more, "--steps", 7), tmp_path)
    for ranks, steps in ((2, 3), (1, 7)):
        train(ranks, words(folder, tmp_path, "run", *more, "--steps", steps), tmp_path)
    expected = losses(tmp_path, "unbroken")
    assert list(expected) == list(range(1, 8))
    assert losses(tmp_path, "run") == expected
