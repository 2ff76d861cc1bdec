"""Is a run collapsing? What is measured after every epoch, and what the figures say.

Three ways in which self-supervised training fails while its loss falls, after arXiv 2105.04906
and 2110.09348 (dimensional collapse):

  constant   every image has the same embedding: the variance term is not met
  low rank   every dimension of the embedding varies, as the variance term asks, but they repeat
             each other: the covariance term is too weak, and the representation follows
  dead       the representation no longer varies at all: nothing can be learnt from here
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jepa_jax.health import covariance_spectrum, dimension_std, rank_me
from jepa_jax.losses import paper_cov_coeff
from jepa_jax.models import ModelFns, normalize
from jepa_jax.train_step import AugmentFn, HParams, LossFn, stream_key

# Bounds RankMe from above, and its cost: a few tenths of a second on a CPU.
_NUM_IMAGES = 1024
_SPECTRUM_POINTS = 64
# How far below the untrained network's a figure has to fall. docs/evaluation.md has what narrow
# networks on CIFAR-10 showed: both lie far from where healthy and where collapsed runs were.
_LOW_RANK_Z, _LOW_RANK_H = 0.25, 0.5
_FALLEN_STD, _DEAD_STD = 0.5, 1e-3
# Of the hinge of a dimension whose standard deviation is 0.
_UNMET_HINGE = 0.5
# A weight this many times off the paper's is worth a line.
_FAR = 10.0


class Watch:
    """Measures a network on the same augmented views of the same images, whenever asked.

    The views go through the network in training mode, in chunks of the batch size, as the loss
    sees them. Compiled on first use.

    Args:
      model: see `ModelFns`.
      augment_fn: (key, images) -> two views in [0, 1].
      loss_fn: (key, z1, z2, hparams) -> (loss, terms).
      term_weights: the weight of each term in the loss, by name; 1 for one that is not named.
      mean, std: the normalisation of every view.
      images: uint8 [N, H, W, C]; as many whole chunks are used as 1,024 images hold.
      batch_size: of training.
      hparams: see `HParams`.
    """

    def __init__(
        self,
        model: ModelFns,
        *,
        augment_fn: AugmentFn,
        loss_fn: LossFn,
        term_weights: Mapping[str, float],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        images: np.ndarray,
        batch_size: int,
        hparams: HParams,
    ):
        size = min(batch_size, _NUM_IMAGES, len(images))
        count = min(_NUM_IMAGES, len(images)) // size * size
        # At even distances: a dataset may be sorted by class.
        chosen = images[np.linspace(0, len(images) - 1, count).astype(int)]
        self._chunks = chosen.reshape(-1, size, *images.shape[1:])
        self._term_weights = dict(term_weights)

        def views_of(chunk, index):
            views = augment_fn(stream_key(hparams.seed, "watch", index), chunk)
            return [normalize(view, mean, std) for view in views]

        def embed(variables, view):
            return model.apply(variables, view, True)[0]

        def terms_of(embeddings):
            return loss_fn(stream_key(hparams.seed, "watch_loss"), *embeddings, hparams)[1]

        def pulls(embeddings, name):
            return jax.grad(lambda z: terms_of(z)[name])(embeddings)

        def gradient_norm(variables, views, pulls):
            def embeddings_of(params):
                given = {**variables, "params": params}
                return [model.apply(given, view, True)[0][1] for view in views]

            (grads,) = jax.vjp(embeddings_of, variables["params"])[1](pulls)
            has_encoder = isinstance(grads, Mapping) and "encoder" in grads
            return optax.tree.norm(grads["encoder"] if has_encoder else grads)

        self._views, self._embed = jax.jit(views_of), jax.jit(embed)
        # jax.eval_shape of a plain function remembers each of its calls: some KB an epoch.
        self._terms_of = jax.jit(terms_of)
        # Term by term down to the embedding: one that has no derivative spoils no other.
        self._pulls = jax.jit(pulls, static_argnums=1)
        self._gradient_norm = jax.jit(gradient_norm)

    def _views_of(self, index: int) -> list[jax.Array]:
        # Drawn anew each time: kept, those of large images would fill the device.
        return self._views(jax.device_put(self._chunks[index]), jax.device_put(np.uint32(index)))

    def representation(self, variables: Any) -> dict[str, Any]:
        """RankMe, the smallest and the mean standard deviation, and the spectrum, of h and z.

        Returns:
          floats {h,z}_rank_me, {h,z}_std_min and {h,z}_std_mean; {h,z}_spectrum, at most 64
          eigenvalues of the covariance, and {h,z}_spectrum_ranks, which ones, 1 being the largest.
        """
        size = self._chunks.shape[1]
        # Of several views of an image one: the same spectrum then, whatever their number.
        pairs = [
            [part[:size] for part in self._embed(variables, self._views_of(index)[0])]
            for index in range(len(self._chunks))
        ]
        measured: dict[str, Any] = {}
        for name, parts in zip(("h", "z"), zip(*pairs, strict=True), strict=True):
            figures = jax.device_get(_figures(jnp.concatenate(parts)))
            spectrum = figures.pop("spectrum")
            measured.update({f"{name}_{key}": float(value) for key, value in figures.items()})
            ranks = np.unique(np.geomspace(1, len(spectrum), _SPECTRUM_POINTS).round().astype(int))
            measured[f"{name}_spectrum"] = [float(value) for value in spectrum[ranks - 1]]
            measured[f"{name}_spectrum_ranks"] = ranks.tolist()
        return measured

    def gradient_norms(self, variables: Any) -> dict[str, float]:
        """The norm of every weighted term's gradient, on the first chunk.

        By the encoder's parameters; by all of them where none are called so.
        """
        views = self._views_of(0)
        embeddings = [self._embed(variables, view)[1] for view in views]
        norms = {}
        for name in self._terms_of.eval_shape(embeddings):
            weight = self._term_weights.get(name, 1.0)
            norm = self._gradient_norm(variables, views, self._pulls(embeddings, name))
            norms[name] = weight * float(norm)
        return norms


@jax.jit
def _figures(z: jax.Array) -> dict[str, jax.Array]:
    std = dimension_std(z)
    return {
        "rank_me": rank_me(z),
        "std_min": jnp.min(std),
        "std_mean": jnp.mean(std),
        "spectrum": covariance_spectrum(z),
    }


def diagnose(
    measured: Mapping[str, Any], untrained: Mapping[str, Any], terms: Mapping[str, float]
) -> str | None:
    """'dead', 'constant', 'low rank', or None for a run that is none of them.

    Args:
      measured, untrained: of `Watch.representation`, now and before the first step.
      terms: the loss's terms over the last epoch, unweighted; 'constant' needs VICReg's 'var_loss',
        the sum of both views' mean hinge, since the scale of an embedding means nothing without it.
    """

    def fell_below(share, name):
        return not measured[name] >= share * untrained[name]  # a NaN has fallen

    if fell_below(_DEAD_STD, "h_std_mean"):
        return "dead"
    is_met = terms.get("var_loss", 0.0) / 2 < _UNMET_HINGE
    if not is_met and fell_below(_FALLEN_STD, "z_std_mean"):
        return "constant"
    if is_met and fell_below(_LOW_RANK_Z, "z_rank_me") and fell_below(_LOW_RANK_H, "h_rank_me"):
        return "low rank"
    return None


def explain(
    kind: str, measured: Mapping[str, Any], untrained: Mapping[str, Any], advice: str
) -> str:
    """One line for a person: what was seen, beside the untrained network's, and what to try."""

    def figure(name, text, digits=1):
        return f"{text} {measured[name]:.{digits}f} (untrained {untrained[name]:.{digits}f})"

    seen = {
        "dead": figure("h_std_mean", "the representation does not vary any more: std of h", 3),
        "constant": figure("z_std_mean", "all images get the same embedding: std of z", 3),
        "low rank": "the embedding's dimensions repeat each other: "
        + figure("z_rank_me", "RankMe of z")
        + ", "
        + figure("h_rank_me", "of h"),
    }
    return f"collapse ({kind}): {seen[kind]}; {advice}"


def loss_balance(
    num_dims: int, *, sim_coeff: float, std_coeff: float, cov_coeff: float
) -> tuple[str, str]:
    """VICReg's weights in the units of its paper (arXiv 2105.04906, section 4.2), and a warning.

    The paper weighs invariance, the variance summed over the views and the sum of squared
    covariances divided by D as 25 : 25 : 1; with the mean over D(D - 1) entries as covariance term
    that is 1 : 1 : 0.04 for sim : std : cov / (D - 1).

    Args:
      num_dims: D of the embedding.
      sim_coeff, std_coeff, cov_coeff: see `vicreg_loss`.

    Returns:
      (weights, warning): '1 : 25 : 0.00024', and a line that names every term that is more than 10
      times away from the paper's balance and the flags that mend it; '' if none is.
    """
    if not sim_coeff:
        weights = f"0 : {std_coeff:.3g} : {cov_coeff / (num_dims - 1):.2g}"
        return weights, "the invariance term has no weight: the views are not brought together"
    std, cov = std_coeff / sim_coeff, cov_coeff / sim_coeff
    weights = f"1 : {std:.3g} : {cov / (num_dims - 1):.2g}"
    wanted = {"std_coeff": sim_coeff, "cov_coeff": sim_coeff * paper_cov_coeff(num_dims)}
    times = {"variance": std, "covariance": cov / paper_cov_coeff(num_dims)}
    far = [
        f"{name} {_how_far(value)}"
        for name, value in times.items()
        if not 1 / _FAR <= value <= _FAR
    ]
    if not far:
        return weights, ""
    flags = " ".join(f"--config.loss.{name}={value:.4g}" for name, value in wanted.items())
    return weights, (
        f"against the VICReg paper's balance {' and '.join(far)}: configs/rapid_fixed.py is "
        f"balanced, and so is {flags}"
    )


def _how_far(times: float) -> str:
    if times == 0:
        return "has no weight"
    return f"is {times:.0f} times too strong" if times > 1 else f"is {1 / times:.0f} times too weak"
