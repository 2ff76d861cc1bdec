"""What became NaN or infinite, when and where: from the metrics of steps to a sentence."""

from collections.abc import Mapping, Sequence

import numpy as np

from jepa_jax.train_step import FAULT, RESERVED_METRICS


def what_is_bad(
    metrics: Mapping[str, np.ndarray], first_step: int, places: Sequence[str]
) -> str | None:
    """The first step at which something is NaN or infinite, in words; None if there is none.

    Args:
      metrics: of consecutive steps, [n] each, as `make_train_step` makes them.
      first_step: the number of the first.
      places: of `train_step.fault_places`.

    Returns:
      'grad_norm became nan at step 43 (the gradient of encoder/stem_conv/kernel is not finite)'.
    """
    terms = [name for name in metrics if name not in RESERVED_METRICS]
    watched = [*terms, "loss", "grad_norm"]
    faults = np.asarray(metrics[FAULT])
    is_bad = np.stack([~np.isfinite(metrics[name]) for name in watched] + [faults > 0])
    if not is_bad.any():
        return None
    place = int(np.argmax(is_bad.any(axis=0)))
    step, fault = first_step + place, int(faults[place])
    where = places[fault - 1] if fault else ""
    which = int(np.argmax(is_bad[:, place]))
    if which == len(watched):
        return f"something became NaN or infinite at step {step} ({where})"
    sentence = f"{watched[which]} became {metrics[watched[which]][place]} at step {step}"
    return f"{sentence} ({where})" if where else sentence
