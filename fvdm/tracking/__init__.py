"""MLflow: a journal on disk, the thread that sends it, and what is logged of a model."""
