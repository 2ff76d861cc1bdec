"""What `loss.type` names: the losses in the form that a training step takes, and one's own.

That form is the seam `loss_fn(key, z1, z2, hparams) -> (loss, terms)`: a key of the step, the
embeddings [B, D] of both views, and the step's numbers (`train_step.HParams`), of which each loss
reads its own coefficients. What is fixed when a program is compiled (how many pairs of views, how
many directions) is bound when the loss is made.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jepa_jax.errors import ConfigError
from jepa_jax.losses import (
    barlow_twins_loss,
    lejepa_loss,
    nt_xent_loss,
    sigreg_loss,
    vicreg_loss,
)

_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", re.ASCII)


def vicreg(key: jax.Array, z1: jax.Array, z2: jax.Array, hparams: Any, *, num_pairs: int = 1):
    """`vicreg_loss` in the form of the seam."""
    del key
    return vicreg_loss(
        z1,
        z2,
        sim_coeff=hparams.sim_coeff,
        std_coeff=hparams.std_coeff,
        cov_coeff=hparams.cov_coeff,
        num_pairs=num_pairs,
    )


def _sketched(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`sigreg_loss` or `lejepa_loss` in the form of the seam."""

    def adapted(key, z1, z2, hparams, **sizes):
        coeffs = {"sim_coeff": hparams.sim_coeff, "sigreg_coeff": hparams.sigreg_coeff}
        return loss(key, z1, z2, **coeffs, **sizes)

    return adapted


def barlow(key: jax.Array, z1: jax.Array, z2: jax.Array, hparams: Any, *, num_pairs: int = 1):
    """`barlow_twins_loss` in the form of the seam."""
    del key
    coeff = hparams.redundancy_coeff
    return barlow_twins_loss(z1, z2, redundancy_coeff=coeff, num_pairs=num_pairs)


def simclr(key: jax.Array, z1: jax.Array, z2: jax.Array, hparams: Any, *, num_pairs: int = 1):
    """`nt_xent_loss` in the form of the seam."""
    del key
    return nt_xent_loss(z1, z2, temperature=hparams.temperature, num_pairs=num_pairs)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss that a config can name.

    Attributes:
      loss_fn: (key, z1, z2, hparams, *, num_pairs, and a keyword for each of `sizes`).
      terms: each term of the loss, and the key of the config's `loss` section that weighs it; None
        for a term whose weight is 1.
      sizes: keys of that section for which a program is compiled.
      numbers: other keys that it reads.
      remedy: what to try when the representation collapses, in words.
    """

    loss_fn: Callable[..., Any]
    terms: Mapping[str, str | None]
    sizes: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    remedy: str = ""

    @property
    def keys(self) -> list[str]:
        """Of the `loss` section, all that it reads."""
        return [*filter(None, self.terms.values()), *self.numbers, *self.sizes]


_SKETCHED = {
    "sizes": ("num_directions",),
    "remedy": "a larger config.loss.sigreg_coeff",
}
_SIGREG = Objective(
    _sketched(sigreg_loss),
    {"invariance_loss": "sim_coeff", "sigreg_loss": "sigreg_coeff"},
    **_SKETCHED,
)
OBJECTIVES = {
    "vicreg": Objective(
        vicreg,
        {"invariance_loss": "sim_coeff", "var_loss": "std_coeff", "cov_loss": "cov_coeff"},
    ),
    "sigreg": _SIGREG,
    "bcs": _SIGREG,  # its name in the reference
    "lejepa": Objective(
        _sketched(lejepa_loss),
        {"prediction_loss": "sim_coeff", "sigreg_loss": "sigreg_coeff"},
        **_SKETCHED,
    ),
    "barlow": Objective(
        barlow,
        {"invariance_loss": None, "redundancy_loss": "redundancy_coeff"},
        remedy="a larger config.loss.redundancy_coeff",
    ),
    "simclr": Objective(
        simclr,
        {"alignment_loss": None, "uniformity_loss": None},
        numbers=("temperature",),
        remedy="another config.loss.temperature",
    ),
}


def is_loss_type(name: str) -> bool:
    """Whether a config may say so: a key of `OBJECTIVES`, or of the form my_module:my_loss."""
    return name in OBJECTIVES or bool(_OWN.fullmatch(name))


def make_loss_fn(loss: Mapping[str, Any], num_pairs: int) -> Callable[..., Any]:
    """The loss that the `loss` section of a config describes, in the form of the seam.

    Args:
      loss: the section.
      num_pairs: P, see `losses`; one's own function is not told, and gets z1 and z2 [P * B, D].

    Raises:
      ConfigError: if it is one's own and cannot be had, in one line.
    """
    if objective := OBJECTIVES.get(loss["type"]):
        sizes = {name: loss[name] for name in objective.sizes}
        return functools.partial(objective.loss_fn, num_pairs=num_pairs, **sizes)
    return _own_loss(loss["type"])


def term_weights(loss: Mapping[str, Any]) -> dict[str, float]:
    """The weight of every term of the loss that a config's section describes; {} of one's own.

    Args:
      loss: the section, also that of an older run.
    """
    objective = OBJECTIVES.get(loss["type"])
    if objective is None or not all(key in loss for key in objective.keys):
        return {}
    return {term: loss[key] if key else 1.0 for term, key in objective.terms.items()}


def described(loss: Mapping[str, Any]) -> str:
    """'simclr, temperature 0.5': the loss and all that it reads of its section, for a person."""
    objective = OBJECTIVES.get(loss["type"])
    keys = objective.keys if objective else []
    return ", ".join([loss["type"], *(f"{key} {loss[key]:g}" for key in keys)])


# --- one's own ----------------------------------------------------------------------------------


def _own_loss(path: str) -> Callable[..., Any]:
    """The function called `my_loss` of `my_module`, for 'my_module:my_loss'."""
    start = f"config.loss.type={path}:"
    name, _, attribute = path.partition(":")
    module = _imported(name, start)
    found = getattr(module, attribute, None)
    if found is None:
        near = difflib.get_close_matches(attribute, vars(module), n=1, cutoff=0.6)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{start} {name} has no {attribute}{hint}")
    if not callable(found):
        raise ConfigError(f"{start} {attribute} is a {type(found).__name__}, not a function")
    try:
        inspect.signature(found).bind(None, None, None, None)
    except TypeError as error:
        raise ConfigError(
            f"{start} {attribute} must take (key, z1, z2, hparams): {error}"
        ) from error
    except ValueError:  # a callable that does not say what it takes
        pass
    return found


def _imported(name: str, start: str) -> Any:
    try:
        with _current_folder_first():
            return importlib.import_module(name)
    except Exception as error:  # whatever a person's own module raises
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name}, neither in the current folder nor installed"
        else:
            text = " ".join(str(error).split())
            reason = f"{name} cannot be imported: {type(error).__name__}: {text}"
        raise ConfigError(f"{start} {reason}") from error


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    """As `python -m` has it, and a function called from anywhere else has not."""
    folder = os.getcwd()
    is_new = not {"", folder} & set(sys.path)
    if is_new:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
    try:
        yield
    finally:
        if is_new and folder in sys.path:
            sys.path.remove(folder)
