"""The battery of probes: against scikit-learn, against each other, and what it never looks at."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.linear_model
import sklearn.neighbors

from jepa_jax import evaluation
from jepa_jax.data import from_arrays
from jepa_jax.errors import DataError
from jepa_jax.evaluation import evaluate_representation, score_of, with_online_probe
from jepa_jax.probes import LOGISTIC_LAMBDAS
from jepa_jax.representation import split_validation

NUM_TRAIN, NUM_VAL, NUM_TEST = 180, 60, 90
HEAD = {"kernel": jnp.eye(3), "bias": jnp.zeros((3,))}


@jax.jit
def colours(variables, images):
    """h [B, 3]: the mean of every channel, scaled; uint8 or floats in [0, 1]."""
    scale = 1.0 / 255 if images.dtype == jnp.uint8 else 1.0
    return variables["scale"] * jnp.mean(images.astype(jnp.float32) * scale, axis=(1, 2))


def embed(variables, images):
    h = colours(variables, images)
    return h, jnp.concatenate([h, h[:, ::-1]], axis=1)


def coloured(labels, seed):
    """Noisy images whose brightest channel is their label, more often than not."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 200, (len(labels), 4, 4, 3))
    images[np.arange(len(labels)), :, :, labels] += 30
    return images.astype(np.uint8)


@pytest.fixture(scope="module")
def dataset():
    """Three classes, of which one is commoner than the others."""
    rng = np.random.default_rng(1)
    train = rng.choice(3, NUM_TRAIN + NUM_VAL, p=(0.5, 0.25, 0.25))
    test = rng.choice(3, NUM_TEST, p=(0.5, 0.25, 0.25))
    return from_arrays(coloured(train, 2), train, coloured(test, 3), test)


SCALE = {"scale": jnp.float32(2.0)}


def evaluate(dataset, **options):
    options = {"num_val": NUM_VAL, "parts": ("linear", "ridge"), **options}
    return evaluate_representation(colours, SCALE, dataset, **options)


@pytest.fixture(scope="module")
def result(dataset):
    """Everything, once; the 'untrained' network sees nothing at all."""
    return evaluate(
        dataset,
        parts=evaluation.PARTS,
        embed=embed,
        untrained={"scale": jnp.float32(0.0)},
        heads={"online_clean": HEAD},
        augmented_epochs=1,
    )


@pytest.fixture(scope="module")
def splits(dataset):
    """Colours and labels of the three splits, by numpy."""
    train, val = split_validation(dataset, NUM_VAL)
    images, labels = dataset.train_images, dataset.train_labels

    def split(images, labels):
        return 2 * images.mean((1, 2)) / 255, labels

    return {
        "train": split(images[train], labels[train]),
        "val": split(images[val], labels[val]),
        "test": split(dataset.test_images, dataset.test_labels),
    }


def encoder_scores(result, probe):
    return result["probes"][probe]["encoder"]


def test_the_linear_probe_is_scikit_learns_with_the_penalty_chosen_on_val(result, splits):
    features, labels = splits["train"]
    mean, std = features.mean(0), features.std(0)
    accs = {}
    for penalty in LOGISTIC_LAMBDAS:
        model = sklearn.linear_model.LogisticRegression(
            C=1 / (penalty * len(features)), tol=1e-10, max_iter=10_000
        ).fit((features - mean) / std, labels)
        accs[penalty] = {
            name: model.score((h - mean) / std, known) for name, (h, known) in splits.items()
        }
    found = encoder_scores(result, "linear")
    best = max(acc["val"] for acc in accs.values())
    assert accs[found["lambda"]]["val"] == pytest.approx(best, abs=1.5 / NUM_VAL)
    for name, count in (("val", NUM_VAL), ("test", NUM_TEST)):
        expected = accs[found["lambda"]][name]
        assert found[name]["acc"] == pytest.approx(expected, abs=1.5 / count)
    assert found["test"]["acc"] > 0.6


def test_neighbours_are_scikit_learns(result, splits):
    model = sklearn.neighbors.KNeighborsClassifier(20, metric="cosine").fit(*splits["train"])
    weighted = sklearn.neighbors.KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(*splits["train"])
    for name, other in (("knn_majority", model), ("knn", weighted)):
        for split, count in (("val", NUM_VAL), ("test", NUM_TEST)):
            expected = other.score(*splits[split])
            assert encoder_scores(result, name)[split]["acc"] == pytest.approx(
                expected, abs=2.5 / count
            )


def test_every_accuracy_has_its_interval_and_its_floors(result):
    shots = {f"few_shot_{shots}" for shots in (1, 10)}  # no class has a hundred images
    others = {"linear", "ridge", "knn", "knn_majority", "augmented", "online_clean"}
    assert set(result["probes"]) == shots | others
    for name, row in result["probes"].items():
        for floor in ("untrained", "pixels"):
            assert bool(row[floor]) == (name not in ("augmented", "online_clean"))
        for scores in filter(None, (row[kind] for kind in ("encoder", "untrained", "pixels"))):
            for split, count in (("val", NUM_VAL), ("test", NUM_TEST)):
                score = scores[split]
                assert 0 <= score["low"] <= score["acc"] <= score["high"] <= 1
                assert score["count"] == count
    # It tells no image from another.
    blind = result["probes"]["linear"]["untrained"]["test"]["acc"]
    assert blind == result["probes"]["linear"]["chance"]["test"]["acc"]


def test_chance_is_the_commonest_training_class(result, dataset):
    commonest = np.bincount(dataset.train_labels).argmax()
    found = result["probes"]["ridge"]["chance"]["test"]
    assert found["acc"] == pytest.approx(np.mean(dataset.test_labels == commonest))


def test_the_pixel_floor_is_the_probe_on_pixels(result, dataset):
    train, val = split_validation(dataset, NUM_VAL)

    def flat(images):
        return images.reshape(len(images), -1) / 255

    features, labels = flat(dataset.train_images[train]), dataset.train_labels[train]
    mean, std = features.mean(0), features.std(0)
    found = result["probes"]["ridge"]["pixels"]
    model = sklearn.linear_model.Ridge(alpha=found["lambda"] * len(train))
    model.fit((features - mean) / std, np.eye(3)[labels])
    predicted = model.predict((flat(dataset.test_images) - mean) / std).argmax(1)
    expected = np.mean(predicted == dataset.test_labels)
    assert found["test"]["acc"] == pytest.approx(expected, abs=1.5 / NUM_TEST)


def test_large_images_are_averaged_down_before_they_are_a_floor():
    images = np.full((2, 64, 48, 3), 51, np.uint8)
    pixels = evaluation._pixels(None, jnp.asarray(images))
    np.testing.assert_allclose(pixels, np.full((2, 32 * 32 * 3), 0.2), rtol=1e-5)


def test_few_shot_figures_are_means_over_draws_with_students_interval(result):
    for shots in (1, 10):
        score = encoder_scores(result, f"few_shot_{shots}")["test"]
        assert len(score["draws"]) == 5
        mean, error = np.mean(score["draws"]), np.std(score["draws"], ddof=1) / 5**0.5
        assert score["acc"] == pytest.approx(mean)
        low, high = scipy.stats.t.interval(0.95, 4, mean, error) if error else (mean, mean)
        assert (score["low"], score["high"]) == pytest.approx((max(low, 0), min(high, 1)))
    more, fewer = (encoder_scores(result, f"few_shot_{n}")["test"]["acc"] for n in (10, 1))
    assert more > fewer


def test_confusion_and_classes_belong_to_the_linear_probe_on_test(result, dataset):
    confusion = np.array(result["confusion"])
    np.testing.assert_array_equal(confusion.sum(1), np.bincount(dataset.test_labels))
    acc = encoder_scores(result, "linear")["test"]["acc"]
    assert np.trace(confusion) / NUM_TEST == pytest.approx(acc)
    scores = result["per_class"]["scores"]
    assert [s["acc"] for s in scores] == pytest.approx(np.diag(confusion) / confusion.sum(1))
    assert (result["per_class"]["probe"], result["per_class"]["split"]) == ("linear", "test")


def test_health_has_figures_of_h_and_z_for_both_networks(result):
    trained, blind = result["health"]["encoder"], result["health"]["untrained"]
    assert (trained["h"]["dim"], trained["z"]["dim"]) == (3, 6)
    # z repeats h: no more rank than that, and the same geometry.
    assert trained["z"]["rank_me"] == pytest.approx(trained["h"]["rank_me"], rel=1e-3)
    assert trained["z"]["alignment"] == pytest.approx(trained["h"]["alignment"], rel=1e-3)
    assert trained["h"]["num_images"] == NUM_VAL and len(trained["z"]["spectrum"]) == 6
    assert (trained["h"]["dead_fraction"], blind["h"]["dead_fraction"]) == (0, 1)


def test_views_that_change_nothing_are_aligned(dataset):
    def same(key, images):
        return images.astype(jnp.float32) / 255, images.astype(jnp.float32) / 255

    health = evaluate(dataset, parts=("health",), augment_fn=same)["health"]["encoder"]
    assert health["h"]["alignment"] == pytest.approx(0, abs=1e-6)
    assert health["h"]["mean_cosine"] == pytest.approx(1)
    assert health["z"] is None


def test_what_comes_out_is_json_without_nan(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_test_labels_never_change_a_choice(dataset):
    wrong = (dataset.test_labels + 1) % 3
    other = from_arrays(dataset.train_images, dataset.train_labels, dataset.test_images, wrong)
    right, misled = evaluate(dataset), evaluate(other)
    for probe in ("linear", "ridge"):
        scores, misled_scores = encoder_scores(right, probe), encoder_scores(misled, probe)
        assert scores.pop("test")["acc"] > 0.5 > misled_scores.pop("test")["acc"]
        assert scores == misled_scores


def test_without_test_labels_everything_is_told_on_val(dataset):
    unlabelled = from_arrays(dataset.train_images, dataset.train_labels, dataset.test_images)
    found = evaluate(unlabelled)
    assert encoder_scores(found, "linear")["test"] is None
    assert found["per_class"]["split"] == "val" and np.sum(found["confusion"]) == NUM_VAL


def test_without_labels_there_is_health_alone(dataset):
    found = evaluate(from_arrays(dataset.train_images), parts=evaluation.PARTS)
    assert found["probes"] == {} and found["health"]["encoder"]["h"]["dim"] == 3


def test_images_without_a_label_do_not_count(dataset):
    """Half of the labels hidden: the accuracy is that of the labelled images, not half of it."""
    hidden, hidden_test = (
        np.where(np.arange(len(labels)) % 10 < 5, labels, -1)
        for labels in (dataset.train_labels, dataset.test_labels)
    )
    partly = from_arrays(dataset.train_images, hidden, dataset.test_images, hidden_test)
    for num_val in (NUM_VAL, int(np.sum(hidden >= 0)) - 60):
        found = evaluate(partly, parts=("linear", "knn"), num_val=num_val)
        assert (hidden[split_validation(partly, num_val)[1]] >= 0).all()
        for probe in ("linear", "knn"):
            scores = encoder_scores(found, probe)
            assert scores["val"]["acc"] > 0.5 and scores["val"]["count"] == num_val
            assert scores["test"]["acc"] > 0.5
            assert scores["test"]["count"] == np.sum(hidden_test >= 0)


def test_the_same_seed_draws_the_same(dataset, result):
    again = evaluate(dataset, parts=("few_shot", "health"), embed=embed)
    assert again["probes"]["few_shot_1"]["encoder"] == encoder_scores(result, "few_shot_1")
    assert again["health"]["encoder"] == result["health"]["encoder"]
    other = evaluate(dataset, parts=("few_shot",), seed=1)
    assert other["probes"]["few_shot_1"]["encoder"] != encoder_scores(result, "few_shot_1")


def test_a_split_that_leaves_nothing_to_fit_is_refused_and_one_image_has_no_health(dataset):
    with pytest.raises(DataError, match="num_val=240 leaves none of the 240 training images"):
        evaluate(dataset, num_val=NUM_TRAIN + NUM_VAL)
    assert evaluate(dataset, num_val=1, parts=("health",))["health"] is None


def test_test_images_without_any_label_have_no_figures(dataset):
    unknown = np.full(NUM_TEST, -1)
    images, labels = dataset.train_images, dataset.train_labels
    found = evaluate(
        from_arrays(images, labels, dataset.test_images, unknown),
        parts=("linear",),
        heads={"online_clean": HEAD},
    )
    assert encoder_scores(found, "linear")["test"] is None
    found = with_online_probe(found, {"val": 0.4, "test": 0.0})
    assert (
        encoder_scores(found, "online")["test"] is None and " on val images" in found["online_gap"]
    )


def test_a_class_without_test_images_has_no_accuracy(dataset):
    keep = dataset.test_labels != 2
    found = evaluate(
        from_arrays(
            dataset.train_images,
            dataset.train_labels,
            dataset.test_images[keep],
            dataset.test_labels[keep],
        ),
        parts=("ridge",),
    )
    assert [score is None for score in found["per_class"]["scores"]] == [False, False, True]


def test_an_unknown_part_is_named(dataset):
    with pytest.raises(ValueError, match="'knnn'"):
        evaluate(dataset, parts=("knnn",))


def test_the_gap_between_online_and_offline_is_shared_out(result):
    clean, offline = (
        round(100 * encoder_scores(result, name)["test"]["acc"], 1)
        for name in ("online_clean", "linear")
    )
    found = with_online_probe(result, {"val": 0.4, "test": 0.5})
    assert encoder_scores(found, "online")["test"] == score_of(0.5, NUM_TEST)
    line = found["online_gap"]
    assert line.startswith(f"online 50.0 %, offline {offline:.1f} % (logistic) on test images")
    assert f"{clean - 50:+.1f} points from BatchNorm" in line
    assert f"{offline - clean:+.1f} from a classifier" in line
    without = {**result, "probes": {"linear": result["probes"]["linear"]}}
    assert evaluation.explain_online_gap(without) is None
