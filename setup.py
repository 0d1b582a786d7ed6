"""The list of packages, which pyproject.toml cannot make: everything under lapse_elmo/, and preprocess/ within it.

The folder preprocess/ holds its programs in the repository. Installed, it is lapse_elmo.preprocess, so that a wheel
adds a single name to site-packages.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lapse_elmo", "lapse_elmo.*"]), "lapse_elmo.preprocess"],
    package_dir={"lapse_elmo.preprocess": "preprocess"},
)
