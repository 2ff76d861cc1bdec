"""Nearest neighbours against scikit-learn, in chunks of any size."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.neighbors

from jepa_jax.probes import accuracy, knn, knn_votes


def rows(seed, count, num_dims=7, num_classes=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, count)
    centres = np.random.default_rng(99).normal(size=(num_classes, num_dims))
    features = (centres[labels] + rng.normal(size=(count, num_dims))) * rng.gamma(
        2, size=(count, 1)
    )
    return features.astype(np.float32), labels.astype(np.int32)


def shares(votes):
    return np.asarray(votes / votes.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_equal_scikit_learn(k):
    train, (queries, _) = rows(0, 150), rows(1, 60)

    def weights_of(distances):
        return np.exp((1 - distances) / 0.07)

    weighted, majority = knn_votes(train, jnp.asarray(queries), num_classes=4, k=k)
    for found, weights in ((weighted, weights_of), (majority, "uniform")):
        model = sklearn.neighbors.KNeighborsClassifier(k, metric="cosine", weights=weights)
        model.fit(train[0].astype(np.float64), train[1])
        np.testing.assert_allclose(shares(found), model.predict_proba(queries), atol=1e-4)
    np.testing.assert_array_equal(majority.sum(axis=1), k)
    np.testing.assert_array_equal(np.max(weighted, axis=1) <= k, True)


@pytest.mark.parametrize("num_queries, num_references", [(60, 13), (7, 150), (9, 40), (1, 1)])
def test_chunks_change_nothing(monkeypatch, num_queries, num_references):
    """Sizes that divide the rows and that do not, and chunks smaller than k."""
    (features, labels), (queries, _) = rows(2, 150), rows(3, 60)
    labels[::7] = -1
    whole = knn_votes((features, labels), jnp.asarray(queries), num_classes=4)
    monkeypatch.setattr(knn, "_QUERIES_AT_ONCE", num_queries)
    monkeypatch.setattr(knn, "_REFERENCES_AT_ONCE", num_references)
    on_device = jnp.asarray(features), jnp.asarray(labels)
    for train in ((features, labels), on_device):
        in_chunks = knn_votes(train, jnp.asarray(queries), num_classes=4)
        for found, expected in zip(in_chunks, whole, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def arrays_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (var.aval for var in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def test_no_array_is_larger_than_a_chunk_and_one_program_serves_all(monkeypatch):
    (features, labels), (queries, _) = rows(4, 103), rows(5, 45)
    monkeypatch.setattr(knn, "_QUERIES_AT_ONCE", 20)
    monkeypatch.setattr(knn, "_REFERENCES_AT_ONCE", 30)
    calls = []
    merge = knn._merge

    def recorded(*args):
        calls.append(args)
        return merge(*args)

    monkeypatch.setattr(knn, "_merge", recorded)
    before = merge._cache_size()
    knn_votes((features, labels), jnp.asarray(queries), num_classes=4, k=3)
    assert merge._cache_size() == before + 1
    assert len(calls) == 4
    # 45 queries are 3 chunks of 15, and 103 references are 4 of 26.
    sizes = [array.size for array in arrays_of(jax.make_jaxpr(merge)(*calls[0]).jaxpr)]
    assert 15 * 26 in sizes
    assert max(sizes) <= 15 * 26


def test_fewer_labelled_references_than_neighbours_all_vote():
    features = jnp.float32([[1, 0], [0, 1], [1, 1], [-1, 0]])
    labels = jnp.int32([2, 0, -1, 2])
    weighted, majority = knn_votes((features, labels), features[:1], num_classes=3, k=20)
    np.testing.assert_array_equal(majority, [[1, 0, 2]])
    expected = [np.exp(-1 / 0.07), 0, 1 + np.exp(-2 / 0.07)]
    np.testing.assert_allclose(weighted[0], expected, rtol=1e-5)
    nobody = knn_votes((features, jnp.full(4, -1)), features, num_classes=3)
    np.testing.assert_array_equal(nobody, np.zeros((2, 4, 3)))


def test_a_small_temperature_overflows_nothing_and_follows_the_nearest():
    train, (queries, labels) = rows(6, 100), rows(7, 30)
    sharp, _ = knn_votes(train, jnp.asarray(queries), num_classes=4, temperature=1e-5)
    _, nearest = knn_votes(train, jnp.asarray(queries), num_classes=4, k=1)
    assert accuracy(sharp, jnp.asarray(labels)) == accuracy(nearest, jnp.asarray(labels))
    np.testing.assert_array_equal(jnp.argmax(sharp, axis=1), jnp.argmax(nearest, axis=1))


def test_of_equally_similar_references_the_earlier_ones_vote(monkeypatch):
    features, labels = jnp.ones((6, 2)), jnp.int32([3, 1, 1, 2, 2, 2])
    for size in (6, 4, 2, 1):
        monkeypatch.setattr(knn, "_REFERENCES_AT_ONCE", size)
        _, majority = knn_votes((features, labels), features[:1], num_classes=4, k=3)
        np.testing.assert_array_equal(majority, [[0, 2, 0, 1]])


def test_dead_features_and_half_precision_are_harmless():
    features, labels = rows(8, 50)
    weighted, majority = knn_votes((np.zeros_like(features), labels), features, num_classes=4)
    np.testing.assert_array_equal(majority, np.tile(np.bincount(labels[:20], minlength=4), (50, 1)))
    np.testing.assert_allclose(weighted, majority)
    half = jnp.asarray(features).astype(jnp.bfloat16)
    found = knn_votes((half, labels), half, num_classes=4)
    rounded = half.astype(jnp.float32)
    expected = knn_votes((rounded, labels), rounded, num_classes=4)
    np.testing.assert_array_equal(found, expected)


def test_what_does_not_fit_is_refused():
    features, labels = rows(9, 10)
    with pytest.raises(ValueError, match=r"\(10, 7\) and \(10, 6\)"):
        knn_votes((features, labels), features[:, 1:], num_classes=4)
    with pytest.raises(ValueError, match=r"\(10, 7\) and \(9,\)"):
        knn_votes((features, labels[1:]), features, num_classes=4)
    with pytest.raises(ValueError, match=r"\(0, 7\) and \(0,\)"):
        knn_votes((features[:0], labels[:0]), features, num_classes=4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        knn_votes((features, labels), features, num_classes=4, k=0)
