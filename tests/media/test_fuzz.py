"""Damaged videos: none may crash, hang or leak, and what is stored must be what the file holds."""

import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from data_prep.decoding import Rejected, Restarted, Task, decode
from fvdm.media.clips import ClipSpec, Piece
from fvdm.media.videos import Info, Preprocess, to_square
from tests.data_fixtures import cut, write_frames, write_video

HOW = Preprocess(min_frames=4)
SIZE = 32
SPEC = ClipSpec(((SIZE, SIZE),), HOW, 8)
BASES = {
    "h264.mp4": ("libx264", "yuv420p"),
    "mpeg4.avi": ("mpeg4", "yuv420p"),
    "vp8.webm": ("libvpx", "yuv420p"),
    "ffv1.mkv": ("ffv1", "yuv420p"),
    "mjpeg.mov": ("mjpeg", "yuvj420p"),
    "colours.gif": ("gif", "rgb8"),
    "h264.ts": ("libx264", "yuv420p"),
    "mpeg1.mpg": ("mpeg1video", "yuv420p"),
}
CHECKED = ("ffv1.mkv", "png")  # every byte of a picture is under a checksum there


def bases(folder: Path) -> dict[str, bytes]:
    """One small clean video per format, as bytes."""
    found = {}
    for number, (name, (codec, pix_fmt)) in enumerate(BASES.items()):
        options = {"level": "3", "slicecrc": "1", "slices": "4"} if codec == "ffv1" else {}
        path = write_video(folder / name, cut(number)[:, ::3, ::3][:, :48, :56], codec, pix_fmt, **options)
        found[name] = path.read_bytes()
    return found


def damage(data: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    """One of the ways in which files break."""
    kind = str(random.choice(["flips", "cut", "zeros", "header", "inserted", "removed", "noise"]))
    out = bytearray(data)
    at = int(random.integers(0, len(out)))
    size = int(random.integers(1, 400))
    if kind == "flips":
        for where in random.integers(0, len(out), int(random.integers(1, 30))):
            out[where] ^= 1 << int(random.integers(8))
    elif kind == "cut":
        out = out[:at]
    elif kind == "zeros":
        out[at : at + size] = bytes(len(out[at : at + size]))
    elif kind == "header":
        out[: min(64, size)] = random.bytes(min(64, size))
    elif kind == "inserted":
        out[at:at] = random.bytes(size)
    elif kind == "removed":
        del out[at : at + size]
    else:
        out[at : at + size] = random.bytes(len(out[at : at + size]))
    return kind, bytes(out)


def make_damaged(folder: Path, count: int, seed: int) -> list[Path]:
    """Damaged files and frame folders in every format."""
    random = np.random.default_rng(seed)
    clean = bases(folder / "clean")
    paths = []
    for number in range(count):
        if number % (len(clean) + 1) == len(clean):
            frames = write_frames(
                folder / f"{number:04d}-png", cut(number)[:, ::3, ::3], [f"{i}.png" for i in range(20)]
            )
            victim = frames / f"{random.integers(20)}.png"
            victim.write_bytes(damage(victim.read_bytes(), random)[1])
            paths.append(frames)
            continue
        name = list(clean)[number % (len(clean) + 1)]
        kind, data = damage(clean[name], random)
        if random.random() < 0.1:  # and a wrong extension
            name = name.rsplit(".", 1)[0] + "." + str(random.choice(list(BASES))).rsplit(".", 1)[1]
        paths.append(folder / f"{number:04d}-{kind}-{name}")
        paths[-1].write_bytes(data)
    return paths


def decode_all(paths: list[Path], timeout: float = 30.0) -> dict[int, np.ndarray | Rejected]:
    """What the decoder pool makes of each path; every one must end exactly once."""
    tasks = [Task(key, str(path), SPEC) for key, path in enumerate(paths)]
    chunks: dict[int, list[np.ndarray]] = {key: [] for key in range(len(paths))}
    results: dict[int, np.ndarray | Rejected] = {}
    for key, item in decode(tasks, workers=2, timeout=timeout):
        assert key not in results
        if isinstance(item, Piece):
            chunks[key].append(item.frames)
        elif isinstance(item, Restarted):
            chunks[key] = []
        elif isinstance(item, Info):
            results[key] = np.concatenate(chunks[key])
            assert len(results[key]) == item.frames
        else:
            assert item.reason
            assert "\n" not in item.reason
            results[key] = item
    assert len(results) == len(paths)
    return results


def independent(path: Path) -> np.ndarray:
    """The frames of a video by the shortest program there is, without any check."""
    return pictures_and_times(path)[0]


def pictures_and_times(path: Path) -> tuple[np.ndarray, list[float | None]]:
    """The frames of a video and when each is to be shown, in seconds."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1  # damaged VP8 depends on the number of threads
        found = []
        for frame in container.decode(video=0):  # not kept: damaged VP8 depends on which buffers are free
            picture = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
            found.append((to_square(picture, SIZE, HOW), frame.time))
    return np.stack([picture for picture, _ in found]), [time for _, time in found]


def is_even(times: list[float | None]) -> bool:
    """Whether no frame comes early or late by more than half a frame."""
    gaps = np.diff(sorted(time for time in times if time is not None))
    return None in times or len(gaps) < 2 or bool(np.abs(gaps - np.median(gaps)).max() <= np.median(gaps) / 2)


def check_accepted(paths: list[Path], results: dict[int, np.ndarray | Rejected], clean: dict[str, np.ndarray]) -> int:
    """Accepted frames are what the file holds; where pictures carry checksums, they are the undamaged ones."""
    accepted = 0
    for key, path in enumerate(paths):
        frames = results[key]
        if isinstance(frames, Rejected):
            continue
        accepted += 1
        if path.is_dir():
            pictures = cut(int(path.name[:4]))[:, ::3, ::3]
            assert np.array_equal(frames, [to_square(picture, SIZE, HOW) for picture in pictures]), path.name
        else:
            plain, times = pictures_and_times(path)
            if is_even(times):
                assert np.array_equal(frames, plain), path.name
            else:  # put on an even grid: the same pictures
                known = {frame.tobytes() for frame in plain}
                assert all(frame.tobytes() in known for frame in frames), path.name
        if path.name.endswith(CHECKED[0]):
            known = {frame.tobytes() for frame in clean[CHECKED[0]]}
            assert all(frame.tobytes() in known for frame in frames), path.name
    return accepted


def test_some_damaged_videos(tmp_path):
    paths = make_damaged(tmp_path, 36, seed=1)
    results = decode_all(paths)
    check_accepted(paths, results, {CHECKED[0]: independent(tmp_path / "clean" / CHECKED[0])})
    assert sum(isinstance(result, Rejected) for result in results.values()) >= 12


@pytest.mark.slow
def test_hundreds_of_damaged_videos(tmp_path):
    """At least 300 inputs through the real pool: none hangs it, memory stays flat, nothing wrong is accepted."""
    seen, peaks = Counter(), []
    for seed in range(8):
        paths = make_damaged(tmp_path / str(seed), 108, seed)
        results = decode_all(paths)
        clean = {CHECKED[0]: independent(tmp_path / str(seed) / "clean" / CHECKED[0])}
        accepted = check_accepted(paths, results, clean)
        assert decode_all([tmp_path / str(seed) / "clean" / name for name in BASES])  # the pool still works
        seen.update(accepted=accepted, rejected=len(paths) - accepted)
        lost = [
            result.reason for result in results.values() if isinstance(result, Rejected) and "died" in result.reason
        ]
        seen.update(died=len(lost))
        peaks.append(psutil.Process().memory_info().rss)
        shutil.rmtree(tmp_path / str(seed))
    assert seen["accepted"] + seen["rejected"] >= 300
    assert peaks[-1] < peaks[0] + 200e6
    print(dict(seen), [round(peak / 1e6) for peak in peaks])


def test_one_worker_does_not_grow(tmp_path):
    """The same damaged inputs again and again in one decoder process: its memory stays where it was."""
    paths = make_damaged(tmp_path, 18, seed=9)
    tasks = (Task(key, str(path), SPEC) for key, path in enumerate(paths * 8))
    sizes, ended = [], 0
    for _, item in decode(tasks, workers=1, timeout=30):
        if isinstance(item, Rejected | Info):
            ended += 1
            if ended % len(paths) == 0:
                sizes.append(_decoder_memory())
    assert ended == 8 * len(paths)
    assert sizes[-1] < sizes[1] + 30e6, sizes


def _decoder_memory() -> int:
    """Memory of the largest process below this one that runs the decoder."""
    return max(child.memory_info().rss for child in psutil.Process().children(recursive=True))


def test_a_decoder_that_dies_costs_one_video(tmp_path):
    """A decoder killed in the middle of a video: the video begins again, and every other is untouched."""
    paths = [write_video(tmp_path / f"{n}.mkv", np.repeat(cut(n), 10, axis=0), "ffv1", "bgr0") for n in range(3)]
    tasks = [Task(key, str(path), SPEC) for key, path in enumerate(paths)]
    killed, restarted = False, 0
    counts = Counter()
    for key, item in decode(tasks, workers=1, timeout=30):
        if isinstance(item, Piece):
            counts[key] += len(item.frames)
            if key == 1 and not killed:
                killed = True
                for child in psutil.Process().children(recursive=True):
                    if "forkserver" not in " ".join(child.cmdline()) or child.parent().pid != os.getpid():
                        child.send_signal(signal.SIGKILL)
        elif isinstance(item, Restarted):
            restarted += 1
            counts[key] = 0
        else:
            assert item == Info(25.0, 200)
            assert counts[key] == 200
    assert killed
    assert restarted == 1


def test_a_decoder_that_hangs_is_given_up(tmp_path):
    """A named pipe blocks whoever opens it: the decoder is killed, twice, and the next video continues."""
    os.mkfifo(write_frames(tmp_path / "a", cut(0), [f"{frame}.png" for frame in range(20)]) / "20.png")
    results = decode_all([tmp_path / "a", write_video(tmp_path / "b.mp4", cut(0))], timeout=4.0)
    assert results[0] == Rejected("decoder sent nothing for 4 s")
    assert len(results[1]) == 20
