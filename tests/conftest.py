import os

os.environ.setdefault("MLFLOW_ENABLE_TELEMETRY", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # The workers share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
