"""A user's program: mypy accepts it, in strict mode, and knows the types of what it gets."""

from typing import Any, assert_type

import jax
import numpy as np
import optax

from jepa_jax import (
    Dataset,
    Encoder,
    HParams,
    TrainState,
    evaluate_representation,
    from_arrays,
    knn_votes,
    lars,
    load_encoder,
    rank_me,
    two_views,
    vicreg_loss,
    warmup_cosine,
)

Terms = dict[str, jax.Array]


def apply(params: jax.Array, images: jax.Array) -> jax.Array:
    return images.reshape(len(images), -1) @ params


def step(params: jax.Array, state: optax.OptState, key: jax.Array, images: jax.Array) -> jax.Array:
    x1, x2 = two_views(key, images)
    assert_type(x1, jax.Array)

    def loss_fn(params: jax.Array) -> tuple[jax.Array, Terms]:
        return vicreg_loss(apply(params, x1), apply(params, x2), std_coeff=1.0, cov_coeff=None)

    (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    optimizer = lars(0.3, weight_decay=1e-4)
    updates, state = optimizer.update(grads, state, params)
    return jax.numpy.asarray(optax.apply_updates(params, updates))


def own_loss(
    key: jax.Array, z1: jax.Array, z2: jax.Array, hparams: HParams
) -> tuple[jax.Array, Terms]:
    loss, terms = vicreg_loss(z1, z2, sim_coeff=hparams.sim_coeff)
    assert_type(loss, jax.Array)
    assert_type(terms, Terms)
    return loss, terms


def judge(workdir: str, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    encoder, variables = load_encoder(workdir)
    assert_type(encoder, Encoder)
    dataset = from_arrays(images, labels)
    assert_type(dataset, Dataset)
    h: jax.Array = encoder.apply(variables, jax.numpy.asarray(images))
    assert_type(rank_me(h), jax.Array)
    votes, _ = knn_votes((h, labels), h, num_classes=10)
    assert_type(votes, jax.Array)
    return evaluate_representation(encoder.apply, variables, dataset, num_val=100)


def steps_of(state: TrainState) -> float:
    rate = warmup_cosine(state.step, peak=0.3, num_steps=100, warmup_steps=10)
    return float(rate)
