"""An encoder in Haiku: --config.model.type=examples.haiku_encoder:create"""

import haiku as hk
import jax
import jax.numpy as jnp

from jepa_jax import EncoderFns


def conv_net(images, train):
    x = hk.Conv2D(16, 3, stride=2)(images)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, train)
    x = jnp.mean(jax.nn.relu(x), axis=(1, 2))
    return jax.nn.relu(hk.Linear(32)(x))


def create() -> EncoderFns:
    net = hk.without_apply_rng(hk.transform_with_state(conv_net))

    def init(key, images):
        params, stats = net.init(key, images, True)
        return {"params": params, "batch_stats": stats}

    def apply(variables, images, train):
        return net.apply(variables["params"], variables["batch_stats"], images, train)

    return EncoderFns(init, apply)
