"""Who reads whom under an attention or cache method, as a picture.

One head attends with weights that are given: keys are unit vectors, and a
query is its row of logits. Values are unit vectors too, so that the output of
a query *is* its row of weights, whatever the method does with keys and values.
The map has what language models show: a sink, a local band, some tokens that
many later ones look at, and a passage that only the end looks at.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from tests.cache.cases import options_of
from tokjax import recipes
from tokjax.analysis import drawing, quick
from tokjax.attention.causal import Causal
from tokjax.cache.kv import KV
from tokjax.layer import Arrivals, Layer
from tokjax.slots import Slots

PROMPT, STEPS, DEPTH, HEADS = 48, 16, 2, 2
LENGTH = PROMPT + STEPS
KEEP = 0.5
HEAVY, PASSAGE = (9, 21, 34), range(26, 30)
# Their map is that of all tokens: they change how entries are stored at most.
SAME = ("full", "kivi", "zipcache")
INK, UNREAD, LATER = "#262626", (0.93, 0.80, 0.78), (1.0, 1.0, 1.0)
CAPTION = (
  "Who reads whom in the upper of two layers, on a made-up attention map with a"
  " sink, a local band, three tokens that many look at and a passage that only"
  " the end looks at. A row is a query: those of the prompt above the line,"
  " generated tokens below it. Dark is much attention; red are tokens that came"
  f" before and are not read. Options are small, and {KEEP:.0%} is kept."
)


def logits() -> np.ndarray:
  """The attention that is asked for, `[LENGTH, LENGTH]`."""
  rng = np.random.default_rng(0)
  query, key = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
  wanted = rng.normal(scale=0.4, size=(LENGTH, LENGTH))
  wanted += 3.5 * (key == 0)
  wanted += 3.0 * np.exp(-np.abs(query - key) / 2)
  wanted += 2.2 * np.isin(key, HEAVY)
  return wanted + 3.0 * (np.isin(key, PASSAGE) & (query >= PROMPT - 6))


def arrivals(start: int, stop: int) -> Arrivals:
  """Tokens start..stop of one example, the same for every head."""
  eye = np.eye(LENGTH)
  # Keys that matter are short, as the method `knorm` supposes.
  length = 1 + 0.1 * np.random.default_rng(2).uniform(size=LENGTH)
  length[[0, *HEAVY]] = 0.8
  q = logits() / length * LENGTH**0.5
  heads = lambda x: jnp.asarray(
    np.repeat(x[None, start:stop, None], HEADS, axis=2), jnp.float32
  )
  ids = np.random.default_rng(1).integers(0, 11, size=LENGTH)
  at = jnp.arange(start, stop)[None]
  return Arrivals(
    heads(q), heads(eye * length[:, None]), heads(eye), at,
    jnp.ones(at.shape, bool), jnp.asarray(ids)[at],
    jnp.asarray(eye[None, start:stop], jnp.float32),
  )  # fmt: skip


@functools.partial(quick.jit, static_argnames="slots")
def _run(slots: Slots, prompt: Arrivals, steps: Arrivals):
  """Outputs of the last layer: of the prompt, and of each step."""
  attend = Causal() if slots.attend is None else slots.attend
  cache = KV() if slots.cache is None else slots.cache
  layers = [Layer(i, DEPTH, HEADS, HEADS, LENGTH) for i in range(DEPTH)]
  states, carry, out = [], {}, None
  for layer in layers:
    state = cache.init(layer, 1, PROMPT, STEPS)
    out, state, carry = cache.prefill(
      layer, state, prompt, attend=attend, params={}, carry=carry, last=True
    )
    states.append(state)

  def step(states, arriving):
    made, carry, read = [], {}, None
    for layer, state in zip(layers, states, strict=True):
      read, state, carry = cache.decode(
        layer, state, arriving, attend=attend, params={}, carry=carry
      )
      made.append(state)
    return made, read[0, 0]

  return out[0], jax.lax.scan(step, states, steps)[1]


def weights(slots: Slots) -> np.ndarray:
  """Weights of the first head, `[LENGTH, LENGTH]`."""
  one_by_one = [arrivals(i, i + 1) for i in range(PROMPT, LENGTH)]
  steps = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
  prompt, generated = _run(slots, arrivals(0, PROMPT), steps)
  return np.concatenate([prompt[:, 0], generated[:, 0]])


def draw(recipe: recipes.Recipe, path: pathlib.Path) -> bool:
  """Writes the picture of a method; False: it has none."""
  if recipe.family not in ("llm", "cache") or recipe.training == "learned":
    return False
  slots = recipe(keep=KEEP, **options_of(recipe.name))
  if slots.reduce or recipe.name in SAME:
    return False
  _plot(weights(slots), recipe.name, path)
  return True


@functools.cache
def _everything() -> np.ndarray:
  return weights(Slots())


def colours(weight: np.ndarray) -> np.ndarray:
  """Rows of weights as colours, `[q, k, 3]`."""
  dark = np.sqrt(np.clip(weight, 0, 1))[..., None]
  shown = (1 - dark) * np.array([0.90, 0.93, 0.97]) + dark * np.array(
    [0.05, 0.12, 0.32]
  )
  earlier = np.tri(LENGTH, dtype=bool)
  shown[earlier & (np.abs(weight) < 1e-6)] = UNREAD
  shown[~earlier] = LATER
  return shown


def _plot(weight: np.ndarray, name: str, path: pathlib.Path) -> None:
  fig = drawing.figure(figsize=(7.4, 4.1), dpi=110, layout="constrained")
  panels = {"every token is read": _everything(), name: weight}
  for place, (title, shown) in zip(
    fig.subplots(1, 2, sharey=True), panels.items(), strict=True
  ):
    place.imshow(colours(shown), interpolation="nearest")
    place.axhline(PROMPT - 0.5, color=INK, linewidth=0.8)
    place.set_title(title, size=10, color=INK)
    place.set_xlabel("key", size=8, color=INK)
    place.tick_params(labelsize=7, colors=INK)
    for side in place.spines.values():
      side.set_visible(False)
    if title != name:
      place.set_ylabel("query", size=8, color=INK)
  fig.savefig(path)
