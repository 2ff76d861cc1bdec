"""Models: sizes, initial distributions, BatchNorm's conventions, dtypes, and the whitening stem."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.models import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    BasicBlock,
    BatchNorm,
    BottleneckBlock,
    Encoder,
    ImageJEPA,
    ModelFns,
    Projector,
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
    linen_model,
    normalize,
    patch_whitening_kernel,
)


def shapes_of(module, *args, **kwargs):
    """Shapes of the variables, without computing them."""
    init = functools.partial(module.init, **kwargs)
    return jax.eval_shape(init, jax.random.key(0), *args)


def count(tree):
    return sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(tree))


def some_variables(module, *args, **kwargs):
    """Variables of the module's shapes with random values; a compiled init takes seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(max(1.0, np.prod(leaf.shape[:-1])))
        return np.float32(1.0 + np.abs(values) if path[-1].key in ("var", "scale") else values)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(module, *args, **kwargs))


@pytest.fixture(scope="module")
def tiny():
    """A ResNet of two stages with a projector: (module, its pair of functions, variables)."""
    module = ImageJEPA(ResNet(stage_sizes=(1, 1), width=4), Projector(6, 5))
    return module, linen_model(module), some_variables(module, jnp.zeros((2, 8, 8, 3)))


@pytest.fixture(scope="module")
def batch(cifar_arrays):
    """Sixteen real images, cut to 8x8, normalised."""
    return normalize(cifar_arrays["train_images"][::25, 12:20, 12:20], CIFAR10_MEAN, CIFAR10_STD)


# --- sizes ---------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_reference():
    encoder = shapes_of(ResNet18(stem_padding=2), jnp.zeros((1, 32, 32, 3)))
    projector = shapes_of(Projector(2048, 2048), jnp.zeros((1, 512)))
    assert count(encoder["params"]) == 11_168_832
    assert count(projector["params"]) == 9_451_520


@pytest.mark.parametrize(
    ("network", "size"), [(ResNet18, 11_176_512), (ResNet34, 21_284_672), (ResNet50, 23_508_032)]
)
def test_networks_of_large_images_have_torchvisions_parameters(network, size):
    """Its published 11,689,512 and 25,557,032 without a head of 1,000 classes."""
    module = network(stem_kernel=7, stem_stride=2, stem_padding=3, stem_pool=True)
    assert count(shapes_of(module, jnp.zeros((1, 224, 224, 3)))["params"]) == size


def test_an_unknown_block_is_one_line():
    with pytest.raises(ValueError, match="block must be one of basic, bottleneck, got 'wide'"):
        shapes_of(ResNet(block="wide"), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(
    ("stem_stride", "stem_padding", "sides"), [(1, 1, (32, 16, 8, 4)), (1, 2, (34, 17, 9, 5))]
)
def test_maps_have_the_sides_of_pytorchs_padding(stem_stride, stem_padding, sides):
    """Padding 2 gives 34x34 maps, and strided convolutions pad (1, 1), not Flax's 'SAME'."""
    module = ResNet18(stem_stride=stem_stride, stem_padding=stem_padding)
    found = {}

    def record(next_fun, args, kwargs, context):
        output = next_fun(*args, **kwargs)
        if isinstance(context.module, BasicBlock) and context.method_name == "__call__":
            found[context.module.name] = output.shape
        return output

    with nn.intercept_methods(record):
        h = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((3, 32, 32, 3)))[0]
    assert h.shape == (3, 512)
    for stage, side in enumerate(sides):
        assert found[f"stage{stage}_block1"] == (3, side, side, 64 * 2**stage)


def test_a_narrow_resnet_has_the_features_of_its_last_stage():
    module = ResNet(stage_sizes=(1, 1, 1), width=32, stem_stride=2)
    h = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))[0]
    assert (h.shape, h.dtype) == ((2, 128), jnp.float32)


def test_convolutions_have_no_bias_and_only_changing_blocks_have_a_skip_convolution():
    params = shapes_of(ResNet(stage_sizes=(2, 2), width=4), jnp.zeros((1, 8, 8, 3)))["params"]
    with_skip = [name for name, block in params.items() if "skip_conv" in block]
    assert with_skip == ["stage1_block0"]
    assert params["stage1_block0"]["skip_conv"]["kernel"].shape == (1, 1, 4, 8)
    assert "bias" not in params["stem_conv"]
    assert set(params["stage0_block0"]["Conv_0"]) == {"kernel"}


def test_a_strided_convolution_pads_one_on_each_side(batch):
    """Against a strided slice of the same convolution without stride, as PyTorch defines it."""
    block = BasicBlock(4, stride=2)
    variables = some_variables(block, batch, train=False)
    kernel = variables["params"]["Conv_0"]["kernel"]
    _, state = jax.jit(
        lambda v, x: block.apply(v, x, False, capture_intermediates=True, mutable="intermediates")
    )(variables, batch)
    found = state["intermediates"]["Conv_0"]["__call__"][0]
    padded = np.pad(batch, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    np.testing.assert_allclose(found, np.einsum("bpqchw,hwcf->bpqf", windows, kernel), atol=1e-4)


def convolved(x, kernel, stride, padding):
    """A convolution by its definition, float64."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bpqchw,hwcf->bpqf", windows[:, ::stride, ::stride], kernel)


@pytest.mark.parametrize(("stride", "width"), [(1, 2), (2, 2), (2, 3), (1, 3)])
def test_a_bottleneck_is_three_convolutions_of_which_the_3x3_strides(stride, width, batch):
    """Against numpy, in evaluation; at 8 input channels a width of 2 alone can skip as it is."""
    x = np.concatenate([batch, batch, batch[..., :2]], axis=-1)[:2]
    block = BottleneckBlock(width, stride=stride)
    variables = some_variables(block, x, train=False)
    found = jax.jit(block.apply, static_argnums=2)(variables, x, False)
    params, stats = variables["params"], variables["batch_stats"]

    def layer(x, conv, norm, **how):
        x = convolved(x, params[conv]["kernel"], **how)
        x = (x - stats[norm]["mean"]) / np.sqrt(stats[norm]["var"] + 1e-5)
        return x * params[norm]["scale"] + params[norm]["bias"]

    y = np.maximum(layer(x, "Conv_0", "BatchNorm_0", stride=1, padding=0), 0)
    y = np.maximum(layer(y, "Conv_1", "BatchNorm_1", stride=stride, padding=1), 0)
    y = layer(y, "Conv_2", "BatchNorm_2", stride=1, padding=0)
    assert ("skip_conv" in params) == (stride == 2 or width == 3)
    if "skip_conv" in params:
        x = layer(x, "skip_conv", "skip_norm", stride=stride, padding=0)
    assert found.shape == (2, 8 // stride, 8 // stride, 4 * width)
    np.testing.assert_allclose(found, np.maximum(x + y, 0), atol=1e-4)


# --- initial values ------------------------------------------------------------------------------


def test_initial_distributions_are_torchvisions():
    module = ResNet(stage_sizes=(1, 1), width=48)
    variables = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 4, 4, 3)))
    params = jax.device_get(variables["params"])
    stem = params["stem_conv"]["kernel"]
    bound = 1 / np.sqrt(3 * 3 * 3)
    assert np.max(np.abs(stem)) <= bound
    np.testing.assert_allclose(np.std(stem), bound / np.sqrt(3), rtol=0.03)
    assert np.max(np.abs(stem)) > 0.99 * bound
    for block, name, fan_out in (
        ("stage0_block0", "Conv_0", 9 * 48),
        ("stage1_block0", "Conv_0", 9 * 96),
        ("stage1_block0", "skip_conv", 96),
    ):
        kernel = params[block][name]["kernel"]
        np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / fan_out), rtol=0.03)
        # Not truncated: some values lie beyond 2.5 deviations, 1.2 % of a normal distribution's.
        beyond = np.mean(np.abs(kernel) > 2.5 * np.sqrt(2 / fan_out))
        np.testing.assert_allclose(beyond, 0.0124, rtol=0.35)
    norms = [params["stem_norm"], params["stage1_block0"]["skip_norm"]]
    for norm in [*norms, params["stage0_block0"]["BatchNorm_1"]]:
        np.testing.assert_array_equal(norm["scale"], np.ones_like(norm["scale"]))
        np.testing.assert_array_equal(norm["bias"], np.zeros_like(norm["bias"]))


def test_linear_layers_are_uniform_by_their_fan_in_biases_too():
    variables = jax.jit(Projector(900, 500).init)(jax.random.key(2), jnp.zeros((1, 50)))
    params = jax.device_get(variables["params"])
    for layer, fan_in in (("Dense_0", 50), ("Dense_1", 900), ("Dense_2", 900)):
        bound = fan_in**-0.5
        for values in params[layer].values():
            assert 0.98 * bound < np.max(np.abs(values)) <= bound
            np.testing.assert_allclose(np.std(values), bound / np.sqrt(3), rtol=0.06)


# --- computing -----------------------------------------------------------------------------------


def test_running_statistics_move_a_tenth_of_the_way_to_the_batchs(tiny, batch):
    """Flax's momentum 0.9 is PyTorch's 0.1."""
    _, model, variables = tiny
    kernel = variables["params"]["encoder"]["stem_conv"]["kernel"]
    maps = jax.lax.conv_general_dilated(
        batch, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    maps = np.asarray(maps, np.float64)
    old = {"mean": 0.5, "var": 2.0}
    stats = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full_like(leaf, old[path[-1].key]), variables["batch_stats"]
    )
    _, new = jax.jit(model.apply, static_argnums=2)(
        {**variables, "batch_stats": stats}, batch, True
    )
    found = new["encoder"]["stem_norm"]
    np.testing.assert_allclose(found["mean"], 0.45 + 0.1 * maps.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["var"], 1.8 + 0.1 * maps.var((0, 1, 2), ddof=1), rtol=1e-4)


def test_the_running_variance_is_the_unbiased_one_and_the_normalising_one_is_not():
    """As in PyTorch; of five rows the two differ by a quarter."""
    h = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    norm = BatchNorm(use_running_average=False, momentum=0.9)
    old = {"mean": jnp.full(3, 0.5), "var": jnp.full(3, 2.0)}
    params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    found, new = norm.apply({"params": params, "batch_stats": old}, h, mutable=["batch_stats"])
    np.testing.assert_allclose(found, (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5), atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.45 + 0.1 * h.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 1.8 + 0.1 * h.var(0, ddof=1), rtol=1e-5)
    assert set(norm.init(jax.random.key(0), h)) == {"params", "batch_stats"}


def test_the_stem_of_larger_images_halves_the_map_twice():
    """The paper's: 7x7 of stride 2, then a 3x3 max-pool of stride 2, both padded by half."""
    module = ResNet(
        stage_sizes=(1,), width=4, stem_kernel=7, stem_stride=2, stem_padding=3, stem_pool=True
    )
    images = np.random.default_rng(2).normal(size=(2, 16, 16, 3)).astype(np.float32)
    variables = some_variables(module, images)
    assert variables["params"]["stem_conv"]["kernel"].shape == (7, 7, 3, 4)
    _, state = jax.jit(
        lambda v, x: module.apply(v, x, capture_intermediates=True, mutable="intermediates")
    )(variables, images)
    maps = np.asarray(state["intermediates"]["stem_norm"]["__call__"][0])
    (found,) = state["intermediates"]["stage0_block0"]["__call__"]
    assert maps.shape == (2, 8, 8, 4)
    # Padded by zeros, which after the ReLU is no different from minus infinity.
    padded = np.pad(np.maximum(maps, 0.0), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    block = {kind: tree["stage0_block0"] for kind, tree in variables.items()}
    expected = jax.jit(BasicBlock(4).apply, static_argnums=2)(block, windows.max((-1, -2)), False)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_outputs_have_the_computes_dtype_but_never_less_than_float32(dtype):
    module = ImageJEPA(ResNet((1,), width=4, dtype=dtype), Projector(4, 4, dtype=dtype))
    # Parameters are initialised in float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        images = jnp.zeros((2, 8, 8, 3), dtype)
        variables = jax.eval_shape(module.init, jax.random.key(0), images)
        outputs = jax.eval_shape(module.apply, variables, images)
    assert {output.dtype for output in outputs} == {jnp.dtype(dtype)}


def test_training_uses_the_batchs_moments_and_evaluation_the_running_ones(tiny, batch):
    _, model, variables = tiny
    apply = jax.jit(model.apply, static_argnums=2)
    (h_train, _), new = apply(variables, batch, True)
    (h_eval, _), same = apply(variables, batch, False)
    moved = {**variables, "batch_stats": new}
    np.testing.assert_allclose(apply(moved, batch, True)[0][0], h_train, atol=1e-6)
    assert np.max(np.abs(apply(moved, batch, False)[0][0] - h_eval)) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, same, variables["batch_stats"])
    (alone, _), _ = apply(variables, batch[:1], False)
    np.testing.assert_allclose(alone, h_eval[:1], atol=1e-5)


def test_projector_is_linear_norm_relu_twice_then_linear():
    """Against numpy, with the batch's own moments."""
    module = Projector(7, 4)
    h = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    variables = some_variables(module, h)
    found, _ = jax.jit(lambda v, h: module.apply(v, h, True, mutable=["batch_stats"]))(variables, h)
    x = h.astype(np.float64)
    for layer in range(3):
        dense = variables["params"][f"Dense_{layer}"]
        x = x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"])
        if layer < 2:
            norm = variables["params"][f"BatchNorm_{layer}"]
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
            x = np.maximum(x * norm["scale"] + norm["bias"], 0.0)
    np.testing.assert_allclose(found, x, atol=1e-4)


def test_features_are_the_mean_over_the_last_map(batch):
    module = ResNet(stage_sizes=(1,), width=4)
    variables = some_variables(module, batch)
    h, state = jax.jit(
        lambda v, x: module.apply(v, x, capture_intermediates=True, mutable="intermediates")
    )(variables, batch)
    (maps,) = state["intermediates"]["stage0_block0"]["__call__"]
    np.testing.assert_allclose(h, np.mean(maps, axis=(1, 2)), rtol=1e-5)
    assert np.min(maps) == 0.0  # the block ends in a ReLU


def test_without_a_projector_z_is_h(tiny, batch):
    module = ImageJEPA(ResNet(stage_sizes=(1, 1), width=4))
    _, _, variables = tiny
    encoder_only = {kind: {"encoder": tree["encoder"]} for kind, tree in variables.items()}
    h, z = jax.jit(module.apply)(encoder_only, batch)
    np.testing.assert_array_equal(z, h)
    full, _ = jax.jit(tiny[0].apply)(variables, batch)
    np.testing.assert_allclose(h, full, atol=1e-6)


def test_bfloat16_computes_coarsely_but_keeps_float32_where_it_matters(tiny, batch):
    """Parameters, running statistics, h and z are float32; the values follow float32's."""
    _, full_model, variables = tiny
    half = ResNet(stage_sizes=(1, 1), width=4, dtype=jnp.bfloat16)
    model = linen_model(ImageJEPA(half, Projector(6, 5, dtype=jnp.bfloat16)))
    # Flax's BatchNorm itself mixes the dtypes.
    with jax.numpy_dtype_promotion("standard"):
        init = jax.eval_shape(model.init, jax.random.key(0), batch)
        (h, z), stats = jax.jit(model.apply, static_argnums=2)(variables, batch, True)
    assert {leaf.dtype for leaf in jax.tree.leaves(init)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves((h, z, stats))} == {jnp.dtype(jnp.float32)}
    (h_full, _), _ = jax.jit(full_model.apply, static_argnums=2)(variables, batch, True)
    np.testing.assert_allclose(h, h_full, atol=0.1)
    assert np.max(np.abs(h - h_full)) > 1e-5  # bfloat16 was used at all


# --- the seam ------------------------------------------------------------------------------------


def test_linen_model_is_the_module(tiny, batch):
    module, model, variables = tiny
    assert jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0), batch)) == (
        jax.tree.structure(variables)
    )
    expected, updates = jax.jit(lambda v, x: module.apply(v, x, True, mutable=["batch_stats"]))(
        variables, batch
    )
    output, stats = jax.jit(model.apply, static_argnums=2)(variables, batch, True)
    jax.tree.map(np.testing.assert_array_equal, (output, stats), (expected, updates["batch_stats"]))


def test_linen_model_of_a_module_without_batch_statistics():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            h = nn.Dense(3)(jnp.mean(x, axis=(1, 2)))
            return h, 2.0 * h

    model = linen_model(Plain())
    images = jnp.ones((2, 4, 4, 3))
    variables = model.init(jax.random.key(0), images)
    assert set(variables) == {"params"}
    for train in (True, False):
        (h, z), stats = model.apply(variables, images, train)
        np.testing.assert_allclose(z, 2 * h)
        assert stats == {}


def test_normalisation_of_uint8_and_of_floats():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    expected = (images / 255 - np.array(CIFAR10_MEAN)) / np.array(CIFAR10_STD)
    for given in (images, np.float32(images / 255)):
        found = normalize(given, CIFAR10_MEAN, CIFAR10_STD)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_cifar10_constants_are_the_references():
    assert CIFAR10_MEAN == (0.4914, 0.4822, 0.4465)
    assert CIFAR10_STD == (0.2023, 0.1994, 0.2010)


def test_encoder_normalises_inside_and_takes_uint8_or_floats(tiny, cifar_arrays):
    _, model, variables = tiny
    images = cifar_arrays["test_images"][:4, :8, :8]
    encoder = Encoder(model)
    from_bytes = encoder.apply(variables, images)
    from_floats = encoder.apply(variables, np.float32(images) / np.float32(255))
    np.testing.assert_allclose(from_bytes, from_floats, atol=1e-6)
    normalised = (images / 255 - np.array(CIFAR10_MEAN)) / np.array(CIFAR10_STD)
    (h, _), _ = jax.jit(model.apply, static_argnums=2)(variables, np.float32(normalised), False)
    np.testing.assert_allclose(from_bytes, h, atol=1e-5)


def test_encoder_uses_the_normalisation_it_was_given():
    model = ModelFns(lambda key, x: {}, lambda v, x, train: ((jnp.mean(x, axis=(1, 2)), None), {}))
    encoder = Encoder(model, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    h = encoder.apply({}, np.full((1, 2, 2, 3), 0.5, np.float32))
    np.testing.assert_allclose(h, [[0.4, 0.15, 0.05]], rtol=1e-5)


# --- the whitening stem --------------------------------------------------------------------------


def responses(images, kernel):
    """Of every patch inside the images, by windows: [patches, filters]."""
    side = kernel.shape[0]
    windows = np.lib.stride_tricks.sliding_window_view(images, (side, side), axis=(1, 2))
    return np.einsum("bpqchw,hwcf->bpqf", windows, kernel).reshape(-1, kernel.shape[-1])


@pytest.mark.parametrize(("num_filters", "patch_size"), [(54, 3), (20, 2)])
def test_whitening_stem_whitens_patches(num_filters, patch_size, cifar_arrays):
    images = np.asarray(normalize(cifar_arrays["train_images"][::10], CIFAR10_MEAN, CIFAR10_STD))
    eps = 1e-3
    whiten = jax.jit(patch_whitening_kernel, static_argnums=1, static_argnames="patch_size")
    kernel = whiten(images, num_filters, patch_size=patch_size, eps=eps)
    assert kernel.shape == (patch_size, patch_size, 3, num_filters)
    half = num_filters // 2
    np.testing.assert_array_equal(kernel[..., half:], -kernel[..., :half])
    covariance = np.cov(responses(images, np.asarray(kernel, np.float64))[:, :half].T)
    variances = np.diag(covariance)
    # An eigenvalue v leaves v / (v + eps) of the variance: 1 but for the smallest.
    patches = np.lib.stride_tricks.sliding_window_view(images, (patch_size,) * 2, axis=(1, 2))
    eigenvalues = np.linalg.eigvalsh(np.cov(patches.reshape(-1, 3 * patch_size**2).T))[::-1][:half]
    np.testing.assert_allclose(variances, eigenvalues / (eigenvalues + eps), atol=5e-3)
    np.testing.assert_allclose(covariance - np.diag(variances), 0.0, atol=5e-3)


@pytest.mark.parametrize("num_filters", [7, 56])
def test_whitening_stem_refuses_odd_and_too_many_filters(num_filters):
    with pytest.raises(ValueError, match=f"even number of filters, at most 54; got {num_filters}"):
        patch_whitening_kernel(jnp.zeros((1, 8, 8, 3)), num_filters)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_remat_computes_the_same_and_keeps_less_for_the_backward_pass(block, batch):
    def loss_of(remat):
        encoder = ResNet(stage_sizes=(2, 2), width=8, remat=remat, block=block, expand_dim=10)

        def loss(params):
            given = {**variables, "params": params}
            h, updates = encoder.apply(given, batch, True, mutable=["batch_stats"])
            return jnp.mean(jnp.square(h)), updates

        return loss

    def kept_bytes(loss):
        backward = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    module = ResNet(stage_sizes=(2, 2), width=8, block=block, expand_dim=10)
    variables = some_variables(module, batch)
    params = variables["params"]
    losses = [loss_of(remat) for remat in (False, True)]
    results = [jax.jit(jax.value_and_grad(loss, has_aux=True))(params) for loss in losses]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert kept_bytes(losses[1]) < 0.5 * kept_bytes(losses[0])
