"""The file that models registered by version 0.1 carry beside their weights, unchanged but for this line.

So nothing is pickled: `mlflow.pyfunc.load_model("models:/demo/1")` needs fvdm installed, and reads safetensors.
"""

from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from fvdm.pipeline import Trained, load
from fvdm.registry import answer


class Clips(PythonModel):
    """One clip for each row of a table; `fvdm.registry.signature` has its columns."""

    trained: Trained

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights."""
        self.trained = load(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Clips, uint8 `(n f 3 h w)`, of a table of n rows; see `fvdm.registry.answer`."""
        rows = [{k: v for k, v in row.items() if not pd.isna(v)} for row in model_input.to_dict("records")]
        return answer(self.trained, rows)


set_model(Clips())
