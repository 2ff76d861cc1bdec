"""Linear classifier by multinomial logistic regression."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jepa_jax.probes.scores import accuracy
from jepa_jax.probes.standardise import Standardised, raw_units, standardise, standardised_logits

# From what suits images as features (0.1) to where the penalty of 100 good ones no longer counts.
LOGISTIC_LAMBDAS = tuple(10.0**exponent for exponent in range(-6, 1))

_MAX_STEPS = 200
_LINE_SEARCH_STEPS = 20
# Of the preconditioned gradient, as a multiple of the loss: the square of its norm is about twice
# the nats still to be gained, or somewhat less of classes that are easy to tell apart.
_TOLERANCE = 1e-4


class Classifier(NamedTuple):
    """Of standardised features; logits = features @ kernel [F, K] + bias [K]."""

    kernel: jax.Array
    bias: jax.Array


class _Descent(NamedTuple):
    params: Classifier
    state: Any
    step: jax.Array


@functools.partial(jax.jit, static_argnames="num_classes")
def class_prior(fit: Standardised, labels: jax.Array, num_classes: int) -> Classifier:
    """The best classifier that sees no feature: the logits are the classes' log frequencies."""
    counts = jnp.sum(jax.nn.one_hot(labels, num_classes, axis=0, dtype=jnp.float32), axis=1)
    # Half an image for a class that has none, whose best bias would be minus infinity.
    bias = jnp.log(jnp.maximum(counts, 0.5) / fit.count)
    return Classifier(jnp.zeros((len(fit.mean), num_classes), jnp.float32), bias)


@jax.jit
def minimise_cross_entropy(
    fit: Standardised, labels: jax.Array, penalty: jax.typing.ArrayLike, start: Classifier
) -> Classifier:
    """Minimises mean cross-entropy + penalty / 2 * sum(kernel**2) from a start.

    L-BFGS on parameters in the eigenbasis of the features' covariance, each divided by the square
    root of its second derivative where all classes are equally likely: there, in these units, the
    surface is as steep in every direction, and some 10 to 40 steps suffice. The penalty is traced.
    """
    num_classes = len(start.bias)
    targets = jax.nn.one_hot(labels, num_classes, axis=0, dtype=jnp.float32)
    is_labelled = jnp.sum(targets, axis=0)
    variance = (num_classes - 1) / num_classes**2
    unit = Classifier(
        jax.lax.rsqrt(variance * fit.eigenvalues + penalty)[:, None], jnp.float32(variance**-0.5)
    )

    def loss(params: Classifier) -> jax.Array:
        kernel, bias = jax.tree.map(jnp.multiply, params, unit)
        logits = (fit.eigenvectors @ kernel).T @ fit.columns + bias[:, None]
        # By how much each other class leads. The log-sum-exp of all less the label's logit is the
        # same, but near 0 all of it is rounding, and the search finds no way down.
        leads = logits - jnp.sum(targets * logits, axis=0, keepdims=True)
        others = jax.nn.logsumexp(jnp.where(targets > 0, -jnp.inf, leads), axis=0)
        entropy = is_labelled * jax.nn.softplus(others)
        return jnp.sum(entropy) / fit.count + penalty / 2 * jnp.sum(jnp.square(kernel))

    line_search = optax.scale_by_zoom_linesearch(_LINE_SEARCH_STEPS, initial_guess_strategy="one")
    optimizer = optax.lbfgs(linesearch=line_search)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def descend(descent: _Descent) -> _Descent:
        params, state, step = descent
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return _Descent(optax.apply_updates(params, updates), state, step + 1)

    def goes_on(descent: _Descent) -> jax.Array:
        gradient_norm = optax.tree.norm(optax.tree.get(descent.state, "grad"))
        # A search in vain has come to the end of what float32 can tell apart.
        tries = optax.tree.get(descent.state, "info").num_linesearch_steps
        is_steep = gradient_norm > _TOLERANCE * optax.tree.get(descent.state, "value")
        found = is_steep & (tries < _LINE_SEARCH_STEPS)
        return (descent.step == 0) | (found & (descent.step < _MAX_STEPS))

    with jax.default_matmul_precision("highest"):
        rotated = Classifier(fit.eigenvectors.T @ start.kernel, start.bias)
        params = jax.tree.map(jnp.divide, rotated, unit)
        descent = _Descent(params, optimizer.init(params), jnp.int32(0))
        descent = jax.lax.while_loop(goes_on, descend, descent)
        kernel, bias = jax.tree.map(jnp.multiply, descent.params, unit)
        return Classifier(fit.eigenvectors @ kernel, bias)


def logistic_probe(
    train: tuple[jax.Array, jax.Array],
    val: tuple[jax.Array, jax.Array],
    test: tuple[jax.Array, jax.Array] | None = None,
    *,
    num_classes: int,
    lambdas: Sequence[float] = LOGISTIC_LAMBDAS,
) -> dict[str, Any]:
    """Linear probe: multinomial logistic regression with an L2 penalty.

    Features are standardised by the training set's mean and standard deviation; then
    mean cross-entropy + lambda / 2 * sum(W**2) is minimised, the bias free of penalty. In
    scikit-learn's terms C = 1 / (lambda N). The penalty is chosen by accuracy on `val`, never on
    `test`; of equal ones the largest wins.

    Args:
      train, val, test: (features [N, F] of any float dtype, integer labels [N]) each; a row with
        the label -1, an image without one, is left out.
      num_classes: K, at least 2.
      lambdas: the penalties to try, all above 0; each fit starts where that of the next larger
        one ended.

    Returns:
      {'lambda', 'val_acc', 'test_acc', 'kernel' [F, K], 'bias' [K]}, accuracies in [0, 1]; no
      'test_acc' without `test`. The logits of raw features are features @ kernel + bias.

    Raises:
      ValueError: if the features of `train` are not [N, F] with a label each.
    """
    fit = standardise(*train)

    def score(split: tuple[jax.Array, jax.Array]) -> float:
        return float(accuracy(standardised_logits(fit, *classifier, split[0]), split[1]))

    classifier = class_prior(fit, train[1], num_classes)
    best: dict[str, Any] = {"val_acc": -1.0}
    for penalty in sorted(lambdas, reverse=True):
        classifier = minimise_cross_entropy(fit, train[1], jnp.float32(penalty), classifier)
        val_acc = score(val)
        if val_acc > best["val_acc"]:
            best = {"lambda": float(penalty), "val_acc": val_acc}
            chosen = classifier
    classifier = chosen
    if test is not None:
        best["test_acc"] = score(test)
    kernel, bias = raw_units(fit, *classifier)
    return {**best, "kernel": kernel, "bias": bias}
