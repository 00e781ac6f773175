"""The code with which MLflow predicts. It copies this file beside the weights and executes it there.

So nothing is pickled: `mlflow.pyfunc.load_model("models:/demo/1")` needs fvdm installed, and reads safetensors.
"""

from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from fvdm.generation.pipeline import Trained, load
from fvdm.serving.registry import predict


class Clips(PythonModel):
    """One clip for each row of a table; `fvdm.serving.registry.signature` has its columns."""

    trained: Trained

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights."""
        self.trained = load(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Clips, uint8 `(n f 3 h w)`, of a table of n rows; see `fvdm.serving.registry.predict`."""
        rows = [{k: v for k, v in row.items() if not pd.isna(v)} for row in model_input.to_dict("records")]
        return predict(self.trained, rows)


set_model(Clips())
