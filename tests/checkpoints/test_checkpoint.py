import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from fvdm.checkpoints import checkpoint as ckpt
from fvdm.checkpoints.config import CheckpointConfig

NAMES = {"a.weight": [3, 4], "b.bias": [5]}
TOTAL = 17


def values():
    return {name: torch.arange(TOTAL).float() + 100 * k for k, name in enumerate(ckpt.SLICES)}


def save(root, step, ranks=1):
    """What `ranks` processes would write, one after the other; barriers are where the order matters."""
    size = -(-TOTAL // ranks)
    folder = root / f".tmp-step-{step:08d}"
    for rank in reversed(range(ranks)):  # Rank 0 finishes.
        if rank == ranks - 1:
            folder.mkdir(parents=True)
        begin = min(rank * size, TOTAL)
        slices = {name: value[begin : begin + size] for name, value in values().items()}
        if rank:
            shard = folder / f"shard-{rank:05d}-of-{ranks:05d}.safetensors"
            ckpt._save_tensors(slices, shard, {"begin": str(begin)})
            (folder / f"digest-{rank:05d}.json").write_text(json.dumps({shard.name: ckpt._digest(shard)}))
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}

    def barrier():
        for name, data in kept.items():
            if folder.is_dir() and not (root / ckpt.STEP.format(step)).exists():
                (folder / name).write_bytes(data)

    slices = {name: value[:size] for name, value in values().items()}
    state = {"names": NAMES, "settings": {}}
    return ckpt.save(root, step, slices, 0, state, 0, ranks, barrier)


def test_weights_come_back_by_name(tmp_path):
    folder = save(tmp_path, 7)
    assert folder.name == "step-00000007"
    assert ckpt.validate(folder) is None
    for kind, offset in (("model", 0), ("ema", 300)):
        weights = ckpt.read_weights(folder, kind)
        assert torch.equal(weights["a.weight"], torch.arange(12).float().view(3, 4) + offset)
        assert torch.equal(weights["b.bias"], torch.arange(12, 17).float() + offset)
    assert ckpt.read_state(folder)["step"] == 7


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_slice_can_be_read_whatever_number_of_ranks_wrote_it(tmp_path, ranks):
    folder = save(tmp_path, 1, ranks)
    assert len(list(folder.glob("shard-*"))) == ranks
    for begin in range(TOTAL):
        for end in range(begin, TOTAL + 1):
            got = ckpt.read_slice(folder, "exp_avg", range(begin, end))
            assert torch.equal(got, values()["exp_avg"][begin:end])
    (folder / f"shard-00000-of-{ranks:05d}.safetensors").unlink()
    with pytest.raises(ValueError, match="incomplete"):
        ckpt.read_slice(folder, "exp_avg", range(TOTAL))


def damage(folder, how):
    shard = next(folder.glob("shard-*"))
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "flipped":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif how == "missing":
        shard.unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "torn manifest":
        (folder / "manifest.json").write_text('{"files": {"a')


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "no manifest", "torn manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, how, caplog):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    assert ckpt.newest(tmp_path) == new
    damage(new, how)
    assert ckpt.newest(tmp_path) == old
    assert "not whole" in caplog.text
    with pytest.raises(ValueError, match=r"not whole|no whole"):
        ckpt.resolve(new)
    damage(old, how)
    assert ckpt.newest(tmp_path) is None
    with pytest.raises(ValueError, match="no whole checkpoint"):
        ckpt.resolve(tmp_path)


def test_a_step_found_damaged_can_be_saved_again(tmp_path):
    damage(save(tmp_path, 2), "flipped")
    assert ckpt.validate(save(tmp_path, 2)) is None


def test_the_policy_keeps_the_last_and_every_nth_and_clears_what_kills_left(tmp_path):
    for step in range(10, 80, 10):
        save(tmp_path, step)
    (tmp_path / ".tmp-step-00000099").mkdir()
    ckpt.clean(tmp_path)
    ckpt.prune(tmp_path, CheckpointConfig(keep_last=2, keep_every=30))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{s:08d}" for s in (30, 60, 70)]


def test_a_run_or_a_checkpoint_may_be_named(tmp_path):
    folder = save(tmp_path / "run" / "checkpoints", 3)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", folder):
        assert ckpt.resolve(path) == folder


def test_a_newer_format_is_refused(tmp_path):
    folder = save(tmp_path, 3)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        ckpt.read_state(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no checkpoint"):
        ckpt.read_state(folder)


def test_what_one_rank_cannot_write_none_has_written(tmp_path):
    def barrier(error=""):
        if error:
            raise OSError(f"rank 0: {error}")

    state = {"names": NAMES, "settings": {}}
    good = save(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002").write_text("in the way")  # mkdir fails
    with pytest.raises(OSError, match=r"rank 0: .*File exists"):
        ckpt.save(tmp_path, 2, values(), 0, state, 0, 1, barrier)
    assert ckpt.newest(tmp_path) == good
    assert not (tmp_path / "step-00000002").exists()


def command(*words):
    done = subprocess.run(
        [sys.executable, "-m", "fvdm", "checkpoint", *map(str, words)], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_command_lists_verifies_and_exports(tmp_path):
    run = tmp_path / "run"
    old, new = save(run / "checkpoints", 10, ranks=2), save(run / "checkpoints", 20)
    listed = command("list", run).stdout
    assert [re.findall(r"step-(\d+).* (\d+) ranks  complete", line) for line in listed.splitlines()] == [
        [("00000010", "2")],
        [("00000020", "1")],
    ]
    assert command("verify", run).returncode == 0
    damage(new, "flipped")
    done = command("verify", run)
    assert done.returncode == 2
    assert "corrupt: the checksum" in done.stdout
    assert command("export", run, tmp_path / "out").returncode == 0  # of the newest whole one
    assert ckpt.resolve(tmp_path / "out") == tmp_path / "out"
    assert torch.equal(
        ckpt.read_weights(tmp_path / "out")["b.bias"],
        ckpt.read_weights(old)["b.bias"],
    )
    assert not list((tmp_path / "out").glob("shard-*"))
    assert "exists" in command("export", run, tmp_path / "out").stderr
    assert "no checkpoint" in command("list", tmp_path / "nothing").stderr
