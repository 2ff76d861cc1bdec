"""SIGReg in place of VICReg at cpu.py's size: objectives.py:sigreg by its own name.

    python -m jepa_jax.main --config=configs/sigreg.py

configs/objectives.py says where its values come from.
"""

from ml_collections import ConfigDict

from jepa_jax.configs import objectives


def get_config() -> ConfigDict:
    """cpu.py:90s under SIGReg."""
    return objectives.get_config("sigreg")
