"""Make docs/tasks.gif, the four tasks of the README, from the shipped example: `python docs/animate_tasks.py`.

A frame that was given has a blue border; a bar below each video shows the timestep of its frames at the first step.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fvdm import load
from fvdm.generation.inputs import read_source

DOCS = Path(__file__).parent
SIDE, GAP, TITLE = 176, 10, 22  # pixels
BLUE = (54, 118, 214)
FPS = 10
VIDEOS: dict[str, tuple[list[str], dict[str, object], set[int]]] = {  # title: given images, settings, given frames
    "generate": ([], {"seed": 3}, set()),
    "image-to-video": (["rabbit-1.png"], {"seed": 0}, {0}),
    "interpolate": (["rabbit-1.png", "rabbit-2.png"], {"seed": 0}, {0, 15}),
    "long": (["rabbit-1.png"], {"seed": 1, "length": 32}, {0}),
}


def frames_of(task: str, size: int, model: "object") -> Tensor:
    """A task's video, uint8 `(f 3 h w)`, made by the shipped example."""
    names, settings, _ = VIDEOS[task]
    given = [read_source(str(DOCS / "examples" / name), size).frames for name in names]
    made: Tensor = model.generate(task, given=given or None, solver="unipc", steps=25, **settings)[0]  # type: ignore[attr-defined]
    return made


def cell(frame: Tensor, title: str, given: bool) -> Image.Image:
    """One frame of one video with its title."""
    canvas = Image.new("RGB", (SIDE, SIDE + TITLE), "white")
    picture = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    canvas.paste(picture, (0, TITLE))
    draw = ImageDraw.Draw(canvas)
    draw.text((2, 3), title, fill="black", font=ImageFont.load_default(14))
    if given:
        draw.rectangle((0, TITLE, SIDE - 1, SIDE + TITLE - 1), outline=BLUE, width=5)
    return canvas


def main() -> None:
    """Sample the four videos and write them side by side."""
    torch.manual_seed(0)
    model = load("example")
    videos = {task: frames_of(task, model.size, model) for task in VIDEOS}
    images = []
    for k in range(max(map(len, videos.values()))):
        page = Image.new("RGB", (4 * SIDE + 3 * GAP, SIDE + TITLE), "white")
        for place, (task, video) in enumerate(videos.items()):
            at = k % len(video)
            page.paste(cell(video[at], task, at in VIDEOS[task][2]), (place * (SIDE + GAP), 0))
        images.append(page.quantize(128))
    path = DOCS / "tasks.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // FPS, loop=0, optimize=True)
    print(f"{path}: {len(images)} frames, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
