"""What a person sees of a run that was really trained: a fresh browser profile follows each printed address."""

import os
import re
import signal
import subprocess
import sys

import pytest

from fvdm.distributed import free_port
from fvdm.tracking import close_run
from fvdm.tracking.pages import run_page
from fvdm.tracking.tracker import run_of
from tests.browser import BROWSER, MISSING, SECONDS, open_browser
from tests.data_fixtures import real_frames, write_video
from tests.runs import ROOT
from tests.tracking.conftest import Server

pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason=MISSING)]
STEPS = 4
SIDE = 32


def command(folder, uri, *words):
    """Run a command of the project in `folder`; its output."""
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "MLFLOW_TRACKING_URI": uri}
    hidden |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=hidden, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run that fvdm trained on real clips and sampled from, the server's address, and the output."""
    folder = tmp_path_factory.mktemp("lab")
    server = Server(folder)
    server.start()
    frames = real_frames()[:48]
    for name, part in (("a", frames[:24]), ("b", frames[24:])):
        write_video(folder / "clips" / f"{name}.mp4", part)
    encode = ["--videos", "clips", "--out", "latents", "--size", SIDE, "--workers", 1, "--mlflow", "none"]
    command(folder, server.uri, ROOT / "data_prep/encode_latents.py", *encode)
    words = ["--cluster", "local", "--nodes", 1, "--config", ROOT / "configs/demo.yaml", "--model", "T/4"]
    words += ["--steps", STEPS, "--log_every", 1, "--engine.cooldown", 0, "--data.path", "latents", "--data.workers", 0]
    words += ["--previews.every", 2, "--previews.steps", 2, "--previews.long_frames", 24]
    printed = command(folder, server.uri, ROOT / "launchers/slurm_train.py", *words)
    sample = ["-m", "fvdm", "generate", "--checkpoint", "runs/demo", "--steps", 2, "--num", 1, "--out", "out"]
    printed += command(folder, server.uri, *sample)
    assert close_run(folder / "runs/demo", "KILLED", timeout=120), "what a busy server had not taken in time"
    yield folder, server.uri, printed
    server.kill()


@pytest.fixture
def page():
    """A tab of a browser that has never seen MLflow."""
    with open_browser() as browser:
        tab = browser.new_page(viewport={"width": 1500, "height": 1300})
        tab.set_default_timeout(90 * SECONDS)
        yield tab


def close_panel(page):
    """Close the panel of MLflow's assistant, which opens for every new visitor."""
    panel = page.get_by_role("button", name="Close")
    panel.first.wait_for()
    panel.first.click()
    panel.first.wait_for(state="detached")


def sections(page):
    """The names of the sections of charts, from top to bottom."""
    headers = page.get_by_test_id("experiment-view-compare-runs-section-header")
    headers.first.wait_for()
    return [re.split(r"\s*\(", " ".join(text.split()))[0] for text in headers.all_inner_texts()]


def test_every_printed_address_opens_the_charts_of_the_run_and_the_loss_comes_first(trained, page, tmp_path):
    folder, uri, printed = trained
    addresses = set(re.findall(r"MLflow: (\S+)", printed))
    assert len(re.findall(r"MLflow: (\S+)", printed)) >= 2, "the training run and the samples each print one"
    assert all(address.startswith(uri) and run_of(folder / "runs/demo") in address for address in addresses)
    for address in addresses:
        page.goto(address, wait_until="commit")
        page.get_by_role("heading", name="demo").first.wait_for()
        close_panel(page)
        assert page.get_by_role("tab", name="Model metrics").get_attribute("aria-selected") == "true"
        assert page.get_by_role("link", name="Runs").count(), "the mode for models, not for traces of agents"
        assert not page.get_by_text("Evaluation runs").count()
        page.get_by_text("demo (loss/mean)").first.wait_for()
        shown = sections(page)
        assert shown == ["loss", "previews", "samples", "speed", "training", "Model metrics"], (
            "the last is MLflow's own, and empty"
        )
        assert page.screenshot(path=str(tmp_path / "charts.png"))


def test_the_overview_tells_who_trained_what_with_which_command_and_shows_the_previews(trained, page, tmp_path):
    folder, uri, _ = trained
    page.goto(run_page(uri, "1", run_of(folder / "runs/demo"), ""), wait_until="commit")
    page.get_by_role("heading", name="demo").first.wait_for()
    close_panel(page)
    page.get_by_text("Show more").first.click()
    commands = ("slurm_train.py", "fvdm generate --checkpoint runs/demo")
    for text in ("trained on", "Finished", f"at step {STEPS}", *commands):
        page.get_by_text(text).first.wait_for()
    page.wait_for_function(
        """() => {
            const shown = [...document.querySelectorAll('img')].filter(image => image.src.includes('images/previews~'));
            return shown.length == 4 && shown.every(image => image.naturalWidth > 0);
        }"""
    )
    assert page.screenshot(path=str(tmp_path / "overview.png"))
    with page.expect_popup() as tab:
        page.get_by_role("link", name=f"previews/step-{STEPS:08d}/generate.mp4").click()
    plays(tab.value)


def plays(page):
    page.locator("video").wait_for()
    page.wait_for_function("document.querySelector('video').readyState >= 3")
    page.evaluate("() => { const v = document.querySelector('video'); v.muted = true; return v.play(); }")
    page.wait_for_function("document.querySelector('video').currentTime > 0.5")
    state = page.evaluate("(v => [v.videoWidth, v.videoHeight, v.error])(document.querySelector('video'))")
    assert (state[0] % SIDE, state[1] % SIDE, state[2]) == (0, 0, None)


def test_the_previews_show_at_every_step_in_a_card_of_their_own(trained, page):
    folder, uri, _ = trained
    page.goto(run_page(uri, "1", run_of(folder / "runs/demo")), wait_until="commit")
    page.get_by_role("heading", name="demo").first.wait_for()
    close_panel(page)
    page.get_by_text("demo (loss/mean)").first.wait_for()
    page.get_by_placeholder("Search metric charts").fill("nothing")  # The search hides curves, and leaves the images.
    page.get_by_text("demo (loss/mean)").first.wait_for(state="detached")
    for step in (2, STEPS):
        field = page.get_by_role("spinbutton").first
        field.fill(str(step))
        field.blur()
        page.wait_for_function(
            f"""() => {{
                const shown = document.querySelector('img.rc-image-img');
                return shown && shown.naturalWidth > 0 && decodeURIComponent(shown.src).includes('step+{step}+');
            }}"""
        )
    # MLflow writes all parameters above every image: a card must be scrolled, one as large as the page shows both.
    page.locator("[data-component-id=fullscreen_button_chartcard]").first.click()
    page.wait_for_function("document.querySelector('[role=dialog] img.rc-image-img')?.clientWidth > 0")
    box = page.get_by_role("dialog").locator("img.rc-image-img").bounding_box()
    assert box
    assert min(box["width"], box["height"]) > 100
    assert box["y"] + box["height"] < 1300


def test_fvdm_ui_shows_the_newest_experiment_on_loopback_and_ends_with_its_server(trained, page):
    folder, _, _ = trained
    port = free_port()
    words = [sys.executable, "-m", "fvdm", "ui", "--uri", f"sqlite:///{folder}/server.db", "--port", str(port)]
    desktopless = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    process = subprocess.Popen(words, cwd=folder, env=desktopless, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"
        page.goto(address, wait_until="commit")
        page.get_by_role("heading", name="Runs").first.wait_for()
        page.get_by_role("link", name="demo").first.wait_for()
        page.get_by_text("video diffusion transformers with one timestep per frame").first.wait_for()
        taken = subprocess.run(words, cwd=folder, env=desktopless, capture_output=True, text=True)
        assert (taken.returncode, taken.stderr.count("\n")) == (2, 1)
        assert f"port {port} is taken" in taken.stderr
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    assert process.returncode == 0
    again = subprocess.Popen(words, cwd=folder, env=desktopless, stdout=subprocess.PIPE, text=True)
    assert again.stdout.readline().strip() == address, "the port is free again"
    again.terminate()
    assert again.wait(timeout=60) == 143
