"""Decodes many videos side by side in worker processes, so that a crash, a hang or a lack of memory costs one video.

A worker process decodes one video after another and sends the frames in chunks. A thread per worker puts them into one
bounded queue, from which the encoder takes them. A worker that dies or sends nothing for too long is replaced, and its
video is rejected with the reason.
"""

import contextlib
import multiprocessing
import os
import queue
import resource
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fvdm.media.clips import ClipSpec, Piece

MEMORY = 8 * 2**30  # bytes of private memory that one decoder may take


@dataclass(frozen=True)
class Task:
    """A video to read. `key` is any number of the caller; with `estimate`, its frames are only estimated."""

    key: int
    path: str
    spec: ClipSpec
    estimate: bool = False


@dataclass(frozen=True)
class Rejected:
    """The reason why a video cannot be used; `unread` if the file could not be read and may be good."""

    reason: str
    unread: bool = False


@dataclass(frozen=True)
class Restarted:
    """The decoder or the disk failed in the middle of the video, which starts again: discard the chunks so far."""


def decode(tasks: Iterable[Task], *, workers: int, timeout: float = 120.0) -> Generator[tuple[int, Any], None, None]:
    """Reads the videos of `tasks`, several at a time.

    Args:
        tasks: the videos; taken one by one as workers become free.
        workers: number of processes, >= 1.
        timeout: seconds after which a decoder that has sent nothing is killed.

    Yields:
        `(key, Piece)`, in order for each video, the videos interleaved;
        for each video once at its end `(key, Info)`, `(key, Rejected)` or its estimate; and `(key,
        Restarted)` when its decoder died (perhaps because the machine ran out of memory) or the file could not
        be read. The second time, the video is rejected.
    """
    out: queue.Queue[tuple[int, Any]] = queue.Queue(maxsize=2 * workers)
    stop = threading.Event()
    source = iter(tasks)
    lock = threading.Lock()
    threads = [
        threading.Thread(target=_serve, args=(source, lock, out, stop, timeout), daemon=True) for _ in range(workers)
    ]
    for thread in threads:
        thread.start()
    alive = len(threads)
    try:
        while alive:
            key, item = out.get()
            if item is None:
                alive -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield key, item
    finally:
        stop.set()
        for thread in threads:
            while thread.is_alive():  # a thread may be waiting for room in the queue
                with contextlib.suppress(queue.Empty):
                    out.get_nowait()
                thread.join(0.05)


def estimate(paths: list[str], spec: ClipSpec, *, workers: int | None = None, timeout: float = 60.0) -> list[int]:
    """About how many frames are encoded of each video, from the headers; 0 if unknown.

    Args:
        paths: the videos.
        spec: which clips are read.
        workers: number of processes; None takes one for each core, at most 8.
        timeout: seconds after which a decoder that has sent nothing is killed.
    """
    workers = workers or min(8, len(os.sched_getaffinity(0)))
    frames = [0] * len(paths)
    tasks = (Task(key, path, spec, estimate=True) for key, path in enumerate(paths))
    for key, item in decode(tasks, workers=min(workers, max(1, len(paths))), timeout=timeout):
        frames[key] = item if isinstance(item, int) else 0
    return frames


def _serve(
    source: Iterator[Task],
    lock: threading.Lock,
    out: "queue.Queue[tuple[int, Any]]",
    stop: threading.Event,
    timeout: float,
) -> None:
    """Runs in a thread: drives one worker process after another until there are no more tasks."""
    worker: _Worker | None = None
    try:
        while not stop.is_set():
            with lock:
                task = next(source, None)
            if task is None:
                break
            for trial in (1, 2):
                worker = worker or _Worker()
                again = False
                for item in worker.read(task, timeout, stop):
                    again = trial == 1 and (not worker.healthy or (isinstance(item, Rejected) and item.unread))
                    out.put((task.key, Restarted() if again else item))
                if not worker.healthy:
                    worker.close()
                    worker = None
                if not again or stop.wait(1.0):
                    break
    except BaseException as error:  # raised in the caller's thread
        out.put((-1, error))
    finally:
        if worker:
            worker.close()
        out.put((-1, None))


class _Worker:
    """One decoder process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fvdm.media.clips"])
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_work, args=(child,), daemon=True)
        self.process.start()
        child.close()
        self.healthy = True

    def read(self, task: Task, timeout: float, stop: threading.Event) -> Iterator[Any]:
        """Yields pieces, then Info or Rejected. After a failure `healthy` is False."""
        try:
            self.pipe.send(task)
            while True:
                if not self._wait(timeout, stop):
                    self.healthy = False
                    if not stop.is_set():
                        yield Rejected(f"decoder sent nothing for {timeout:.0f} s")
                    return
                item = self.pipe.recv()
                yield item
                if not isinstance(item, Piece):
                    return
        except (EOFError, OSError):
            self.healthy = False
            self.process.join(5)
            code = self.process.exitcode
            yield Rejected(f"decoder died ({f'signal {-code}' if code and code < 0 else f'exit code {code}'})")

    def _wait(self, timeout: float, stop: threading.Event) -> bool:
        waited = 0.0
        while waited < timeout and not stop.is_set():
            if self.pipe.poll(0.25):
                return True
            waited += 0.25
        return False

    def close(self) -> None:
        """Ends the process; kills it if it is in the middle of a video."""
        self.pipe.close()
        if not self.healthy:
            self.process.kill()
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _work(pipe: Connection) -> None:
    """The worker process: reads tasks until the pipe closes. It ignores signals that are meant for the job."""
    import torch

    from fvdm.media.clips import estimate_clips, read_clips
    from fvdm.media.videos import VideoError

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            task: Task = pipe.recv()
            if task.estimate:
                pipe.send(estimate_clips(task.path, task.spec))
                continue
            try:
                for item in read_clips(Path(task.path), task.spec):
                    pipe.send(item)
            except VideoError as error:
                pipe.send(Rejected(str(error), error.unread))
            except MemoryError:
                pipe.send(Rejected(f"decoding takes more than {MEMORY / 2**30:.0f} GiB of memory"))
            except (BrokenPipeError, EOFError):
                return
            except Exception as error:  # any failure on a corrupt file costs that file only
                pipe.send(Rejected(f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"))
