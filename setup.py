"""All metadata are in pyproject.toml; here is what needs code: reference/ as a part of the package."""

from setuptools import find_packages, setup

# reference/ stays at the top level, where readers find it; the link ntk_kernels/reference makes it part of the package.
# Where links cannot be checked out (Windows), the folder is mapped. The root "." makes an editable install a plain
# path, which editors and type checkers can follow.
packages = find_packages(include=["ntk_kernels", "ntk_kernels.*"])
package_dir = {"": "."}
if "ntk_kernels.reference" not in packages:
    packages.append("ntk_kernels.reference")
    package_dir["ntk_kernels.reference"] = "reference"

setup(packages=packages, package_dir=package_dir)
