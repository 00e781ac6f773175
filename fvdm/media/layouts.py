"""Finds the videos under a folder and says how that folder is laid out.

Four layouts are those of the data sets of the Latte and FVDM papers, with their preprocessing as defaults:

| layout    | on disk                                     | spatial                        | flipped copy |
|-----------|---------------------------------------------|--------------------------------|--------------|
| `ffs`     | video files, at any depth                   | shorter side, then centre crop | yes          |
| `ucf101`  | `<Class>/*.avi` (any video file)            | the same                       | yes          |
| `sky`     | `<video>/<clip>/*_NNN.jpg`                  | centre crop, then resize       | no           |
| `taichi`  | `<video>/*.jpg` or `.png`, already square   | none needed                    | yes          |
| `mixed`   | video files and frame folders, anywhere     | shorter side, antialiased      | no           |

Whether a file is a video or an image follows from its content; see `fvdm/media/stills.py`. Nothing is dropped in
silence: files that are no videos are counted by suffix, videos that do not belong to the given layout are counted too,
and what should be a video and is not is listed with its reason.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fvdm.media.config import LAYOUTS, LayoutName
from fvdm.media.preprocess import Preprocess
from fvdm.media.stills import STILL_SUFFIXES, kind_of

VIDEO_SUFFIXES = frozenset(
    [
        ".3gp",
        ".asf",
        ".avi",
        ".divx",
        ".f4v",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mjpeg",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".ogg",
        ".ogv",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    ]
)

Kind = Literal["file", "frames", "image"]


def caption_file(video: Path) -> Path | None:
    """The text file beside a video that holds its captions, one a line: `a.txt` or `a.mp4.txt` for `a.mp4`."""
    beside = (Path(os.path.splitext(video)[0] + ".txt"), Path(f"{video}.txt"))
    return next((path for path in beside if os.path.lexists(path) and not path.is_dir()), None)


PAPER: dict[str, Preprocess] = {
    "ffs": Preprocess(flip=True),
    "ucf101": Preprocess(flip=True),
    "sky": Preprocess(resize="centre-square", min_frames=49, frame_order="underscore"),
    "taichi": Preprocess(flip=True),
    "mixed": Preprocess(antialias=True),
}


@dataclass(frozen=True)
class Source:
    """One video: a file, or a folder of frames; or one still image.

    Attributes:
        name: its path below the videos folder; bytes that are not UTF-8 are represented by surrogates (os.fsdecode).
        kind: `file`, `frames` or `image`.
        label: class index, or None.
        split: `train`, or the split whose list names it.
    """

    name: str
    kind: Kind
    label: int | None = None
    split: str = "train"


@dataclass
class Listing:
    """What is in a folder.

    Attributes:
        layout: the layout, recognised or asked for.
        sources: the videos, sorted by the bytes of their names.
        classes: class names; `Source.label` is an index into them.
        rejected: `(name, reason)` of what looks like a video and cannot be opened at all.
        ignored: number of other files by extension, and of the videos that the layout does not take.
    """

    layout: str
    sources: list[Source] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def sentence(self) -> str:
        """One line for people: layout, number of videos and classes, and what was left out."""
        kinds: Counter[str] = Counter(source.kind for source in self.sources)
        names = {"file": "video files", "frames": "frame folders", "image": "images"}
        parts = [f"{kinds[kind]} {name}" for kind, name in names.items() if kinds[kind]]
        text = f"layout {self.layout}: {' and '.join(parts) or 'no videos'}"
        text += f" in {len(self.classes)} classes" if self.classes else ""
        text += f", {len(self.rejected)} unreadable" if self.rejected else ""
        if self.ignored:
            text += ", ignored " + ", ".join(f"{n} {what}" for what, n in sorted(self.ignored.items()))
        return text


def list_videos(
    root: str | Path,
    layout: LayoutName = "auto",
    *,
    split_files: tuple[str, ...] = (),
    class_file: str | None = None,
    exclude: str | Path | None = None,
    images: bool = False,
) -> Listing:
    """Lists the videos under `root`.

    Args:
        root: the folder; symbolic links are followed, each real folder once, so a loop ends.
        layout: one of `LAYOUTS`; `auto` recognises it from the tree.
        split_files: lists in the form of UCF101's `trainlist01.txt`; only the videos they name are taken, in
            the split that the file's name begins with (`train`, `test`).
        class_file: `classInd.txt`, lines `1 Name`; by default the sorted names of the class folders.
        exclude: a folder below root that is left out (the output).
        images: still images are sources of their own, not frames of their folder.

    Raises:
        ValueError: root is no folder, or a list file is missing or malformed, or an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"There is no layout {layout!r}: use one of {', '.join(LAYOUTS)}.")
    if not os.path.isdir(root):
        raise ValueError(f"{str(root)!r} is not a folder: --videos takes the folder that holds the videos.")
    listing = Listing(layout)
    files, folders, stills = _walk(os.fspath(root), listing, exclude, images)
    if layout == "auto":
        listing.layout = recognise(files + stills, folders)
    names: list[tuple[str, Kind]] = [(name, "image") for name in stills]
    if listing.layout in ("ffs", "ucf101", "mixed"):
        names += [(name, "file") for name in files]
    elif files:
        listing.ignored["video files (--layout mixed takes both)"] = len(files)
    if listing.layout in ("sky", "taichi", "mixed"):
        names += [(name, "frames") for name in folders]
    elif folders:
        listing.ignored["frame folders (--layout mixed takes both)"] = len(folders)
    names.sort(key=lambda item: os.fsencode(item[0]))
    if listing.layout == "ucf101":
        _label(listing, names, split_files, class_file)
    elif split_files or class_file:
        raise ValueError(f"Lists of splits and classes belong to the layout ucf101, not to {listing.layout}.")
    else:
        listing.sources = [Source(name, kind) for name, kind in names]
    return listing


def recognise(files: list[str], folders: list[str]) -> str:
    """The layout of a tree, from the names of its video files and of the folders that hold images.

    Args:
        files: video files, paths below the root.
        folders: folders with images in them, paths below the root (`.` is the root).
    """
    depths = {name.count("/") for name in files}
    if files and not folders:
        classes = {name.split("/")[0] for name in files}
        return "ucf101" if depths == {1} and len(classes) > 1 else "ffs"
    if folders and not files:
        depths = {name.count("/") for name in folders}
        if depths == {1}:
            return "sky"
        if depths == {0} and folders != ["."]:
            return "taichi"
    return "mixed" if folders else "ffs"


def _walk(
    root: str, listing: Listing, exclude: str | Path | None, stills: bool
) -> tuple[list[str], list[str], list[str]]:
    """All video files, and all folders with at least two images or, with `stills`, all images; paths below root."""
    files: list[str] = []
    folders: list[str] = []
    singles: list[str] = []
    seen: set[tuple[int, int]] = set()
    if exclude is not None and os.path.isdir(exclude):
        status = os.stat(exclude)
        seen.add((status.st_dev, status.st_ino))
    stack = ["."]
    while stack:
        folder = stack.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            listing.rejected.append((folder, f"folder cannot be read: {error.strerror}"))
            continue
        images: list[str] = []
        videos: set[str] = set()  # names without suffix
        for entry in entries:
            name = os.path.normpath(os.path.join(folder, entry.name))
            kind = _kind(entry, name, listing)
            if kind == "folder":
                stack.append(name)
            elif kind == "video":
                files.append(name)
                videos.add(os.path.splitext(entry.name)[0])
            elif kind == "image":
                images.append(entry.name)
        own = [image for image in images if os.path.splitext(image)[0] not in videos]
        thumbnails = len(images) - len(own)
        if thumbnails:
            listing.ignored["image beside a video of its name"] += thumbnails
        if stills:
            singles += [os.path.normpath(os.path.join(folder, image)) for image in own]
        elif len(own) >= 2:
            folders.append(folder)
        elif own:
            listing.ignored["single image"] += 1
    return files, folders, singles


def _kind(entry: os.DirEntry[str], name: str, listing: Listing) -> str | None:
    """`folder`, `video`, `image` or None (then counted as ignored, or rejected with a reason)."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if entry.name.startswith("."):
        listing.ignored["hidden"] += 1
        return None
    try:
        mode = entry.stat().st_mode
        if stat.S_ISDIR(mode):
            return "folder"
        if not stat.S_ISREG(mode):
            if suffix in VIDEO_SUFFIXES:
                listing.rejected.append((name, "not a regular file"))
            return None
        if suffix in STILL_SUFFIXES:
            return "image"
        content = kind_of(entry.path)
        if content == "image":
            return "image"
        if content or suffix in VIDEO_SUFFIXES:
            return "video"
    except OSError as error:
        listing.rejected.append((name, f"cannot be read: {error.strerror}"))
        return None
    listing.ignored[ascii(suffix)[1:-1] or "without extension"] += 1  # a name may hold any character
    return None


def _label(
    listing: Listing,
    names: list[tuple[str, Kind]],
    split_files: tuple[str, ...],
    class_file: str | None,
) -> None:
    """Fills sources and classes of a tree of class folders, by the official lists where given."""
    if class_file:
        classes = _classes(class_file)
    else:
        folders = {name.split("/")[0] for name, _ in names if "/" in name}
        classes = {name: index for index, name in enumerate(sorted(folders, key=os.fsencode))}
    listing.classes = list(classes)
    splits = dict(_listed(split_files)) if split_files else {name: "train" for name, _ in names}
    found = dict(names)
    for name in sorted(splits, key=os.fsencode):
        label = classes.get(name.split("/")[0])
        if name not in found:
            listing.rejected.append((name, "named by a split list, but not on disk"))
        elif label is None:
            listing.rejected.append((name, "lies in no class folder" if "/" not in name else "unknown class"))
        else:
            listing.sources.append(Source(name, found[name], label, splits[name]))
    left_out = len(found.keys() - splits.keys())
    if left_out:
        listing.ignored["in no split list"] += left_out


def _classes(path: str) -> dict[str, int]:
    """Reads `classInd.txt`: lines `1 ApplyEyeMakeup`, numbered from 1 without gaps."""
    lines = [line.split(maxsplit=1) for line in _read_lines(path)]
    if any(len(line) != 2 or line[0] != str(number) for number, line in enumerate(lines, start=1)):
        raise ValueError(f"{path!r} is not a class list: its lines must be '1 Name', '2 Name', ... in order.")
    return {line[1]: number for number, line in enumerate(lines)}


def _listed(paths: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """`(name, split)` of every video that the split lists name."""
    for path in paths:
        split = next((name for name in ("train", "test", "val") if Path(path).name.startswith(name)), None)
        if split is None:
            raise ValueError(f"{path!r}: a split list's name must begin with train, test or val.")
        for line in _read_lines(path):
            yield line.rsplit(maxsplit=1)[0] if line.rsplit(maxsplit=1)[-1].isdigit() else line, split


def _read_lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"Cannot read the list {path!r}: {error.strerror}.") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
