"""MLflow; the only file that imports mlflow."""

import os
import time
from pathlib import Path
from typing import Any

from PIL import Image

from fcmae.config import without_arguments
from fcmae.files import replacing
from fcmae.imports import needed
from fcmae.opening import read_regular
from fcmae.status import read_config

ID_FILE = "mlflow_id"
"""In a run directory: the id of its MLflow run."""
PARAMS = 100
"""In a request."""
LONGEST = 500
"""Characters of a parameter that every server takes."""


class MLflow:
    """An MLflow run that continues when its run directory does: ``_target_`` of an entry of ``logger.sinks``.

    Args:
        uri: the tracking server; None = MLFLOW_TRACKING_URI, else a folder of MLflow's.
        experiment: its name, created if it is missing.
        name: the run's name; None = the run directory's.
        artifact: upload encoder.safetensors at the end of pretraining.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        uri: str | None = None,
        experiment: str = "fcmae",
        name: str | None = None,
        artifact: bool = False,
    ) -> None:
        with needed("logger.sinks: MLflow is not installed: pip install 'fcmae[mlflow]'"):
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        self._client, self._metric, self._uploads = MlflowClient(uri), Metric, artifact
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        file = run_dir / ID_FILE
        if os.path.lexists(file):
            self._id = read_regular(file, 64, links=False).decode()
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, run_name=name or run_dir.resolve().name).info.run_id
        with replacing(file) as new:
            new.write(self._id.encode())
        config = read_config(run_dir / "config.yaml")
        params = [Param(key, value[:LONGEST]) for key, value in _flat(without_arguments(config))]
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(self._id, params=params[start : start + PARAMS])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in metrics.items()])

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._client.log_image(self._id, image, artifact_file=f"{name}/{step:08d}.png")

    def artifact(self, file: Path) -> None:
        """Uploads what a run that is done ends with."""
        if self._uploads:
            self._client.log_artifact(self._id, str(file))

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, str(value)))
    return pairs
