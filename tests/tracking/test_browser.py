"""What a person sees of a run: a real browser on a real MLflow server, on this machine alone."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from fvdm import config as settings
from fvdm.distributed import free_port
from fvdm.media.writing import card, tile, write_mp4, write_strips
from fvdm.tracking import tracker as tracking
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.tracker import Tracker
from fvdm.training.config import TrainConfig
from tests.data_fixtures import real_frames

sync = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no Chromium: apt-get install -y --no-install-recommends chromium"),
]
TASKS = ("generate", "image-to-video", "interpolate")
STEPS = (0, 250, 500, 1000)
VIDEO = "previews/step-00001000"
SECONDS = 1000  # milliseconds, as playwright counts


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of an MLflow server."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=1)
            break
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
    yield uri
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def run(server, tmp_path_factory):
    """The page of a small run: metrics, an image that gets clearer over the steps, and a video."""
    folder = tmp_path_factory.mktemp("run")
    config = settings.parse(TrainConfig, ["--config", str(ROOT / "configs" / "demo.yaml")])
    tracker = Tracker(folder, TrackingConfig(server, "demo", False), "demo", settings.flatten(config))
    for step in range(0, 1001, 50):
        losses = {f"loss/{name}": k + 1 / (1 + step / 100) for k, name in enumerate(("mean", "one_t", "t_per_frame"))}
        tracker.metrics(losses | {"fvd/styleganv_16f": 1500 / (1 + step / 300)}, step)
    frames = torch.from_numpy(real_frames()[:48].copy()).permute(0, 3, 1, 2).float()
    noise = 255 * torch.rand(frames.shape, generator=torch.Generator().manual_seed(0))
    for step in STEPS:
        video = torch.lerp(noise, frames, step / 1000).byte()
        rows, columns = card(2)
        write_strips(torch.stack([video[:16], video[16:32]]), folder / f"{step}.png", columns, rows)
        for task in TASKS:
            tracker.image(folder / f"{step}.png", f"previews/{task}", step)
    write_mp4(tile([frames[:24].byte(), frames[24:].byte()]), folder / "generate.mp4")
    tracker.artifact(folder / "generate.mp4", VIDEO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "TIMEOUT", 120.0)  # A busy machine may take its time.
        tracker.close()
    assert tracker.run_id
    with urllib.request.urlopen(f"{server}/api/2.0/mlflow/runs/get?run_id={tracker.run_id}") as answer:
        assert b'"status": "FINISHED"' in answer.read()
    return f"{server}/#/experiments/1/runs/{tracker.run_id}"


@pytest.fixture(scope="module")
def page():
    """A tab of a headless browser."""
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # Root may have no sandbox.
        tab = browser.new_page(viewport={"width": 1500, "height": 1300})
        tab.set_default_timeout(60 * SECONDS)
        yield tab
        browser.close()


def show(page, address):
    """Go to a page of MLflow, without the panel of its assistant."""
    page.goto(address)
    page.get_by_role("heading", name="demo").first.wait_for()
    panel = page.get_by_role("button", name="Close")
    if panel.count():
        panel.first.click()


def test_the_run_shows_its_charts_and_its_pictures(page, run, tmp_path):
    show(page, f"{run}/model-metrics")
    for metric in ("loss/mean", "loss/one_t", "loss/t_per_frame", "fvd/styleganv_16f"):
        page.get_by_text(f"demo ({metric})").first.wait_for()
    page.wait_for_function("document.querySelectorAll('svg.main-svg path.js-line').length >= 4")
    sections = page.get_by_test_id("experiment-view-compare-runs-section-header")
    texts = " ".join(sections.all_inner_texts()).replace("\n", " ")
    assert all(f"{name} ({count})" in texts for name, count in (("loss", 3), ("fvd", 1), ("previews", len(TASKS))))
    page.locator("img.rc-image-img").last.scroll_into_view_if_needed()
    page.mouse.move(700, 700)
    page.mouse.wheel(0, 2000)  # to the whole cards
    for step in page.get_by_role("spinbutton").all():
        step.fill("1000")
        step.blur()
    page.wait_for_function(
        """() => {
            const shown = [...document.querySelectorAll('img.rc-image-img')].at(-1);
            return shown && shown.naturalWidth > 0 && decodeURIComponent(shown.src).includes('step+1000+');
        }"""
    )
    for picture in page.locator("img.rc-image-img").all():
        picture.scroll_into_view_if_needed()
    assert page.screenshot(path=str(tmp_path / "metrics.png"))
    # MLflow writes all parameters above every picture: a card must be scrolled, one as large as the page shows both.
    page.locator("[data-component-id=fullscreen_button_chartcard]").last.click()
    box = page.get_by_role("dialog").locator("img.rc-image-img").bounding_box()
    assert box
    assert min(box["width"], box["height"]) > 100
    assert box["y"] + box["height"] < 1300


def test_the_video_plays(page, run):
    show(page, f"{run}/artifacts/{VIDEO}/generate.mp4")
    page.locator("video").wait_for()
    page.wait_for_function("document.querySelector('video').readyState >= 3")
    page.evaluate("() => { const v = document.querySelector('video'); v.muted = true; return v.play(); }")
    page.wait_for_function("document.querySelector('video').currentTime > 0.5")
    state = page.evaluate("(v => [v.videoWidth, v.videoHeight, v.duration, v.error])(document.querySelector('video'))")
    assert state[:2] == [176, 288]
    assert state[2] == pytest.approx(3, abs=0.1)
    assert state[3] is None
