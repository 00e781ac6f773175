"""`fvdm play --checkpoint example`: a page in the browser to sample with timestep schedules.

Choose a task or draw a schedule by hand, give images or a video, and watch the clip become clear step by step.
"""

import os
from collections.abc import Sequence

from fvdm import config as settings
from fvdm.playground.config import PlayConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        config = settings.parse(PlayConfig, argv, __doc__)
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        try:
            from fvdm.playground.app import serve
        except ModuleNotFoundError as error:
            raise ValueError(f"the playground needs the package {error.name}; type: pip install 'fvdm[play]'") from None
        from fvdm import load

        model = load(
            config.checkpoint,
            config.weights,
            config.vae,
            config.device,
            config.precision,
            text_encoder=config.text_encoder,
            base=config.base,
        )
        page = serve(model, config, block=False)
        print(f"the playground is at {page.local_url}  (Ctrl-C ends it)", flush=True)
        page.block_thread()
    except (ValueError, OSError) as error:
        settings.fail(error)
