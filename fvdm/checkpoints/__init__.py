"""Checkpoints: save, find, read and reshard; the writer that does it in the background."""
