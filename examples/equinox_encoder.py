"""An encoder in Equinox: --config.model.type=examples.equinox_encoder:create"""

import equinox as eqx
import jax

from jepa_jax import EncoderFns


class ConvNet(eqx.Module):
    layers: tuple

    def __init__(self, key):
        key1, key2 = jax.random.split(key)
        conv = eqx.nn.Conv2d(3, 16, 3, stride=2, padding=1, key=key1)
        norm = eqx.nn.BatchNorm(16, axis_name="batch", momentum=0.9, mode="batch")
        self.layers = (conv, norm, eqx.nn.Linear(16, 32, key=key2))

    def __call__(self, image, state):
        conv, norm, linear = self.layers
        x, state = norm(conv(image.transpose(2, 0, 1)), state)
        return jax.nn.relu(linear(jax.nn.relu(x).mean((1, 2)))), state


def create() -> EncoderFns:
    make = eqx.nn.make_with_state(ConvNet)
    arrays, rest = eqx.partition(make(jax.random.key(0)), eqx.is_array)

    def init(key, images):  # dicts, which a checkpoint can hold
        trees = [jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in make(key)]
        named = [{f"{i:03}": leaf for i, leaf in enumerate(leaves)} for leaves in trees]
        return {"params": named[0], "batch_stats": named[1]}

    def apply(variables, images, train):
        leaves = [*variables["params"].values(), *variables["batch_stats"].values()]
        model, state = eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), leaves), rest)
        model = eqx.nn.inference_mode(model, not train)
        h, state = jax.vmap(model, (0, None), (0, None), axis_name="batch")(images, state)
        return h, dict(zip(variables["batch_stats"], jax.tree.leaves(state), strict=True))

    return EncoderFns(init, apply)
