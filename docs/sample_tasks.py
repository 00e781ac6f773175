"""Make docs/tasks_samples.png, a row of frames per task, from the shipped example: `python docs/sample_tasks.py`.

A frame that was given has a blue border.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_prep.demo_clips import VIDEOS, find, read
from fvdm import load
from fvdm.generation.inputs import as_frames
from fvdm.generation.pipeline import Trained

DOCS = Path(__file__).parent
SIDE, TITLE, COLUMNS = 64, 112, 12  # pixels, pixels, frames of a row
BLUE = (54, 118, 214)
CLIP = slice(96, 112)  # frames of a source: the clip that most tasks are given
BEFORE = slice(64, 68)  # what a transition begins with


def rows(rabbit: Tensor, man: Tensor) -> list[tuple[str, list[Tensor], dict[str, object], set[int]]]:
    """Task, given clips `(f 3 h w)`, settings, and the indices of the given frames in the video.

    Args:
        rabbit: frames of the first source, `(f 3 h w)`.
        man: of the second.
    """
    clip, still = man[CLIP], rabbit[CLIP][:1]
    noisy = {"given_noise": "100"}
    return [
        ("generate", [], {"seed": 3}, set()),
        ("image-to-video", [still], {}, {0}),
        ("interpolate", [clip[:1], clip[-1:]], {}, {0, 15}),
        ("any-frame", [clip], {"frames": "0,5,10,-1"}, {0, 5, 10, 15}),
        ("infill", [clip], {"frames": "5:11"}, {*range(5), *range(11, 16)}),
        ("transition", [rabbit[BEFORE], rabbit[CLIP][-4:]], {"context": 4}, {*range(4), *range(12, 16)}),
        ("progressive", [still], {}, set()),
        ("edit", [clip], {"strength": 0.6}, set()),
        ("long", [clip], {"length": 32, **noisy}, set(range(8))),
        ("next-frame", [clip], {"length": 24, **noisy}, set(range(8))),
        ("pyramid", [still], {"delay": 4}, {0}),
        ("stream", [clip], {"length": 32, **noisy}, set(range(8))),
    ]


def row(model: Trained, task: str, given: list[Tensor], settings: dict[str, object], held: set[int]) -> Image.Image:
    """The name of a task and frames spread over its video, the first and the last among them."""
    (video,) = model.generate(task, given=given or None, solver="unipc", steps=25, **settings)
    canvas = Image.new("RGB", (TITLE + COLUMNS * SIDE, SIDE), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((2, SIDE // 2 - 9), task, fill="black", font=ImageFont.load_default(13))
    for column in range(COLUMNS):
        index = round(column * (len(video) - 1) / (COLUMNS - 1))
        left = TITLE + column * SIDE
        canvas.paste(Image.fromarray(video[index].permute(1, 2, 0).numpy()).resize((SIDE, SIDE)), (left, 0))
        if index in held:
            draw.rectangle((left, 0, left + SIDE - 1, SIDE - 1), outline=BLUE, width=2)
    return canvas


def main() -> None:
    """Sample every task and write the rows below each other."""
    model = load("example")
    man, rabbit = (as_frames(read(find(name))[0], model.frame_size) for name in VIDEOS)
    images = [row(model, *each) for each in rows(rabbit, man)]
    page = Image.new("RGB", (images[0].width, len(images) * SIDE), "white")
    for number, image in enumerate(images):
        page.paste(image, (0, number * SIDE))
    path = DOCS / "tasks_samples.png"
    page.save(path, optimize=True)
    print(f"{path}: {len(images)} tasks, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
