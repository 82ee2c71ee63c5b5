"""How many parts a GPU cuts the read of a cache into."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import decode_attention
from pallas_kernels.decode_attention import operands as forms
from pallas_kernels.decode_attention import splits


@pytest.mark.parametrize(
  ("cells", "tiles", "parts"),
  [
    (32, 256, 4),  # 128 thread blocks for 132 multiprocessors.
    (8, 256, 16),
    (1, 256, 128),  # Two tiles each: not 132, of which some have one.
    (132, 256, 1),  # Full as it is.
    (512, 256, 1),
    (100, 256, 5),  # 3.8 rounds of a fifth instead of one for 100 of 132.
    (1, 1, 1),
    (8, 0, 1),
  ],
)
def test_every_multiprocessor_has_work(cells, tiles, parts):
  assert splits.choose(cells, tiles) == parts


def test_a_smaller_gpu_takes_fewer_parts():
  assert splits.choose(8, 256, multiprocessors=66) == 8


def test_parts_follow_what_is_read():
  """All entries, a tenth of their blocks, single tokens; other platforms: 1."""
  shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
  q, k = shape(1, 1, 32, 128), shape(1, 32768, 8, 128)
  options = forms.Options(1.0, None, 128, False, 1)

  def parts(name="gpu", **listed):
    arrays = dict.fromkeys(("lengths", "bias", "blocks", "tokens", "counts"))
    operands = forms.Operands(q, k, k, **(arrays | listed))
    return splits.of_call(name, operands, options)

  listed = functools.partial(shape, dtype=jnp.int32)
  assert parts() == parts("gpu_interpret") == splits.choose(8, 256) == 16
  assert parts(blocks=listed(1, 8, 25)) == splits.choose(8, 25) == 13
  assert parts(tokens=listed(1, 8, 1000)) == splits.choose(8, 8) == 8
  assert parts("xla") == parts("tpu") == 1


def test_it_is_at_least_one():
  q, k = jnp.ones((1, 1, 2, 8)), jnp.ones((1, 16, 1, 8))
  with pytest.raises(ValueError, match="splits=0, must be at least 1, or None"):
    decode_attention(q, k, k, splits=0)
