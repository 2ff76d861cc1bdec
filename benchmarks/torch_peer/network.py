"""Network and loss, computing what jepa_jax.models and jepa_jax.losses compute."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.torch_peer.recipe import Recipe


def _conv(in_channels: int, channels: int, kernel: int, stride: int, padding: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip; parameters have torchvision's names."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, channels, 3, stride, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            skip = _conv(in_channels, channels, 1, stride, 0)
            self.downsample = nn.Sequential(skip, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        x += skip
        return F.relu(x, inplace=True)


class ResNet(nn.Module):
    """Normalised images [B, 3, H, W] to representations [B, F], float32."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        channels = recipe.width
        self.conv1 = _conv(3, channels, recipe.stem_kernel, recipe.stem_stride, recipe.stem_padding)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if recipe.stem_pool else nn.Identity()
        self.stages = []
        for stage, num_blocks in enumerate(recipe.stage_sizes):
            blocks = []
            for block in range(num_blocks):
                wanted = recipe.width * 2**stage
                blocks.append(BasicBlock(channels, wanted, 2 if stage and not block else 1))
                channels = wanted
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.expand = nn.Identity()
        if recipe.expand_dim:
            expand = _conv(channels, recipe.expand_dim, 1, 1, 0)
            norm = nn.BatchNorm2d(recipe.expand_dim)
            self.expand = nn.Sequential(expand, norm, nn.ReLU(inplace=True))
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and name != "conv1":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.expand(x).mean((2, 3), dtype=torch.float32)


class Model(nn.Module):
    """Encoder and projector: images to (h [B, F], z [B, D]), both float32."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.encoder = ResNet(recipe)
        self.projector = nn.Identity()
        if recipe.use_projector:
            hidden = recipe.proj_hidden_dim
            self.projector = nn.Sequential(
                nn.Linear(recipe.num_features, hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
                nn.Linear(hidden, hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
                nn.Linear(hidden, recipe.proj_output_dim),
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return h, self.projector(h).float()


def _variance_and_covariance(z: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, num_dims = z.shape
    z = z - z.mean(0)
    variances = z.square().sum(0) / (num_rows - 1)
    variance_loss = F.relu(1 - (variances + 1e-4).sqrt()).mean()
    # The Frobenius norm of the covariance is that of the Gram matrix: the smaller one is formed.
    if num_rows < num_dims:
        total = (z @ z.T / (num_rows - 1)).square().sum() - variances.square().sum()
    else:
        total = 2 * torch.triu(z.T @ z / (num_rows - 1), 1).square().sum()
    return variance_loss, total / (num_dims * (num_dims - 1))


def vicreg_loss(
    z1: Tensor, z2: Tensor, *, sim_coeff: float, std_coeff: float, cov_coeff: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """jepa_jax.vicreg_loss: embeddings [B, D] to (loss, unweighted terms), scalars."""
    var1, cov1 = _variance_and_covariance(z1)
    var2, cov2 = _variance_and_covariance(z2)
    terms = {
        "invariance_loss": F.mse_loss(z1, z2),
        "var_loss": var1 + var2,
        "cov_loss": cov1 + cov2,
    }
    loss = sim_coeff * terms["invariance_loss"] + std_coeff * terms["var_loss"]
    return loss + cov_coeff * terms["cov_loss"], terms
