"""Latent shards: their format, where they lie, the order of samples, and the loader."""
