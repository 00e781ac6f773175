"""Finds the captions of videos: text files beside them, or one CSV or JSONL file for all."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.config import EncodeConfig
from fvdm.media.layouts import Listing, caption_file

Captions = dict[str, tuple[str, ...]]
TEXT = ".txt"
csv.field_size_limit(2**24)


def find_captions(config: EncodeConfig, listing: Listing) -> Captions:
    """The captions of each video of a listing, by its name; `()` where the empty prompt stands for one.

    Videos whose caption cannot be read, and with `--uncaptioned skip` those without one, go from the listing's sources
    to its rejected ones. What was found is printed.

    Raises:
        ValueError: a caption file is corrupt, or a video has no caption and `--uncaptioned` is `refuse`.
    """
    if not config.captioned:
        return {}
    names = {source.name for source in listing.sources}
    beside = config.captions in ("", "txt")
    found, bad = _beside(Path(config.videos), names, listing) if beside else (_listed(Path(config.captions)), {})
    elsewhere = sorted(set(found) - names - {name for name, _ in listing.rejected})
    without = sorted(names - set(found) - set(bad))
    if without and config.uncaptioned == "refuse":
        where = "a text file of the same name beside it" if beside else f"a caption in {config.captions!r}"
        raise ValueError(
            f"{len(without)} of {len(names)} videos have no caption, for example {without[0]!a}: give each {where}, or "
            "type --uncaptioned skip to leave them out, or --uncaptioned empty for the empty prompt."
        )
    if config.uncaptioned == "skip":
        bad |= dict.fromkeys(without, "it has no caption (--uncaptioned skip)")
    print(_sentence(found, names, without, elsewhere, config))
    listing.rejected += sorted(bad.items())
    listing.sources = [source for source in listing.sources if source.name not in bad]
    return {source.name: found.get(source.name, ()) for source in listing.sources}


def _sentence(found: Captions, names: set[str], without: list[str], elsewhere: list[str], config: EncodeConfig) -> str:
    captions = sum(len(texts) for name, texts in found.items() if name in names)
    text = f"captions: {captions} for {len(names & set(found))} videos"
    if without:
        text += f", {len(without)} videos without one, " + (
            "which are left out" if config.uncaptioned == "skip" else "which take the empty prompt"
        )
    if elsewhere:
        text += f", {len(elsewhere)} for files that are not there, for example {elsewhere[0]!a}"
    return text


def _beside(videos: Path, names: set[str], listing: Listing) -> tuple[Captions, dict[str, str]]:
    """Captions from `a.txt` for `a.mp4`, one a line, and the reasons why some cannot be read."""
    found: Captions = {}
    bad: dict[str, str] = {}
    for name in names:
        path = caption_file(videos / name)
        if path is None:
            continue
        listing.ignored[TEXT] -= 1
        try:
            texts = _clean(path.read_text(encoding="utf-8-sig").splitlines())
        except OSError as error:
            bad[name] = f"its caption {path.name!a} cannot be read: {error.strerror}"
        except UnicodeError:
            bad[name] = f"its caption {path.name!a} is not UTF-8 text"
        else:
            if any("\0" in text for text in texts):
                bad[name] = f"its caption {path.name!a} holds a null character"
            elif texts:
                found[name] = texts
    listing.ignored += type(listing.ignored)()  # drops what is not above 0
    return found, bad


def _clean(texts: list[str]) -> tuple[str, ...]:
    return tuple(text.strip() for text in texts if text.strip())


def _listed(path: Path) -> Captions:
    """Captions from a CSV file with the columns `file` and `caption`, or a JSONL file with these fields.

    Raises:
        ValueError: says which line is wrong, and how.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"Cannot read the captions {str(path)!r}: {error.strerror}.") from None
    except UnicodeError:
        raise ValueError(f"The captions {str(path)!r} are not UTF-8 text: save them as UTF-8.") from None
    kinds = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in kinds:
        raise ValueError(
            f"--captions {str(path)!r}: it takes txt, for text files beside the videos, or a .csv or .jsonl file."
        )
    found: Captions = {}
    for line, name, captions in kinds[path.suffix.lower()](path, text):
        if not name or any("\0" in word for word in (name, *captions)):
            raise ValueError(f"{str(path)!r}, line {line}: it names no file, or holds a null character.")
        name = os.path.normpath(name)
        found[name] = found.get(name, ()) + _clean(captions)
    return {name: texts for name, texts in found.items() if texts}


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, str, list[str]]]:
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if not {"file", "caption"} <= set(header):
            raise ValueError(f"{str(path)!r}: its first line must name the columns file and caption.")
        for row in reader:
            if len(row) != len(header) and row:
                raise ValueError(
                    f"{str(path)!r}, line {reader.line_num}: {len(row)} columns in place of {len(header)}; put "
                    "captions with commas in quotes."
                )
            if row:
                yield reader.line_num, row[header.index("file")], [row[header.index("caption")]]
    except csv.Error as error:
        raise ValueError(f"{str(path)!r}, line {reader.line_num}: {error}.") from None


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, str, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r}, line {number}: it is not JSON ({error}).") from None
        name = row.get("file") if isinstance(row, dict) else None
        captions = row.get("caption") if isinstance(row, dict) else None
        texts = [captions] if isinstance(captions, str) else captions
        if not (isinstance(name, str) and isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise ValueError(
                f'{str(path)!r}, line {number}: it must be of the form {{"file": "a.mp4", "caption": "a dog runs"}}; '
                "several captions are a list."
            )
        yield number, name, texts
