"""How strong variance and covariance have to be beside an invariance of 1.

    python -m jepa_jax.sweep --config=configs/cpu.py --axes=configs/sweeps/loss_weights.py

The paper's balance is std_coeff 1 and cov_coeff (D - 1) / 25, 20 at the 512 outputs of cpu.py;
rapid.yaml says 25 and 1 at 4,096.
"""


def get_sweep():
    """Every combination of three weights of either term."""
    return {"grid": {"loss.std_coeff": (1.0, 5.0, 25.0), "loss.cov_coeff": (1.0, 5.0, 20.0)}}
