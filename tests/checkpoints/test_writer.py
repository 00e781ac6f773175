"""Checkpoints written beside the training, on a real process group of one."""

import threading

import pytest
import torch
import torch.distributed as dist

from fvdm.checkpoints.writer import AsyncCheckpointWriter
from fvdm.distributed import free_port


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_training_goes_on_while_a_copy_is_written():
    writer, gate, written = AsyncCheckpointWriter(background=True, timeout=60), threading.Event(), []
    weights = torch.zeros(3)

    def write(slices):
        gate.wait(10)
        writer.barrier()
        written.append(slices["w"].clone())

    writer.begin({"w": weights}, write)
    weights += 1  # the next step
    assert not written
    gate.set()
    assert writer.wait() is None
    assert torch.equal(written[0], torch.zeros(3))


def test_in_the_foreground_nothing_is_copied():
    writer, weights, seen = AsyncCheckpointWriter(background=False, timeout=60), torch.zeros(3), []
    writer.begin({"w": weights}, lambda slices: seen.append(slices["w"].data_ptr()))
    assert seen == [weights.data_ptr()]


def test_a_full_disk_is_told_at_the_next_write_and_other_errors_are_raised():
    writer = AsyncCheckpointWriter(background=True, timeout=60)
    writer.begin({}, lambda slices: writer.barrier("No space left on device"))
    assert "rank 0: No space left" in str(writer.wait())
    assert writer.wait() is None

    def lost(slices):
        raise RuntimeError("Connection closed by peer")

    writer.begin({}, lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        writer.wait()
