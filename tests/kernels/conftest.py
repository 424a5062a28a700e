"""The compiled library: built for the sources as they are, or a reason to skip."""

import pytest

from secateur import kernels
from secateur.errors import KernelError
from secateur.kernels.building import build


@pytest.fixture(scope="session", autouse=True)
def library():
    """The kernels, built when they are not; skipped without a compiler."""
    if kernels.where() is None:
        try:
            build()
        except KernelError as error:
            pytest.skip(f"no kernels: {error}")
        kernels.library.cache_clear()
        kernels._level.cache_clear()
        kernels._found.cache_clear()
    return kernels.library()
