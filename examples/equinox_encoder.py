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
    make = eqx.nn.make_with_state(ConvNet)
    arrays, rest = eqx.partition(make(jax.random.key(0)), eqx.is_array)

    def named(tree):  # a dict, which a checkpoint can hold
        return {f"{i:03}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}

    def init(key, images):
        model, state = eqx.filter(make(key), eqx.is_array)
        return {"params": named(model), "batch_stats": named(state)}

    def apply(variables, images, train):
        leaves = [*variables["params"].values(), *variables["batch_stats"].values()]
        model, state = eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), leaves), rest)
        model = eqx.nn.inference_mode(model, not train)
        h, state = jax.vmap(model, (0, None), (0, None), axis_name="batch")(images, state)
        return h, named(state)

    return EncoderFns(init, apply)
