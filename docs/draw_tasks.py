"""Draws docs/tasks.png, the matrix of every task, from the code itself: `python docs/draw_tasks.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from fvdm.diffusion.tasks import TASKS, TaskSpec
from fvdm.diffusion.timesteps import evenly_spaced

WINDOW, STEPS = 8, 6
LONG = 16  # frames of the tasks that slide
SHOWN = {
    "generate": {},
    "image-to-video": {},
    "interpolate": {},
    "any-frame": {"frames": (0, 3, -2)},
    "infill": {"frames": (3, 4, 5)},
    "transition": {},
    "progressive": {"slope": 0.15},
    "edit": {"frames": (2, 3, 4, 5), "strength": 0.6},
    "long": {"length": LONG},
    "next-frame": {"length": 10},
    "pyramid": {"delay": 2},
    "stream": {"length": LONG},
}


def main() -> None:
    """Draw every task: a column is a frame, a row a step; black is clean (t = 0), white is noise (t = T)."""
    figure, axes = pyplot.subplots(3, 4, figsize=(11, 8.5))
    for axis, (task, told) in zip(axes.flat, SHOWN.items(), strict=True):
        want = TaskSpec(evenly_spaced(STEPS), WINDOW, **{"length": WINDOW, "given": WINDOW} | told)
        plan = TASKS[task].plan(want)
        axis.imshow(plan.schedule, cmap="gray", vmin=0, vmax=1000, aspect="auto", interpolation="nearest")
        for frame in plan.held:
            axis.axvspan(frame - 0.5, frame + 0.5, color="tab:blue", alpha=0.55, linewidth=0)
        axis.set_title(task, fontsize=10)
        axis.set_xticks(range(0, plan.schedule.shape[1], 4))
        axis.set_yticks([0, len(plan.schedule) - 1])
    figure.supxlabel("frame", fontsize=9)
    figure.supylabel("step", fontsize=9)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "tasks.png", dpi=80)


if __name__ == "__main__":
    main()
