"""A real Chromium for the tests of pages."""

import contextlib
import shutil

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no Chromium: apt-get install -y --no-install-recommends chromium"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]  # Root may have no sandbox.
SECONDS = 1000  # milliseconds, as playwright counts


@contextlib.contextmanager
def open_browser():
    """A Chromium of its own, with a profile that has seen no page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield browser
        browser.close()
