"""Augmentation against Pillow, colorsys and the definitions, on real images."""

import colorsys
import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image, ImageEnhance, ImageOps

from configs import cpu
from jepa_jax import augment
from jepa_jax.augment import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    color_jitter,
    gaussian_blur,
    multi_crop_views,
    pairs_of_views,
    random_color_jitter,
    random_crop_box,
    random_gaussian_blur,
    random_jitter_parameters,
    random_view,
    resize_images,
    resized_crop,
    rgb_to_grayscale,
    solarize,
    to_float,
    two_views,
)

# Pillow rounds to whole grey levels, the mean grey of its contrast too.
ONE_LEVEL = 1.5 / 255
FACTORS = (0.0, 0.6, 1.0, 1.4, 2.5)
CHOICES = ("jitter_prob", "grayscale_prob", "solarize_prob", "flip_prob")

jitted_views = jax.jit(two_views)
crop_to_size = {
    size: jax.jit(functools.partial(resized_crop, size=size)) for size in (5, 8, 32, 45)
}


@pytest.fixture(scope="module")
def images(cifar_arrays):
    """Eight images, one of them with black and white added."""
    images = cifar_arrays["train_images"][::50].copy()
    images[0, :4], images[0, 4:8] = 0, 255
    return images


@pytest.fixture(scope="module")
def floats(images):
    return np.float32(images) / np.float32(255)


@jax.jit
def views_of(image, probabilities):
    """1500 views of one image without crop, so that each choice shows; one compilation for all."""
    options = dict(zip(CHOICES, probabilities, strict=True))
    view = functools.partial(random_view, image=image, scale=(1.0, 1.0), **options)
    return jax.vmap(lambda key: view(key))(jax.random.split(jax.random.key(0), 1500))


def chosen_views(image, **probabilities):
    """Views made with these probabilities, the other choices never."""
    return np.asarray(views_of(image, [np.float32(probabilities.get(c, 0.0)) for c in CHOICES]))


def assert_share(hits, probability):
    """A binomial count within four and a half standard deviations; fixed keys, so no luck."""
    sigma = math.sqrt(len(hits) * probability * (1 - probability))
    assert abs(np.sum(hits) - len(hits) * probability) < 4.5 * sigma


def assert_uniform(samples, low, high):
    assert np.min(samples) >= low - 1e-3
    assert np.max(samples) <= high + 1e-3
    assert scipy.stats.kstest(samples, "uniform", (low, high - low)).pvalue > 0.01


# --- the cores ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("core", "enhancer"),
    [
        (adjust_brightness, ImageEnhance.Brightness),
        (adjust_contrast, ImageEnhance.Contrast),
        (adjust_saturation, ImageEnhance.Color),
    ],
)
def test_blends_equal_pillows(core, enhancer, images, floats):
    adjust = jax.jit(jax.vmap(core, in_axes=(0, None)))
    for factor in FACTORS:
        found = adjust(floats, np.float32(factor))
        expected = [np.asarray(enhancer(Image.fromarray(x)).enhance(factor)) for x in images]
        # A factor above 1 multiplies Pillow's rounding of the grey it blends with.
        tolerance = ONE_LEVEL * max(1.0, factor)
        np.testing.assert_allclose(found, np.float32(expected) / 255, atol=tolerance)


def test_blends_clip_to_the_range(floats):
    for core in (adjust_brightness, adjust_contrast, adjust_saturation):
        adjusted = jax.jit(jax.vmap(core, in_axes=(0, None)))(floats, np.float32(3.0))
        assert np.min(adjusted) >= 0.0
        assert np.max(adjusted) == 1.0


def test_contrast_is_about_the_mean_of_each_image_alone(floats):
    alone = adjust_contrast(floats[1], 0.0)
    expected = np.mean(floats[1].astype(np.float64) @ [0.2989, 0.587, 0.114])
    np.testing.assert_allclose(alone, expected, rtol=1e-5)


@pytest.mark.parametrize("delta", [-0.5, -0.13, 0.0, 0.1, 0.37])
def test_hue_equals_colorsys(delta, floats):
    found = jax.jit(jax.vmap(adjust_hue, in_axes=(0, None)))(floats[:3], np.float32(delta))
    expected = np.empty_like(floats[:3])
    for index in np.ndindex(expected.shape[:3]):
        hue, saturation, value = colorsys.rgb_to_hsv(*floats[index].tolist())
        expected[index] = colorsys.hsv_to_rgb((hue + delta) % 1.0, saturation, value)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_hue_of_pure_colours_turns_red_to_green_to_blue():
    red, green, blue = (
        np.broadcast_to(np.eye(3, dtype=np.float32)[c], (1, 1, 3)) for c in range(3)
    )
    for start, delta, end in ((red, 1 / 3, green), (green, 1 / 3, blue), (red, -1 / 3, blue)):
        np.testing.assert_allclose(jax.jit(adjust_hue)(start, np.float32(delta)), end, atol=1e-5)


def test_grayscale_equals_pillows_in_every_channel(images, floats):
    expected = np.stack([np.asarray(Image.fromarray(x).convert("L")) for x in images])
    expected = np.repeat(expected[..., None], 3, axis=-1)
    found = rgb_to_grayscale(floats)
    np.testing.assert_allclose(found, np.float32(expected) / 255, atol=ONE_LEVEL)


@pytest.mark.parametrize("threshold", [1, 64, 128, 255])
def test_solarize_equals_pillows_at_and_around_the_threshold(threshold):
    every_level = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=-1)
    expected = np.asarray(ImageOps.solarize(Image.fromarray(every_level), threshold))
    found = solarize(np.float32(every_level) / np.float32(255), threshold / 255)
    np.testing.assert_allclose(found, np.float32(expected) / 255, atol=1e-6)


def pillow_crop(image, top, left, height, width, size):
    """Crop, then Pillow's anti-aliased bilinear resize, in floats: no rounding to levels."""
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(3)]
    box = (left, top, left + width, top + height)
    resized = [c.crop(box).resize((size, size), Image.Resampling.BILINEAR) for c in channels]
    return np.stack([np.asarray(c) for c in resized], axis=-1)


@pytest.mark.parametrize("size", crop_to_size)
@pytest.mark.parametrize(
    "box",
    [(0, 0, 32, 32), (3, 5, 14, 20), (20, 0, 12, 32), (31, 31, 1, 1), (7, 11, 25, 9), (0, 2, 5, 5)],
)
def test_resized_crop_equals_pillows_crop_and_resize(box, size, floats):
    """Every box both shrunk and enlarged; what lies outside the box has no say."""
    found = crop_to_size[size](floats[2], *map(np.int32, box))
    np.testing.assert_allclose(found, pillow_crop(floats[2], *box, size), atol=2e-6)


def test_resized_crop_of_the_whole_image_to_its_own_size_is_the_identity(floats):
    whole = crop_to_size[32](floats[3], *map(np.int32, (0, 0, 32, 32)))
    np.testing.assert_array_equal(whole, floats[3])


@pytest.mark.parametrize("size", [16, 24, 48])
def test_resize_images_is_the_resized_crop_of_the_whole(size, images):
    whole = jax.vmap(lambda image: resized_crop(to_float(image), 0, 0, 32, 32, size))(images)
    np.testing.assert_allclose(resize_images(images, size), whole, atol=1e-6)
    np.testing.assert_array_equal(resize_images(images, 32), to_float(images))


def test_resized_crop_of_an_image_that_is_not_square(floats):
    image = floats[4][:20]
    found = crop_to_size[8](image, *map(np.int32, (4, 9, 15, 22)))
    np.testing.assert_allclose(found, pillow_crop(image, 4, 9, 15, 22, 8), atol=2e-6)


def test_color_jitter_applies_the_four_cores_in_every_order(floats):
    factors = {"brightness": 1.3, "contrast": 0.5, "saturation": 1.8, "hue": 0.08}
    cores = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    adjust = [jax.jit(functools.partial(c)) for c in cores]
    orders = np.array(list(itertools.permutations(range(4))), np.int32)
    jitter = jax.jit(jax.vmap(functools.partial(color_jitter, **factors), in_axes=(None, 0)))
    for image in floats[:2]:
        found = np.asarray(jitter(image, orders))
        for order, jittered in zip(orders, found, strict=True):
            expected = image
            for kind in order:
                expected = adjust[kind](expected, list(factors.values())[kind])
            np.testing.assert_allclose(jittered, expected, atol=2e-5, err_msg=str(order))
        assert len(np.unique(found.round(4), axis=0)) > 12  # the order matters


@pytest.mark.parametrize(("kernel_size", "height"), [(3, 32), (9, 20), (23, 32), (1, 7), (13, 7)])
def test_gaussian_blur_equals_scipys_on_a_mirrored_image(kernel_size, height, floats):
    """One program for every strength, as under vmap; scipy's 'mirror' is PyTorch's 'reflect'."""
    image, sigmas = floats[2][:height], np.float32([0.1, 0.5, 1.3, 2.0, 9.0])
    blur = jax.jit(jax.vmap(functools.partial(gaussian_blur, kernel_size=kernel_size), (None, 0)))
    for sigma, found in zip(sigmas, blur(image, sigmas), strict=True):
        expected = image.astype(np.float64)
        for axis in (0, 1):
            expected = scipy.ndimage.gaussian_filter1d(
                expected, sigma, axis, mode="mirror", radius=kernel_size // 2
            )
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_gaussian_blur_keeps_a_constant_and_leaves_the_image_at_a_small_sigma(floats):
    constant = np.full((16, 12, 3), 0.3, np.float32)
    np.testing.assert_allclose(gaussian_blur(constant, 2.0, 7), constant, atol=1e-6)
    np.testing.assert_array_equal(gaussian_blur(floats[0], 1e-3, 7), floats[0])


@pytest.mark.parametrize("kernel_size", [0, 4, -3, 17])
def test_gaussian_blur_refuses_an_even_and_a_wider_kernel_than_the_image_mirrors(kernel_size):
    message = f"of 8 x 9 pixels has an odd kernel_size of at most 15, got {kernel_size}"
    with pytest.raises(ValueError, match=message):
        gaussian_blur(np.zeros((8, 9, 3), np.float32), 1.0, kernel_size)


# --- what is drawn ------------------------------------------------------------------------------


def boxes(count, height, width, **options):
    keys = jax.random.split(jax.random.key(1), count)
    draw = jax.jit(jax.vmap(lambda key: random_crop_box(key, height, width, **options)))
    return np.stack([np.asarray(part) for part in draw(keys)]).astype(np.int64)


def test_crop_area_and_log_ratio_and_place_are_uniform():
    """At scales where every draw fits, on an image so large that rounding cannot show."""
    top, left, height, width = boxes(3000, 1000, 2000, scale=(0.1, 0.3))
    assert_uniform(height * width / 2e6, 0.1, 0.3)
    assert_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3))
    assert_uniform(top / (1000 - height), 0.0, 1.0)
    assert_uniform(left / (2000 - width), 0.0, 1.0)


def torchvisions_box(rng, side):
    """The published algorithm, draw by draw: (height, width) of a square image's crop."""
    for _ in range(10):
        area = side * side * rng.uniform(0.2, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= side and 0 < height <= side:
            return height, width
    return side, side


def test_default_crop_of_a_small_image_has_torchvisions_distribution_and_stays_inside():
    top, left, height, width = boxes(4000, 32, 32)
    assert np.min([top, left]) == 0
    assert np.min([height, width]) >= 1
    assert np.max(top + height) == 32
    assert np.max(left + width) == 32
    rng = np.random.default_rng(0)
    expected = np.array([torchvisions_box(rng, 32) for _ in range(4000)]).T
    for found, wanted in (
        (height, expected[0]),
        (width, expected[1]),
        (height * width, expected[0] * expected[1]),
    ):
        assert scipy.stats.ks_2samp(found, wanted).pvalue > 0.01


@pytest.mark.parametrize(
    ("shape", "expected"), [((8, 100), (0, 44, 8, 11)), ((100, 8), (44, 0, 11, 8))]
)
def test_where_no_draw_fits_the_crop_is_the_largest_central_box(shape, expected):
    for seed in range(3):
        found = random_crop_box(jax.random.key(seed), *shape, scale=(0.9, 1.0))
        np.testing.assert_array_equal(found, expected)


def test_flip_mirrors_the_columns_of_half_of_the_views(floats):
    patch = floats[1, :8, :8]
    views = chosen_views(patch, flip_prob=0.5)
    mirrored = np.all(views == patch[:, ::-1], axis=(1, 2, 3))
    kept = np.all(views == patch, axis=(1, 2, 3))
    assert np.all(mirrored ^ kept)
    assert_share(mirrored, 0.5)


@pytest.mark.parametrize(
    ("choice", "probability"), list(zip(CHOICES, (0.8, 0.2, 0.1, 0.5), strict=True))
)
def test_choices_have_the_references_probabilities_by_default(choice, probability, floats):
    patch = floats[5, :8, :8]
    default = inspect.signature(random_view).parameters[choice].default
    views = chosen_views(patch, **{choice: default})
    assert_share(np.any(np.abs(views - patch) > 1e-6, axis=(1, 2, 3)), probability)


def test_greyscale_solarize_and_flip_are_chosen_independently_and_in_this_order(floats):
    """All eight outcomes, each as often as the product of its probabilities."""
    patch = floats[0, 6:14, :8]  # white above colours: every outcome looks different
    probabilities = (0.3, 0.4, 0.5)
    views = chosen_views(patch, **dict(zip(CHOICES[1:], probabilities, strict=True)))
    changes = (rgb_to_grayscale, lambda x: solarize(x, 128 / 255), lambda x: x[:, ::-1])
    total = 0
    for chosen in itertools.product([False, True], repeat=3):
        expected, share = patch, 1.0
        for is_on, change, probability in zip(chosen, changes, probabilities, strict=True):
            expected = change(expected) if is_on else expected
            share *= probability if is_on else 1 - probability
        hits = np.max(np.abs(views - np.asarray(expected)), axis=(1, 2, 3)) < 1e-5
        assert_share(hits, share)
        total += np.sum(hits)
    assert total == len(views)


def test_a_blur_has_its_sigma_from_its_range(floats):
    """The share of a bright pixel that stays in place tells the sigma."""
    image = np.zeros((9, 9, 3), np.float32)
    image[4, 4] = 1.0
    options = {"kernel_size": 9, "sigma": (0.5, 1.5)}
    keys = jax.random.split(jax.random.key(3), 1500)
    blurs = jax.jit(jax.vmap(lambda key: random_gaussian_blur(key, image, **options)))(keys)
    found = np.asarray(blurs[:, 4, 5, 0] / blurs[:, 4, 4, 0], np.float64)
    assert_uniform(np.sqrt(-0.5 / np.log(found)), 0.5, 1.5)


NEVER = {"scale": (1.0, 1.0), **dict.fromkeys(CHOICES, 0.0)}


def test_a_share_of_the_views_is_blurred_and_no_two_alike(floats):
    patch = floats[5, :8, :8]
    options = {**NEVER, "blur_kernel": 3, "blur_prob": 0.3, "blur_sigma": (0.5, 2.0)}
    view = jax.jit(jax.vmap(functools.partial(random_view, image=patch, **options)))
    views = np.asarray(view(jax.random.split(jax.random.key(0), 1500)))
    is_blurred = np.any(np.abs(views - patch) > 1e-6, axis=(1, 2, 3))
    assert_share(is_blurred, 0.3)
    assert len(np.unique(views, axis=0)) == 1 + np.sum(is_blurred)


def test_a_blur_comes_after_the_greyscale_and_before_solarize(floats):
    patch = floats[0, 6:14, :8]
    options = {**NEVER, "solarize_prob": 1.0, "grayscale_prob": 1.0, "flip_prob": 1.0}
    blur = {"blur_kernel": 5, "blur_prob": 1.0, "blur_sigma": (1.2, 1.2)}
    found = random_view(jax.random.key(0), patch, **options, **blur)
    grey = rgb_to_grayscale(patch[:, ::-1])
    expected = solarize(gaussian_blur(grey, 1.2, 5), 128 / 255)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.max(np.abs(expected - gaussian_blur(solarize(grey, 128 / 255), 1.2, 5))) > 0.01


def test_a_blur_changes_no_other_draw(images):
    key = jax.random.key(13)
    blur = functools.partial(two_views, blur_kernel=3, solarize_prob=0.0)
    views = jax.jit(functools.partial(two_views, solarize_prob=0.0))(key, images)
    of_chance = {chance: jax.jit(blur)(key, images, blur_prob=chance) for chance in (0.0, 1.0)}
    for view, same, blurred in zip(views, of_chance[0.0], of_chance[1.0], strict=True):
        np.testing.assert_allclose(same, view, atol=1e-5)
        # Of all blurs that it may have, the view is one.
        sigmas = np.linspace(0.1, 2.0, 500).astype(np.float32)
        every = jax.jit(jax.vmap(functools.partial(gaussian_blur, kernel_size=3), (None, 0)))
        nearest = [
            np.abs(np.asarray(every(image, sigmas)) - found).max((1, 2, 3)).min()
            for image, found in zip(view, np.asarray(blurred), strict=True)
        ]
        assert np.max(nearest) < 5e-3


def test_a_blur_without_a_kernel_is_refused_and_none_is_computed(floats):
    with pytest.raises(ValueError, match="blur_prob above 0 needs a blur_kernel"):
        random_view(jax.random.key(0), floats[0], blur_prob=0.5)
    options = {"blur_prob": np.float32(0.5), "blur_sigma": (1.0, 2.0)}
    programs = {
        str(jax.make_jaxpr(functools.partial(random_view, **given))(jax.random.key(0), floats[0]))
        for given in ({}, options)
    }
    assert len(programs) == 1


def drawn_jitters(**amounts):
    """Orders [N, 4] and factors [N] by kind."""
    draw = jax.vmap(functools.partial(random_jitter_parameters, **amounts))
    drawn = jax.device_get(jax.jit(draw)(jax.random.split(jax.random.key(2), 4800)))
    return drawn.pop("order"), drawn


def test_random_color_jitter_applies_what_it_draws(floats):
    key, amounts = jax.random.key(4), {"brightness": 0.9, "hue": 0.3}
    expected = color_jitter(floats[1], **random_jitter_parameters(key, **amounts))
    found = random_color_jitter(key, floats[1], **amounts)
    np.testing.assert_array_equal(found, expected)
    assert np.max(np.abs(found - floats[1])) > 0.02


def test_jitter_draws_a_uniform_order_and_uniform_independent_factors():
    orders, factors = drawn_jitters()
    found, counts = np.unique(orders, axis=0, return_counts=True)
    assert sorted(map(tuple, found)) == list(itertools.permutations(range(4)))
    assert scipy.stats.chisquare(counts).pvalue > 0.01
    assert_uniform(factors["brightness"], 0.6, 1.4)
    assert_uniform(factors["contrast"], 0.6, 1.4)
    assert_uniform(factors["saturation"], 0.8, 1.2)
    assert_uniform(factors["hue"], -0.1, 0.1)
    correlation = np.corrcoef([*factors.values(), orders[:, 0]])
    assert np.max(np.abs(correlation - np.eye(5))) < 4.5 / math.sqrt(4800)


def test_a_jitter_larger_than_one_never_has_a_negative_factor():
    _, factors = drawn_jitters(brightness=3.0, contrast=1.0)
    assert_uniform(factors["brightness"], 0.0, 4.0)
    assert_uniform(factors["contrast"], 0.0, 2.0)


# --- the two views ------------------------------------------------------------------------------


def test_views_are_in_range_and_differ_from_their_originals(images, floats):
    for view in jitted_views(jax.random.key(5), images):
        # The weights of a resize sum to 1 within rounding.
        assert np.min(view) >= -1e-6
        assert np.max(view) <= 1 + 1e-6
        assert np.all(np.max(np.abs(view - floats), axis=(1, 2, 3)) > 0.01)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("size", "side"), [(None, 24), (20, 20)])
def test_views_are_float32_and_of_the_asked_size(dtype, size, side):
    images = jax.ShapeDtypeStruct((3, 24, 24, 3), dtype)
    views = jax.eval_shape(functools.partial(two_views, size=size), jax.random.key(0), images)
    assert [(view.shape, view.dtype) for view in views] == [((3, side, side, 3), jnp.float32)] * 2


def test_uint8_is_scaled_to_one_and_floats_are_left_alone():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_float(levels), np.float32(levels) / np.float32(255))
    np.testing.assert_array_equal(to_float(np.float32([0.25, 1.0])), [0.25, 1.0])


def test_views_are_a_pure_function_of_the_key(images):
    once, again = jitted_views(jax.random.key(6), images), jitted_views(jax.random.key(6), images)
    other = jitted_views(jax.random.key(7), images)
    for view in (0, 1):
        np.testing.assert_array_equal(once[view], again[view])
        assert not np.any(np.all(once[view] == other[view], axis=(1, 2, 3)))


def test_every_image_and_view_has_its_own_draw(images):
    same = np.repeat(images[3:4], 8, axis=0)
    views = np.concatenate(jitted_views(jax.random.key(8), same))
    assert len(np.unique(views, axis=0)) == 16


def test_a_view_does_not_depend_on_the_other_images(images):
    changed = images[::-1].copy()
    changed[2] = images[2]
    key = jax.random.key(9)
    for view, other in zip(jitted_views(key, images), jitted_views(key, changed), strict=True):
        np.testing.assert_allclose(view[2], other[2], atol=1e-6)
        assert np.max(np.abs(view[1] - other[1])) > 0.01


def test_two_views_is_random_view_of_each_image_with_or_without_jit(images):
    key = jax.random.key(10)
    keys = jax.random.split(key, (2, len(images)))
    views = jitted_views(key, images)
    for view, index in ((0, 3), (1, 5)):
        alone = random_view(keys[view, index], np.float32(images[index]) / np.float32(255))
        np.testing.assert_allclose(views[view][index], alone, atol=1e-5)


def test_strengths_may_be_traced_and_give_the_same_views(images):
    """At values that none of them has by default."""
    strengths = {
        "scale": (0.4, 0.9),
        "local_scale": (0.1, 0.3),
        "jitter_prob": 0.9,
        "brightness": 0.3,
        "contrast": 0.2,
        "saturation": 0.6,
        "hue": 0.05,
        "grayscale_prob": 0.4,
        "solarize_prob": 0.5,
        "flip_prob": 0.1,
        "blur_prob": 0.6,
        "blur_sigma": (0.5, 1.0),
    }
    assert set(strengths) == set(cpu.get_config().augment)
    key = jax.random.key(12)
    blurred_views = functools.partial(
        multi_crop_views, num_local_crops=1, local_size=9, blur_kernel=5, local_blur_kernel=3
    )
    static = jax.jit(functools.partial(blurred_views, **strengths))(key, images)
    traced = jax.jit(blurred_views)(key, images, **jax.tree.map(np.float32, strengths))
    default = jax.jit(blurred_views)(key, images)
    for view, other, usual in zip(static, traced, default, strict=True):
        # A crop that rounds to another pixel would be another view altogether.
        np.testing.assert_allclose(view, other, atol=1e-4)
        assert np.abs(view - usual).max() > 0.1


def test_of_several_pairs_the_views_of_an_image_lie_a_batch_apart(images):
    key, count = jax.random.key(11), len(images)
    views_of = jax.jit(functools.partial(pairs_of_views, num_pairs=2))
    changed = images.copy()
    changed[2] = 255 - images[2]
    for view, other in zip(views_of(key, images), views_of(key, changed), strict=True):
        is_other = np.abs(view - other).reshape(2 * count, -1).max(1) > 1e-5
        np.testing.assert_array_equal(np.flatnonzero(is_other), [2, 2 + count])
        assert np.max(np.abs(view[:count] - view[count:])) > 0.01
    one_pair = jax.jit(pairs_of_views)(key, images)
    for view, alone in zip(one_pair, jitted_views(key, images), strict=True):
        np.testing.assert_allclose(view, alone, atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 32, 3), (2, 32, 32, 1), (2, 3, 32, 32)])
def test_two_views_refuses_what_is_not_a_batch_of_colour_images(shape):
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
        two_views(jax.random.key(0), np.zeros(shape, np.uint8))


def test_local_crops_leave_the_other_views_alone_and_lie_image_by_image(images):
    key, options = jax.random.key(13), {"num_pairs": 2, "size": 16}
    crops_of = {
        count: jax.jit(
            functools.partial(multi_crop_views, num_local_crops=count, local_size=8, **options)
        )
        for count in (2, 3)
    }
    *views, crops = crops_of[3](key, images)
    without = jax.jit(functools.partial(pairs_of_views, **options))(key, images)
    for view, other in zip(views, without, strict=True):
        np.testing.assert_allclose(view, other, atol=1e-5)
    assert crops.shape == (3 * len(images), 8, 8, 3)
    assert crops.min() >= 0 and crops.max() <= 1
    # A third one leaves the first two as they are.
    fewer = crops_of[2](key, images)[2].reshape(-1, 2, 8, 8, 3)
    np.testing.assert_allclose(fewer, crops.reshape(-1, 3, 8, 8, 3)[:, :2], atol=1e-5)
    # All of them differ, also those of equal images.
    alike = crops_of[3](key, np.stack([images[0]] * len(images)))[2]
    apart = np.abs(alike[:, None] - alike[None]).reshape(len(alike), len(alike), -1).max(-1)
    assert np.min(apart + np.eye(len(alike))) > 0.01
    changed = images.copy()
    changed[2] = 255 - images[2]
    moved = np.abs(crops_of[3](key, changed)[2] - crops).reshape(len(crops), -1).max(1) > 1e-5
    np.testing.assert_array_equal(np.flatnonzero(moved), [6, 7, 8])


def test_a_local_crop_shows_the_share_of_the_image_that_its_scale_says():
    """Of a ramp whose grey is the place: by how much it rises is how wide the crop is."""
    ramp = np.zeros((64, 40, 40, 3), np.float32) + np.linspace(0, 1, 40)[:, None].astype(np.float32)
    rest = dict.fromkeys((*CHOICES, "blur_prob"), 0.0)
    x1, _, crops = multi_crop_views(
        jax.random.key(14), ramp, num_local_crops=2, local_size=8, local_scale=(0.1, 0.1), **rest
    )
    # Seven of eight steps from the first pixel's centre to the last one's.
    widths = np.ptp(crops[..., 0], axis=(1, 2)) * 8 / 7
    areas = widths**2 / 0.1  # the aspect ratio, of which the mean logarithm is 0
    assert areas.min() > 0.7 and areas.max() < 1.5 and abs(np.log(areas).mean()) < 0.1
    assert np.ptp(x1[..., 0], axis=(1, 2)).mean() > 0.6


MAKERS = ("two_views", "pairs_of_views", "multi_crop_views")


def test_conventions_of_the_public_functions():
    """Randomness takes the key first, cores the image; hyper-parameters of wrappers are by name."""
    public = {
        name: function
        for name, function in inspect.getmembers(augment, inspect.isfunction)
        if function.__module__ == augment.__name__ and not name.startswith("_")
    }
    assert {"adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"} <= set(
        public
    )
    for name, function in public.items():
        parameters = list(inspect.signature(function).parameters.values())
        is_random = name.startswith("random_") or name in MAKERS
        assert function.__doc__, name
        assert parameters[0].name == ("key" if is_random else parameters[0].name), name
        assert ("key" in [p.name for p in parameters]) == is_random, name
        if is_random:
            by_place = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
            assert all(p.default is p.empty for p in by_place), name
        elif name not in ("to_float", "resize_images"):  # of whole batches
            assert parameters[0].name == "image", name
