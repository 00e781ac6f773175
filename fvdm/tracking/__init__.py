"""MLflow: a journal on disk, the thread that sends it, the pages that show it, and what is logged of a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "closing": ["close_run"],
        "pages": ["run_page", "where_to_look"],
        "tracker": ["Tracker", "run_of"],
    },
)
