"""Text dominance: the card, and rows of a small model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import config, params_of
from tests.multimodal import prompts
from tokjax.analysis.dominance import by_depth, dominance
from tokjax.models.decoder import Decoder
from tokjax.signals import Last, Rows
from tokjax.slots import Slots
from tokjax.tokens import Kind


def test_numbers_of_its_card():
  """10 text and 90 other tokens that share attention equally."""
  text = jnp.arange(100) < 10
  row = jnp.where(text, 0.05, 0.5 / 90)
  found = dominance(row, text, ~text)
  np.testing.assert_allclose(found, (9, 5, 0.5556), rtol=1e-4)
  # Attention to neither does not count; equal tokens give 1.
  even = dominance(jnp.ones(100), text, ~text & (jnp.arange(100) < 50))
  np.testing.assert_allclose(even, (1, 1, 1), rtol=1e-6)


def test_layers_are_grouped():
  values = jnp.arange(8.0)
  found = by_depth(values)
  assert {name: float(x) for name, x in found.items()} == {
    "early": 0.5, "middle": 3.5, "late": 6.5
  }
  with pytest.raises(ValueError, match="each=9: must be in 1..8"):
    by_depth(values, 9)


def test_rows_of_a_model_that_collects_them():
  """Of the last two tokens, as if they had been generated."""
  given = prompts.packed(("long", "short"))
  kinds = given[2]
  asked, cfg = Rows(of=Last(2), over="mean"), config(depth=2)
  model = Decoder(cfg, Slots(collect=(asked,)))

  @jax.jit
  def run(params, ids, mask, kinds):
    out = model.apply({"params": params}, ids, mask=mask, kind=kinds)[1]
    maps = jnp.stack([answers.values[0] for answers in out["signals"]])
    visual = kinds == Kind.VISUAL
    asked = jnp.arange(ids.shape[1])[None] < mask.sum(axis=1)[:, None] - 2
    return maps, dominance(maps, asked & ~visual, asked & visual)

  maps, found = jax.device_get(run(params_of(cfg), *given))
  assert found.index.shape == (2, 2)
  visual = kinds == Kind.VISUAL
  for layer in range(2):
    for i, name in enumerate(("long", "short")):
      n = len(prompts.KINDS[name]) - 2
      row, own = maps[layer, i, :n], visual[i, :n]
      expected = row[~own].mean() / row[own].mean()
      np.testing.assert_allclose(found.index[layer, i], expected, rtol=1e-5)
  np.testing.assert_allclose(found.index, found.text / found.other, rtol=1e-5)
