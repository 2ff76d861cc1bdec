"""Optimisers and the training step."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.torch_peer.network import Model, vicreg_loss
from benchmarks.torch_peer.recipe import Recipe

NUM_CLASSES = 10


def _lars_update(weights, others, *, lr, weight_decay, momentum):
    """One update in place; `weights` and `others` are each (parameters, gradients, buffers)."""
    params, grads, buffers = weights
    p_norms = torch.stack(torch._foreach_norm(params))
    g_norms = torch.stack(torch._foreach_norm(grads))
    ratios = 0.02 * p_norms / (g_norms + weight_decay * p_norms + 1e-8)
    ratios = (ratios / lr).clamp(max=1.0)
    is_scaled = (p_norms > 0) & (g_norms > 0)
    decays = torch.where(is_scaled, weight_decay * ratios, 0.0)
    ratios = torch.where(is_scaled, ratios, 1.0)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_addcmul_(buffers, grads, list(ratios.unbind()))
    torch._foreach_addcmul_(buffers, params, list(decays.unbind()))
    torch._foreach_add_(params, buffers, alpha=-lr)
    params, grads, buffers = others
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, grads)
    torch._foreach_add_(params, buffers, alpha=-lr)


class Lars(torch.optim.Optimizer):
    """LARS with clipping, as jepa_jax.lars; every parameter must have a gradient.

    Args:
      compiled: whether torch.compile fuses the update's passes over memory.
    """

    def __init__(self, params, *, lr, weight_decay, momentum, compiled: bool = False):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._update = torch.compile(_lars_update) if compiled else _lars_update
        (self._group,) = self.param_groups
        for param in self._group["params"]:
            self.state[param]["momentum"] = torch.zeros_like(param)

    def _lists(self, params):
        return params, [p.grad for p in params], [self.state[p]["momentum"] for p in params]

    @torch.no_grad()
    def step(self) -> None:
        """Updates in place."""
        weights = [p for p in self._group["params"] if p.ndim > 1]
        others = [p for p in self._group["params"] if p.ndim <= 1]
        options = {name: self._group[name] for name in ("lr", "weight_decay", "momentum")}
        self._update(self._lists(weights), self._lists(others), **options)


def create_optimizer(
    recipe: Recipe, params: Iterator[nn.Parameter], *, compiled: bool
) -> torch.optim.Optimizer:
    """The recipe's optimiser; weight decay never touches one-axis parameters."""
    params, decay = list(params), recipe.weight_decay
    if recipe.optimizer == "lars":
        return Lars(
            params, lr=recipe.lr, weight_decay=decay, momentum=recipe.momentum, compiled=compiled
        )
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


class Trainer:
    """Everything a step changes, and the step.

    Args:
      recipe: see `Recipe`.
      mode: what torch.compile makes: 'eager' nothing, 'mixed' LARS alone, 'compile' forward and
        backward too. (On CPUs PyTorch's own operators can beat the compiled network.)
      dtype: 'float32', or 'bfloat16' for autocast with a loss in float32.
      memory_format: of weights and activations.
      device: where all of it lies.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        mode: str,
        dtype: str,
        memory_format: torch.memory_format,
        device: torch.device,
    ):
        torch.manual_seed(0)
        self.recipe, self.dtype, self.device = recipe, dtype, device
        self.model = Model(recipe).to(device, memory_format=memory_format).train()
        num_outputs = recipe.num_features
        self.probe = nn.Linear(num_outputs, NUM_CLASSES).to(device)
        self.optimizers = (
            create_optimizer(recipe, self.model.parameters(), compiled=mode != "eager"),
            torch.optim.Adam(self.probe.parameters(), lr=1e-3, fused=True),
        )
        self._forward = torch.compile(self.losses) if mode == "compile" else self.losses

    def losses(self, x1: Tensor, x2: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and that of the online probe on the first view's detached features."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            h, z1 = self.model(x1)
            _, z2 = self.model(x2)
        recipe = self.recipe
        loss, _ = vicreg_loss(
            z1,
            z2,
            sim_coeff=recipe.sim_coeff,
            std_coeff=recipe.std_coeff,
            cov_coeff=recipe.cov_coeff,
        )
        return loss, F.cross_entropy(self.probe(h.detach()), labels)

    def step(self, x1: Tensor, x2: Tensor, labels: Tensor) -> Tensor:
        """One update from two normalised views [B, 3, H, W]; the loss, on the device."""
        loss, probe_loss = self._forward(x1, x2, labels)
        (loss + probe_loss).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()
