"""What the tests share."""
import pytest

import train


@pytest.fixture(scope="session")
def mesh():
    """A world of one, which a process can start only once."""
    return train.start_world("cpu")
