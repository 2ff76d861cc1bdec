"""Self-supervised losses: two embeddings in, one scalar and its named terms out.

Every loss here has the form `loss(z1, z2, *, ...) -> (loss, terms)` with `z1, z2 [B, D]`, computes
in float32 (in float64 if its input is), and returns `terms` unweighted, so that a curve of a term
can be compared between runs whose coefficients differ.
"""

import jax
import jax.numpy as jnp


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
      num_pairs: P, for 2P views of N = B / P images: rows n, n + N, n + 2N, ... of z1 and of z2 are
        then views of image n (see `pairs_of_views`). Invariance is the mean over all pairs of an
        image's views; variance and covariance are those of z1's and z2's B rows.

    Returns:
      (loss, terms): a scalar, and the unweighted scalars `invariance_loss`, `var_loss` and
      `cov_loss`; float32, or float64 if z1 and z2 are.

    Raises:
      ValueError: if the shapes differ, are not [B, D], B or D is below 2, or B is no multiple
        of P.
    """
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"z1 and z2 must share one shape [B, D], got {z1.shape} and {z2.shape}")
    if min(z1.shape) < 2:
        raise ValueError(f"variance and covariance need B >= 2 and D >= 2, got {z1.shape}")
    if num_pairs < 1 or z1.shape[0] % num_pairs:
        raise ValueError(f"{z1.shape[0]} rows are not num_pairs = {num_pairs} views of each image")
    if cov_coeff is None:
        cov_coeff = paper_cov_coeff(z1.shape[1])
    dtype = jnp.float64 if z1.dtype == jnp.float64 else jnp.float32
    z1, z2 = z1.astype(dtype), z2.astype(dtype)
    # A GPU's default matmul precision would round the covariance but not the diagonal taken off it.
    with jax.default_matmul_precision("highest"):
        invariance = invariance_loss(z1, z2)
        if num_pairs > 1:
            views = jnp.concatenate([z1, z2]).reshape(2 * num_pairs, -1, z1.shape[1])
            invariance = multi_view_invariance_loss(views)
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
