"""An encoder in Equinox: --config.model.type=examples.equinox_encoder:create"""

import equinox as eqx
import jax
import jax.numpy as jnp

from jepa_jax import EncoderFns


class ConvNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 16, 3, stride=2, padding=1, key=keys[0])
        self.norm = eqx.nn.BatchNorm(16, axis_name="batch", momentum=0.9, mode="batch")
        self.out = eqx.nn.Linear(16, 32, key=keys[1])

    def __call__(self, image, state):
        x, state = self.norm(self.conv(image.transpose(2, 0, 1)), state)
        return jax.nn.relu(self.out(jnp.mean(jax.nn.relu(x), axis=(1, 2)))), state


def create() -> EncoderFns:
    def make(key):
        model, state = eqx.nn.make_with_state(ConvNet)(key)
        return eqx.filter(model, eqx.is_inexact_array), state

    model, state = eqx.nn.make_with_state(ConvNet)(jax.random.key(0))
    static = eqx.partition(model, eqx.is_inexact_array)[1]
    # Checkpoints hold trees of dicts: the arrays by number, and what puts them together again.
    trees = {"params": eqx.filter(model, eqx.is_inexact_array), "batch_stats": state}
