"""configs/cpu.py with another objective, at the same scale: 90 seconds on two CPU cores.

    python -m jepa_jax.main --config=configs/objectives.py:sigreg
    python -m jepa_jax.main --config=configs/objectives.py:simclr

The argument is one of vicreg (cpu.py as it is), sigreg (the default), lejepa, barlow and simclr.
Data, views, network, optimiser and length are cpu.py's; the loss and the width of what it sees are
by published values, not tuned here.
"""

from ml_collections import ConfigDict

from jepa_jax.configs import cpu

# Keys of cpu.py to change, by objective.
OBJECTIVES = {
    "vicreg": {},
    # The reference's: weight 10, 128 outputs. A Gaussian needs fewer dimensions than images.
    "sigreg": {"loss.sigreg_coeff": 10.0, "model.proj_output_dim": 128},
    # The paper's lambda (arXiv 2511.08544), and its (1 - lambda).
    "lejepa": {
        "loss.sim_coeff": 0.95,
        "loss.sigreg_coeff": 0.05,
        "model.proj_output_dim": 128,
    },
    # The paper's lambda (arXiv 2103.03230), at cpu.py's 512 outputs: it gains from many.
    "barlow": {"loss.redundancy_coeff": 0.005},
    # The paper's temperature and outputs for CIFAR-10 (arXiv 2002.05709, appendix B.9).
    "simclr": {"loss.temperature": 0.5, "model.proj_output_dim": 128},
}


def get_config(objective: str = "sigreg") -> ConfigDict:
    """cpu.py:90s under another loss.

    Args:
      objective: a key of `OBJECTIVES`.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objectives.py has {', '.join(OBJECTIVES)}, not {objective}")
    config = cpu.get_config()
    config.loss.type = objective
    config.update_from_flattened_dict(OBJECTIVES[objective])
    return config
