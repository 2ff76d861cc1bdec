"""Self-supervised losses: two embeddings in, one scalar and its named terms out.

Every loss here has the form `loss(z1, z2, *, ...) -> (loss, terms)` with `z1, z2 [B, D]` (one that
draws takes a key before them), computes in float32 (in float64 if its input is), and returns
`terms` unweighted, so that a curve of a term can be compared between runs whose coefficients
differ.

All take `num_pairs`, P, for 2P views of N = B / P images: rows n, n + N, n + 2N, ... of z1 and of
z2 are then views of image n (see `pairs_of_views`). With P = 1 each is the loss of its paper.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp


def _checked(z1: jax.Array, z2: jax.Array, num_pairs: int) -> tuple[jax.Array, jax.Array]:
    """Both in the dtype of the arithmetic; ValueError for shapes that no loss takes."""
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"z1 and z2 must share one shape [B, D], got {z1.shape} and {z2.shape}")
    if num_pairs < 1 or z1.shape[0] % num_pairs:
        raise ValueError(f"{z1.shape[0]} rows are not num_pairs = {num_pairs} views of each image")
    dtype = jnp.float64 if z1.dtype == jnp.float64 else jnp.float32
    return z1.astype(dtype), z2.astype(dtype)


def _by_view(z1: jax.Array, z2: jax.Array, num_pairs: int) -> jax.Array:
    """[2P, N, D]: row n of every view is image n."""
    return jnp.concatenate([z1, z2]).reshape(2 * num_pairs, -1, z1.shape[1])


# --- VICReg -------------------------------------------------------------------------------------


def invariance_loss(z1: jax.Array, z2: jax.Array) -> jax.Array:
    """Mean squared difference of two embeddings [B, D], over both axes; a scalar."""
    return jnp.mean(jnp.square(z1 - z2))


def multi_view_invariance_loss(views: jax.Array) -> jax.Array:
    """`invariance_loss`, the mean over all V (V - 1) / 2 pairs of views [V, B, D]; a scalar.

    No pair is formed: it is 2 / (V - 1) times the sum over the views of their mean squared distance
    from the views' mean.
    """
    deviations = views - jnp.mean(views, axis=0, keepdims=True)
    return 2 / (views.shape[0] - 1) * jnp.sum(jnp.mean(jnp.square(deviations), axis=(1, 2)))


def _centred(z: jax.Array) -> jax.Array:
    # Off the first row before the mean is: of a collapsed batch nothing at all remains, where the
    # rounding of its mean would, made a hundred times larger by the slope of sqrt(var + eps).
    z = z - jax.lax.stop_gradient(z[:1])
    return z - jnp.mean(z, axis=0, keepdims=True)


def variance_loss(z: jax.Array, *, margin: float = 1.0, eps: float = 1e-4) -> jax.Array:
    """Hinge on the standard deviation of every dimension (arXiv 2105.04906, eq. 1).

    Args:
      z: embeddings [B, D], B >= 2.
      margin: the standard deviation below which a dimension is penalised.
      eps: added to the variance, so that the gradient of a constant dimension is finite.

    Returns:
      mean over D of relu(margin - sqrt(var + eps)), the variance with B - 1; a scalar >= 0.
    """
    variances = jnp.sum(jnp.square(_centred(z)), axis=0) / (z.shape[0] - 1)
    return jnp.mean(jax.nn.relu(margin - jnp.sqrt(variances + eps)))


def covariance_loss(z: jax.Array) -> jax.Array:
    """Mean squared off-diagonal entry of the covariance (arXiv 2105.04906, eq. 3).

    The paper divides the sum by D; the reference implementation takes the mean over the D(D - 1)
    entries, and so does this. With B < D the covariance [D, D] is never formed: its Frobenius norm
    is that of the Gram matrix [B, B], from which the squared variances are taken off.

    Args:
      z: embeddings [B, D], B >= 2, D >= 2.

    Returns:
      a scalar >= 0 (with B < D to rounding); infinite, its gradient not NaN, on overflow.
    """
    num_rows, num_dims = z.shape
    z = _centred(z)
    if num_rows < num_dims:
        norm = jnp.sum(jnp.square(z @ z.T / (num_rows - 1)))
        variances = jnp.sum(jnp.square(z), axis=0) / (num_rows - 1)
        # Where both overflow the difference would be NaN.
        total = jnp.where(jnp.isinf(norm), norm, norm - jnp.sum(jnp.square(variances)))
    else:
        covariance = z.T @ z / (num_rows - 1)
        is_diagonal = jnp.eye(num_dims, dtype=bool)
        total = jnp.sum(jnp.square(jnp.where(is_diagonal, 0.0, covariance)))
    return total / (num_dims * (num_dims - 1))


def paper_cov_coeff(num_dims: int) -> float:
    """The `cov_coeff` that gives the paper's balance (25 : 25 : 1) when the other two are 1.

    The paper weighs the sum of squared off-diagonal entries divided by D; with the mean over
    D(D - 1) entries the same weight reads (D - 1) / 25.
    """
    return (num_dims - 1) / 25


def vicreg_loss(
    z1: jax.Array,
    z2: jax.Array,
    *,
    sim_coeff: jax.typing.ArrayLike = 1.0,
    std_coeff: jax.typing.ArrayLike = 1.0,
    cov_coeff: jax.typing.ArrayLike | None = None,
    num_pairs: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Variance-invariance-covariance regularisation (arXiv 2105.04906, eq. 6).

    Args:
      z1, z2: embeddings of two views of the same images, [B, D] each.
      sim_coeff: weight of the invariance term.
      std_coeff: weight of the variance term, the sum over both views.
      cov_coeff: weight of the covariance term, the sum over both views of the mean squared
        off-diagonal entry; None gives the paper's balance, (D - 1) / 25.
      num_pairs: P, see above. Invariance is the mean over all pairs of an image's views; variance
        and covariance are those of z1's and z2's B rows.

    Returns:
      (loss, terms): a scalar, and the unweighted scalars `invariance_loss`, `var_loss` and
      `cov_loss`; float32, or float64 if z1 and z2 are.

    Raises:
      ValueError: if the shapes differ, are not [B, D], B or D is below 2, or B is no multiple
        of P.
    """
    z1, z2 = _checked(z1, z2, num_pairs)
    if min(z1.shape) < 2:
        raise ValueError(f"variance and covariance need B >= 2 and D >= 2, got {z1.shape}")
    if cov_coeff is None:
        cov_coeff = paper_cov_coeff(z1.shape[1])
    # A GPU's default matmul precision would round the covariance but not the diagonal taken off it.
    with jax.default_matmul_precision("highest"):
        invariance = invariance_loss(z1, z2)
        if num_pairs > 1:
            invariance = multi_view_invariance_loss(_by_view(z1, z2, num_pairs))
        terms = {
            "invariance_loss": invariance,
            "var_loss": variance_loss(z1) + variance_loss(z2),
            "cov_loss": covariance_loss(z1) + covariance_loss(z2),
        }
    loss = (
        sim_coeff * terms["invariance_loss"]
        + std_coeff * terms["var_loss"]
        + cov_coeff * terms["cov_loss"]
    )
    return jnp.asarray(loss), terms


# --- SIGReg -------------------------------------------------------------------------------------


def random_directions(key: jax.Array, num_dims: int, num_directions: int, dtype: Any) -> jax.Array:
    """Unit vectors, uniform on the sphere, the columns of [D, M]: a function of the key alone."""
    directions = jax.random.normal(key, (num_dims, num_directions), dtype)
    return directions / jnp.linalg.norm(directions, axis=0, keepdims=True)


def epps_pulley(x: jax.Array, *, limit: float, num_points: int) -> jax.Array:
    """How far samples are from a standard normal, by their characteristic function.

    The integral over t of |mean of exp(i t x) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), by the trapezoid
    rule (Epps and Pulley 1983, without their factor N; arXiv 2511.08544, section 4.2).

    Args:
      x: samples [..., N, M], M sets of N.
      limit, num_points: the knots, at equal distances in [-limit, limit].

    Returns:
      [..., M], each at least 0; for N normal samples about 1 / N.
    """
    knots = jnp.linspace(-limit, limit, num_points, dtype=x.dtype)
    spacing = 2 * limit / (num_points - 1)
    # The integrand is even, and 0 at 0: the positive knots twice are the same sum at half the cost.
    first = (num_points + 1) // 2
    knots = knots[first:]
    normal = jnp.exp(-0.5 * jnp.square(knots))
    weights = (2 * spacing * normal).at[-1].multiply(0.5)
    angles = x[..., None] * jnp.expand_dims(knots, range(x.ndim))
    real = jnp.mean(jnp.cos(angles), axis=-3) - jnp.expand_dims(normal, range(x.ndim - 1))
    imaginary = jnp.mean(jnp.sin(angles), axis=-3)
    return (jnp.square(real) + jnp.square(imaginary)) @ weights


def sigreg_loss(
    key: jax.Array,
    z1: jax.Array,
    z2: jax.Array,
    *,
    sim_coeff: jax.typing.ArrayLike = 1.0,
    sigreg_coeff: jax.typing.ArrayLike = 10.0,
    num_directions: int = 256,
    num_pairs: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Invariance and a sketched isotropic Gaussian, as eb_jepa has it ("BCS").

    `lejepa_loss` is that of the paper (arXiv 2511.08544); this one weighs the same two ideas by
    other units: the statistic is not multiplied by N, and has 10 knots in [-3, 3].

    Args:
      key: of the random directions, the same for every view.
      z1, z2: embeddings of two views of the same images, [B, D] each.
      sim_coeff: weight of the invariance, the mean squared difference over all pairs of an image's
        views.
      sigreg_coeff: weight of `epps_pulley`, the mean over the directions and the views.
      num_directions: M, on which every view's N rows are projected.
      num_pairs: P, see above.

    Returns:
      (loss, terms): a scalar, and the unweighted scalars `invariance_loss` and `sigreg_loss`;
      float32, or float64 if z1 and z2 are.

    Raises:
      ValueError: if the shapes differ, are not [B, D], or B is no multiple of P.
    """
    z1, z2 = _checked(z1, z2, num_pairs)
    views = _by_view(z1, z2, num_pairs)
    terms = {
        "invariance_loss": multi_view_invariance_loss(views),
        "sigreg_loss": _sketched(key, views, num_directions, limit=3.0, num_points=10),
    }
    loss = sim_coeff * terms["invariance_loss"] + sigreg_coeff * terms["sigreg_loss"]
    return jnp.asarray(loss), terms


def lejepa_loss(
    key: jax.Array,
    z1: jax.Array,
    z2: jax.Array,
    *,
    sim_coeff: jax.typing.ArrayLike = 0.95,
    sigreg_coeff: jax.typing.ArrayLike = 0.05,
    num_directions: int = 256,
    num_pairs: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """LeJEPA: prediction and a sketched isotropic Gaussian (arXiv 2511.08544, algorithms 1 and 2).

    The paper's (1 - lambda) and lambda are two weights here; its 0.95 and 0.05 are the defaults.
    The authors' later code has other knots (33 in [-3, 3]); this has the paper's 17 in [-5, 5].

    Args:
      key: of the random directions, the same for every view.
      z1, z2: embeddings of two views of the same images, [B, D] each.
      sim_coeff: weight of the prediction, the mean squared difference between a view and the mean
        of its image's views, over all views, rows and dimensions.
      sigreg_coeff: weight of N times `epps_pulley`, the mean over the directions and the views.
      num_directions: M, on which every view's N rows are projected.
      num_pairs: P, see above.

    Returns:
      (loss, terms): a scalar, and the unweighted scalars `prediction_loss` and `sigreg_loss`;
      float32, or float64 if z1 and z2 are.

    Raises:
      ValueError: if the shapes differ, are not [B, D], or B is no multiple of P.
    """
    z1, z2 = _checked(z1, z2, num_pairs)
    views = _by_view(z1, z2, num_pairs)
    statistic = _sketched(key, views, num_directions, limit=5.0, num_points=17)
    terms = {
        "prediction_loss": jnp.mean(jnp.square(views - jnp.mean(views, axis=0, keepdims=True))),
        "sigreg_loss": views.shape[1] * statistic,
    }
    loss = sim_coeff * terms["prediction_loss"] + sigreg_coeff * terms["sigreg_loss"]
    return jnp.asarray(loss), terms


def _sketched(key: jax.Array, views: jax.Array, num_directions: int, **knots: Any) -> jax.Array:
    """`epps_pulley` of views [V, N, D] on random directions, its mean over both; a scalar."""
    directions = random_directions(key, views.shape[-1], num_directions, views.dtype)
    with jax.default_matmul_precision("highest"):
        return jnp.mean(epps_pulley(views @ directions, **knots))


# --- Barlow Twins and SimCLR --------------------------------------------------------------------


def barlow_twins_loss(
    z1: jax.Array,
    z2: jax.Array,
    *,
    redundancy_coeff: jax.typing.ArrayLike = 5e-3,
    num_pairs: int = 1,
    eps: float = 1e-5,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Barlow Twins: the cross-correlation of two views is to be the identity (arXiv 2103.03230).

    Args:
      z1, z2: embeddings of two views of the same images, [B, D] each.
      redundancy_coeff: the paper's lambda.
      num_pairs: P, see above. The mean over all pairs of an image's views, P (2P - 1) of them.
      eps: added to the variance of every dimension, as a BatchNorm does.

    Returns:
      (loss, terms): a scalar, and the unweighted scalars `invariance_loss`, the sum over the D
      dimensions of (1 - C_ii)^2, and `redundancy_loss`, the sum over the D (D - 1) others of C_ij^2
      (eq. 1), C being the correlation over the N rows (eq. 2); float32, or float64 if z1 and z2
      are.

    Raises:
      ValueError: if the shapes differ, are not [B, D], N is below 2, or B is no multiple of P.
    """
    z1, z2 = _checked(z1, z2, num_pairs)
    views = _by_view(z1, z2, num_pairs)
    num_views, num_rows, num_dims = views.shape
    if num_rows < 2:
        raise ValueError(f"a correlation needs 2 images or more, got {num_rows} in {z1.shape}")
    centred = jax.vmap(_centred)(views)
    variances = jnp.mean(jnp.square(centred), axis=1, keepdims=True)
    views = centred * jax.lax.rsqrt(variances + eps)
    is_diagonal = jnp.eye(num_dims, dtype=bool)
    invariance, redundancy = [], []
    for first, second in itertools.combinations(range(num_views), 2):
        with jax.default_matmul_precision("highest"):
            correlation = views[first].T @ views[second] / num_rows
        invariance.append(jnp.sum(jnp.square(1 - jnp.diagonal(correlation))))
        redundancy.append(jnp.sum(jnp.square(jnp.where(is_diagonal, 0.0, correlation))))
    terms = {
        "invariance_loss": jnp.mean(jnp.stack(invariance)),
        "redundancy_loss": jnp.mean(jnp.stack(redundancy)),
    }
    return terms["invariance_loss"] + redundancy_coeff * terms["redundancy_loss"], terms


def nt_xent_loss(
    z1: jax.Array,
    z2: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 0.5,
    num_pairs: int = 1,
    eps: float = 1e-8,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """SimCLR's normalised, temperature-scaled cross-entropy (arXiv 2002.05709, eq. 1).

    Every one of the 2B rows is to find the other view of its image among all rows but itself, by
    cosine similarity. With several pairs the target is the mean over the image's other views, as
    in arXiv 2004.11362, eq. 2, with images for classes.

    Args:
      z1, z2: embeddings of two views of the same images, [B, D] each.
      temperature: by which similarities are divided, above 0.
      num_pairs: P, see above.
      eps: the norm below which a row is not brought to norm 1.

    Returns:
      (loss, terms): the mean over all rows, and its two summands, scalars both: `alignment_loss`,
      (1 - similarity to the other view) / temperature, and `uniformity_loss`, the logarithm of the
      sum over all other rows of exp((similarity - 1) / temperature); float32, or float64 if z1 and
      z2 are.

    Raises:
      ValueError: if the shapes differ, are not [B, D], there are fewer than 2 images, or B is no
        multiple of P.
    """
    z1, z2 = _checked(z1, z2, num_pairs)
    num_views, num_images = 2 * num_pairs, z1.shape[0] // num_pairs
    if num_images < 2:
        raise ValueError(f"a contrast needs 2 images or more, got {num_images} in {z1.shape}")
    rows = jnp.concatenate([z1, z2])
    squares = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
    rows = rows * jax.lax.rsqrt(jnp.maximum(squares, eps**2))
    with jax.default_matmul_precision("highest"):
        # At most 0: no exponential overflows, however low the temperature.
        scores = (rows @ rows.T - 1) / temperature
    is_self = jnp.eye(len(rows), dtype=bool)
    image = jnp.arange(len(rows)) % num_images
    is_other_view = (image[:, None] == image[None, :]) & ~is_self
    of_views = jnp.sum(jnp.where(is_other_view, scores, 0.0), axis=1) / (num_views - 1)
    of_all = jax.nn.logsumexp(jnp.where(is_self, -jnp.inf, scores), axis=1)
    terms = {"alignment_loss": -jnp.mean(of_views), "uniformity_loss": jnp.mean(of_all)}
    return terms["alignment_loss"] + terms["uniformity_loss"], terms
