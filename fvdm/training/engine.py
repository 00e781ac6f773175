"""The DeepSpeed ZeRO-2 engine: built from our settings, and its sharded float32 state laid open for checkpoints.

The only place that imports deepspeed. Weights are bf16 (or float32); master weights, Adam moments, gradient
accumulation and reduction are float32. All parameters form one flat vector, of which rank r owns one slice.
"""

import datetime
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fvdm.distributed import Ranks
from fvdm.training.config import EngineConfig


def initialise(timeout: int) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a C++ extension here, for 20 s and behind a lock that a killed run leaves shut.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        import os

        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(seconds=timeout))
    return torch.device(accelerator.current_device_name())


def accumulation(batch_size: int, micro_batch: int, world_size: int) -> tuple[int, int]:
    """Split a global batch: `(clips a rank takes at once, micro-batches a step)`.

    Raises:
        ValueError: if the ranks or the micro-batches do not divide the batch.
    """
    share, rest = divmod(batch_size, world_size)
    if rest or not share:
        raise ValueError(
            f"a global batch of {batch_size} clips does not divide among {world_size} ranks; set data.batch_size to "
            f"a multiple of {world_size}, or start another number of ranks"
        )
    micro = micro_batch or share
    if share % micro:
        raise ValueError(f"engine.micro_batch {micro} does not divide a rank's share of {share} clips")
    return micro, share // micro


def learning_rate(config: EngineConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`: constant but for a linear rise and a linear fall."""
    rise = (step + 1) / config.warmup if config.warmup else 1.0
    fall = (steps - step) / config.cooldown if config.cooldown else 1.0
    return config.lr * min(1.0, rise, max(0.0, fall))


class Engine:
    """A model under ZeRO-2: call it, `backward` the loss, `step`."""

    def __init__(self, model: nn.Module, config: EngineConfig, batch_size: int, ranks: Ranks) -> None:
        """Wrap `model`; its float32 weights become the masters exactly.

        Args:
            model: on the CPU or the rank's device, float32.
            config: settings.
            batch_size: global batch, in clips.
            ranks: this process among its peers.

        Raises:
            ValueError: if the batch does not divide among the ranks.
        """
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        self.config, self.ranks = config, ranks
        self.micro_batch, self.micro_batches = accumulation(batch_size, config.micro_batch, ranks.world_size)
        self.names = {name: tuple(p.shape) for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(
            model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
        )
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._deepspeed_config()
        )
        self._bound_groups()
        for name, parameter in self.engine.module.named_parameters():
            # DeepSpeed makes the masters from weights that it has already rounded to bf16.
            safe_set_full_fp32_param(parameter, weights[name])
        self.device = torch.device(self.engine.device)

    def _deepspeed_config(self) -> dict[str, Any]:
        config = self.config
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": config.grad_clip,
            "bf16": {"enabled": config.precision == "bf16"},
            # Both are needed: bf16 alone accumulates and reduces gradients in bf16.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": 2,
                "contiguous_gradients": True,
                "reduce_scatter": True,
                "overlap_comm": torch.cuda.is_available(),
                "reduce_bucket_size": config.reduce_bucket_size,
                "allgather_bucket_size": config.reduce_bucket_size,
            },
            "steps_per_print": 10**9,
        }

    def _bound_groups(self) -> None:
        # DeepSpeed clones the world group with PyTorch's 30 minutes, whatever init_distributed was told.
        from torch.distributed import distributed_c10d as c10d

        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(datetime.timedelta(seconds=self.config.timeout), group)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The model's forward pass."""
        return self.engine(x, t, y)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss `()`."""
        self.engine.backward(loss)

    def step(self, step: int, steps: int) -> bool:
        """End a micro-batch; after the last one of a step, update the weights.

        Args:
            step: number of optimizer steps taken so far; clipping and the learning rate depend on it.
            steps: number of steps of the whole training.

        Returns:
            Whether the weights moved: not within an accumulation, nor when a gradient was not finite on any rank.
        """
        self.zero.clip_grad = self.config.grad_clip if step >= self.config.grad_clip_start else 0.0
        self.zero.param_groups[0]["lr"] = learning_rate(self.config, step, steps)
        self.engine.step()
        return bool(self.engine.was_step_applied())

    @property
    def gradient_norm(self) -> Tensor | float | None:
        """Norm of the whole gradient at the last step, before clipping."""
        return self.engine.get_global_grad_norm()

    @property
    def masters(self) -> list[Tensor]:
        """This rank's slice of the float32 weights, padded at the end of the last rank."""
        return self.zero.single_partition_of_fp32_groups

    @property
    def total(self) -> int:
        """Number of trainable parameters: the length of the flat vector."""
        return sum(torch.Size(shape).numel() for shape in self.names.values())

    @property
    def slice(self) -> range:
        """The part of the flat vector that this rank owns, without padding."""
        size = self.masters[0].numel()
        begin = min(self.ranks.rank * size, self.total)
        return range(begin, min(begin + size, self.total))

    def state(self) -> dict[str, Tensor]:
        """Master weights and Adam moments of this rank's slice, flat and float32, sharing memory."""
        moments = self.zero.optimizer.state[self.masters[0]]
        named = {"master": self.masters[0].detach()} | {k: moments[k] for k in ("exp_avg", "exp_avg_sq")}
        return {name: values[: len(self.slice)] for name, values in named.items()}

    def load_state(self, state: dict[str, Tensor], optimizer_steps: int) -> None:
        """Take over what `state` returned, for this rank's slice, whatever number of ranks wrote it.

        Args:
            state: `master`, `exp_avg`, `exp_avg_sq`, each flat, as long as `slice`.
            optimizer_steps: updates that Adam has made, for its bias correction.
        """
        master = self.masters[0]
        moments = self.zero.optimizer.state[master]
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.zeros_like(master)
        moments["step"] = torch.tensor(float(optimizer_steps), device=master.device)
        for name, values in ({"master": master} | moments).items():
            if name != "step":
                values.data[: len(self.slice)].copy_(state[name])
        self.zero.update_lp_params()

    @contextmanager
    def weights(self, shards: Sequence[Tensor]) -> Iterator[Any]:
        """The model holding other weights for a while, such as the EMA's. Collective; masters stay untouched.

        Args:
            shards: this rank's slice, shaped as `masters`.
        """
        keep = self.zero.single_partition_of_fp32_groups
        self.zero.single_partition_of_fp32_groups = list(shards)
        self.zero.update_lp_params()
        self.zero.single_partition_of_fp32_groups = keep
        training = self.engine.module.training
        try:
            yield self.engine.module.eval()
        finally:
            self.engine.module.train(training)
            self.zero.update_lp_params()

    def close(self) -> None:
        """Leave together: without the barrier some processes abort at exit."""
        dist.barrier()
        self.engine.destroy()
        dist.destroy_process_group()
