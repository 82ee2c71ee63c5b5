"""Why some methods that ask the question stay behind on the grid of digits.

    python -m scripts.vlm_probes --workdir DIR

Takes the model that `scripts.learned_questions` trained in DIR (or trains it)
and changes one thing at a time in `sparsevlm`, `trim` and `cdpruner`, at a
quarter of the visual tokens. Prints right answers to held-out questions by
kind, in percent, and how often the cell that a question names remains.

- `sparsevlm` ranks behind later blocks, which see the image.
- `trim` and `cdpruner` without the sign of the official code; `trim` with as
  many tokens as the budget says.
- Both with words and visual tokens that are alike: a linear map of visual
  tokens, learned on questions of training that name a cell, so that their
  product with the mean word is largest there.
"""

import argparse
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import vlm_grid
from configs.learned import questions
from experiments.data import pipeline
from experiments.training import config as config_lib
from scripts.learned_questions import accuracy, params_of
from tokjax import budgets, diversity, recipes, scores
from tokjax.binding import bind
from tokjax.models.vlm import VisionLanguage
from tokjax.recipes.multimodal import diverse, trim
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_selected
from tokjax.reduce.site import Site
from tokjax.slots import Slots
from tokjax.tokens import Kind

KEEP = 0.25


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
  """A linear map of visual tokens, equal to itself only."""

  matrix: Any

  def site(self, site: Site) -> Site:
    """The site with visual tokens that were mapped."""
    x, visual = site.tokens.x, site.tokens.kind == Kind.VISUAL
    x = jnp.where(visual[:, None], x @ jnp.asarray(self.matrix), x)
    return dataclasses.replace(site, tokens=site.tokens.replace(x=x))


def aligned_trim(site: Site, *, map: Map):
  """TRIM's best by product with the words, of mapped tokens."""
  return trim.best_and_mean(
    map.site(site), similarity="product", sign=1, adaptive=False
  )


def aligned_cdpruner(site: Site, *, map: Map):
  """CDPruner, its relevance that of mapped tokens."""
  weight = diverse.relevance(map.site(site), negated=False)
  x = site.tokens.x.astype(jnp.float32)
  kernel = weight[:, None] * scores.cosine(x, x) * weight[None]
  picked = diversity.determinantal(
    kernel, site.keep, mask=site.mask, count=site.due
  )
  return keep_selected(site, picked)


def named_of(config, numbers) -> np.ndarray:
  """The cell that each held-out question names; -1: none."""
  side = config.data.side
  found = [config.data.question(i)[1].named((side, side)) for i in numbers]
  return np.array([x.argmax() if x.any() else -1 for x in found])


def entering(model: VisionLanguage, params, inputs):
  """What goes into the language model: embeddings, kinds, what is real."""
  rows = model.apply({"params": params}, inputs, method="enter")
  return rows.x, rows.kind, rows.valid


def learned_map(config, params, steps: int) -> Map:
  """Of questions of training that name a cell, by the softmax over cells."""
  model = config.build_model(Slots())
  data, side = config.data, config.data.side
  enter = jax.jit(functools.partial(entering, model))
  rng = np.random.default_rng(5)

  def draw(count):
    rows, cells = [], []
    for _ in range(count):
      scene = data.scene("train", rng)
      asked = data.ask(scene, "cell", int(rng.integers(3)))
      cells.append(int(asked.named((side, side)).argmax()))
      rows.append(
        {"image": scene.image, **_ids(data, asked)}
      )
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}, np.array(cells)

  optimizer = optax.adam(1e-2)
  width = config.model.language.width
  matrix = jnp.zeros((width, width))
  state = optimizer.init(matrix)

  @jax.jit
  def step(matrix, state, x, kind, valid, cell):
    def loss(matrix):
      visual = kind == Kind.VISUAL
      last = jnp.where(visual, jnp.arange(x.shape[1])[None], -1).max(1)
      text = valid & (jnp.arange(x.shape[1])[None] > last[:, None])
      mean = (x * text[..., None]).sum(1) / text.sum(1)[:, None]
      logits = jnp.einsum("bnd,de,be->bn", x, matrix, mean)
      logits = jnp.where(visual, logits, -jnp.inf)
      first = visual.argmax(axis=1) + int(config.model.pass_class)
      log_p = jax.nn.log_softmax(logits)
      own = jnp.take_along_axis(log_p, (first + cell)[:, None], axis=1)
      return -own.mean()

    value, grad = jax.value_and_grad(loss)(matrix)
    change, state = optimizer.update(grad, state)
    return optax.apply_updates(matrix, change), state, value

  value = None
  for _ in range(steps):
    batch, cell = draw(64)
    x, kind, valid = enter(params, config.task.inputs(batch, model))
    matrix, state, value = step(matrix, state, x, kind, valid, cell)
  print(f"map: loss {float(value):.3f}, {np.log(side * side):.3f} at random")
  return Map(np.asarray(matrix))


def _ids(data, asked) -> dict[str, Any]:
  from experiments.data.questions import conversation

  made = conversation(
    data.words, np.zeros((1, 1, 3)), [asked], data.length, held=True
  )
  return {k: made[k] for k in ("tokens", "target", "length")}


def remaining(config, model, params) -> float:
  """How often the named cell remains, in percent."""
  run = jax.jit(
    lambda params, batch: model.apply(
      {"params": params}, config.task.inputs(batch, model)
    )[1]["remains"]
  )
  found, begin = [], 0
  for batch in pipeline.heldout_batches(config.data, config.eval_batch_size, 1):
    left = np.asarray(run(params, batch))
    real = int(batch["weight"].sum())
    cells = named_of(config, range(begin, begin + real))
    begin += real
    first = int(np.argmax(batch["tokens"][0] == config.model.image_token))
    first += int(config.model.pass_class)
    found += [left[i, first + c] for i, c in enumerate(cells) if c >= 0]
  return 100 * float(np.mean(found))


def cases(map: Map) -> dict[str, Slots]:
  """What is compared."""
  once = budgets.Once(KEEP)
  own = lambda rule: Slots(Reduce(rule, once, free=VISUAL, position="renumber"))
  get = functools.partial(recipes.get, keep=KEEP)
  later = budgets.Recycled({1: 0.5, 2: 0.5, 3: 0.5})
  return {
    "fastv": get("fastv"),
    "sparsevlm": get("sparsevlm"),
    "sparsevlm, behind blocks 1, 2 and 3": get("sparsevlm", budget=later),
    "trim": get("trim"),
    "trim, not negated": get("trim", negated=False),
    "trim, as many as the budget": get("trim", adaptive=False),
    "trim, both": get("trim", adaptive=False, negated=False),
    "trim, mapped": own(bind(aligned_trim, map=map)),
    "cdpruner": get("cdpruner"),
    "cdpruner, not negated": get("cdpruner", negated=False),
    "cdpruner, mapped": own(bind(aligned_cdpruner, map=map)),
  }


def main() -> None:
  """Prints a row for each change."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--local", action="store_true", help="two steps")
  args = parser.parse_args()
  local = "runlocal" if args.local else ""
  folder = args.workdir.resolve() / "train"
  params = params_of(vlm_grid.get_config(local), folder)
  config = config_lib.load(
    questions.get_config(",".join(filter(None, ["method=plain", local])))
  )
  print("method\tcell\tcount\tlargest\tnamed cell remains", flush=True)
  for name, slots in cases(learned_map(config, params, args.steps)).items():
    model = config.build_model(slots)
    right = accuracy(config, model, params)
    cells = [f"{x:.1f}" for x in right.values()]
    left = remaining(config, model, params)
    print(name, *cells, f"{left:.0f}", sep="\t", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
