"""What the tests share."""
import pytest

import training.distributed


@pytest.fixture(scope="session")
def mesh():
    """A world of one, which a process can start only once."""
    return training.distributed.start_world("cpu")
