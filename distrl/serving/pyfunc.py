"""The model that MLflow loads and serves. MLflow runs this file; nothing imports it.

In: a column `history`, each a list of the caller's own item ids, oldest first. Parameters: `k`, how
many items (10), and `mask_seen`, whether to leave out what the history holds (false). Out: `items`
and `scores`, each a list, best first, and `num_unknown`, how many ids of the history the model does
not know. Those it passes over; after a history without any known id come the most frequent items of
the training data, each with the score 0.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from distrl.serving.artifact import read_artifact
from distrl.serving.recommender import Recommender

ARTIFACT = "recommender"
"""The name that `distrl.tracking.model` gives the model's folder."""


class TopItems(PythonModel):
    """The top items after each history."""

    def load_context(self, context: PythonModelContext) -> None:
        """Reads the model's folder."""
        artifact = read_artifact(Path(context.artifacts[ARTIFACT]))
        self._item_type = artifact.items.type
        self._recommender = Recommender(artifact)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  # declared to return None
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """One row of recommendations a row of `model_input`; see the top of this file."""
        settings = {"k": 10, "mask_seen": False} | (params or {})
        rows = [list(history) for history in model_input["history"]]
        answer = self._recommender.recommend(
            pa.array(rows, type=pa.list_(self._item_type)),
            int(settings["k"]),
            mask_seen=bool(settings["mask_seen"]),
        )
        return pd.DataFrame(
            {
                "items": answer.items.to_pylist(),
                "scores": answer.scores.to_pylist(),
                "num_unknown": answer.num_unknown,
            }
        )


set_model(TopItems())
