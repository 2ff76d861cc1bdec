"""The vision transformer against a forward pass written in numpy, and its laws."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.config import create_encoder, feature_dim, num_parameters, validate
from jepa_jax.errors import ConfigError
from jepa_jax.interop import encoder_tensors, serialize_encoder
from jepa_jax.vit import VIT_SIZES, ViT, sincos_positions
from tests.tiny import tiny_config

SMALL = functools.partial(ViT, patch_size=4, dim=12, depth=2, num_heads=3)
KINDS = [("learned", "cls"), ("sincos", "mean")]


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (3, 8, 12, 3))


def some_variables(module, images):
    """Drawn at random all over: none of them is zero or one, as initial ones are."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)


def numpy_layer_norm(x, norm):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * norm["scale"] + norm["bias"]


def numpy_vit(params, images, *, patch=4, heads=3, positions=None, keep=None):
    """All tokens of one ViT, in float64, from its definition; images are looked at one by one."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    dense = lambda x, layer: x @ layer["kernel"] + layer["bias"]  # noqa: E731
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))
    tokens = []
    for image in np.asarray(images, np.float64):
        x = [
            np.tensordot(image[i : i + patch, j : j + patch], params["patch_embed"]["kernel"], 3)
            for i in range(0, image.shape[0], patch)
            for j in range(0, image.shape[1], patch)
        ]
        where = params["pos_embed"] if positions is None else np.asarray(positions)
        x = np.array(x) + params["patch_embed"]["bias"] + where.reshape(len(x), -1)
        x = x if keep is None else x[keep]
        if "class_token" in params:
            x = np.concatenate([[params["class_token"] + params["class_pos"]], x])
        for name in sorted(name for name in params if name.startswith("block")):
            block = params[name]
            q, k, v = np.split(
                dense(numpy_layer_norm(x, block["attention_norm"]), block["qkv"]), 3, axis=1
            )
            outputs = []
            for q_head, k_head, v_head in zip(
                *(np.split(a, heads, axis=1) for a in (q, k, v)), strict=True
            ):
                weights = np.exp(q_head @ k_head.T / math.sqrt(q_head.shape[1]))
                outputs.append(weights / weights.sum(1, keepdims=True) @ v_head)
            x = x + dense(np.concatenate(outputs, axis=1), block["attention_out"])
            y = gelu(dense(numpy_layer_norm(x, block["mlp_norm"]), block["mlp_in"]))
            x = x + dense(y, block["mlp_out"])
        tokens.append(numpy_layer_norm(x, params["norm"]))
    return np.array(tokens)


@pytest.mark.parametrize(("pos_embed", "pool"), KINDS)
def test_forward_is_the_papers(images, pos_embed, pool):
    module = SMALL(pos_embed=pos_embed, pool=pool)
    variables = some_variables(module, images)
    positions = sincos_positions(2, 3, 12) if pos_embed == "sincos" else None
    wanted = numpy_vit(variables["params"], images, positions=positions)
    h = module.apply(variables, images)
    tokens = module.apply(variables, images, method="tokens")
    expected_h = wanted[:, 0] if pool == "cls" else wanted.mean(1)
    np.testing.assert_allclose(h, expected_h, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tokens, wanted[:, -6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("pos_embed", "pool"), KINDS)
def test_patches_are_dropped_after_their_positions_were_added(images, pos_embed, pool):
    module = SMALL(pos_embed=pos_embed, pool=pool)
    variables = some_variables(module, images)
    positions = sincos_positions(2, 3, 12) if pos_embed == "sincos" else None
    kept = np.array([[4, 1], [0, 5], [2, 3]])
    tokens = module.apply(variables, images, keep=jnp.asarray(kept), method="tokens")
    for n, keep in enumerate(kept):
        wanted = numpy_vit(variables["params"], images[n : n + 1], positions=positions, keep=keep)[
            0, -2:
        ]
        np.testing.assert_allclose(tokens[n], wanted, rtol=1e-4, atol=1e-4)
    alike = module.apply(variables, images, keep=jnp.asarray(kept[0]), method="tokens")
    np.testing.assert_allclose(alike[0], tokens[0], rtol=1e-4, atol=1e-5)


def test_sincos_positions_are_the_formula():
    found = np.asarray(sincos_positions(3, 5, 8))
    for row in range(3):
        for column in range(5):
            angles = [place * 10000 ** (-i / 2) for place in (column, row) for i in range(2)]
            x, y = angles[:2], angles[2:]
            wanted = [f(a) for part in (x, y) for f in (math.sin, math.cos) for a in part]
            np.testing.assert_allclose(found[row, column], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a multiple of 4, got 6"):
        sincos_positions(2, 2, 6)


def test_learned_positions_are_resized_for_images_of_another_size(images):
    module = SMALL()
    variables = some_variables(module, images)
    params = variables["params"]
    assert params["pos_embed"].shape == (2, 3, 12)
    larger = jax.random.normal(jax.random.key(2), (2, 16, 24, 3))
    resized = jax.image.resize(params["pos_embed"], (4, 6, 12), "bicubic")
    given = {"params": {**params, "pos_embed": resized}}
    np.testing.assert_array_equal(module.apply(variables, larger), module.apply(given, larger))
    # Where all places are alike, so they are after it.
    same = {"params": {**params, "pos_embed": jnp.full_like(params["pos_embed"], 0.25)}}
    wanted = numpy_vit(same["params"], larger, positions=np.full((4, 6, 12), 0.25))[:, 0]
    np.testing.assert_allclose(module.apply(same, larger), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_the_patch_size_is_honoured(patch):
    module, images = SMALL(patch_size=patch, depth=1), jnp.zeros((1, 16, 8, 3))
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    assert params["patch_embed"]["kernel"].shape == (patch, patch, 3, 12)
    assert params["pos_embed"].shape == (16 // patch, 8 // patch, 12)
    wrong = jnp.zeros((1, 16, 8 + patch - 1, 3))
    text = f"images of 16 x {8 + patch - 1} pixels cannot be cut into patches of {patch}"
    with pytest.raises(ValueError, match=text):
        module.init(jax.random.key(0), wrong)


def test_one_gradient_law_remat_vmap_and_jit(images):
    """A step along the gradient gains as much as its slope says; all ways give the same one."""
    module = SMALL(depth=1)
    variables = some_variables(module, images)

    def loss(module, variables):
        return jnp.mean(module.apply(variables, images, True) ** 3)

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    value, grads = value_and_grad(module, variables)
    _, again = value_and_grad(SMALL(depth=1, remat=True), variables)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))

    def moved(t):
        return jax.tree.map(lambda v, g: v + t * g / norm, variables, grads)

    step = 1e-2
    both = [moved(-step), moved(step)]
    low, high = (value_and_grad(module, v)[0] for v in both)
    np.testing.assert_allclose((high - low) / (2 * step), norm, rtol=0.03)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    np.testing.assert_allclose(
        jax.vmap(functools.partial(loss, module))(stacked), jnp.stack([low, high]), rtol=1e-4
    )


def test_bfloat16_is_of_the_computation_alone(images):
    # JAX's own attention mixes dtypes in bfloat16, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        module = SMALL(depth=1, dtype=jnp.bfloat16)
        variables = module.init(jax.random.key(3), images)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        h = module.apply(variables, images)
    assert h.dtype == jnp.float32
    exact = SMALL(depth=1).apply(variables, images)
    assert 0 < np.abs(h - exact).max() < 0.2


# --- from a config -----------------------------------------------------------------------------


def vit_config(**overrides):
    return tiny_config(**{"model__type": "vit_ti", "model__stem_init": "random", **overrides})


@pytest.mark.parametrize(
    # Published, with a head of 1,000 classes: torchvision's vit_b_16, and DeiT's Ti and S.
    ("name", "published"),
    [("vit_ti", 5_717_416), ("vit_s", 22_050_664), ("vit_b", 86_567_656)],
)
def test_sizes_are_the_published_ones(name, published):
    module, images = ViT(patch_size=16, **VIT_SIZES[name]), jnp.zeros((1, 224, 224, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count + 1000 * (VIT_SIZES[name]["dim"] + 1) == published


@pytest.mark.parametrize(
    "model",
    [
        {"type": "vit_ti"},
        {"type": "vit_s", "patch_size": 8, "pos_embed": "sincos", "depth": 2},
        {"type": "vit_b", "patch_size": 16, "pool": "mean", "depth": 1, "use_projector": False},
        {"type": "resnet", "stage_sizes": (1, 2), "block": "bottleneck"},
    ],
)
def test_a_config_counts_what_it_builds(model):
    config = vit_config(**{f"model__{key}": value for key, value in model.items()})
    validate(config)
    encoder = create_encoder(config)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(encoder.model.init, jax.random.key(0), images)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert num_parameters(config.model) == count
    apply = functools.partial(encoder.model.apply, train=False)
    (h, _), _ = jax.eval_shape(apply, variables, images)
    assert h.shape == (2, feature_dim(config.model))


def test_a_patch_that_does_not_divide_is_one_line(tmp_path):
    from jepa_jax import from_arrays, train_and_evaluate

    images = np.zeros((300, 12, 12, 3), np.uint8)
    config = vit_config(model__patch_size=8)
    with pytest.raises(ConfigError, match="patch_size=8 does not divide images of 12 x 12 pixels"):
        train_and_evaluate(config, tmp_path, dataset=from_arrays(images))
    config = vit_config(data__view_size=10)
    with pytest.raises(ConfigError, match=r"does not divide views \(config.data.view_size\) of 10"):
        train_and_evaluate(config, tmp_path, dataset=from_arrays(images))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_exported_program_gives_what_the_encoder_does(pool):
    config = vit_config(model__depth=1, model__pool=pool, model__use_projector=False)
    encoder = create_encoder(config)
    variables = some_variables_of(encoder, (8, 8, 3))
    weights = encoder_tensors(variables)
    kernel = variables["params"]["encoder"]["block0"]["qkv"]["kernel"]
    np.testing.assert_array_equal(weights["block0.qkv.kernel"], kernel)
    program = jax.export.deserialize(bytearray(serialize_encoder(encoder, variables, (8, 8, 3))))
    images = np.random.default_rng(0).uniform(0, 1, (5, 8, 8, 3)).astype(np.float32)
    wanted = encoder.apply(variables, images)
    np.testing.assert_allclose(program.call(weights, images), wanted, rtol=1e-3, atol=1e-4)


def some_variables_of(encoder, image_shape):
    images = jnp.zeros((2, *image_shape), jnp.float32)
    return jax.jit(encoder.model.init)(jax.random.key(0), images)
