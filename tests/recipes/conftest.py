"""Fixtures for the tests of recipes."""

import jaxtyping
import pytest


@pytest.fixture
def as_users_run_it():
  """Switches off the type checks that only tests have.

  They would catch a wrong type before the library's own error does, which is
  the one that users see.
  """
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", before)
