"""A disk that is full, without filling one."""

from contextlib import contextmanager

import pytest


@contextmanager
def files_of_at_most(size):
    """The kernel refuses to let a file grow beyond that, as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
