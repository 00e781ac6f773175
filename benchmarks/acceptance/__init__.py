"""The parts of benchmarks/gpu_acceptance.py: what must be known of a machine before a long training run on it."""
