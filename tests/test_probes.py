"""Linear probes and scores against scikit-learn and by construction."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics

from jepa_jax.probes import (
    LOGISTIC_LAMBDAS,
    RIDGE_LAMBDAS,
    accuracy,
    confusion_matrix,
    few_shot_draws,
    few_shot_probe,
    logistic_probe,
    ridge_probe,
    wilson_interval,
)
from jepa_jax.probes.logistic import minimise_cross_entropy

both_probes = pytest.mark.parametrize("probe", [ridge_probe, logistic_probe])


def blobs(seed, count, num_dims=6, num_classes=4, noise=1.5):
    """Features of overlapping classes whose dimensions differ in scale and offset."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, num_dims))
    labels = rng.integers(0, num_classes, count)
    features = centres[labels] + noise * rng.normal(size=(count, num_dims))
    features = features * np.logspace(-2, 2, num_dims) + np.linspace(-5, 5, num_dims)
    return jnp.float32(features), jnp.int32(labels)


def scores(result):
    return {name: value for name, value in result.items() if name not in ("kernel", "bias")}


def standardised(train, other):
    features = np.asarray(train[0], np.float64)
    return (np.asarray(other[0], np.float64) - features.mean(0)) / features.std(0)


def scikit_accuracy(train, other, ridge_lambda, num_classes):
    """Ridge on one-hot targets, with the penalty in scikit-learn's units: N times ours."""
    model = sklearn.linear_model.Ridge(alpha=ridge_lambda * len(train[1]))
    model.fit(standardised(train, train), np.eye(num_classes)[train[1]])
    predicted = model.predict(standardised(train, other))
    return np.mean(np.argmax(predicted, axis=1) == np.asarray(other[1]))


@pytest.mark.parametrize("ridge_lambda", [1e-5, 0.1, 3.0])
def test_ridge_equals_scikit_learn(ridge_lambda):
    train, val, test = blobs(0, 120), blobs(1, 400), blobs(2, 400)
    found = ridge_probe(train, val, test, num_classes=4, lambdas=[ridge_lambda])
    assert found["lambda"] == pytest.approx(ridge_lambda)
    # One image in four hundred may sit on a boundary within rounding.
    for name, split in (("val_acc", val), ("test_acc", test)):
        expected = scikit_accuracy(train, split, ridge_lambda, 4)
        assert found[name] == pytest.approx(expected, abs=1.5 / 400)
    assert found["val_acc"] > 0.4


@pytest.mark.parametrize("num_dims", [20, 60])
def test_penalties_make_a_difference_that_scikit_learn_shares(num_dims):
    """Few images of many dimensions, even of more than images: a wrong penalty shows."""
    train, val = (blobs(*size, num_dims=num_dims, noise=2.5) for size in ((3, 24), (4, 300)))
    found = []
    for ridge_lambda in (1e-3, 1.0, 30.0):
        expected = scikit_accuracy(train, val, ridge_lambda, 4)
        result = ridge_probe(train, val, num_classes=4, lambdas=[ridge_lambda])
        assert result["val_acc"] == pytest.approx(expected, abs=1.5 / 300)
        found.append(result["val_acc"])
    assert np.ptp(found) > 0.02


@both_probes
def test_penalty_is_chosen_on_val_and_never_on_test(probe):
    """The label is the sign of x - y, which only a small penalty can see, x and y being so alike.

    A large penalty goes by a hint that is right nine times in ten. On images where the two
    disagree, one penalty is right about all and the other about none.
    """
    # Pairs that differ in their label alone, so that nothing else tells of it.
    common = np.repeat(np.random.default_rng(5).normal(size=200), 2)
    labels = np.arange(400) % 2
    sign = 2.0 * labels - 1.0
    lies = np.arange(400) // 2 % 10 == 0
    difference, hint = 0.05 * sign, np.where(lies, -sign, sign)
    features = np.stack([common + difference, common - difference, hint], axis=1)
    train = jnp.float32(features), jnp.int32(labels)
    for_small = jnp.float32(features[lies]), jnp.int32(labels[lies])
    for_large = for_small[0], 1 - for_small[1]
    for val, test, expected in ((for_small, for_large, 1e-5), (for_large, for_small, 10.0)):
        result = probe(train, val, test, num_classes=2, lambdas=[1e-5, 10.0])
        assert scores(result) == {"lambda": expected, "val_acc": 1.0, "test_acc": 0.0}


@pytest.mark.parametrize(
    "probe, grid", [(ridge_probe, RIDGE_LAMBDAS), (logistic_probe, LOGISTIC_LAMBDAS)]
)
def test_of_equally_good_penalties_the_largest_wins(probe, grid):
    features = jnp.float32([[-1.0], [-1.1], [1.0], [1.1]])
    split = features, jnp.int32([0, 0, 1, 1])
    for lambdas in (grid, grid[::-1]):
        result = probe(split, split, num_classes=2, lambdas=lambdas)
        assert scores(result) == {"lambda": max(grid), "val_acc": 1.0}


@both_probes
def test_constant_and_repeated_features_are_harmless(probe):
    train, val = blobs(6, 100), blobs(7, 200)

    def widened(split, constant):
        extra = jnp.full((len(split[1]), 1), constant)
        return jnp.concatenate([split[0], extra, split[0][:, :1]], axis=1), split[1]

    plain = probe(train, val, num_classes=4, lambdas=[1e-3])
    # A constant of the training images that moves in the others must have no say either.
    wide = probe(widened(train, 1000.3), widened(val, 1013.0), num_classes=4, lambdas=[1e-3])
    assert not wide["kernel"][-2].any()
    assert wide["val_acc"] == pytest.approx(plain["val_acc"], abs=0.03)


@both_probes
def test_scale_and_offset_of_features_change_nothing(probe):
    train, val = blobs(8, 100), blobs(9, 200)
    moved = [(3.0 * features + 7.0, labels) for features, labels in (train, val)]
    assert probe(*moved, num_classes=4)["val_acc"] == pytest.approx(
        probe(train, val, num_classes=4)["val_acc"], abs=0.01
    )


def test_rare_classes_are_found_through_the_bias():
    """Without centred targets a class of one image in twenty would never win a boundary."""
    features = jnp.float32(np.r_[np.full(19, 1.0), 5.0][:, None])
    split = features, jnp.int32(np.r_[np.zeros(19), 1])
    assert ridge_probe(split, split, num_classes=2, lambdas=[1e-4])["val_acc"] == 1.0


@both_probes
def test_bfloat16_features_are_accepted(probe):
    train, val = blobs(10, 60), blobs(11, 60)
    half = [(features.astype(jnp.bfloat16), labels) for features, labels in (train, val)]
    rounded = [(features.astype(jnp.float32), labels) for features, labels in half]
    assert scores(probe(*half, num_classes=4)) == scores(probe(*rounded, num_classes=4))


@both_probes
def test_images_without_a_label_are_left_out(probe):
    """A label of -1 neither trains the classifier nor counts against it."""
    train, val, test = blobs(12, 120), blobs(13, 200), blobs(14, 200)

    def with_unlabelled(split):
        noise = jnp.flip(split[0]) * 3.0
        return jnp.concatenate([split[0], noise]), jnp.concatenate(
            [split[1], jnp.full_like(split[1], -1)]
        )

    options = {"num_classes": 4, "lambdas": [1e-2, 1.0]}
    expected = probe(train, val, test, **options)
    found = probe(*map(with_unlabelled, (train, val, test)), **options)
    assert scores(found) == pytest.approx(scores(expected))
    np.testing.assert_allclose(found["bias"], expected["bias"], rtol=1e-2, atol=1e-2)


@both_probes
def test_kernel_and_bias_take_raw_features(probe):
    train, val, test = blobs(15, 200), blobs(16, 200), blobs(17, 200)
    result = probe(train, val, test, num_classes=4)
    for name, (features, labels) in (("val_acc", val), ("test_acc", test)):
        predicted = accuracy(features @ result["kernel"] + result["bias"][None], labels)
        assert predicted == pytest.approx(result[name], abs=1.5 / 200)


@both_probes
def test_dead_features_give_the_commonest_class(probe):
    labels = jnp.int32([0, 1, 1, 1, 2])
    split = jnp.full((5, 3), 7.1), labels
    result = probe(split, split, num_classes=4)
    assert result["val_acc"] == pytest.approx(0.6)
    assert not result["kernel"].any()


@both_probes
def test_features_and_labels_that_do_not_fit_are_refused(probe):
    features, labels = blobs(18, 20)
    with pytest.raises(ValueError, match=r"\(20, 6\) and \(19,\)"):
        probe((features, labels[1:]), (features, labels), num_classes=4)


@pytest.mark.parametrize("num_rows, num_dims", [(200, 6), (24, 60)])
def test_logistic_regression_equals_scikit_learn(num_rows, num_dims):
    """Few images of many dimensions take the other way to the eigenbasis."""
    train = blobs(19, num_rows, num_dims=num_dims)
    val = blobs(20, 100, num_dims=num_dims)
    for penalty in (1.0, 0.1, 1e-3):
        model = sklearn.linear_model.LogisticRegression(
            C=1 / (penalty * num_rows), tol=1e-8, max_iter=5000
        )
        model.fit(standardised(train, train), train[1])
        expected = model.predict_log_proba(standardised(train, val))
        result = logistic_probe(train, val, num_classes=4, lambdas=[penalty])
        logits = val[0] @ result["kernel"] + result["bias"][None]
        np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, rtol=3e-3, atol=3e-3)


def test_logistic_regression_is_compiled_once_for_all_penalties():
    train = blobs(21, 37, num_dims=5)
    before = minimise_cross_entropy._cache_size()
    logistic_probe(train, train, num_classes=4)
    logistic_probe(train, train, num_classes=4, lambdas=[0.3, 0.2])
    assert minimise_cross_entropy._cache_size() == before + 1


def test_separable_classes_of_few_images_end_in_finite_numbers():
    train = blobs(22, 12, num_dims=40)
    result = logistic_probe(train, train, num_classes=5, lambdas=[1.0, 1e-6, 1e-12])
    last = logistic_probe(train, train, num_classes=5, lambdas=[1e-12])
    assert result["val_acc"] == last["val_acc"] == 1.0
    assert jnp.isfinite(last["kernel"]).all()
    assert jnp.isfinite(last["bias"]).all()


def test_few_shot_penalty_keeps_the_variance_of_a_logit():
    """In scikit-learn's terms C = 4 / F, whatever the number of images; dead features aside."""
    for num_rows in (16, 40):
        train, val = blobs(23, num_rows), blobs(24, 50)
        model = sklearn.linear_model.LogisticRegression(C=4 / 6, tol=1e-8, max_iter=5000)
        model.fit(standardised(train, train), train[1])
        expected = model.predict_log_proba(standardised(train, val))
        dead = jnp.concatenate([train[0], jnp.ones((num_rows, 3))], axis=1)
        kernel, bias = few_shot_probe(dead, train[1], num_classes=4)
        logits = val[0] @ kernel[:6] + bias[None]
        np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, rtol=3e-3, atol=3e-3)


def test_few_shot_draws_are_of_every_class_and_without_replacement():
    labels = np.random.default_rng(25).permutation(np.repeat([-1, 0, 1, 2], [30, 5, 9, 40]))
    options = {"num_classes": 3, "shots": 4, "seed": 3}
    draws = np.asarray(few_shot_draws(jnp.int32(labels), num_draws=40, **options))
    assert draws.shape == (40, 12)
    assert draws.dtype == np.int32
    assert (labels[draws] == np.repeat([0, 1, 2], 4)).all()
    assert all(len(set(draw)) == 12 for draw in draws)
    assert len({tuple(draw) for draw in draws}) == 40
    # Forty draws of 4 out of 5, or of 9, leave none of them out.
    assert np.isin(np.flatnonzero((labels == 0) | (labels == 1)), draws).all()
    np.testing.assert_array_equal(few_shot_draws(labels, num_draws=2, **options), draws[:2])


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(ValueError, match="class 2 has 1 images, too few for 2"):
        few_shot_draws(
            jnp.int32([0, 0, 1, 1, 2, -1, -1]), num_classes=3, shots=2, num_draws=1, seed=0
        )


def test_accuracy_is_the_share_of_labelled_rows_whose_largest_logit_is_their_label():
    logits = jnp.float32([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.6, 0.4]])
    assert accuracy(logits, jnp.int32([1, 0, 0, 1, 0])) == pytest.approx(0.6)
    assert accuracy(logits, jnp.int32([1, -1, 0, -1, -1])) == pytest.approx(0.5)
    assert accuracy(logits, jnp.full(5, -1)) == 0.0


def test_confusion_matrix_equals_scikit_learn():
    rng = np.random.default_rng(26)
    labels, predicted = rng.integers(-1, 5, 300), rng.integers(0, 4, 300)
    found = confusion_matrix(jnp.int32(predicted), jnp.int32(labels), num_classes=6)
    keep = labels >= 0
    expected = sklearn.metrics.confusion_matrix(labels[keep], predicted[keep], labels=range(6))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"\(300,\), \(299,\)"):
        confusion_matrix(jnp.int32(predicted), jnp.int32(labels[1:]), num_classes=6)


@pytest.mark.parametrize("hits, count", [(3, 10), (617, 1000), (1, 2), (0, 7), (7, 7)])
def test_wilson_interval_ends_where_the_test_of_a_share_would_reject(hits, count):
    low, high = wilson_interval(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    assert high - low > 0
    for end in (low, high):
        # At 0 of n and n of n one end is the share itself, where the test has no width.
        distance = 1.96 * math.sqrt(end * (1 - end) / count)
        assert abs(hits / count - end) == pytest.approx(distance, abs=1e-7)
    other_low, other_high = wilson_interval(count - hits, count)
    assert (1 - other_high, 1 - other_low) == pytest.approx((low, high))


def test_of_no_trials_nothing_is_known():
    assert wilson_interval(0, 0) == (0.0, 1.0)
