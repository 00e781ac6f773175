"""The measurements of benchmarks/evidence.py: clips are sampled and scored a few at a time, each part a file."""

import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.evidence.data import read_classifier
from benchmarks.evidence.plan import SetConfig, trials
from benchmarks.experiment import Bench, Trial
from benchmarks.models import open_model
from data_prep.moving_digits import SPEEDS
from fvdm.diffusion.tasks import given_frames
from fvdm.evaluation import fvd
from fvdm.evaluation.completion import Completion, freeze_given
from fvdm.evaluation.digits import (
    DigitClassifier,
    centres,
    distance_from_path,
    identity,
    name_digits,
    path_residual,
    straight_line,
)
from fvdm.evaluation.i3d import I3D, load_i3d
from fvdm.evaluation.protocols import Clip, departures, protocol, select_real
from fvdm.evaluation.scores import drawn, neighbour_table, psnr
from fvdm.evaluation.sources import Files, device
from fvdm.files import atomic_write
from fvdm.generation.pipeline import Trained

FIRST_SEED = 1000  # of the first sampled clip; clip k has this + k in every arm, so that arms are compared on the same
SHOWN = 4  # clips of a measurement that are kept for the eye
SHORT = 16  # frames of the windows at both ends of a long video


def windows(config: SetConfig, lengths: list[int], frames: int, clips: int, stride: int = 0) -> list[Clip]:
    """Real clips: by the set's protocol where that is published, else windows spread over every video.

    Args:
        config: of the set.
        lengths: frames of its videos.
        frames: of a clip.
        clips: most of them.
        stride: every n-th frame; 0 is the stride of the training run.

    Raises:
        ValueError: if fewer than two videos are long enough.
    """
    stride = stride or config.stride
    if config.published:
        return select_real(protocol(config.protocol), lengths, frames, stride, clips)
    span = (frames - 1) * stride + 1
    usable = [video for video, length in enumerate(lengths) if length >= span]
    found = []
    for video in usable:
        for window in range(config.windows):
            begin = window * (lengths[video] - span) // max(1, config.windows - 1)
            found.append(Clip(video, tuple(range(begin, begin + span, stride))))
    if len(usable) < 2:
        raise ValueError(f"{len(usable)} videos have {span} frames; give longer ones, or lower the set's stride")
    count = min(clips, len(found))
    return [found[k * len(found) // count] for k in range(count)]


class ClipBench(Bench):
    """What the measurements of one set share."""

    def __init__(
        self, name: str, config: SetConfig, out: Path, checkpoint: Callable[[Trial], Path], batch: int
    ) -> None:
        self.name, self.config, self.out, self.batch = name, config, out, batch
        self.checkpoint = checkpoint
        self.trials = list(trials(name, config))
        self._opened: tuple[Path, Trained] | None = None

    def folder(self, trial: Trial) -> Path:
        """Where a measurement's parts are."""
        return self.out / "measured" / trial.name

    @cached_property
    def sources(self) -> dict[str, Files]:
        """The real videos by split."""
        return {
            split: Files(str(self.out / "data" / self.name / split), self.config.size) for split in ("train", "test")
        }

    @cached_property
    def paths(self) -> dict[str, list[list[float]]]:
        """Where the held-out digits truly are, by the name of the video."""
        return json.loads((self.out / "data" / self.name / "test" / "paths.json").read_text())

    @cached_property
    def classifier(self) -> DigitClassifier | None:
        """What names digits, where there is one."""
        return read_classifier(self.out / "data" / self.name)

    @cached_property
    def labels(self) -> dict[str, dict[str, int]]:
        """Which digit each real clip shows: split -> name of the video -> digit."""
        return json.loads((self.out / "data" / self.name / "labels.json").read_text())

    @cached_property
    def net(self) -> I3D:
        """The detector."""
        return load_i3d(device=device())

    def frames(self, trial: Trial) -> int:
        """Frames of the videos of a measurement."""
        return self.config.length if trial.task == "long" else self.config.frames

    def clips(self, trial: Trial) -> list[Clip]:
        """The real clips that belong to it: what is measured, what is given, or what is compared with."""
        # A protocol has a stride of its own for what FVD compares with; a truth runs as the model was trained.
        stride = self.stride if trial.task == "generate" else self.config.stride
        return windows(self.config, self.sources[self.split(trial)].lengths, self.frames(trial), trial.clips, stride)

    def split(self, trial: Trial) -> str:
        """The split that its real clips are of: what generated clips are compared with, else what was held out."""
        if trial.method == "sampled":
            return self.config.reference
        return "train" if trial.method == "train" else "test"

    @property
    def stride(self) -> int:
        """Of the real clips that FVD compares generated ones with."""
        config = self.config
        return protocol(config.protocol).stride_on(self.name) if config.published else config.stride

    def own_truth(self, trial: Trial) -> bool:
        """Whether its truth are other clips than those of generate/test."""
        return trial.task == "long" or self.config.published

    def count(self, trial: Trial) -> int:
        """How many clips it has; fewer than asked for where there are fewer real ones."""
        return trial.clips if trial.method == "sampled" else len(self.clips(trial))

    def trained(self, trial: Trial) -> Trained:
        """The model of a measurement; the last one is kept."""
        path = self.checkpoint(trial)
        if self._opened is None or self._opened[0] != path:
            self._opened = (path, open_model(str(path)))
        return self._opened[1]

    def parts(self, trial: Trial) -> list[Path]:
        """The files of a measurement."""
        return [self.folder(trial) / f"part-{k:04d}.npz" for k in range(-(-self.count(trial) // self.batch))]

    def read(self, trial: Trial) -> dict[str, np.ndarray]:
        """All parts of a measurement, joined; what is shown, of the first part."""
        tables = [dict(np.load(path, allow_pickle=False)) for path in self.parts(trial)]
        joined = {name: np.concatenate([t[name] for t in tables]) for name in tables[0] if not name.startswith("shown")}
        return joined | {name: value for name, value in tables[0].items() if name.startswith("shown")}

    def make(self, trial: Trial, number: int, path: Path) -> None:
        """Measure a few clips, and keep their scores."""
        began = time.monotonic()
        result = self.measure(trial, range(number * self.batch, (number + 1) * self.batch))
        result["seconds"] = np.array([time.monotonic() - began])
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **result)  # type: ignore[arg-type]

    @torch.no_grad()
    def measure(self, trial: Trial, numbers: range) -> dict[str, np.ndarray]:
        """Scores of some clips of a measurement, by name, each with a row per clip."""
        numbers = range(numbers.start, min(numbers.stop, self.count(trial)))
        seeds = range(FIRST_SEED + numbers.start, FIRST_SEED + numbers.stop)
        if trial.method == "sampled":
            return self._score(trial, self._sample(trial, seeds), None, [])
        real = [self.clips(trial)[k] for k in numbers]
        truth = self.sources[self.split(trial)].read(real)
        if trial.method == "loss":
            trained = self.trained(trial)
            latents = trained.vae.encode_mean(truth)
            hidden = trained.model.null(len(latents))
            table = neighbour_table(trained.model, trained.diffusion, latents, seeds.start, hidden)
            return {"table": table.cpu().numpy()}
        if trial.method in ("train", "test"):
            return self._score(trial, truth, None, real)
        return self._score(trial, self._draw(trial, truth, seeds), truth, real)

    def _sample(self, trial: Trial, seeds: range) -> Tensor:
        solver, steps = trial.solver
        count, guidance = len(seeds), self.config.guidance
        return self.trained(trial).generate(
            num=count, batch_size=count, seed=seeds.start, steps=steps, solver=solver, guidance=guidance
        )

    def _draw(self, trial: Trial, truth: Tensor, seeds: range) -> Tensor:
        given = given_frames(trial.task, self.config.frames)
        if trial.method == "frozen":
            return freeze_given(truth, given)
        if trial.method == "straight":
            return straight_line(truth, given)
        completion = Completion(trial.method, self.trained(trial), *(trial.solver if trial.sampler else ("ddim", 1)))
        return completion(trial.task, truth, given, seeds)

    def _score(self, trial: Trial, video: Tensor, truth: Tensor | None, real: list[Clip]) -> dict[str, np.ndarray]:
        config = self.config
        result = {"shown": video[:SHOWN].numpy()}
        if truth is not None:
            result["shown_truth"] = truth[:SHOWN].numpy()
            new = drawn(self.frames(trial), given_frames(trial.task, config.frames))
            result["psnr"] = psnr(video[:, new], truth[:, new]).numpy()
        if config.i3d:
            result |= self._features(trial, video, "features")
            if truth is not None and self.own_truth(trial):
                result |= self._features(trial, truth, "truth_features")
        if config.kind == "digits":
            where = centres(video)
            result["residual"] = path_residual(where[:, : config.frames], config.size, SPEEDS)
            result["residual_last"] = path_residual(where[:, -config.frames :], config.size, SPEEDS)
            shown = new if truth is not None else list(range(video.shape[1]))
            result |= self._names(trial, video[:, shown], real)
            if truth is not None:
                names = self.sources["test"].names
                flown = np.array([[self.paths[names[clip.video]][f] for f in clip.frames] for clip in real])
                result["motion"] = distance_from_path(where[:, new], flown[:, new])
        return result

    def _names(self, trial: Trial, video: Tensor, real: list[Clip]) -> dict[str, np.ndarray]:
        """What the classifier makes of generated frames: is it the digit it should be, and the same one throughout?"""
        if self.classifier is None:
            return {}
        sure = name_digits(self.classifier, video)  # (b f 10)
        names = sure.argmax(axis=2)
        result = {"sure": sure.max(axis=2), "identity": identity(names)}
        if real:
            split = self.split(trial)
            labels = [self.labels[split][self.sources[split].names[clip.video]] for clip in real]
            result["named"] = (names == np.array(labels)[:, None]).astype(np.float64)
        return result

    def _features(self, trial: Trial, video: Tensor, name: str) -> dict[str, np.ndarray]:
        """What the detector makes of clips; of long ones at both ends."""
        ends = {name: video[:, :SHORT]} | ({f"{name}_last": video[:, -SHORT:]} if trial.task == "long" else {})
        resize = protocol(self.config.protocol).resize
        return {key: fvd.features(self.net, part, resize=resize).cpu().numpy() for key, part in ends.items()}

    def card(self) -> dict[str, Any]:
        """How FVD is measured, and where that departs from its protocol."""
        config, rules = self.config, protocol(self.config.protocol)
        real = self.count(Trial(self.name, None, "generate", config.reference, "", config.clips))
        source = self.sources[config.reference]
        span = (config.frames - 1) * self.stride + 1
        departed = departures(
            rules,
            clips=(real, config.clips),
            frames=config.frames,
            size=config.size,
            stride=self.stride,
            usual=rules.stride_on(self.name),
            videos=sum(length >= span for length in source.lengths),
            repeats=1,
            seed=rules.seed,
            split=config.reference,
        )
        return {
            "protocol": f"{rules.name}: {rules.source}",
            "departs from it": departed + ([] if config.published else [f"{config.windows} windows of each video"]),
            "real clips": f"{real} of the split {config.reference}, which has {len(source.names)} videos",
            "generated clips": config.clips,
            "frames": config.frames,
            "stride": f"real {self.stride}, generated 1",
            "resolution": f"{config.size} pixels",
            "covariance": f"divided by n - {rules.ddof}",
            "codec": source.describe()["codec"],
        }
