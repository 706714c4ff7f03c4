"""What a full disk is like: the system refuses to make files longer."""

import resource
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size):
    """Let this process write no more bytes than these into a file; Python leaves it an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
