"""Downloads from the Hugging Face hub, of which a log says now and then how far they are."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fvdm.background import repeatedly

LOG_EVERY = 30.0  # seconds between two lines in a log


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """Print a line now and then while files of a model come from the hub; on a terminal the hub shows bars of its own.

    Nothing is printed when nothing comes: for a folder on disk, or files that are in the hub's cache already.

    Args:
        name: of the model on the hub, such as `stabilityai/sd-vae-ft-ema`, with or without a folder in it.
    """
    parts = name.split("/")
    if sys.stderr.isatty() or len(parts) < 2 or Path(name).exists():
        yield
        return
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    files = Path(HF_HUB_CACHE) / repo_folder_name(repo_id="/".join(parts[:2]), repo_type="model") / "blobs"
    start = before = _bytes(files)

    def watch() -> None:
        nonlocal before
        now = _bytes(files)
        if now > before:
            print(f"fetching {name}: {(now - start) / 1e9:.2f} GB so far", file=sys.stderr, flush=True)
        before = now

    with repeatedly(watch, LOG_EVERY):
        yield


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # The hub has renamed it since.
            continue
    return total
