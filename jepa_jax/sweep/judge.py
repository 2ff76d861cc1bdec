"""What a cell is worth: the ridge probe on validation images, RankMe where there are no labels."""

import dataclasses
from typing import Any

import jax

from jepa_jax.evaluation import evaluate_representation
from jepa_jax.loop import online_probe
from jepa_jax.plan import Plan, clean_images, initial_state
from jepa_jax.report.sweep_table import ONLINE, RANK_ME, RIDGE
from jepa_jax.representation import reestimate_batch_stats
from jepa_jax.train_step import TrainState


def score_name(plan: Plan) -> str:
    """What cells are ranked by."""
    return RIDGE if plan.has_labels else RANK_ME


def encoder_variables(plan: Plan, state: TrainState) -> Any:
    """The variables that are judged, BatchNorm's statistics those of clean images."""
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    images = clean_images(plan.dataset.train_images)
    return jax.block_until_ready(reestimate_batch_stats(plan.encoder, trained, images))


def score(plan: Plan, variables: Any, *, with_test: bool = False) -> dict[str, float]:
    """{RIDGE}, or {RANK_ME} without labels; with 'test_ridge_probe_acc' where asked for."""
    dataset = plan.dataset
    if not with_test:
        dataset = dataclasses.replace(dataset, test_images=None, test_labels=None)
    found = evaluate_representation(
        plan.encoder.apply,
        variables,
        dataset,
        num_val=plan.config.data.num_val,
        augment_fn=plan.views_fn,
        parts=("ridge",) if plan.has_labels else ("health",),
    )
    if not plan.has_labels:
        return {RANK_ME: found["health"]["encoder"]["h"]["rank_me"]}
    scores = found["probes"]["ridge"]["encoder"]
    result = {RIDGE: scores["val"]["acc"]}
    if scores["test"]:
        result["test_ridge_probe_acc"] = scores["test"]["acc"]
    return result


def judge(plan: Plan, state: TrainState, variables: Any) -> dict[str, float]:
    """Every figure of a finished cell; nothing of it is of test images."""
    online = {}
    if plan.has_labels:
        online = {ONLINE: online_probe(plan, state, with_test=False)["val/online_probe_acc"]}
    return {**score(plan, variables), **online}


def untrained_score(plan: Plan) -> dict[str, float]:
    """The floor: the same network before its first step, judged alike."""
    return score(plan, encoder_variables(plan, initial_state(plan)))
