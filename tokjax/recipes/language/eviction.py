"""Cache compression: what a decoder keeps of its prompt and its text."""

from typing import Literal

from tokjax import budgets
from tokjax.attention.static import Band
from tokjax.binding import bind
from tokjax.budgets import Budget
from tokjax.cache import scores as importance
from tokjax.cache.adaptive import Adaptive
from tokjax.cache.answers import Observed, Remembered
from tokjax.cache.combine import ByHead
from tokjax.cache.evict import evicting
from tokjax.cache.kv import KV
from tokjax.cache.stores import Exact
from tokjax.cache.trim import Trim
from tokjax.recipes.registry import recipe
from tokjax.reduce.rules import KEEP_NEWEST, KeepTop, keep_top, key_norm
from tokjax.slots import Slots

GROUPS = "one set of tokens per key head, not per query head"
TIES = (
  "of equal scores, which max pooling makes, the earliest stays (torch's order"
  " is not defined)"
)


@recipe("full", family="cache", paper="-")
def full() -> Slots:
  """All entries, in full precision."""
  return Slots(cache=KV())


@recipe("random_kv", family="cache", paper="-")
def random_kv(
  budget: Budget = budgets.Share(0.5), last: int = 1, seed: int = 0
) -> Slots:
  """Keeps prompt tokens drawn without replacement, and the last ones.

  Args:
    budget: tokens that remain of a prompt.
    last: last tokens of the prompt that always stay.
    seed: of the draw.
  """
  noise = Observed(fn=bind(importance.noise, seed=seed))
  return Slots(cache=KV(evicting(keep_top(noise), budget, last=last)))


@recipe(
  "streaming_llm",
  family="cache",
  paper="Efficient Streaming Language Models with Attention Sinks",
  arxiv="2309.17453",
  code="mit-han-lab/streaming-llm",
  evidence="mit-han-lab/streaming-llm:streaming_llm/kv_cache.py, pos_shift/"
  " (2e50426)",
  deviations="a long prompt is attended to by a banded mask with the distances"
  " that feeding it token by token gives; room is made before a token is added,"
  " as evict_for_space does (the perplexity script evicts after the step, which"
  " then sees one token more)",
)
def streaming_llm(
  first: int = 4,
  budget: Budget = budgets.Count(516),
  reindexed: bool = True,
) -> Slots:
  """The first tokens and the most recent ones, `budget` in all, at every step.

  Keys are rotated when they are read, to their places in the cache
  (`reindexed`), so that distances never exceed its size.

  Args:
    first: first tokens, the attention sinks, that always stay.
    budget: tokens that a step sees, the first ones included.
    reindexed: positions are those within the cache; False: those of the text.
  """
  return Slots(
    attend=Band(first, budget, reindexed=reindexed),
    cache=KV(
      evicting(KEEP_NEWEST, budget, first=first, last=1),
      Exact(rotated=not reindexed, reindexed=reindexed),
      trim=Trim(KEEP_NEWEST),
    ),
  )


@recipe(
  "snapkv",
  family="cache",
  paper="SnapKV: LLM Knows What You are Looking for Before Generation",
  arxiv="2404.14469",
  code="FasterDecoding/SnapKV",
  evidence="FasterDecoding/SnapKV:snapkv/monkeypatch/snapkv_utils.py (e216ddc);"
  " heads of a group as in NVIDIA/kvpress (8bb29b9)",
  deviations=GROUPS,
)
def snapkv(
  budget: Budget = budgets.Count(2048),
  window: int = 64,
  kernel: int = 5,
  pooling: Literal["avg", "max"] = "avg",
) -> Slots:
  """What the last `window` queries attend to, pooled over neighbours.

  The window itself stays, inside the budget.

  Args:
    budget: tokens that remain of a prompt, the window included.
    window: last queries of the prompt, whose attention ranks the others.
    kernel: neighbours that scores are pooled over, odd; 1: not pooled.
    pooling: mean or maximum of the neighbours.
  """
  score = bind(importance.last_window, kernel=kernel, pooling=pooling)
  rule = keep_top(Observed(fn=score, queries=window))
  return Slots(cache=KV(evicting(rule, budget, last=window)))


@recipe(
  "pyramidkv",
  family="cache",
  paper="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information"
  " Funneling",
  arxiv="2406.02069",
  code="Zefan-Cai/KVCache-Factory",
  evidence="Zefan-Cai/KVCache-Factory:pyramidkv/pyramidkv_utils.py (c97f9d7),"
  " its path for grouped heads (kv_cache_granularity=kv_head) run next to this"
  " one on the same arrays",
  deviations=TIES,
)
def pyramidkv(
  budget: Budget = budgets.Count(2048),
  window: int = 64,
  beta: int = 20,
  kernel: int = 5,
  pooling: Literal["avg", "max"] = "avg",
) -> Slots:
  """SnapKV with more room in lower layers; `budget` is the average.

  Heads of a group are averaged before neighbours are pooled.

  Args:
    budget: what a layer keeps on average, the window included.
    window, kernel, pooling: see SnapKV.
    beta: the highest layer keeps 1 / beta of the average (window apart).
  """
  score = bind(
    importance.last_window, kernel=kernel, pooling=pooling, heads_first=True
  )
  pyramid = budgets.Pyramid(budget, window, beta)
  rule = keep_top(Observed(fn=score, queries=window))
  return Slots(cache=KV(evicting(rule, pyramid, last=window)))


@recipe(
  "adakv",
  family="cache",
  paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for"
  " Efficient LLM Inference",
  arxiv="2407.11550",
  code="FFY0/AdaKV",
  evidence="FFY0/AdaKV:adaptive_snapkv/monkeypatch/snapkv_utils.py (efe4e2e),"
  " its path for grouped heads run next to this one on the same arrays",
  deviations=TIES,
)
def adakv(
  budget: Budget = budgets.Count(2048),
  window: int = 32,
  alpha: float = 0.2,
  kernel: int = 7,
  pooling: Literal["avg", "max"] = "max",
  heads: Literal["mean", "max"] = "mean",
  normalise: bool = False,
) -> Slots:
  """SnapKV's scores; heads compete for the budget of their layer.

  With `budget=budgets.Pyramid(...)` layers differ too.

  Args:
    budget: what a head keeps on average, the window included.
    window, kernel, pooling: see SnapKV.
    alpha: part of the budget that is divided evenly; 1: no competition.
    heads: how the query heads of a key head are reduced, before pooling.
    normalise: scores are multiplied, before heads compete, by the part of the
      head's mass that its own best tokens hold.
  """
  score = bind(
    importance.last_window, kernel=kernel, pooling=pooling, heads=heads,
    heads_first=True,
  )  # fmt: skip
  return Slots(cache=Adaptive(score, budget, window, alpha, normalise))


@recipe(
  "h2o",
  family="cache",
  paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large"
  " Language Models",
  arxiv="2306.14048",
  code="FMInference/H2O",
  evidence="FMInference/H2O:h2o_hf/utils_real_drop/modify_llama.py (ac75c2a)",
  deviations=f"{GROUPS} (masses are summed); the rule of true eviction, without"
  " the masking version's off-by-one in the number of recent tokens",
)
def h2o(
  heavy: Budget = budgets.Share(0.1), recent: Budget = budgets.Share(0.1)
) -> Slots:
  """Tokens that received most attention so far, and the recent ones.

  Both numbers are fixed by the prompt. Attention sums go on while tokens are
  generated; every step evicts one token.

  Args:
    heavy: tokens that stay because they received most attention.
    recent: last tokens that stay.
  """
  budget = budgets.Sum(heavy, recent)
  mass = Observed(fn=importance.received, queries=None)
  trim = Trim(keep_top(Remembered()), remember=mass, after=True)
  evict = evicting(keep_top(mass), budget, last=recent)
  return Slots(cache=KV(evict, trim=trim))


@recipe(
  "knorm",
  family="cache",
  paper="A Simple and Effective L2 Norm-Based Strategy for KV Cache"
  " Compression",
  arxiv="2406.11430",
  evidence="NVIDIA/kvpress:kvpress/presses/knorm_press.py (8bb29b9)",
)
def knorm(budget: Budget = budgets.Share(0.5)) -> Slots:
  """Keeps the keys of smallest norm; nothing is protected."""
  return Slots(cache=KV(evicting(KeepTop(key_norm), budget)))


@recipe(
  "expected_attention",
  family="cache",
  paper="Expected Attention: KV Cache Compression by Estimating Attention from"
  " Future Queries Distribution",
  arxiv="2510.00636",
  code="NVIDIA/kvpress",
  evidence="NVIDIA/kvpress:kvpress/presses/expected_attention_press.py"
  " (8bb29b9)",
)
def expected_attention(
  budget: Budget = budgets.Share(0.5),
  sinks: int = 4,
  future: int = 512,
  covariance: bool = True,
  value_norm: bool = True,
  epsilon: float = 0.0,
) -> Slots:
  """Attention that Gaussian future queries would pay, times value length.

  Args:
    budget: tokens that remain of a prompt.
    sinks: first tokens, which stay and are left out of the estimate.
    future: positions that the expected query is averaged over.
    covariance: whether the queries' second moment counts.
    value_norm: whether the length of the value counts.
    epsilon: added to probabilities before that.
  """
  score = bind(
    importance.expected, sinks=sinks, future=future, covariance=covariance,
    value_norm=value_norm, epsilon=epsilon,
  )  # fmt: skip
  rule = keep_top(Observed(fn=score, queries=None))
  return Slots(cache=KV(evicting(rule, budget, first=sinks)))


@recipe(
  "razor_attention",
  family="cache",
  paper="RazorAttention: Efficient KV Cache Compression Through Retrieval"
  " Heads",
  arxiv="2407.15891",
  evidence="weak: the paper's text; no code is public",
  deviations="the compensation token is a running mean while the window slides,"
  " which the paper leaves open; positions by rotary embedding only",
)
def razor_attention(
  retrieval: tuple = (),
  first: int = 4,
  window: Budget = budgets.Larger(budgets.Count(4000), budgets.Share(0.2)),
) -> Slots:
  """Retrieval heads keep all; others sinks, a window, and one mean token.

  The mean of what is dropped counts for all of it: log n is added to its
  logit. `retrieval` names key heads, for all layers or a tuple for each; see
  `tokjax.cache.retrieval_heads` for how they are found.

  Args:
    retrieval: key heads that keep everything, for all layers or a tuple for
      each.
    first: first tokens that the other heads keep.
    window: last tokens that they keep.
  """
  budget = budgets.Sum(budgets.Always(first), window)
  local = KV(
    evicting(KEEP_NEWEST, budget, first=first, last=window, merge=True),
    trim=Trim(KEEP_NEWEST, merge=True),
  )
  return Slots(cache=ByHead(((retrieval, KV()),), local))
