"""What mypy has to refuse, line by line: an `ignore` that is not needed is an error of its own."""

import jax

import jepa_jax
from jepa_jax import from_arrays, lars, load_encoder, two_views, vicreg_loss, warmup_cosine

z = jax.numpy.ones((4, 3))

jepa_jax.vicreg_los(z, z)  # type: ignore[attr-defined]
vicreg_loss(z)  # type: ignore[call-arg]
vicreg_loss(z, z, 1.0)  # type: ignore[call-arg]
vicreg_loss(z, z, std_coef=1.0)  # type: ignore[call-arg]
vicreg_loss(z, z, cov_coeff="paper")  # type: ignore[arg-type]
loss: float = vicreg_loss(z, z)  # type: ignore[assignment]
two_views(z, z).mean()  # type: ignore[attr-defined]
lars(0.3, 1e-4)  # type: ignore[call-arg]
warmup_cosine(0)  # type: ignore[call-arg]
load_encoder(3)  # type: ignore[arg-type]
from_arrays("images.npy")  # type: ignore[arg-type]
