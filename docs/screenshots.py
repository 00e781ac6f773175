"""Takes docs/mlflow.png and docs/mlflow_run.png of a run: `make demo`, then `python docs/screenshots.py runs/demo`.

Needs playwright and a Chromium: `apt-get install -y --no-install-recommends chromium`.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvdm import config as settings

DOCS = Path(__file__).parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]  # Root may have no sandbox.
IMAGES = "[...document.querySelectorAll('img.rc-image-img')]"
LOADED = "image => image.naturalWidth > 0"
SHOWN = "loss/(mean|one_t|t_per_frame)"


@dataclass(frozen=True)
class ScreenshotsConfig:
    """Which run is shown.

    Attributes:
        run: folder of the run.
        out: folder of the screenshots.
    """

    run: str = "runs/demo"
    out: str = str(DOCS)


def go_to(page: Any, address: str) -> None:
    """Open a page of a run and close the panel of MLflow's assistant."""
    page.goto(address, wait_until="commit")
    page.get_by_role("tab", name="Overview").wait_for()
    panel = page.get_by_role("button", name="Close")
    panel.first.wait_for()
    panel.first.click()
    panel.first.wait_for(state="detached")


def charts(page: Any, address: str, path: Path, last: int) -> None:
    """The curves of the loss, and below them the previews of the step `last`."""
    go_to(page, address)
    page.get_by_placeholder("Search metric charts").fill(SHOWN)
    page.wait_for_function("document.querySelectorAll('svg.main-svg path.js-line').length >= 3")
    section = page.get_by_test_id("experiment-view-compare-runs-section-header")
    section.filter(has_text=re.compile(r"loss\s*\(3\)")).wait_for()  # The search has taken effect.
    for field in page.get_by_role("spinbutton").all()[:3]:  # the first row of previews
        field.fill(str(last))
        field.blur()
    page.wait_for_function(f"(shown => shown.length >= 3 && shown.slice(0, 3).every({LOADED}))({IMAGES})")
    for image in page.locator("img.rc-image-img").all()[:3]:  # below a list of all parameters, in a card that scrolls
        image.scroll_into_view_if_needed()
    page.mouse.move(5, 5)
    page.screenshot(path=str(path))


def overview(page: Any, address: str, path: Path, last: int) -> None:
    """The page that says what the run is, with its description and the previews of the step `last`."""
    go_to(page, address)
    page.get_by_text("Show more").first.click()
    page.get_by_text(f"step {last:,}").first.wait_for()
    page.wait_for_function(f"[...document.querySelectorAll('img')].every({LOADED})")
    page.mouse.move(5, 5)
    page.screenshot(path=str(path))


def main() -> None:
    """Start the pages if the runs are in a database, and take both screenshots."""
    try:
        options = settings.parse(ScreenshotsConfig, None, __doc__, ("run",))
    except ValueError as error:
        settings.fail(error)
    from playwright.sync_api import sync_playwright

    from fvdm.distributed import free_port
    from fvdm.tracking.config import is_server
    from fvdm.tracking.pages import run_page, server_of

    run, out = Path(options.run), Path(options.out)
    place = json.loads((run / "tracking.json").read_text())
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    last = max(event["step"] for event in events if "image" in event)
    port, pages = free_port(), None
    server = server_of(place["uri"])
    if not is_server(place["uri"]):
        command = [sys.executable, "-m", "fvdm", "ui", "--uri", place["uri"], "--port", str(port), "--browser", "false"]
        pages = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert pages.stdout
        server = pages.stdout.readline().partition("/#")[0]
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=BROWSER, args=OPTIONS)
            for take, part, height in ((charts, "model-metrics", 1050), (overview, "", 1200)):
                page = browser.new_page(viewport={"width": 1500, "height": height})
                page.set_default_timeout(120_000)
                name = "mlflow.png" if take is charts else "mlflow_run.png"
                take(page, run_page(server, place["experiment_id"], place["run_id"], part), out / name, last)
                print(out / name)
            browser.close()
    finally:
        if pages:
            pages.terminate()
            pages.wait()


if __name__ == "__main__":
    main()
