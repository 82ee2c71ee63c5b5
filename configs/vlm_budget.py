"""One budget over encoder, prompt, language model and cache: how to share it.

python -m experiments.sweep --config configs/vlm_budget.py --workdir DIR

The model of `vlm_pareto.py`. Single methods before the language model, inside
it and in its cache, against pairs and triples that share one keep ratio:
"divprune^1/3+snapkv^2/3" gives the first keep^(1/3), the second keep^(2/3); and
pairs with the cache in few bits, which no keep ratio turns. The search is the
list of shares. Says under the table whether the best
combination beats the best single method at equal FLOPs and at equal bytes.
"""

import ml_collections

from configs import common, vlm_pareto

# Prompts are short: the last words of a question look for the rest.
WINDOW = 4
# Entries of a head have 16 channels, and prompts are short.
FEW_BITS = dict(bits=4, group=8, residual=8)
# What acts before the language model, inside it, and in its cache; a store.
BEFORE = ("divprune", "fastervlm")
INSIDE = ("fastv",)
CACHE = ("snapkv",)
STORE = ("kivi",)
SHARES = ("1/3", "1/2", "2/3")


def combinations() -> tuple[str, ...]:
  """Names of pairs with three shares each, and of equal triples."""
  pairs = [
    f"{a}^{share}+{b}^{rest}"
    for firsts, seconds in ((BEFORE, INSIDE), (BEFORE, CACHE), (INSIDE, CACHE))
    for a in firsts
    for b in seconds
    for share, rest in zip(SHARES, reversed(SHARES), strict=True)
  ]
  triples = [
    f"{a}^1/3+{b}^1/3+{c}^1/3" for a in BEFORE for b in INSIDE for c in CACHE
  ]
  stored = [
    f"{a}^1/2+{c}^1/2+{d}" for a in BEFORE for c in (*INSIDE, *CACHE)
    for d in STORE
  ]  # fmt: skip
  return (*pairs, *triples, *stored)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: as of `vlm_pareto`; "runlocal" is two methods and a pair."""
  values = common.parse_arg(arg, checkpoint="", questions="", data="grid")
  config = vlm_pareto.get_config(arg)
  config.recipes = ("random_visual", *BEFORE, *INSIDE, *CACHE, *combinations())
  if values.runlocal:
    config.recipes = ("divprune", "snapkv", "divprune^1/2+snapkv^1/2")
  if not values.checkpoint:
    for name in config.recipes:
      options = dict(window=WINDOW) if "snapkv" in name else {}
      options |= FEW_BITS if "kivi" in name else {}
      if options:
        config.options[name] = options
  return config
