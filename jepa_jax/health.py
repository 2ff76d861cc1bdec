"""How healthy a representation is, without labels: its rank, its spread and its geometry."""

import jax
import jax.numpy as jnp


def _matrix(z: jax.Array) -> jax.Array:
    if z.ndim != 2 or min(z.shape) < 1 or z.shape[0] < 2:
        raise ValueError(f"embeddings must be [N, D] with N >= 2 and D >= 1, got {z.shape}")
    return z.astype(jnp.float32)


def _pair(z1: jax.Array, z2: jax.Array) -> tuple[jax.Array, jax.Array]:
    if z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must share one shape [N, D], got {z1.shape} and {z2.shape}")
    return _normalised(_matrix(z1)), _normalised(_matrix(z2))


def _normalised(z: jax.Array) -> jax.Array:
    return z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def _centred(z: jax.Array) -> jax.Array:
    # Off the first row before the mean is: of a constant dimension nothing at all remains.
    z = z - z[:1]
    return z - jnp.mean(z, axis=0, keepdims=True)


def _exp_entropy(shares: jax.Array) -> jax.Array:
    return jnp.exp(jnp.sum(jax.scipy.special.entr(shares)))


def covariance_spectrum(z: jax.Array) -> jax.Array:
    """Eigenvalues of the covariance (N - 1) of embeddings [N, D]: [D], descending, none below 0.

    With N < D they are those of the Gram matrix [N, N], and zeros.

    Raises:
      ValueError: if z is not [N, D] with N >= 2.
    """
    z = _centred(_matrix(z))
    num_rows, num_dims = z.shape
    with jax.default_matmul_precision("highest"):
        products = z @ z.T if num_rows < num_dims else z.T @ z
    eigenvalues = jnp.linalg.eigvalsh(products / (num_rows - 1))[::-1]
    return jnp.pad(jnp.maximum(eigenvalues, 0.0), (0, num_dims - len(eigenvalues)))


def rank_me(z: jax.Array, *, eps: float = 1e-7) -> jax.Array:
    """RankMe (arXiv 2210.02885, eq. 1 and 2): a smooth rank of embeddings [N, D]; a scalar.

    The exponential of the entropy of p = sigma / sum(sigma) + eps, sigma the min(N, D) singular
    values of z, which is not centred. 1 of a matrix of rank one, min(N, D) of one whose singular
    values are equal. It depends on N: the paper takes 25,600 images.

    The singular values are not the roots of a Gram matrix's eigenvalues: float32 leaves 1e-7 of
    the largest on each of those, thus 3e-4 on each of these, and hundreds of them add up.

    Raises:
      ValueError: if z is not [N, D] with N >= 2.
    """
    z = _matrix(z)
    with jax.default_matmul_precision("highest"):
        # A triangle has the singular values of the tall matrix, and its own are the cheaper ones.
        triangle = jnp.linalg.qr(z if z.shape[0] >= z.shape[1] else z.T, mode="r")
        singular = jnp.linalg.svd(triangle, compute_uv=False)
    return _exp_entropy(singular / jnp.maximum(jnp.sum(singular), 1e-30) + eps)


def effective_rank(z: jax.Array) -> jax.Array:
    """Effective rank of the covariance of embeddings [N, D] (Roy and Vetterli 2007); a scalar.

    The exponential of the entropy of lambda / sum(lambda), lambda the covariance's eigenvalues.
    Where `rank_me` takes the singular values of z itself, the mean included, these are, up to
    N - 1, the squares of those of z less its mean: a common offset of all embeddings has no say
    here, and weak directions have less. D of an isotropic z, 1 of one that varies along a line
    (or not at all).

    Raises:
      ValueError: if z is not [N, D] with N >= 2.
    """
    return _effective_rank(covariance_spectrum(z))


def _effective_rank(spectrum: jax.Array) -> jax.Array:
    return _exp_entropy(spectrum / jnp.maximum(jnp.sum(spectrum), 1e-30))


def dimension_std(z: jax.Array) -> jax.Array:
    """Standard deviation (N - 1, as in arXiv 2105.04906) of every dimension of z [N, D]: [D].

    Raises:
      ValueError: if z is not [N, D] with N >= 2.
    """
    z = _centred(_matrix(z))
    return jnp.sqrt(jnp.sum(jnp.square(z), axis=0) / (z.shape[0] - 1))


def dead_fraction(z: jax.Array) -> jax.Array:
    """Share of the dimensions of z [N, D] that hardly vary; in [0, 1].

    Dead is a standard deviation of at most 1 % of the root mean square of all entries: so that
    every dimension is of a representation that is constant, at zero or elsewhere.

    Raises:
      ValueError: if z is not [N, D] with N >= 2.
    """
    return _dead_fraction(z, dimension_std(z))


def _dead_fraction(z: jax.Array, std: jax.Array) -> jax.Array:
    size = jnp.sqrt(jnp.mean(jnp.square(z.astype(jnp.float32))))
    return jnp.mean((std <= 0.01 * size).astype(jnp.float32))


def alignment(z1: jax.Array, z2: jax.Array) -> jax.Array:
    """Mean squared distance of l2-normalised pairs [N, D] (arXiv 2005.10242, alpha = 2); in [0, 4].

    Raises:
      ValueError: if the shapes differ or are not [N, D] with N >= 2.
    """
    z1, z2 = _pair(z1, z2)
    return jnp.mean(jnp.sum(jnp.square(z1 - z2), axis=1))


def mean_cosine(z1: jax.Array, z2: jax.Array) -> jax.Array:
    """Mean cosine similarity of pairs [N, D]; in [-1, 1], a pair with a row of zeros counting 0.

    Raises:
      ValueError: if the shapes differ or are not [N, D] with N >= 2.
    """
    z1, z2 = _pair(z1, z2)
    return jnp.mean(jnp.sum(z1 * z2, axis=1))


def uniformity(z: jax.Array) -> jax.Array:
    """Log of the mean of exp(-2 |zi - zj|^2) over pairs i < j (arXiv 2005.10242, t = 2).

    Of l2-normalised embeddings [N, D]; in [-8, 0]: 0 where all are equal, and the lower the more
    evenly they cover the sphere. An array [N, N] is formed.

    Raises:
      ValueError: if z is not [N, D] with N >= 2.
    """
    z = _normalised(_matrix(z))
    count = z.shape[0]
    norms = jnp.sum(jnp.square(z), axis=1)
    with jax.default_matmul_precision("highest"):
        distances = norms[:, None] + norms[None] - 2.0 * (z @ z.T)
    others = ~jnp.eye(count, dtype=bool)
    terms = jnp.where(others, jnp.exp(-2.0 * jnp.maximum(distances, 0.0)), 0.0)
    return jnp.log(jnp.sum(terms) / (count * (count - 1)))


@jax.jit
def summarise(z: jax.Array, z1: jax.Array, z2: jax.Array) -> dict[str, jax.Array]:
    """Everything above, of embeddings [N, D] of clean images and of two views of the same images.

    Returns:
      {'rank_me', 'effective_rank', 'std_min', 'std_mean', 'std_max', 'dead_fraction',
      'uniformity', 'spectrum'} of z and {'alignment', 'mean_cosine'} of z1 and z2: scalars in
      float32, and the spectrum [D].

    Raises:
      ValueError: if the shapes differ or are not [N, D] with N >= 2.
    """
    if z.shape != z1.shape:
        raise ValueError(f"z and its views must share one shape [N, D], got {z.shape}, {z1.shape}")
    spectrum, std = covariance_spectrum(z), dimension_std(z)
    return {
        "rank_me": rank_me(z),
        "effective_rank": _effective_rank(spectrum),
        "std_min": jnp.min(std),
        "std_mean": jnp.mean(std),
        "std_max": jnp.max(std),
        "dead_fraction": _dead_fraction(z, std),
        "alignment": alignment(z1, z2),
        "uniformity": uniformity(z),
        "mean_cosine": mean_cosine(z1, z2),
        "spectrum": spectrum,
    }
