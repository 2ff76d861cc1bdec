"""The guide's search over learning rates: six rates of LARS, 5 epochs, of which 5 are warm-up.

    python -m jepa_jax.sweep --config=configs/rapid.py --axes=configs/sweeps/lr_search.py
    python -m jepa_jax.sweep --config=configs/cpu.py --axes=configs/sweeps/lr_search.py

It never leaves the warm-up, as the guide's never did: --config.optim.warmup_epochs=1 makes it a
search over the rate of a run.
"""


def get_sweep():
    """Six values of one key, and what is the same for all."""
    return {
        "grid": {"optim.lr": (0.1, 0.3, 0.5, 0.707, 1.0, 1.5)},
        "config": {"optim.name": "lars", "optim.epochs": 5.0, "optim.warmup_epochs": 5.0},
    }
