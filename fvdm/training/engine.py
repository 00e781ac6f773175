"""The DeepSpeed ZeRO-2 engine: built from our settings, with access to its sharded float32 state for checkpoints.

The only place that imports deepspeed. Weights are bf16 (or float32); master weights, Adam moments, gradient
accumulation and reduction are float32. The trained parameters form one flat vector, one parameter group after the
other; rank r owns a slice of each group. Frozen parameters are in none of it.
"""

import datetime
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fvdm.checkpoints.layout import group_key
from fvdm.distributed import Ranks
from fvdm.training.config import EngineConfig


def initialise(timeout: int) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device."""
    _leave_out_unused_imports()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a C++ extension here: 20 s, behind a lock that a killed run never releases.
        # Asking what could be compiled starts compilers, too.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        allow_gpu_names()
    deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(seconds=timeout))
    return torch.device(accelerator.current_device_name())


def _leave_out_unused_imports() -> None:
    """Keep every rank from 4 s of imports, for parts that no run here uses.

    DeepSpeed's autotuner imports MLflow. Its Muon optimizer, which ZeRO imports at the first step whatever the
    optimizer is, decorates its kernels with `torch.compile`, which imports the whole compiler. So does PyTorch's
    optimizer, to mark where a compiled step would break in two; here only a model's blocks are compiled.
    """
    autotuner = ModuleType("deepspeed.autotuning.autotuner")
    autotuner.__dict__["Autotuner"] = None
    sys.modules.setdefault(autotuner.__name__, autotuner)
    from deepspeed.runtime import compiler

    compiler.compile = lambda: lambda function: function
    adamw = torch.optim.AdamW
    adamw.add_param_group = inspect.unwrap(adamw.add_param_group)  # type: ignore[method-assign]
    adamw.step = torch.no_grad()(inspect.unwrap(adamw.step))  # type: ignore[method-assign]


def allow_gpu_names() -> None:
    """Keep DeepSpeed from pynvml where CUDA_VISIBLE_DEVICES names GPUs by UUID or MIG slice: it expects numbers."""
    if re.search(r"[^\d,\s]", os.environ.get("CUDA_VISIBLE_DEVICES", "")):
        from deepspeed.accelerator import cuda_accelerator

        cuda_accelerator.pynvml = None  # It asks torch for the memory that is free, then.


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

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        batch_size: int,
        ranks: Ranks,
        groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Wrap `model`; its float32 weights become the masters exactly.

        Args:
            model: on the CPU or the rank's device, float32; parameters that do not require a gradient stay frozen.
            config: settings.
            batch_size: global batch, in clips.
            ranks: this process among its peers.
            groups: parameter groups as `torch.optim.AdamW` takes them; one group of all trained parameters by default.

        Raises:
            ValueError: if the batch does not divide among the ranks.
        """
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        self.config, self.ranks = config, ranks
        self.micro_batch, self.micro_batches = accumulation(batch_size, config.micro_batch, ranks.world_size)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = groups or [{"params": list(trained.values())}]
        name_of = {id(p): name for name, p in trained.items()}
        named = [[name_of[id(p)] for p in group["params"]] for group in groups]
        self.names = {name: tuple(trained[name].shape) for names in named for name in names}
        self.sizes = [sum(trained[name].numel() for name in names) for names in named]  # of each group
        optimizer = torch.optim.AdamW(
            [dict(group) for group in groups], config.lr, config.betas, weight_decay=config.weight_decay, fused=True
        )
        weights = {name: p.detach().clone() for name, p in trained.items()}
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._deepspeed_config()
        )
        self._bound_groups()
        for name, parameter in self.engine.module.named_parameters():
            if name in weights:
                # DeepSpeed makes the masters from weights that it has already rounded to bf16.
                safe_set_full_fp32_param(parameter, weights[name])
        self.device = torch.device(self.engine.device)

    def _deepspeed_config(self) -> dict[str, Any]:
        from deepspeed.accelerator import get_accelerator

        config = self.config
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": config.grad_clip,
            # Named, though it is the default: a gradient that is not finite must never reach the weights.
            "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
            # Both are needed: bf16 alone accumulates and reduces gradients in bf16.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": 2,
                "contiguous_gradients": True,
                "reduce_scatter": True,
                "overlap_comm": config.overlap_comm and get_accelerator().device_name() != "cpu",
                "reduce_bucket_size": config.reduce_bucket_size,
                "allgather_bucket_size": config.reduce_bucket_size,
            },
            "timers": {"throughput": {"enabled": False}},  # It waits for the device twice in a micro-batch.
            "steps_per_print": 10**9,
        }

    def _bound_groups(self) -> None:
        # DeepSpeed clones the world group with PyTorch's 30 minutes, whatever timeout init_distributed got.
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
            steps: number of steps of the whole run.

        Returns:
            Whether the weights moved: not within an accumulation, nor when a gradient was not finite on any rank.
        """
        self.zero.clip_grad = self.config.grad_clip if step >= self.config.grad_clip_start else 0.0
        for group in self.zero.param_groups:
            group["lr"] = learning_rate(self.config, step, steps)
        self.engine.step()
        return bool(self.engine.was_step_applied())

    @property
    def gradient_norm(self) -> Tensor | float | None:
        """Norm of the whole gradient at the last step, before clipping."""
        return self.engine.get_global_grad_norm()

    @property
    def masters(self) -> list[Tensor]:
        """This rank's slice of the float32 weights of each group, padded at the end of the last rank."""
        return self.zero.single_partition_of_fp32_groups

    @property
    def total(self) -> int:
        """Number of trained parameters: the length of the flat vector."""
        return sum(self.sizes)

    @property
    def slices(self) -> list[range]:
        """The parts of the flat vector that this rank owns, one of each group, without padding."""
        parts, first = [], 0
        for master, size in zip(self.masters, self.sizes, strict=True):
            begin = min(self.ranks.rank * master.numel(), size)
            parts.append(range(first + begin, first + min(begin + master.numel(), size)))
            first += size
        return parts

    def own(self, name: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Values shaped as `masters`, under the names that checkpoints give them, without padding; they share memory.

        Args:
            name: of `fvdm.checkpoints.layout.SLICES`.
            values: one flat tensor of each group.
        """
        pairs = zip(values, self.slices, strict=True)
        return {group_key(name, k): tensor.detach()[: len(part)] for k, (tensor, part) in enumerate(pairs)}

    def state(self) -> dict[str, Tensor]:
        """Master weights and Adam moments of this rank's slices, flat and float32, sharing memory."""
        state = self.own("master", self.masters)
        for name in ("exp_avg", "exp_avg_sq"):
            # Before the first update there are none, which is the same as zero.
            moments = [self.zero.optimizer.state.get(master, {}).get(name) for master in self.masters]
            pairs = zip(moments, self.masters, strict=True)
            state |= self.own(name, [torch.zeros_like(master) if m is None else m for m, master in pairs])
        return state

    def load_state(self, state: Mapping[str, Sequence[Tensor]], optimizer_steps: int) -> None:
        """Take over what `state` returned, for this rank's slices, whatever number of ranks wrote it.

        Args:
            state: `master`, `exp_avg`, `exp_avg_sq`: for each group a flat tensor, as long as its part of `slices`.
            optimizer_steps: updates that Adam has made, for its bias correction.
        """
        for k, (master, part) in enumerate(zip(self.masters, self.slices, strict=True)):
            moments = self.zero.optimizer.state[master]
            moments["step"] = torch.tensor(float(optimizer_steps), device=master.device)
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.zeros_like(master)
            for name, values in (("master", master.data), *((n, moments[n]) for n in ("exp_avg", "exp_avg_sq"))):
                values[: len(part)].copy_(state[name][k])
        self.zero.update_lp_params()

    @contextmanager
    def weights(self, shards: Sequence[Tensor]) -> Iterator[Any]:
        """The model in eval mode with other weights, such as the EMA's, in a block. Collective; the masters stay.

        Args:
            shards: this rank's slices, shaped as `masters`.
        """
        masters = self.zero.single_partition_of_fp32_groups
        self.zero.single_partition_of_fp32_groups = list(shards)
        self.zero.update_lp_params()
        self.zero.single_partition_of_fp32_groups = masters
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
