"""The registered model's own code (MLflow's models from code): a bundle behind ``predict``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

# MLflow asks for type hints on `predict` when the class is made, and drops `params` from models
# that have them; it does so under a filter of its own, so only recording keeps it quiet
with warnings.catch_warnings(record=True):

    class RouterModel(PythonModel):
        """Prompts in, win rates and routes out.

        Input: a frame with the column ``prompt``. Params: ``strong_fraction`` in [0, 1] (default
        0.5), or ``threshold`` in [0, 1], which then decides (default -1: not set). Output: the
        columns ``win_rate`` and ``route`` (``strong`` or ``weak``).
        """

        def load_context(self, context: Any) -> None:
            from routellm.bundle import load_bundle

            self.bundle = load_bundle(Path(context.artifacts["bundle"]))

        # no type hints here: MLflow drops `params` from models whose predict is hinted
        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
            import numpy as np
            import pandas as pd

            asked = params or {}
            threshold = asked.get("threshold", -1.0)
            limit = self.bundle.thresholds(
                threshold=None if threshold == -1.0 else threshold,
                strong_fraction=asked.get("strong_fraction", 0.5) if threshold == -1.0 else None,
            )
            prompts = [str(p) for p in model_input["prompt"]]
            rates = self.bundle.router.win_rate(prompts)
            routes = np.where(rates >= limit, "strong", "weak")
            return pd.DataFrame({"win_rate": rates, "route": routes})


set_model(RouterModel())
