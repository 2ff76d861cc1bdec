"""What frozen features tell of the labels: arrays in, arrays and numbers out."""

from jepa_jax.probes.few_shot import few_shot_draws, few_shot_probe
from jepa_jax.probes.knn import knn_votes
from jepa_jax.probes.logistic import LOGISTIC_LAMBDAS, logistic_probe
from jepa_jax.probes.ridge import RIDGE_LAMBDAS, ridge_probe
from jepa_jax.probes.scores import accuracy, confusion_matrix, wilson_interval

__all__ = [
    "LOGISTIC_LAMBDAS",
    "RIDGE_LAMBDAS",
    "accuracy",
    "confusion_matrix",
    "few_shot_draws",
    "few_shot_probe",
    "knn_votes",
    "logistic_probe",
    "ridge_probe",
    "wilson_interval",
]
