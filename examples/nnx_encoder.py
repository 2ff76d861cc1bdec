"""An encoder in Flax NNX: --config.model.type=examples.nnx_encoder:create"""

import jax.numpy as jnp
from flax import nnx

from jepa_jax import EncoderFns


class ConvNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(16, 32, rngs=rngs)

    def __call__(self, images, train: bool):
        x = self.norm(self.conv(images), use_running_average=not train)
        return nnx.relu(self.out(jnp.mean(nnx.relu(x), axis=(1, 2))))


def create() -> EncoderFns:
    def split(model):
        graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        return graph, {"params": params, "batch_stats": stats}

    graph, like = split(nnx.eval_shape(lambda: ConvNet(nnx.Rngs(0))))

    def init(key, images):
        _, states = split(ConvNet(nnx.Rngs(key)))
        return {kind: nnx.to_pure_dict(state) for kind, state in states.items()}

    def apply(variables, images, train):
        for kind, state in like.items():
            nnx.replace_by_pure_dict(state, variables[kind])
        model = nnx.merge(graph, like["params"], like["batch_stats"])
        h = model(images, train)
        return h, nnx.to_pure_dict(split(model)[1]["batch_stats"])

    return EncoderFns(init, apply)
