"""Votes of the nearest neighbours, for any number of references in bounded memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# The largest array, the similarities of the two, is 256 MiB.
_QUERIES_AT_ONCE = 1024
_REFERENCES_AT_ONCE = 65536


def _normalised(features: jax.Array) -> jax.Array:
    features = features.astype(jnp.float32)
    norms = jnp.linalg.norm(features, axis=1, keepdims=True)
    return features / jnp.maximum(norms, 1e-12)


@functools.partial(jax.jit, static_argnames="size")
def _in_chunks(queries: jax.Array, *, size: int) -> jax.Array:
    """Normalised queries [Q, F] as [C, size, F], zeros after the last."""
    queries = jnp.pad(_normalised(queries), ((0, -len(queries) % size), (0, 0)))
    return queries.reshape(-1, size, queries.shape[1])


@jax.jit
def _merge(
    similarities: jax.Array,
    classes: jax.Array,
    queries: jax.Array,
    references: jax.Array,
    labels: jax.Array,
    num_seen: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """The nearest [C, q, k] so far and those among [n] more references, of which some were seen."""
    k = classes.shape[-1]
    references = _normalised(references)
    labels = jnp.where(jnp.arange(len(labels)) < num_seen, -1, labels.astype(jnp.int32))

    def of_chunk(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        similarities, classes, queries = chunk
        found = jnp.where((labels >= 0)[None], queries @ references.T, -jnp.inf)
        found, places = jax.lax.top_k(found, min(k, len(labels)))
        # The earlier references first: of equally similar ones top_k takes the first.
        similarities = jnp.concatenate([similarities, found], axis=1)
        classes = jnp.concatenate([classes, labels[places]], axis=1)
        similarities, places = jax.lax.top_k(similarities, k)
        return similarities, jnp.take_along_axis(classes, places, axis=1)

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(of_chunk, (similarities, classes, queries))


@functools.partial(jax.jit, static_argnames="num_classes")
def _votes(
    similarities: jax.Array,
    classes: jax.Array,
    temperature: jax.typing.ArrayLike,
    num_classes: int,
) -> tuple[jax.Array, jax.Array]:
    """Votes [Q, K] of neighbours [Q, k]; a similarity of -inf is that of none."""
    counts = jnp.isfinite(similarities)
    nearest = jnp.where(counts[:, :1], similarities[:, :1], 0.0)
    weights = jnp.exp((similarities - nearest) / temperature)
    rows = jnp.arange(len(classes))[:, None]
    nothing = jnp.zeros((len(classes), num_classes), jnp.float32)
    # A class of -1 would be the last one, but has no weight.
    return (
        nothing.at[rows, classes].add(weights),
        nothing.at[rows, classes].add(counts.astype(jnp.float32)),
    )


def knn_votes(
    train: tuple[Any, Any],
    queries: jax.Array,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> tuple[jax.Array, jax.Array]:
    """Votes of the k references nearest to each query by cosine similarity.

    The similarity s is that of the raw features, not centred. In the weighted vote a neighbour
    counts exp(s / temperature) (arXiv 1805.01978, section 3.4; k = 20 and 0.07 as in arXiv
    2104.14294), divided by the weight of the nearest, so that nothing overflows; in the other,
    one. The class of a query is the argmax: of classes with equally many votes the first. Of
    equally similar references the earlier one is the neighbour. A row of zeros has the similarity
    0 to everything.

    Args:
      train: (features [N, F] of any float dtype, integer labels [N]); arrays of the host are sent
        to the device in chunks. A row with the label -1 has no vote.
      queries: features [Q, F].
      num_classes: K.
      k: neighbours; all labelled references where there are fewer.
      temperature: of the weighted vote.

    Returns:
      (weighted [Q, K], majority [Q, K]), float32; no row of `weighted` adds up to more than k.

    Raises:
      ValueError: if the shapes do not fit, or k is below 1.
    """
    features, labels = train
    if features.ndim != 2 or queries.ndim != 2 or features.shape[1] != queries.shape[1]:
        raise ValueError(
            "references [N, F] and queries [Q, F] must share F, got "
            f"{features.shape} and {queries.shape}"
        )
    if labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(f"every reference needs a label, got {features.shape} and {labels.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    num_queries, num_references = len(queries), len(features)
    queries = _in_chunks(queries, size=_even(num_queries, _QUERIES_AT_ONCE))
    best = (
        jnp.full((*queries.shape[:2], k), -jnp.inf, jnp.float32),
        jnp.full((*queries.shape[:2], k), -1, jnp.int32),
    )
    size = _even(num_references, _REFERENCES_AT_ONCE)
    for seen in range(0, num_references, size):
        # One size for all chunks: the last one begins among those of the last but one.
        start = min(seen, num_references - size)
        chunk = (jnp.asarray(array[start : start + size]) for array in (features, labels))
        best = _merge(*best, queries, *chunk, seen - start)
    similarities, classes = (array.reshape(-1, k)[:num_queries] for array in best)
    return _votes(similarities, classes, temperature, num_classes)


def _even(count: int, most: int) -> int:
    """The size of the fewest equal chunks that hold `count` rows, none of them above `most`."""
    return -(-count // -(-count // most))
