"""The version of the package, as pyproject.toml states it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fae-ray")
except PackageNotFoundError:  # a checkout on the path of a machine where it is not installed
    __version__ = "0+unknown"
