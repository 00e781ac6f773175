"""Caption files: what they hold is found to the letter, and no damage is silent."""

import csv
import io
import json

import numpy as np
import pytest

from data_prep.captions import find_captions
from data_prep.config import EncodeConfig
from fvdm.media.layouts import Listing, Source

NAMES = [f"{number}.mp4" for number in range(8)]
TEXTS = {name: f'a "talking" man, number {name[0]}, äöü 人' for name in NAMES}


def listing():
    return Listing("mixed", [Source(name, "file") for name in NAMES])


def write(folder, kind):
    """Returns what `--captions` takes, and the files."""
    if kind == "txt":
        for name, text in TEXTS.items():
            (folder / f"{name[0]}.txt").write_text(f"{text}\nsecond of {name}\n", encoding="utf-8")
        return "txt", sorted(folder.glob("*.txt"))
    path = folder / f"captions.{kind}"
    if kind == "csv":
        buffer = io.StringIO()
        csv.writer(buffer).writerows([("file", "caption"), *TEXTS.items()])
        path.write_text(buffer.getvalue(), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({"file": k, "caption": v}) + "\n" for k, v in TEXTS.items()))
    return str(path), [path]


def found(folder, captions, uncaptioned="skip"):
    given = listing()
    config = EncodeConfig(videos=str(folder), captions=captions, uncaptioned=uncaptioned)
    return find_captions(config, given), dict(given.rejected)


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_captions_are_found_to_the_letter(tmp_path, kind):
    captions, _ = write(tmp_path, kind)
    more = {name: (TEXTS[name], f"second of {name}") if kind == "txt" else (TEXTS[name],) for name in NAMES}
    assert found(tmp_path, captions) == (more, {})


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_no_damage_is_silent(tmp_path, kind):
    """100 damaged files of each kind: a sentence that names the file, a rejected video, or exactly what is there now.

    What a file without checksums cannot know is a changed letter of a caption; it is stored as it stands.
    """
    captions, files = write(tmp_path, kind)
    random = np.random.default_rng(5)
    outcomes, refused = set(), []
    for _ in range(100):
        path = files[random.integers(len(files))]
        good = path.read_bytes()
        data = bytearray(good)
        at, size = int(random.integers(len(data))), int(random.integers(1, 20))
        how = random.integers(4)
        if how == 0:
            del data[at:]
        elif how == 1:
            data[at : at + size] = random.bytes(size)
        elif how == 2:
            data[at : at + size] = bytes(size)
        else:
            data[at] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            texts, rejected = found(tmp_path, captions)
        except ValueError as error:
            refused.append((path, str(error)))
            outcomes.add("refused")
        else:
            assert set(texts) | set(rejected) == set(NAMES)
            assert not set(texts) & set(rejected)
            held = data.decode(errors="replace")
            for name in texts:
                for text in texts[name]:
                    same = kind == "txt" and not path.name.startswith(name[0])
                    plain = held.replace('""', '"') if kind == "csv" else held
                    assert same or kind == "jsonl" or text.split("\n")[0] in plain
            outcomes |= {"rejected"} if rejected else {"read"}
        path.write_bytes(good)
    assert all(str(path) in sentence and "\n" not in sentence for path, sentence in refused)
    assert outcomes == {"rejected", "read"} if kind == "txt" else outcomes >= {"refused", "read"}


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "", "its first line must name the columns file and caption"),
        ("a.csv", "file,text\n", "its first line must name the columns file and caption"),
        ("a.csv", "file,caption\na.mp4,one, two\n", "line 2: 3 columns in place of 2; put captions with commas in"),
        ("a.csv", 'file,caption\na.mp4,"one\n', "line 2: unexpected end of data"),
        ("a.jsonl", '{"file": "a.mp4"\n', "line 1: it is not JSON"),
        ("a.jsonl", '\n{"file": "a.mp4", "caption": 3}\n', "line 2: it must be of the form"),
        ("a.jsonl", "[1]\n", "line 1: it must be of the form"),
        ("a.jsonl", '{"file": "", "caption": "x"}\n', "line 1: it names no file"),
        ("a.json", "{}", "it takes txt, for text files beside the videos, or a .csv or .jsonl file"),
    ],
)
def test_a_corrupt_caption_file_is_a_sentence(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"a\.(csv|json)") as error:
        found(tmp_path, str(tmp_path / name))
    assert sentence in str(error.value)


def test_captions_of_files_that_are_not_there_are_counted(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        '{"file": "gone.mp4", "caption": "x"}\n{"file": "0.mp4", "caption": ["y", " "]}\n'
    )
    texts, _ = found(tmp_path, str(tmp_path / "a.jsonl"), "empty")
    assert texts == {"0.mp4": ("y",)} | dict.fromkeys(NAMES[1:], ())
    shown = capsys.readouterr().out
    assert "captions: 1 for 1 videos, 7 videos without one, which take the empty prompt" in shown
    assert "1 for files that are not there, for example 'gone.mp4'" in shown
