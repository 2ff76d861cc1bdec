"""Joint-embedding prediction: its terms, the law of the target network, and what may not move."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import (
    BATCH,
    DENSE,
    NUM_CLASSES,
    dimmed,
    new_state,
    new_step,
    normalised,
    some_hparams,
)

from jepa_jax.augment import to_float
from jepa_jax.checkpoint import Checkpoints
from jepa_jax.health import dimension_std, rank_me
from jepa_jax.masks import sample_blocks
from jepa_jax.models import ImageJEPA, Projector, linen_model, without_predictor
from jepa_jax.objectives import make_loss_fn
from jepa_jax.predictors import (
    BlockPredictor,
    EmbeddingPredictor,
    predicts_blocks,
    predicts_views,
)
from jepa_jax.train_step import (
    TargetState,
    create_train_state,
    fault_places,
    fresh_target,
    make_train_epoch,
    stream_key,
    target_momentum,
    vicreg,
)
from jepa_jax.vit import ViT

BYOL = predicts_views(DENSE, EmbeddingPredictor(5))
VIT = ViT(patch_size=4, dim=32, depth=1, num_heads=2, pos_embed="sincos", pool="mean")
VIT_MODEL = linen_model(ImageJEPA(VIT, Projector(8, 8)))
BLOCKS = BlockPredictor(dim=32, depth=1)
JEPA = predicts_blocks(VIT_MODEL, VIT, BLOCKS)
GRID = (5, 5)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (BATCH, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def labels():
    return np.arange(BATCH, dtype=np.int32) % NUM_CLASSES


@pytest.fixture(scope="module")
def byol_step():
    return jax.jit(new_step(BYOL))


@pytest.fixture(scope="module")
def patches():
    """Normalised views of 5x5 patches, and the variables of a model that predicts blocks."""
    views = np.random.default_rng(1).normal(size=(3, 20, 20, 3)).astype(np.float32)
    return views, jax.jit(JEPA.init)(jax.random.key(0), views)


def by_numpy(params, z):
    """The MLP of `EmbeddingPredictor`, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    z = np.asarray(z, np.float64)
    x = z @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    x = np.maximum(x * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"], 0)
    return x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def dense_by_numpy(params, view):
    view = np.asarray(view, np.float64).reshape(len(view), -1)
    return np.tanh(view @ np.asarray(params["w"], np.float64) + np.asarray(params["b"], np.float64))


def distinct_target(state):
    """The state with a target unlike the online network."""
    return state.replace(target=jax.tree.map(lambda leaf: 0.5 * leaf + 0.01, state.target))


# --- the term -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_target", [True, False])
def test_the_term_of_two_views_is_that_of_numpy(byol_step, images, labels, with_target):
    hparams = some_hparams(pred_coeff=0.7)
    state = new_state(BYOL, hparams, has_target=with_target)
    state = distinct_target(state) if with_target else state
    views = [normalised(view) for view in dimmed(stream_key(hparams.seed, "views", 0), images)]
    z1, z2 = (dense_by_numpy(state.params, view) for view in views)
    p1, p2 = (by_numpy(state.params["predictor"], z) for z in (z1, z2))
    target = state.target["params"] if with_target else state.params
    t1, t2 = (dense_by_numpy(target, view) for view in views)
    expected = (((p1 - t2) ** 2).mean() + ((p2 - t1) ** 2).mean()) / 2
    metrics = byol_step(state, images, labels, hparams)[1]
    np.testing.assert_allclose(metrics["pred_loss"], expected, rtol=1e-4)
    loss, _ = vicreg(None, jnp.float32(z1), jnp.float32(z2), hparams)
    np.testing.assert_allclose(metrics["loss"], loss + 0.7 * expected, rtol=1e-4)


def test_the_term_of_blocks_is_that_of_its_parts(patches):
    views, variables = patches
    key = jax.random.key(5)
    target = jax.tree.map(lambda leaf: 0.9 * leaf, without_predictor(variables))
    predict = jax.jit(lambda *given: JEPA.predict(*given, None))
    found = predict(key, variables, target, [views[:2], views[1:]])
    stacked = np.concatenate([views[:2], views[1:]])
    terms = []
    draw = jax.jit(lambda key: sample_blocks(key, GRID))
    for own, view in zip(jax.random.split(key, 4), stacked, strict=True):
        context, targets = draw(own)
        seen = tokens(variables, view[None], context[None])
        wanted = np.asarray(tokens(target, view[None])[0], np.float64)
        wanted -= wanted.mean(-1, keepdims=True)
        wanted /= np.sqrt((wanted**2).mean(-1, keepdims=True) + 1e-5)
        guess = guess_of(variables, seen, context[None], targets[None])[0]
        away = np.abs(guess - wanted[np.asarray(targets)])
        terms.append(np.where(away < 1, away**2 / 2, away - 0.5).mean())
    np.testing.assert_allclose(found, np.mean(terms), rtol=1e-4)


@jax.jit
def tokens(variables, views, keep=None):
    return VIT.apply({"params": variables["params"]["encoder"]}, views, True, keep, method="tokens")


@jax.jit
def guess_of(variables, seen, context, targets):
    own = {"params": variables["params"]["predictor"]}
    return BLOCKS.apply(own, seen, context, targets, GRID)


def test_a_block_is_guessed_from_the_context_alone_and_by_itself(patches):
    views, variables = patches
    draw = jax.jit(jax.vmap(lambda key: sample_blocks(key, GRID)))
    context, targets = draw(jax.random.split(jax.random.key(3), len(views)))
    seen = tokens(variables, views, context)
    guess = guess_of(variables, seen, context, targets)
    assert guess.shape == (*targets.shape, VIT.dim)
    # Other pixels in a target change nothing of what the context says.
    hidden = np.array(views)
    for view, blocks in zip(hidden, np.asarray(targets), strict=True):
        for patch in blocks.ravel():
            row, column = divmod(int(patch), GRID[1])
            view[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 10
    np.testing.assert_allclose(tokens(variables, hidden, context), seen, rtol=1e-5, atol=1e-5)
    # The order of the context's patches is none of a set.
    back = guess_of(variables, seen[:, ::-1], context[:, ::-1], targets)
    np.testing.assert_allclose(back, guess, rtol=1e-3, atol=1e-4)
    # Another place for one block leaves the others as they are, and is another guess.
    moved = targets.at[:, 1].set((targets[:, 1] + 1) % 25)
    others = np.asarray(guess_of(variables, seen, context, moved))
    np.testing.assert_allclose(others[:, [0, 2, 3]], guess[:, [0, 2, 3]], rtol=1e-3, atol=1e-4)
    assert np.abs(others[:, 1] - guess[:, 1]).max() > 1e-3


# --- where gradients go ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["views", "blocks"])
def test_no_gradient_reaches_what_is_predicted(form, patches):
    model, views = (BYOL, patches[0][:, :8, :8]) if form == "views" else (JEPA, patches[0])
    variables = jax.jit(model.init)(jax.random.key(0), views)
    key, online = jax.random.key(1), without_predictor(variables)

    def term(variables, target):
        z1, z2 = (model.apply(variables, view, True)[0][1] for view in (views, views[::-1]))
        return model.predict(key, variables, target, [views, views[::-1]], [z1, z2])

    of_online, of_target = jax.jit(jax.grad(term, argnums=(0, 1)))(variables, online)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(of_target))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_online))
    # Without a target network it is the online one that stands still: the same number and pull.
    alone = jax.jit(jax.grad(lambda variables: term(variables, None)))(variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), alone, of_online
    )


def test_without_weight_a_predictor_changes_nothing_of_the_network(byol_step, images, labels):
    hparams = some_hparams(pred_coeff=0.0)
    with_it, plain = new_state(BYOL, hparams), new_state(DENSE, hparams)
    own = {name: with_it.params[name] for name in plain.params}
    jax.tree.map(np.testing.assert_array_equal, own, plain.params)
    moved = byol_step(with_it, images, labels, hparams)[0].params
    expected = jax.jit(new_step(DENSE))(plain, images, labels, hparams)[0].params
    for name, leaf in expected.items():
        np.testing.assert_allclose(moved[name], leaf, rtol=1e-5, atol=1e-6)


# --- the target network ---------------------------------------------------------------------------


def test_the_target_follows_by_the_law_of_a_moving_average(byol_step, images, labels):
    hparams = some_hparams(target_ema=0.9)
    state = distinct_target(new_state(BYOL, hparams, has_target=True))
    assert set(state.target["params"]) == {"w", "b"}
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.target["params"])
    for step in range(4):
        state, _ = byol_step(state, images, labels, hparams)
        m = 1 - 0.1 * (np.cos(np.pi * step / 10) + 1) / 2
        for name, leaf in expected.items():
            expected[name] = m * leaf + (1 - m) * np.asarray(state.params[name], np.float64)
            np.testing.assert_allclose(
                state.target["params"][name], expected[name], rtol=1e-5, atol=1e-7
            )


def test_the_momentum_goes_from_its_start_to_one():
    hparams = some_hparams(target_ema=0.6, num_steps=40)
    momenta = np.array([target_momentum(hparams, step) for step in range(41)])
    np.testing.assert_allclose(momenta[[0, 20, 40]], [0.6, 0.8, 1.0], rtol=1e-6)
    assert (np.diff(momenta) > 0).all()


def test_statistics_follow_as_the_parameters_do():
    module = linen_model(ImageJEPA(VIT, Projector(8, 8)))
    hparams = some_hparams()
    create = functools.partial(
        create_train_state, module, image_shape=(20, 20, 3), num_classes=0, has_target=True
    )
    state = jax.jit(create)(hparams)
    jax.tree.map(np.testing.assert_array_equal, state.target["batch_stats"], state.batch_stats)
    state = state.replace(batch_stats=jax.tree.map(lambda leaf: leaf + 1, state.batch_stats))
    jax.tree.map(
        np.testing.assert_array_equal, fresh_target(state).target["batch_stats"], state.batch_stats
    )


def test_a_fresh_state_can_be_donated_and_scan_and_vmap_equal_the_loop(images, labels):
    """One program of several steps, over two points of a sweep side by side."""
    points = [some_hparams(target_ema=0.9), some_hparams(seed=11, target_ema=0.5, pred_coeff=2.0)]
    many = jax.tree.map(lambda *values: np.stack(values), *points)
    create = functools.partial(new_state, BYOL, has_target=True)
    order = np.stack([np.arange(BATCH), np.arange(BATCH)[::-1]]).astype(np.int32)
    epoch = jax.vmap(make_train_epoch(new_step(BYOL)), in_axes=(0, None, None, None, 0))
    swept, _ = jax.jit(epoch, donate_argnums=0)(jax.vmap(create)(many), images, labels, order, many)
    step = jax.jit(new_step(BYOL), donate_argnums=0)
    for row, hparams in enumerate(points):
        state = create(hparams)
        for places in order:
            state, _ = step(state, images[places], labels[places], hparams)
        assert isinstance(state, TargetState)
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_allclose(a[row], b, rtol=1e-3, atol=1e-5),
            swept,
            state,
        )


# --- what was there before ------------------------------------------------------------------------


@flax.struct.dataclass
class StateOfOld:
    """The training state as it was before there were target networks."""

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: tuple
    probe: object


@pytest.mark.parametrize("num_classes", [0, NUM_CLASSES])
def test_a_checkpoint_of_before_is_restored(tmp_path, num_classes):
    state = create_train_state(
        DENSE, some_hparams(), image_shape=(8, 8, 3), num_classes=num_classes
    )
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(StateOfOld)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, StateOfOld(**fields), {}, {})
    checkpoints.wait()
    found, _ = checkpoints.restore(3, state)
    checkpoints.close()
    assert [field.name for field in dataclasses.fields(state)] == list(fields)
    jax.tree.map(np.testing.assert_array_equal, found, state)


# --- refusals -------------------------------------------------------------------------------------


def test_a_predictor_in_pieces_and_a_second_term_of_its_name_are_refused(images, labels):
    with pytest.raises(ValueError, match="microbatches"):
        new_step(BYOL, microbatches=2)

    def loss_fn(key, z1, z2, hparams):
        return jnp.mean(z1), {"pred_loss": jnp.mean(z2)}

    hparams = some_hparams()
    with pytest.raises(ValueError, match="'pred_loss', the predictor's own"):
        new_step(BYOL, loss_fn=loss_fn)(new_state(BYOL, hparams), images, labels, hparams)


def test_a_fault_of_the_predictor_has_a_name():
    places = fault_places(new_state(BYOL, some_hparams()).params)
    assert "the gradient of predictor/Dense_1/bias is not finite" in places


# --- collapse -------------------------------------------------------------------------------------


def noised(key, images):
    """Two views that share half of what they show."""
    noise = jax.random.uniform(key, (2, *images.shape))
    return [to_float(images) / 2 + part / 2 for part in noise]


def trained(model, weights, images, *, has_target, num_steps=300, loss="vicreg"):
    """z of the images before and after a short training by a loss's terms, weighted."""
    hparams = some_hparams(
        lr=0.1, min_lr=0.1, weight_decay=0, warmup_steps=0, num_steps=num_steps, **weights
    )
    hparams = dataclasses.replace(hparams, target_ema=np.float32(0.9))
    state = new_state(model, hparams, optimizer="sgd", has_target=has_target)
    loss_fn = make_loss_fn({"type": loss, "num_directions": 64}, 1)
    step = new_step(model, augment_fn=noised, loss_fn=loss_fn, optimizer="sgd")
    epoch = make_train_epoch(step)
    unlabelled = np.full(len(images), -1, np.int32)
    order = np.tile(np.arange(len(images), dtype=np.int32), (num_steps, 1))

    def embed(state):
        return model.apply({"params": state.params}, normalised(to_float(images)), False)[0][1]

    after, _ = jax.jit(epoch)(state, images, unlabelled, order, hparams)
    return embed(state), embed(after)


@pytest.mark.parametrize(
    ("loss", "against"),
    [
        ("vicreg", {"sim_coeff": 0, "std_coeff": 1, "cov_coeff": 1}),
        ("sigreg", {"sim_coeff": 0, "sigreg_coeff": 10}),
    ],
)
def test_prediction_with_a_regulariser_does_not_collapse_and_bare_invariance_does(
    cifar_arrays, loss, against
):
    """Six dimensions that go on to vary each in its own way, beside six that repeat each other."""
    images = cifar_arrays["train_images"][:64, ::4, ::4]
    before, kept = trained(BYOL, against, images, has_target=True, loss=loss)
    bare = {"sim_coeff": 1, "std_coeff": 0, "cov_coeff": 0}
    _, lost = trained(DENSE, bare, images, has_target=False)
    assert dimension_std(kept).min() > 0.5
    assert rank_me(kept) > 0.8 * rank_me(before)
    assert rank_me(lost) < 0.5 * rank_me(before)
