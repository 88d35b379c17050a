from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["transformers>=4.51", "peft>=0.14", "rich>=13", "matplotlib>=3.7"]
# TRL asks for Python 3.11; on 3.10 the core works without it.
TRL = ["trl>=1.15,<2", "datasets>=4.7", "peft>=0.17", "rich>=13", "matplotlib>=3.7"]
BENCH = ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.7", "transformers>=4.51", "peft>=0.14"]
TEST = ["pytest>=8", "pytest-timeout>=2", "pytest-xdist>=3", "hypothesis>=6", "numpy>=1.26", "ruff>=0.6"]

# torch 2.7 pins Triton 3.3, 2.8 3.4, 2.9 3.5: a higher bound would leave no CUDA build of the older ones. Triton's
# interpreter, which the tests use on CPUs, needs numpy<2.4 before Triton 3.7.
INSTALL = ["torch>=2.7", "triton>=3.3; platform_system == 'Linux'"]

setup(
    name="egrsd-kernels",
    version="0.1.0",
    description="Fused Triton kernels for entropy-guided reinforced self-distillation (EGRSD, CL-EGRSD)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["egrsd_kernels", "egrsd_kernels.*"]),
    package_data={"egrsd_kernels.presets": ["*.yaml"], "egrsd_kernels.rollouts": ["page.*"]},
    entry_points={"console_scripts": ["egrsd = egrsd_kernels.cli:main"]},
    python_requires=">=3.10",
    install_requires=INSTALL,
    extras_require={
        "train": TRAIN,
        "trl": TRL,
        "bench": BENCH,
        "test": [*TEST, *TRAIN, *TRL],
        "all": sorted({*TRAIN, *TRL, *BENCH, *TEST}),
    },
)
