"""An encoder in Flax NNX: --config.model.type=examples.nnx_encoder:create"""

import jax.numpy as jnp
from flax import nnx

from jepa_jax import EncoderFns


class ConvNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(16, 32, rngs=rngs)

    def __call__(self, images):
        x = jnp.mean(nnx.relu(self.norm(self.conv(images))), axis=(1, 2))
        return nnx.relu(self.out(x))


def create() -> EncoderFns:
    graph, *_ = nnx.split(nnx.eval_shape(lambda: ConvNet(nnx.Rngs(0))), nnx.Param, ...)

    def init(key, images):
        _, params, stats = nnx.split(ConvNet(nnx.Rngs(key)), nnx.Param, ...)
        return {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}

    def apply(variables, images, train):
        model = nnx.merge(graph, variables["params"], variables["batch_stats"])
        model.set_attributes(use_running_average=not train)
        h = model(images)
        _, _, stats = nnx.split(model, nnx.Param, ...)
        return h, nnx.to_pure_dict(stats)

    return EncoderFns(init, apply)
