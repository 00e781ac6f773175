"""The playground as a person uses it: drawing, dropping, watching, comparing, cancelling, waiting, on two widths."""

import base64
import re
import shlex
from pathlib import Path

import pytest

from fvdm import config as settings
from fvdm import load
from fvdm.generation.config import GenerateCommand, GenerationConfig, read_schedule
from fvdm.generation.inputs import read_frames
from fvdm.media.writing import write_mp4
from fvdm.playground.config import PlayConfig
from tests.browser import BROWSER, MISSING, SECONDS, open_browser

pytest.importorskip("gradio", reason="the extra `play` is not installed")
pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason=MISSING)]
EXAMPLES = [Path(__file__).parents[2] / "docs" / "examples" / f"rabbit-{number}.png" for number in (1, 2)]
WIDE, NARROW = {"width": 1400, "height": 1000}, {"width": 420, "height": 900}
# Notes every state of the status and every image of the clip while the page changes.
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const image = document.querySelector('#clip-a img');
        window.seen.push([document.querySelector('#status').innerText.trim(), image ? image.src : '']);
    }).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
}"""
DROP = """files => {
    const transfer = new DataTransfer();
    for (const [name, content] of files) {
        const bytes = Uint8Array.from(atob(content), character => character.charCodeAt(0));
        transfer.items.add(new File([bytes], name, {type: 'image/png'}));
    }
    return transfer;
}"""


@pytest.fixture(scope="module")
def model():
    return load("example")


@pytest.fixture(scope="module")
def visit(model):
    """Opens the playground in a profile of its own: one server and one browser for all tests."""
    from fvdm.playground.app import serve

    server = serve(model, PlayConfig(port=0, max_steps=1000), block=False)
    with open_browser() as browser:

        def open_page(viewport=WIDE):
            page = browser.new_context(viewport=viewport).new_page()
            page.set_default_timeout(60 * SECONDS)
            page.wrong = []
            page.on("console", lambda message: message.type == "error" and page.wrong.append(message.text))
            page.on("request", lambda request: server.local_url in request.url or page.wrong.append(request.url[:100]))
            page.asked = set()
            page.on("request", lambda request: "/gradio_api/run/" in request.url and page.asked.add(request))
            for event in ("requestfinished", "requestfailed"):
                page.on(event, lambda request: page.asked.discard(request))
            page.goto(server.local_url)
            shows(page, "#schedule-a")
            return page

        yield open_page
    server.close()


def shows(page, place, other=""):
    """Wait until an image is there, and return its address; with `other`, until it is another image."""
    page.wait_for_function(
        "([place, other]) => { const image = document.querySelector(place + ' img');"
        " return image && image.naturalWidth > 0 && image.src != other; }",
        arg=[place, other],
    )
    settle(page)
    return page.locator(f"{place} img").get_attribute("src")


def settle(page):
    """Wait until the page has shown all that it has asked the server for."""
    page.evaluate("() => new Promise(requestAnimationFrame)")
    while page.asked:
        page.wait_for_function("() => new Promise(done => requestAnimationFrame(() => done(true)))")


def set_steps(page, steps):
    before = shows(page, "#schedule-a")
    page.locator("#steps").get_by_role("spinbutton").fill(str(steps))
    page.locator("#steps").get_by_role("spinbutton").press("Tab")
    shows(page, "#schedule-a", before)


def choose_task(page, name, task):
    before = shows(page, f"#schedule-{name}")
    page.locator(f"#task-{name} input").click()
    page.get_by_role("option", name=task, exact=True).click()
    shows(page, f"#schedule-{name}", before)


def write_cell(page, row, column, value):
    before = shows(page, "#schedule-a")
    cell = page.get_by_test_id(f"cell-{row}-{column}").first
    cell.dblclick()
    cell.get_by_role("textbox").fill(value)
    cell.get_by_role("textbox").press("Enter")
    shows(page, "#schedule-a", before)


def fits(page):
    """No text or image is wider than the page, and every image has loaded."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.querySelectorAll('img')].every(image => image.naturalWidth > 0)")


def command_of(page, name):
    """The settings of the command that the page shows, read by the real parser."""
    words = shlex.split(" ".join(page.locator(f"#command-{name} .cm-content").inner_text().split()))
    assert words[:2] == ["fvdm", "generate"]
    return settings.parse(GenerateCommand, words[2:])


def made_by(model, config, folder):
    """The bytes of the mp4 file that a command writes in `folder`."""
    chosen = {name: getattr(config, name) for name in GenerationConfig.__dataclass_fields__ if name != "task"}
    chosen["schedule"] = str(folder / config.schedule) if config.schedule else ""
    given = [read_frames(str(folder / name), model.size) for name in config.paths]
    video = model.generate(config.task, given=given or None, **chosen)[0]
    write_mp4(video, folder / "same.mp4")
    return (folder / "same.mp4").read_bytes()


def download(page, place, folder):
    with page.expect_download() as found:
        page.locator(place).locator("a[download], button[aria-label='Download']").first.click()
    path = folder / found.value.suggested_filename
    found.value.save_as(path)
    return path


def test_a_schedule_drawn_by_hand_with_two_dropped_images_is_sampled_step_by_step(visit, model, tmp_path):
    page = visit()
    set_steps(page, 30)
    page.get_by_text("Draw it by hand").first.click()
    for row in (0, 15):
        before = shows(page, "#schedule-a")
        page.get_by_test_id(f"cell-{row}-1").first.get_by_role("checkbox").check()
        shows(page, "#schedule-a", before)  # Given frames are blue.
        write_cell(page, row, 4, "0")
    write_cell(page, 7, 2, "10")  # A frame that starts later.
    assert page.locator("#task-a input").input_value() == "custom"
    page.get_by_text("custom takes given frames: drop images").wait_for()
    files = [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in EXAMPLES]
    page.locator("#given button").first.dispatch_event("drop", {"dataTransfer": page.evaluate_handle(DROP, files)})
    page.get_by_text("custom takes given frames").wait_for(state="detached")

    page.evaluate(WATCH)
    page.locator("#generate").click()
    page.get_by_text("Done.").wait_for()
    page.locator("#video-a video").wait_for()
    seen = page.evaluate("window.seen")
    steps = [int(found[1]) for status, _ in seen if (found := re.fullmatch(r"A: step (\d+) of 30", status))]
    assert steps == sorted(steps), "the steps are counted up"
    assert len(set(steps)) > 1
    assert len({image for _, image in seen if image}) > 1, "the clip changes while it is sampled"

    video = download(page, "#video-a", tmp_path)
    schedule = read_schedule(str(download(page, "#file-a", tmp_path)))
    assert schedule[:, [0, 15]].abs().max() == 0
    assert schedule[10, 7] == schedule[0, 7] > schedule[10, 6]
    for path in EXAMPLES:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = command_of(page, "a")
    assert (config.task, config.frames, config.paths) == ("custom", "0,15", [path.name for path in EXAMPLES])
    assert video.read_bytes() == made_by(model, config, tmp_path)
    fits(page)
    page.screenshot(path=str(tmp_path / "drawn.png"), full_page=True)
    assert not page.wrong


def test_two_schedules_are_compared_side_by_side_from_one_seed_and_below_each_other_on_a_phone(visit, model, tmp_path):
    page = visit()
    page.locator("#compare").get_by_role("checkbox").check()
    set_steps(page, 4)
    choose_task(page, "b", "long")
    page.get_by_label("length (0: default)").nth(1).fill("24")
    page.locator("#generate").click()
    page.get_by_text("Done.").wait_for()
    for name in "ab":
        page.locator(f"#video-{name} video").wait_for()
        config = command_of(page, name)
        assert (config.task, config.seed) == ({"a": "generate", "b": "long"}[name], 0)
        assert download(page, f"#video-{name}", tmp_path).read_bytes() == made_by(model, config, tmp_path)
    a, b = (page.locator(f"#video-{name}").bounding_box() for name in "ab")
    assert a["x"] + a["width"] <= b["x"]
    fits(page)
    page.screenshot(path=str(tmp_path / "1400.png"), full_page=True)
    page.set_viewport_size(NARROW)
    page.wait_for_function("document.querySelector('#generate').getBoundingClientRect().right < 420")
    a, b = (page.locator(f"#video-{name}").bounding_box() for name in "ab")
    assert a["y"] + a["height"] <= b["y"]
    fits(page)
    page.screenshot(path=str(tmp_path / "420.png"), full_page=True)
    assert not page.wrong


def wait_in_the_queue(page):
    """Ask for a clip while another session has the model."""
    page.locator("#generate").click()
    page.get_by_text("Waiting: 1 request before yours.").wait_for()


def test_a_second_session_waits_in_the_queue_until_the_first_is_cancelled(visit):
    first, second = visit(), visit(NARROW)
    set_steps(first, 1000)
    set_steps(second, 2)
    first.locator("#generate").click()
    first.get_by_text("of 1000").wait_for()
    for _ in range(2):  # What waits can be cancelled, and the page can be used again.
        wait_in_the_queue(second)
        second.locator("#cancel").click()
        second.get_by_text("Cancelled.").wait_for()
    wait_in_the_queue(second)
    first.locator("#cancel").click()
    first.get_by_text("Cancelled.").wait_for()
    second.get_by_text("Done.").wait_for()
    first.locator("#generate").click()
    first.get_by_text("of 1000").wait_for()
    wait_in_the_queue(second)
    first.close()  # A closed tab frees the model.
    second.get_by_text("Done.").wait_for()
    assert not first.wrong + second.wrong


def test_a_mistake_is_a_sentence_on_the_page_and_nothing_is_sampled(visit):
    page = visit()
    choose_task(page, "a", "image-to-video")
    page.locator("#generate").click()
    page.get_by_test_id("toast-text").get_by_text("image-to-video takes a given frame: drop an image").wait_for()
    assert not page.locator("#video-a video").count()
