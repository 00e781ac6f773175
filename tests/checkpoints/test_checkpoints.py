import json
import shutil

import pytest
import torch

from fvdm.checkpoints.config import CheckpointConfig
from fvdm.checkpoints.find import clean, corrupt_checkpoints, newest, prune, resolve, set_aside
from fvdm.checkpoints.layout import SLICES, STEP, group_key, validate
from fvdm.checkpoints.read import read_slice, read_slices, read_state, read_weights, require_finite
from fvdm.checkpoints.save import save, write_shard

NAMES = {"a.weight": [3, 4], "b.bias": [5]}
TOTAL = 17


def values():
    return {name: torch.arange(TOTAL).float() + 100 * k for k, name in enumerate(SLICES)}


def write(root, step, ranks=1, groups=(TOTAL,)):
    """What `ranks` processes would write, one after the other; barriers are where the order matters."""
    folder = root / f".tmp-step-{step:08d}"
    folder.mkdir(parents=True)
    own = {}
    for rank in range(ranks):
        slices, begin, first = {}, [], 0
        for group, size in enumerate(groups):
            share = -(-size // ranks)
            low, high = first + min(rank * share, size), first + min((rank + 1) * share, size)
            slices |= {group_key(name, group): value[low:high] for name, value in values().items()}
            begin.append(low)
            first += size
        own[rank] = slices, begin
        if rank:
            write_shard(folder, slices, begin, rank, ranks)
    others = {path.name: path.read_bytes() for path in folder.iterdir()}

    def barrier():
        for name, data in others.items():
            if folder.is_dir() and not (root / STEP.format(step)).exists():
                (folder / name).write_bytes(data)

    return save(root, step, *own[0], {"names": NAMES, "settings": {}}, 0, ranks, barrier)


def test_weights_come_back_by_name(tmp_path):
    folder = write(tmp_path, 7)
    assert folder.name == "step-00000007"
    assert validate(folder) is None
    for kind, offset in (("model", 0), ("ema", 300)):
        weights = read_weights(folder, kind)
        assert torch.equal(weights["a.weight"], torch.arange(12).float().view(3, 4) + offset)
        assert torch.equal(weights["b.bias"], torch.arange(12, 17).float() + offset)
    assert read_state(folder)["step"] == 7


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_slice_can_be_read_whatever_number_of_ranks_wrote_it(tmp_path, ranks):
    folder = write(tmp_path, 1, ranks)
    assert len(list(folder.glob("shard-*"))) == ranks
    for begin in range(TOTAL):
        for end in range(begin, TOTAL + 1):
            got = read_slice(folder, "exp_avg", range(begin, end))
            assert torch.equal(got, values()["exp_avg"][begin:end])
    (folder / f"shard-00000-of-{ranks:05d}.safetensors").unlink()
    with pytest.raises(ValueError, match="incomplete"):
        read_slice(folder, "exp_avg", range(TOTAL))


def corrupt(folder, how):
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


def test_files_follow_the_umask(tmp_path):
    folder = write(tmp_path, 1, ranks=2)
    (tmp_path / "other").touch()
    wanted = (tmp_path / "other").stat().st_mode
    assert {path.name: path.stat().st_mode for path in folder.iterdir() if path.stat().st_mode != wanted} == {}


@pytest.mark.parametrize("how", ["truncated", "missing", "no manifest", "torn manifest"])
def test_a_newest_checkpoint_with_a_missing_or_short_file_is_passed_over(tmp_path, how, caplog):
    old, new = write(tmp_path, 1), write(tmp_path, 2)
    assert newest(tmp_path) == new
    corrupt(new, how)
    assert newest(tmp_path) == old
    assert "is corrupt" in caplog.text
    with pytest.raises(ValueError, match="is corrupt"):
        resolve(new)
    corrupt(old, how)
    assert newest(tmp_path) is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        resolve(tmp_path)


def test_a_flipped_bit_is_found_by_checksum_where_the_file_is_read(tmp_path):
    folder = write(tmp_path, 1)
    corrupt(folder, "flipped")
    assert validate(folder) is None
    assert validate(folder, checksums=True) == "the checksum of shard-00000-of-00001.safetensors is wrong"
    read_weights(folder)  # Another file.
    data = bytearray((folder / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "ema.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"is corrupt: the checksum of ema\.safetensors is wrong"):
        read_weights(folder)
    read_weights(folder, checksum=False)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    weights = {"good": torch.ones(2), "bad.weight": torch.tensor([1.0, float("nan")]), "count": torch.ones(1).long()}
    with pytest.raises(ValueError, match=r"weights in there are not finite: bad\.weight, of 3"):
        require_finite(weights, "there")
    require_finite({"good": weights["good"]}, "there")


def test_a_corrupt_checkpoint_is_moved_aside_and_its_step_can_be_saved_again(tmp_path):
    content = set(write(tmp_path, 2).iterdir())
    aside = set_aside(tmp_path / "step-00000002", "for a test")
    assert {path.name for path in content} <= {path.name for path in aside.iterdir()}
    assert corrupt_checkpoints(tmp_path) == {tmp_path / "corrupt-step-00000002": "for a test"}
    assert newest(tmp_path) is None
    set_aside(write(tmp_path, 2), "again")
    assert [path.name for path in corrupt_checkpoints(tmp_path)] == ["corrupt-step-00000002", "corrupt-step-00000002-2"]


def test_corrupt_checkpoints_do_not_count_as_kept(tmp_path):
    """Nor are they deleted: of five, the newest two are corrupt, and the two newest of the others stay."""
    for step in range(1, 6):
        write(tmp_path, step)
    for step in (4, 5):
        corrupt(tmp_path / f"step-{step:08d}", "truncated")
    prune(tmp_path, CheckpointConfig(keep_last=2))
    kept = ["corrupt-step-00000004", "corrupt-step-00000005", "step-00000002", "step-00000003"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == kept


@pytest.mark.parametrize("ranks", [1, 3])
def test_slices_of_several_parameter_groups_come_back(tmp_path, ranks):
    folder = write(tmp_path, 1, ranks, groups=(12, 5))
    for part in (range(TOTAL), range(3, 15), range(12, 17)):
        assert torch.equal(read_slice(folder, "ema", part), values()["ema"][part.start : part.stop])
    two = read_slices(folder, SLICES, [range(2), range(11, 14)])
    assert torch.equal(two["master"][1], torch.tensor([11.0, 12, 13]))
    assert torch.equal(read_weights(folder, "model")["b.bias"], torch.arange(12, 17).float())


def test_the_policy_keeps_the_last_and_every_nth_and_clears_what_kills_left(tmp_path):
    for step in range(10, 80, 10):
        write(tmp_path, step)
    (tmp_path / ".tmp-step-00000099").mkdir()
    clean(tmp_path)
    prune(tmp_path, CheckpointConfig(keep_last=2, keep_every=30))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{s:08d}" for s in (30, 60, 70)]


def test_a_run_or_a_checkpoint_may_be_named(tmp_path):
    folder = write(tmp_path / "run" / "checkpoints", 3)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", folder):
        assert resolve(path) == folder


def test_a_newer_format_is_refused(tmp_path):
    folder = write(tmp_path, 3)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        read_state(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no checkpoint"):
        read_state(folder)


def test_what_one_rank_cannot_write_none_has_written(tmp_path):
    def barrier(error=""):
        if error:
            raise OSError(f"rank 0: {error}")

    state = {"names": NAMES, "settings": {}}
    good = write(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002").write_text("in the way")  # mkdir fails
    with pytest.raises(OSError, match=r"rank 0: .*File exists"):
        save(tmp_path, 2, values(), [0], state, 0, 1, barrier)
    assert newest(tmp_path) == good
    assert not (tmp_path / "step-00000002").exists()
