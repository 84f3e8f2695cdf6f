"""MLflow's view of a run.

The id of the MLflow run is in mlflow.json of the run folder, so that a run which goes on does so in the same MLflow
run. A metric's history there has every value that was logged: steps that a resumed run repeats are in it twice. MLflow
never changes a parameter, so the recipe there is that of the first start.

Left out: samples and files as artifacts.
"""

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from gspo_megatron.config import TrackingConfig
from gspo_megatron.metrics.sink import MLFLOW_FILE, Row
from gspo_megatron.recipe.load import flat
from gspo_megatron.utils import plain_json
from gspo_megatron.utils.small_files import replace

LOCAL = "mlflow"  # the folder of a run that has no other place for it
PARAMS_A_CALL = 100  # MLflow takes no more
NOT_IN_A_NAME = re.compile(r"[^/\w.\- :]")


class MlflowSink:
    """Logs to an MLflow run, to that of mlflow.json where the server or database has it.

    Args:
        recipe: the parameters of a new MLflow run.
        earlier: the rows that it gets first.
    """

    def __init__(self, folder: Path, tracking: TrackingConfig, recipe: dict[str, Any], earlier: list[Row]):
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
        is_local = tracking.mlflow_uri is None and not mlflow.is_tracking_uri_set()
        self._client = MlflowClient(_database(folder) if is_local else tracking.mlflow_uri)
        known = self._known(folder / MLFLOW_FILE)
        if known is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
            return
        artifacts = (folder / LOCAL / "artifacts").resolve().as_uri() if is_local else None
        self._run = self._client.create_run(
            self._experiment(tracking.project, artifacts), run_name=folder.name
        ).info.run_id
        replace(folder / MLFLOW_FILE, json.dumps({"run_id": self._run}).encode())
        self._log_recipe(recipe)
        for row in earlier:
            self.log(*row)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Log the numbers in one call."""
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._run, metrics=[Metric(key, value, now, step) for key, value in numbers.items()])

    def close(self, patience: float) -> None:
        """Mark the MLflow run as finished; a resumed run makes it a running one again."""
        self._client.set_terminated(self._run)

    def _known(self, path: Path) -> str | None:
        """Return the id that this run has here; None where it has none, or one of another server or database."""
        try:
            run = str(plain_json.read_object(path)["run_id"])
            self._client.get_run(run)
        except (OSError, ValueError, KeyError):
            return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run

    def _experiment(self, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:
                found = self._client.get_experiment_by_name(name)  # another run has made it in this moment
                if found is None:
                    raise
        return found.experiment_id

    def _log_recipe(self, recipe: dict[str, Any]) -> None:
        params = [Param(NOT_IN_A_NAME.sub("_", name), str(value)) for name, value in flat(recipe).items()]
        for first in range(0, len(params), PARAMS_A_CALL):
            self._client.log_batch(self._run, params=params[first : first + PARAMS_A_CALL])


def _database(folder: Path) -> str:
    """Return the URI of a database in the run folder. (MLflow gives up its plain files, which cannot have the metrics
    reward/TASK and reward/TASK/FUNCTION at once.)"""
    place = (folder / LOCAL).resolve()
    place.mkdir(exist_ok=True)
    return f"sqlite:///{place}/mlflow.db"
