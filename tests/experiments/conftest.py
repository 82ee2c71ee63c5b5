"""What the tests of the loop share."""

import pytest

from tests.experiments.fork_server import ForkServer


@pytest.fixture(scope="session")
def fork_server():
  with ForkServer() as found:
    yield found
