"""A loss of two views lifted to many: over pairs of views, or of every view against a mean.

An image has G >= 2 global views and L >= 0 local crops, each embedded to [B, D]. The lifted loss is
a weighted mean of the two-view loss, and so is each of its terms. So all coefficients keep their
meaning: what regularises one view, and is counted twice by a loss of two, is counted twice in all,
as twice a weighted mean over the views. With two global views and no local crop either lift is the
two-view loss to the bit. The two-view loss must not change when its two views change places.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

TwoViewLoss = Callable[[jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def over_pairs(
    loss: TwoViewLoss, global_views: Sequence[jax.Array], local_views: Sequence[jax.Array] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean over every global view g and every other view v of the same image of loss(g, v).

    As in SwAV (arXiv 2006.09882), DINO (arXiv 2104.14294) and VICRegL (arXiv 2210.01571): local
    crops are not paired with one another. Among the G (G - 1 + L) pairs two global views appear
    twice, once from either side. A global view is in 2 (G - 1) + L of them and a local crop in G,
    which are the weights of what regularises a view; VICRegL gives all views the same.

    Args:
      loss: of two views [B, D] -> (loss, terms).
      global_views: G of them, [B, D] each.
      local_views: L of them, [B, D] each.

    Raises:
      ValueError: for fewer than two global views.
    """
    _check_number(global_views)
    pairs = [(2, a, b) for a, b in itertools.combinations(global_views, 2)]
    pairs += [(1, a, b) for a in global_views for b in local_views]
    return _weighted_mean(loss, pairs)


def against_mean(
    loss: TwoViewLoss, global_views: Sequence[jax.Array], local_views: Sequence[jax.Array] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean over all G + L views v of loss(m, v), m the mean of the global views but v itself.

    LeJEPA (arXiv 2511.08544, algorithm 2) takes the squared distance of every view from the mean of
    all global views, EMP-SSL (arXiv 2304.03977) the cosine with that of all views. There a global
    view is part of its own target, which makes its squared distance (G - 1)^2 / G^2 of that to the
    others' mean, a quarter for two views: without it two views are the two-view loss, whichever
    that is. A local crop is compared with the mean of all global views, as in LeJEPA. The gradient
    reaches the mean too, and what regularises a view regularises it.

    Args, Raises: as for `over_pairs`.
    """
    _check_number(global_views)
    total = sum(global_views[1:], start=global_views[0])
    if len(global_views) == 2:
        pairs = [(2, global_views[0], global_views[1])]
    else:
        pairs = [(1, (total - view) / (len(global_views) - 1), view) for view in global_views]
    pairs += [(1, total / len(global_views), view) for view in local_views]
    return _weighted_mean(loss, pairs)


PAIRINGS = {"pairs": over_pairs, "mean": against_mean}


def lifted(loss_fn: Callable[..., Any], pairing: str, *, num_pairs: int = 1) -> Callable[..., Any]:
    """A loss of two views to that of stacked batches of them, in the form of the loss seam.

    Args:
      loss_fn: (key, z1 [B, D], z2 [B, D], hparams) -> (loss, terms), whichever. Every call gets the
        same key: directions drawn from it are those of all views.
      pairing: a name of `PAIRINGS`.
      num_pairs: P, for G = 2P global views.

    Returns:
      (key, z1 [P * B, D], z2 [P * B, D], hparams) -> (loss, terms), rows n, n + B, ... of z1 and
      z2 being of image n, as `pairs_of_views` stacks them; or (key, z1, z2, local [B * L, D],
      hparams), rows L * n to L * n + L - 1 of local being of image n, as `multi_crop_views` has
      them.
    """
    combine = PAIRINGS[pairing]

    def many_view_loss(
        key: jax.Array, z1: jax.Array, z2: jax.Array, *others: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        *stacks, hparams = others
        num_images = z1.shape[0] // num_pairs
        global_views = [z[n : n + num_images] for z in (z1, z2) for n in _starts(z, num_images)]
        local_views = []
        for stack in stacks:
            of_images = stack.reshape(num_images, -1, stack.shape[-1])
            local_views += [of_images[:, n] for n in range(of_images.shape[1])]
        return combine(lambda a, b: loss_fn(key, a, b, hparams), global_views, local_views)

    return many_view_loss


def _starts(z: jax.Array, num_images: int) -> range:
    return range(0, z.shape[0], num_images)


def _check_number(global_views: Sequence[jax.Array]) -> None:
    if len(global_views) < 2:
        raise ValueError(f"at least two global views are needed, got {len(global_views)}")


def _weighted_mean(
    loss: TwoViewLoss, pairs: Sequence[tuple[int, jax.Array, jax.Array]]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Of (weight, view, view); the two-view loss itself, to the bit, if there is one pair."""
    whole = sum(weight for weight, _, _ in pairs)
    found = [(weight / whole, loss(a, b)) for weight, a, b in pairs]
    return jax.tree.map(
        lambda *values: sum(
            (share * value for (share, _), value in zip(found[1:], values[1:], strict=True)),
            start=found[0][0] * values[0],
        ),
        *(result for _, result in found),
    )
