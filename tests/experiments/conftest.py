"""What the tests of the loop share."""

import pytest

from tests.experiments.nursery import Nursery


@pytest.fixture(scope="session")
def nursery():
  with Nursery() as found:
    yield found
