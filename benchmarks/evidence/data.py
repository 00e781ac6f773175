"""The clips of benchmarks/evidence.py: training and held-out videos of a set, latents of both, and who names digits."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.clips import encode
from benchmarks.evidence.plan import SetConfig
from data_prep import moving_digits
from data_prep.config import MovingDigitsConfig
from fvdm.evaluation.digits import DigitClassifier, train_classifier
from fvdm.files import atomic_write, write_text
from fvdm.media.layouts import list_videos

VIDEOS = "FVDM_EVIDENCE_VIDEOS"
DIGITS = "FVDM_EVIDENCE_DIGITS"
SPLITS = ("train", "test")
CLASSIFIER = "classifier.safetensors"


def folders(words: Sequence[str], sets: Mapping[str, SetConfig]) -> dict[str, Path]:
    """Which folder of videos is which set's.

    Args:
        words: NAME=DIR, or DIR where one set alone takes videos; those of the environment variable if there are none.
        sets: by name.

    Raises:
        ValueError: if a name is unknown, or a folder is not there.
    """
    words = list(words) or [word for word in os.environ.get(VIDEOS, "").split(os.pathsep) if word]
    names = [name for name, config in sets.items() if config.kind == "videos"]
    found: dict[str, Path] = {}
    for word in words:
        name, _, path = word.rpartition("=")
        name = name or (names[0] if len(names) == 1 else "")
        if name not in names:
            raise ValueError(f"--videos {word}: write NAME=DIR, where NAME is one of {', '.join(names)}")
        if not Path(path).is_dir():
            raise ValueError(f"--videos {word}: {path} is not a folder")
        found[name] = Path(path)
    return found


def made_of(data: Path, sets: Mapping[str, SetConfig]) -> list[str]:
    """The words of the command line that name what the clips in a folder were made of."""
    videos, digits = [], []
    for name, config in sets.items():
        record = data / name / ("split.txt" if config.kind == "videos" else "digits.txt")
        if record.exists():
            path = record.read_text().splitlines()[0].removeprefix("videos ")
            videos += [f"{name}={path}"] if config.kind == "videos" else []
            digits += [path] if config.kind == "digits" else []
    return [*(["--videos", *videos] if videos else []), *(["--digits", digits[0]] if digits else [])]


def prepare(name: str, config: SetConfig, out: Path, videos: Path | None, digits: str) -> None:
    """Make, or split, the videos of a set into `out/train` and `out/test`, and encode both; what is there stays.

    Args:
        name: of the set.
        config: of the set.
        out: folder for it.
        videos: folder of real videos, for a set of that kind.
        digits: see data_prep/moving_digits.py.

    Raises:
        ValueError: if there are no videos, or they cannot be used.
    """
    out.mkdir(parents=True, exist_ok=True)
    if config.kind == "digits":
        digits = digits or os.environ.get(DIGITS, "")
        if digits:
            write_text(out / "digits.txt", f"{Path(digits).resolve()}\n")
        frames = max(config.length, config.frames)
        _make_digits(out / "train", config, digits, clips=config.clips_made, frames=2 * config.frames)
        _make_digits(out / "test", config, digits, clips=config.clips_held_out, frames=frames, held_out=True)
    elif videos is None and not (out / "split.txt").exists():
        raise ValueError(
            f"the set {name} needs real videos: give a folder of them with --videos {name}=DIR, or name it in {VIDEOS}"
        )
    elif videos is not None:
        _split(videos, out, config.hold_out, bool(config.train.get("conditional")))
    shortest = {"min_frames": config.frames} if config.kind == "digits" else {}
    flip = None if config.train.get("data.flip", True) else False
    for split in SPLITS:
        encode(out / split, out / f"latents-{split}", config.size, vae=config.vae, flip=flip, **shortest)
    if config.kind == "digits":
        _train_classifier(out, digits, config.size)


def _make_digits(out: Path, config: SetConfig, digits: str, **settings: Any) -> None:
    if not (out / "paths.json").exists():
        moving_digits.main(MovingDigitsConfig(str(out), digits, size=config.size, **settings))


def _train_classifier(out: Path, digits: str, size: int) -> None:
    """Train a network that names digits, on others than those that fly; and write which digit each clip shows.

    Left out where the digits have no labels, where all of them fly, and for clips of a version that did not note them.
    """
    if (out / CLASSIFIER).exists() or not all((out / split / "digits.json").exists() for split in SPLITS):
        return
    images, labels = moving_digits.read_digits(digits)
    flown = {split: json.loads((out / split / "digits.json").read_text()) for split in SPLITS}
    others = sorted(set(range(len(images))) - {number for shown in flown.values() for number in shown.values()})
    if labels is None or len(others) < 2:
        print(f"{out.name}: digits are not named, as {'they have no labels' if labels is None else 'all of them fly'}")
        return
    net, accuracy = train_classifier(images[others], labels[others], size)
    named = {split: {name: int(labels[number]) for name, number in shown.items()} for split, shown in flown.items()}
    write_text(out / "labels.json", json.dumps(named | {"accuracy": accuracy, "digits": len(others)}))
    with atomic_write(out / CLASSIFIER) as temporary:
        save_file(net.state_dict(), temporary)
    print(f"{out.name}: a classifier trained on {len(others)} other digits names {accuracy:.1%} of unseen ones right")


def read_classifier(folder: Path) -> DigitClassifier | None:
    """The classifier of a set, or None where there is none."""
    if not (folder / CLASSIFIER).exists():
        return None
    net = DigitClassifier()
    net.load_state_dict(load_file(folder / CLASSIFIER))
    return net.eval().requires_grad_(False)


def _split(videos: Path, out: Path, every: int, conditional: bool) -> None:
    """Link the videos of a folder into two: every n-th, in sorted order, is held out. Written once."""
    record = out / "split.txt"
    names = sorted(source.name for source in list_videos(str(videos)).sources)
    lines = [f"{SPLITS[k % every == every - 1]} {name}" for k, name in enumerate(names)]
    text = "\n".join([f"videos {videos.resolve()}", *lines]) + "\n"
    if record.exists():
        if record.read_text() != text:
            raise ValueError(
                f"{record} was made of other videos than {videos} has now: held-out clips would mix with trained "
                f"ones; give the same folder, or another --out"
            )
        return
    if len(names) < every:
        raise ValueError(f"{videos} holds {len(names)} videos; {every} or more are needed to hold one out")
    for line in lines:
        split, _, name = line.partition(" ")
        # Frame folders tell their layout, and class folders their labels, by where they lie.
        keep = conditional or (videos / name).is_dir()
        link = out / split / (name if keep else name.replace("/", "__"))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((videos / name).resolve())
    write_text(record, text)
