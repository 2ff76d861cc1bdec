"""What pyproject.toml cannot say: all subpackages, and where configs/ goes.

An installation has configs/ inside the package: a top-level package of that name would be in the
way of a user's own (jepa_jax/configs.py finds either).
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["jepa_jax", "jepa_jax.*"]),
        "jepa_jax._configs",
        "jepa_jax._configs.sweeps",
    ],
    package_dir={"jepa_jax._configs": "configs"},
)
