import os
import sys
from pathlib import Path

import pytest

from fvdm.media.layouts import list_videos
from tests.data_fixtures import LAYOUTS, cut, make_tree, write_frames, write_video


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_recognises_each_layout(tmp_path, layout):
    expected = make_tree(tmp_path, layout)
    listing = list_videos(tmp_path)
    assert listing.layout == layout
    assert [source.name for source in listing.sources] == expected["videos"]
    assert [source.label for source in listing.sources] == expected["labels"]
    assert not listing.rejected
    assert f"layout {layout}" in listing.sentence()


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_ucf101_official_lists(tmp_path):
    touch(tmp_path, "data/B/v1.avi", "data/B/v2.avi", "data/A/v3.avi", "data/A/v4.avi")
    (tmp_path / "trainlist01.txt").write_text("B/v1.avi 1\nA/v3.avi 2\nA/gone.avi 2\n")
    (tmp_path / "testlist01.txt").write_text("B/v2.avi\r\n")
    (tmp_path / "classInd.txt").write_text("1 B\n2 A\n")
    listing = list_videos(
        tmp_path / "data",
        split_files=(str(tmp_path / "trainlist01.txt"), str(tmp_path / "testlist01.txt")),
        class_file=str(tmp_path / "classInd.txt"),
    )
    assert listing.classes == ["B", "A"]
    found = {source.name: (source.split, source.label) for source in listing.sources}
    assert found == {"A/v3.avi": ("train", 1), "B/v1.avi": ("train", 0), "B/v2.avi": ("test", 0)}
    assert listing.rejected == [("A/gone.avi", "named by a split list, but not on disk")]
    assert listing.ignored["in no split list"] == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"split_files": ("missing.txt",), "layout": "ucf101"}, "missing.txt"),
        ({"class_file": "missing.txt", "layout": "ucf101"}, "missing.txt"),
        ({"layout": "ucf"}, "no layout 'ucf'"),
        ({"split_files": ("x",), "layout": "ffs"}, "belong to the layout ucf101"),
    ],
)
def test_wrong_usage_is_a_sentence(tmp_path, words, sentence):
    touch(tmp_path, "A/a.avi", "B/b.avi")
    with pytest.raises(ValueError, match=sentence):
        list_videos(tmp_path, **words)
    with pytest.raises(ValueError, match="is not a folder"):
        list_videos(tmp_path / "nowhere")


def test_nothing_is_dropped_in_silence(tmp_path):
    touch(tmp_path, "a.mp4", "notes.txt", "b.csv", "c.csv", ".hidden.mp4", "one/picture.png", "noextension")
    write_video(tmp_path / "x.mp4", cut(0, 2)).rename(tmp_path / "clip.dat")  # wrong extension, right content
    write_video(tmp_path / "d.ts", cut(0, 2), "mpeg1video")
    (tmp_path / "page.ts").write_text("let x: number = 1;\n" * 20)
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "broken.mp4").symlink_to(tmp_path / "gone.mp4")
    listing = list_videos(tmp_path)
    assert [source.name for source in listing.sources] == ["a.mp4", "clip.dat", "d.ts"]
    assert dict(listing.rejected) == {
        "pipe.mp4": "not a regular file",
        "broken.mp4": "cannot be read: No such file or directory",
    }
    assert listing.ignored == {".ts": 1, ".txt": 1, ".csv": 2, "hidden": 1, "single image": 1, "without extension": 1}


def test_a_layout_that_was_asked_for_drops_nothing_in_silence(tmp_path):
    write_video(tmp_path / "a.mp4", cut(0, 2))
    write_frames(tmp_path / "frames" / "b", cut(1), [f"{number}.png" for number in range(20)])
    for layout, kind, other in (
        ("ffs", "file", "frame folders"),
        ("ucf101", "file", "frame folders"),
        ("sky", "frames", "video files"),
        ("taichi", "frames", "video files"),
    ):
        listing = list_videos(tmp_path, layout)
        assert {source.kind for source in listing.sources} <= {kind}
        assert listing.ignored == {f"{other} (--layout mixed takes both)": 1}
        assert f"ignored 1 {other}" in listing.sentence()
    assert list_videos(tmp_path).layout == "mixed"
    assert not list_videos(tmp_path).ignored


def test_suffixes_that_no_terminal_shows(tmp_path):
    for name in (b"notes.\xff\xfe", b"x.a\nb\x1b[2J"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"x")
    listing = list_videos(tmp_path)
    assert listing.ignored == {r".\udcff\udcfe": 1, r".a\nb\x1b[2j": 1}
    assert listing.sentence().isascii()
    assert listing.sentence().isprintable()


def test_symlink_loops_end_and_links_are_followed_once(tmp_path):
    touch(tmp_path, "data/real/a.mp4")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/real/again").symlink_to(tmp_path / "data" / "real")
    touch(tmp_path, "elsewhere/b.mp4")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    names = [source.name for source in list_videos(tmp_path / "data").sources]
    assert sorted(Path(name).name for name in names) == ["a.mp4", "b.mp4"]
    (tmp_path / "data/self").symlink_to("self")
    assert ("self", "cannot be read: Too many levels of symbolic links") in list_videos(tmp_path / "data").rejected


def test_hostile_names(tmp_path):
    names = [b"new\nline.mp4", b"\xff\xfe.mp4", b"-rf.mp4", b"a b'\".mp4", b"..mp4.mp4", b"tab\t.mp4"]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"x")
    listing = list_videos(tmp_path)
    assert [os.fsencode(source.name) for source in listing.sources] == sorted(names[:4] + names[5:])
    assert listing.ignored["hidden"] == 1  # ..mp4.mp4 begins with a dot


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything; run the tests as a user")
def test_unreadable_folder_is_reported(tmp_path):
    touch(tmp_path, "a.mp4", "closed/b.mp4")
    (tmp_path / "closed").chmod(0)
    try:
        assert list_videos(tmp_path).rejected == [("closed", "folder cannot be read: Permission denied")]
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_unreadable_folder_is_reported_to_root_too(tmp_path, monkeypatch):
    touch(tmp_path, "a.mp4", "closed/b.mp4")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list_videos(tmp_path).rejected == [("closed", "folder cannot be read: Permission denied")]


def test_the_output_folder_is_left_out(tmp_path):
    touch(tmp_path, "a.mp4", "out/b.mp4")
    assert [source.name for source in list_videos(tmp_path, exclude=tmp_path / "out").sources] == ["a.mp4"]


def test_the_command_imports_nothing_heavy_before_it_must():
    import subprocess

    code = "import sys, data_prep.encode_latents; sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
