"""The hand count of FLOPs and bytes against counts made in other ways."""

import jax
import jax.numpy as jnp
import pytest

from configs import cpu, default, rapid
from jepa_jax.benchmark import roofline
from jepa_jax.config import create_encoder


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(getattr(value, "jaxpr", value))


def traced_products(config):
    """(multiply-adds of the convolutions, of the dense layers) of one view, from the trace."""
    config.training.use_amp = False  # bfloat16 does not pass the tests' strict promotion
    model = create_encoder(config).model
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    trace = jax.make_jaxpr(lambda v, x: model.apply(v, x, True))(variables, images)
    convolved = dense = 0
    for equation in equations(trace.jaxpr):
        size = equation.outvars[0].aval.size // 2
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            convolved += size * kernel[0] * kernel[1] * kernel[2]
        elif equation.primitive.name == "dot_general":
            dense += size * equation.invars[1].aval.shape[0]
    return convolved, dense


def with_stem(**changes):
    config = rapid.get_config()
    config.model.update(changes)
    return config


@pytest.mark.parametrize(
    "config",
    [
        rapid.get_config(),
        cpu.get_config(),
        default.get_config(),
        with_stem(stem_kernel=7, stem_stride=2, stem_padding=3, stem_pool=True, width=10),
        with_stem(stage_sizes=(1, 3), width=6, use_projector=False),
        with_stem(stage_sizes=(2, 3), width=6, block="bottleneck", expand_dim=5),
    ],
    ids=["rapid", "cpu", "default", "imagenet stem", "two stages", "bottlenecks"],
)
def test_multiply_adds_are_those_of_the_traced_network(config):
    counted = roofline.count(config.model.to_dict(), batch_size=8, bytes_per_value=2)
    per_view = counted["multiply_adds_per_view"]
    assert (per_view["encoder"], per_view["projector"]) == traced_products(config)


def test_the_known_figures_of_resnet_18():
    def encoder(padding):
        model = {**rapid.get_config().model.to_dict(), "stem_padding": padding}
        counted = roofline.count(model, batch_size=8, bytes_per_value=2)
        return counted["multiply_adds_per_view"]["encoder"]

    assert encoder(1) == pytest.approx(555.4e6, rel=1e-4)  # ResNet-18's on CIFAR, as published
    assert encoder(2) == pytest.approx(703.6e6, rel=1e-4)


@pytest.mark.parametrize(
    ("block", "stage_sizes", "published"),
    [("basic", (2, 2, 2, 2), 1.814e9), ("bottleneck", (3, 4, 6, 3), 4.089e9)],
)
def test_the_known_figures_at_224_pixels(block, stage_sizes, published):
    """torchvision's of ResNet-18 and ResNet-50, which include a head of 1,000 classes."""
    stem = {"stem_kernel": 7, "stem_stride": 2, "stem_padding": 3, "stem_pool": True}
    model = with_stem(**stem, block=block, stage_sizes=stage_sizes).model.to_dict()
    counted = roofline.count(model, batch_size=8, bytes_per_value=2, image_side=224)
    head = 1000 * roofline.feature_dim(model)
    found = counted["multiply_adds_per_view"]["encoder"] + head
    assert found == pytest.approx(published, rel=5e-4)


def test_the_budget_of_a_rapid_step():
    counted = roofline.count(rapid.get_config().model.to_dict(), batch_size=3072, bytes_per_value=2)
    assert counted["flops_per_image"] == pytest.approx(9.06e9, rel=0.005)
    assert counted["flops_per_step"] == pytest.approx(27.8e12, rel=0.005)
    assert counted["bytes_per_view"]["unfused"] == pytest.approx(22.7e6, rel=0.05)
    assert counted["bytes_per_view"]["fused"] == pytest.approx(15.6e6, rel=0.05)


def test_the_parameters_are_those_of_the_network_without_biases_and_norms():
    config = cpu.get_config()
    model = create_encoder(config).model
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    counted = roofline.count(config.model.to_dict(), batch_size=8, bytes_per_value=4)
    assert counted["num_weights"] == kernels


def test_the_loss_takes_the_smaller_of_both_forms():
    model = cpu.get_config().model.to_dict()

    def of_loss(batch_size):
        counted = roofline.count(model, batch_size=batch_size, bytes_per_value=4)
        return counted["multiply_adds_per_image"]["loss"]

    assert of_loss(100) == 2 * 100 * 512
    assert of_loss(512) == of_loss(9000) == 2 * 512 * 512


def test_four_views_cost_what_twice_as_many_images_of_two_cost():
    model = cpu.get_config().model.to_dict()
    four = roofline.count(model, batch_size=48, bytes_per_value=4, num_views=4)
    two = roofline.count(model, batch_size=96, bytes_per_value=4)
    for name in ("flops_per_step", "bytes_per_step", "multiply_adds_per_view"):
        assert four[name] == two[name]
    assert four["flops_per_image"] == 2 * two["flops_per_image"]


def test_local_crops_cost_what_a_network_of_their_side_costs():
    model = cpu.get_config().model.to_dict()
    options = {"batch_size": 48, "bytes_per_value": 4}
    plain = roofline.count(model, image_side=16, **options)
    crops = roofline.count(model, image_side=16, num_local_crops=3, local_side=8, **options)
    small = roofline.count(model, image_side=8, **options)
    assert crops["multiply_adds_per_local_crop"] == small["multiply_adds_per_view"]
    assert crops["multiply_adds_per_view"] == plain["multiply_adds_per_view"]
    # Two views in plain and in small each; every view has a matrix of the loss.
    more = 1.5 * small["flops_per_image"]
    assert crops["flops_per_image"] == plain["flops_per_image"] + more
    for kind in ("unfused", "fused"):
        added = crops["bytes_per_step"][kind] - plain["bytes_per_step"][kind]
        assert added == 3 * 48 * small["bytes_per_view"][kind]


def test_bytes_scale_with_the_width_of_a_value_and_floors_with_the_rates():
    model = cpu.get_config().model.to_dict()
    narrow = roofline.count(model, batch_size=64, bytes_per_value=2)
    wide = roofline.count(model, batch_size=64, bytes_per_value=4)
    for kind in ("unfused", "fused"):
        assert wide["bytes_per_view"][kind] == 2 * narrow["bytes_per_view"][kind]
        moved = 2 * 64 * wide["bytes_per_view"][kind] + wide["bytes_of_parameters"]
        assert wide["bytes_per_step"][kind] == moved
    floor = roofline.floors(wide, flops_per_second=1e12, bytes_per_second=1e9)
    assert floor["arithmetic"] == wide["flops_per_step"] / 1e12
    assert floor["memory_unfused"] == wide["bytes_per_step"]["unfused"] / 1e9
    assert floor["memory_fused"] < floor["memory_unfused"]
