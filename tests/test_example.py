"""The example checkpoint that ships: it loads by name, fits in the package, and makes videos on a fresh clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fvdm.generation.pipeline import load
from fvdm.media.writing import FORMATS
from fvdm.models.loading import EXAMPLE

ROOT = Path(__file__).parent.parent
IMAGES = sorted((ROOT / "docs" / "examples").glob("*.png"))


def test_the_example_is_small_and_loads_by_name():
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 10e6
    trained = load("example", device="cpu")
    assert trained.folder == EXAMPLE
    video = trained.generate(num=1, steps=2)
    assert video.shape == (1, trained.model.config.frames, 3, trained.size, trained.size)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example").mkdir()
    with pytest.raises(ValueError, match="example"):
        load("example")


def test_the_images_have_a_page_that_names_their_origin():
    page = (ROOT / "docs" / "examples" / "README.md").read_text()
    assert len(IMAGES) >= 2
    assert all(image.name in page for image in IMAGES)
    assert all(image.stat().st_size < 100_000 for image in IMAGES)


@pytest.mark.slow
def test_the_command_of_the_readme_makes_a_video_in_a_fresh_process(tmp_path):
    command = [sys.executable, "-m", "fvdm", "generate", "--checkpoint", "example", "--task", "image-to-video"]
    command += ["--given", str(IMAGES[0]), "--num", "1", "--out", "out"]
    where = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    done = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for form in set(FORMATS) & {"mp4", "gif"}:
        assert (tmp_path / "out" / f"image-to-video.{form}").stat().st_size > 1000
