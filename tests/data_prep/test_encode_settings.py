"""Wrong settings and hostile names: one sentence, and the exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.config import EncodeConfig
from tests.data_fixtures import cut, make_vae, write_video
from tests.data_prep.test_encode_latents import encode, words

ROOT = Path(__file__).resolve().parents[2]
STRICT = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        *(((flag, bad), f"{flag[2:].replace('-', '_')} is {bad}: it must be at least 1")
          for flag in ("--size", "--min-frames", "--chunk", "--workers", "--encoders", "--jobs", "--minutes")
          for bad in ("0", "-1")),
        *(((flag, bad), f"{flag[2:].replace('-', '_')} is {float(bad.replace('.', ''))}: it must be a number above 0")
          for flag in ("--shard-mb", "--timeout") for bad in ("0", "-1", ".nan", ".inf")),
        (("--slurm", "partition"), "--slurm 'partition': it takes words of the form KEY=VALUE"),
        (("--slurm", "=gpu"), "--slurm '=gpu': it takes words of the form KEY=VALUE"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_a_sentence_and_2(tmp_path, capsys, more, sentence):
    assert encode(tmp_path, tmp_path / "out", "none", *more) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_defaults_are_in_range():
    EncodeConfig()


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_an_out_that_is_a_file_is_a_sentence_and_2(tmp_path, capsys, below):
    (tmp_path / "file").touch()
    assert encode(tmp_path, f"{tmp_path}/file{below}", "none") == 2
    assert "is a file, or lies below one: name a folder." in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", '{"sources": [{}]}', "\x00"])
def test_a_corrupt_plan_is_a_sentence_and_2(vae, tmp_path, capsys, text):
    write_video(tmp_path / "v" / "a.mp4", cut(0))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text(text)
    assert encode(tmp_path / "v", tmp_path / "out", vae) == 2
    assert "plan.json' is corrupt, or of another version" in capsys.readouterr().err


@pytest.mark.slow
def test_no_name_can_end_a_run(vae, tmp_path):
    """Names that are not UTF-8, of files, suffixes and folders, on terminals that take nothing else."""
    root = os.fsencode(tmp_path) + b"/v\xfe\xff\n"
    os.mkdir(root)
    names = [b"notes.\xff\xfe", b"table.\xd0\xbf\n", b"bad\xff\x1b[31m.mp4", b"a.mp4"]
    for name in names:
        Path(os.fsdecode(os.path.join(root, name))).write_bytes(b"x")
    write_video(tmp_path / "a.mp4", cut(0)).rename(os.fsdecode(root) + "/\udcff.mp4")
    out = os.fsdecode(os.fsencode(tmp_path) + b"/out\xfe")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, str(ROOT / "data_prep" / "encode_latents.py"), *words(os.fsdecode(root), out, vae)]
    done = subprocess.run([*command, "--mlflow", uri], capture_output=True, env=STRICT)
    assert done.returncode == 3, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert rb"ignored 1 .\u043f\n, 1 .\udcff\udcfe" in done.stdout
    for encoding in ("utf-8:strict", "ascii:strict"):
        shown = subprocess.run(
            [sys.executable, str(ROOT / "data_prep" / "inspect_shards.py"), out],
            capture_output=True,
            env=STRICT | {"PYTHONIOENCODING": encoding},
        )
        assert shown.returncode == 0, shown.stderr.decode()
        assert b"reconstruction" in shown.stdout
