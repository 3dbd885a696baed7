"""Metrics of running jobs for Prometheus: Ray's metrics agent exports them with the prefix `ray_` on each node.

MLflow has the history of one run; these are for dashboards and alerts over all jobs of a cluster (infra/monitoring).
"""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

TRAINING = {
    "step": "Steps of the stage that are finished",
    "steps": "Steps of the stage in total",
    "loss": "Training loss of the last step",
    "validation_loss": "Validation loss",
    "grad_norm": "Gradient norm before clipping",
    "samples_per_second": "Samples per second over all workers",
    "step_seconds": "Seconds of the last step",
    "data_wait_seconds": "Seconds in which the last step waited for data",
    "mfu": "Model FLOP utilization, 0 to 1; only on GPUs whose peak is known",
    "checkpoint_seconds": "Seconds in which the last checkpoint blocked the training",
    "memory_gb": "Peak memory of the first worker in GB",
}
"""Exported metrics of a training, `tcan_train_NAME`, with their descriptions."""


class TrainingGauges:
    """The last values of a stage's metrics.

    Args:
        run: name of the run folder.
        mlflow_run_id: id of the stage's MLflow run.
        steps: steps of the stage in total.
    """

    def __init__(self, run: str, stage: int, mlflow_run_id: str, steps: int):
        self._tags = {"run": run, "stage": str(stage), "mlflow_run_id": mlflow_run_id}
        self._gauges = {
            name: Gauge(f"tcan_train_{name}", description, tuple(self._tags))
            for name, description in TRAINING.items()
        }
        self._set("steps", steps)
        self._set("step", 0)  # so that a stage that stalls before its first step is visible

    def set(self, metrics: Mapping[str, float], step: int) -> None:
        """Set the exported ones of the metrics of a step."""
        for name in metrics.keys() & self._gauges.keys():
            self._set(name, metrics[name])
        self._set("step", step)

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(value, self._tags)


class PreprocessingCounters:
    """Counts of the current preprocessing job.

    Args:
        dataset: name of the dataset folder.
        videos: number of videos to process.
    """

    def __init__(self, dataset: str, videos: int):
        self._tags = {"dataset": dataset}
        keys = tuple(self._tags)
        self._clips = Counter("tcan_preprocess_clips", "Encoded clips", keys)
        self._frames = Counter("tcan_preprocess_frames", "Encoded frames", keys)
        self._videos = Counter("tcan_preprocess_videos", "Finished videos", (*keys, "outcome"))
        Gauge("tcan_preprocess_videos_to_process", "Videos of the job", keys).set(videos, self._tags)

    def clip(self, frames: int) -> None:
        self._clips.inc(1, self._tags)
        self._frames.inc(frames, self._tags)

    def video(self, outcome: str) -> None:
        """outcome: "kept", or the kind of reason for which the video was rejected."""
        self._videos.inc(1, self._tags | {"outcome": outcome})
