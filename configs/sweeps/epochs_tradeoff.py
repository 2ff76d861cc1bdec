"""The guide's table of epochs against time and accuracy; two of its five cells say "Error".

    python -m jepa_jax.sweep --config=configs/rapid.py --axes=configs/sweeps/epochs_tradeoff.py
    python -m jepa_jax.sweep --config=configs/cpu.py --axes=configs/sweeps/epochs_tradeoff.py

Each length has a schedule of its own, with 5 epochs of warm-up as in rapid.yaml: the shortest is
nothing but warm-up.
"""


def get_sweep():
    """Five lengths of one recipe."""
    return {
        "grid": {"optim.epochs": (5.0, 10.0, 15.0, 25.0, 40.0)},
        "config": {"optim.warmup_epochs": 5.0},
    }
