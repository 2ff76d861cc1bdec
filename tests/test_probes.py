"""Closed-form probes against scikit-learn and by construction."""

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model

from jepa_jax.probes import RIDGE_LAMBDAS, accuracy, ridge_probe


def blobs(seed, count, num_dims=6, num_classes=4, noise=1.5):
    """Features of overlapping classes whose dimensions differ in scale and offset."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, num_dims))
    labels = rng.integers(0, num_classes, count)
    features = centres[labels] + noise * rng.normal(size=(count, num_dims))
    features = features * np.logspace(-2, 2, num_dims) + np.linspace(-5, 5, num_dims)
    return jnp.float32(features), jnp.int32(labels)


def scikit_accuracy(train, other, ridge_lambda, num_classes):
    """Ridge on one-hot targets, with the penalty in scikit-learn's units: N times ours."""
    features = np.asarray(train[0], np.float64)
    mean, std = features.mean(0), features.std(0)
    model = sklearn.linear_model.Ridge(alpha=ridge_lambda * len(features))
    model.fit((features - mean) / std, np.eye(num_classes)[train[1]])
    predicted = model.predict((np.asarray(other[0], np.float64) - mean) / std)
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


def test_penalties_make_a_difference_that_scikit_learn_shares():
    """Few images of many dimensions: a wrong scale of the penalty shows."""
    train, val = blobs(3, 24, num_dims=20, noise=2.5), blobs(4, 300, num_dims=20, noise=2.5)
    found = []
    for ridge_lambda in (1e-3, 0.1, 1.0):
        expected = scikit_accuracy(train, val, ridge_lambda, 4)
        result = ridge_probe(train, val, num_classes=4, lambdas=[ridge_lambda])
        assert result["val_acc"] == pytest.approx(expected, abs=1.5 / 300)
        found.append(result["val_acc"])
    assert np.ptp(found) > 0.02


def test_penalty_is_chosen_on_val_and_never_on_test():
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
        result = ridge_probe(train, val, test, num_classes=2, lambdas=[1e-5, 10.0])
        assert result == {"lambda": expected, "val_acc": 1.0, "test_acc": 0.0}


def test_of_equally_good_penalties_the_largest_wins():
    features = jnp.float32([[-1.0], [-1.1], [1.0], [1.1]])
    split = features, jnp.int32([0, 0, 1, 1])
    for lambdas in (RIDGE_LAMBDAS, RIDGE_LAMBDAS[::-1]):
        result = ridge_probe(split, split, num_classes=2, lambdas=lambdas)
        assert result == {"lambda": 10.0, "val_acc": 1.0}


def test_constant_and_repeated_features_are_harmless():
    train, val = blobs(6, 100), blobs(7, 200)

    def widened(split, constant):
        extra = jnp.full((len(split[1]), 1), constant)
        return jnp.concatenate([split[0], extra, split[0][:, :1]], axis=1), split[1]

    plain = ridge_probe(train, val, num_classes=4, lambdas=[1e-3])
    # A constant of the training images that moves in the others must have no say either.
    wide = ridge_probe(widened(train, 1000.0), widened(val, 1013.0), num_classes=4, lambdas=[1e-3])
    assert wide["val_acc"] == pytest.approx(plain["val_acc"], abs=0.03)


def test_scale_and_offset_of_features_change_nothing():
    train, val = blobs(8, 100), blobs(9, 200)
    moved = [(3.0 * features + 7.0, labels) for features, labels in (train, val)]
    assert ridge_probe(*moved, num_classes=4)["val_acc"] == pytest.approx(
        ridge_probe(train, val, num_classes=4)["val_acc"], abs=0.01
    )


def test_rare_classes_are_found_through_the_bias():
    """Without centred targets a class of one image in twenty would never win a boundary."""
    features = jnp.float32(np.r_[np.full(19, 1.0), 5.0][:, None])
    split = features, jnp.int32(np.r_[np.zeros(19), 1])
    assert ridge_probe(split, split, num_classes=2, lambdas=[1e-4])["val_acc"] == 1.0


def test_bfloat16_features_are_accepted():
    train, val = blobs(10, 60), blobs(11, 60)
    half = [(features.astype(jnp.bfloat16), labels) for features, labels in (train, val)]
    rounded = [(features.astype(jnp.float32), labels) for features, labels in half]
    assert ridge_probe(*half, num_classes=4) == ridge_probe(*rounded, num_classes=4)


def test_images_without_a_label_are_left_out():
    """A label of -1 neither trains the classifier nor counts against it."""
    train, val, test = blobs(12, 120), blobs(13, 200), blobs(14, 200)

    def with_unlabelled(split):
        noise = jnp.flip(split[0]) * 3.0
        return jnp.concatenate([split[0], noise]), jnp.concatenate(
            [split[1], jnp.full_like(split[1], -1)]
        )

    expected = ridge_probe(train, val, test, num_classes=4)
    found = ridge_probe(*map(with_unlabelled, (train, val, test)), num_classes=4)
    assert found == pytest.approx(expected)


def test_accuracy_is_the_share_of_labelled_rows_whose_largest_logit_is_their_label():
    logits = jnp.float32([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.6, 0.4]])
    assert accuracy(logits, jnp.int32([1, 0, 0, 1, 0])) == pytest.approx(0.6)
    assert accuracy(logits, jnp.int32([1, -1, 0, -1, -1])) == pytest.approx(0.5)
    assert accuracy(logits, jnp.full(5, -1)) == 0.0
