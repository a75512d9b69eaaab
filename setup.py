"""Places python/ and pallas_kernels/ into one package, and builds csrc/ into dlm_kernels._cpu."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("python"), "dlm_kernels.pallas_kernels"],
    package_dir={"": "python", "dlm_kernels.pallas_kernels": "pallas_kernels"},
)
