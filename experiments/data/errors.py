"""What goes wrong with data, said clearly."""


class DataError(RuntimeError):
  """A data set that is not there or not usable; the message says what to do."""
