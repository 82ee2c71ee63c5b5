"""Attention to a condensed past: one token for many, or one state for all."""

from tokjax import budgets
from tokjax.attention.core_context import CoreContext
from tokjax.attention.linear import Linear, LinearState
from tokjax.attention.multi_token_states import MultiTokenStates
from tokjax.attention.sentinel import Sentinels
from tokjax.attention.static import Separators
from tokjax.binding import bind
from tokjax.budgets import Budget
from tokjax.cache import scores as importance
from tokjax.cache.answers import Observed, Remembered
from tokjax.cache.cores import Cores
from tokjax.cache.evict import evicting
from tokjax.cache.kv import KV
from tokjax.cache.multi_token import MultiTokenCache
from tokjax.cache.stores import Exact
from tokjax.cache.trim import Trim
from tokjax.recipes.registry import recipe
from tokjax.reduce.rules import KeepTop, answer
from tokjax.slots import Slots


@recipe(
  "cca",
  family="llm",
  paper="Core Context Aware Attention for Long Context Language Modeling",
  arxiv="2412.12465",
  training="both",
  code="chenyaofo/CCA-Attention",
  evidence="chenyaofo/CCA-Attention:codebase/core/cca_attn.py, cca_pooling.py"
  " (052cc8e; later commits have no code), run next to this one on the same"
  " arrays",
  deviations="while decoding, cores of the first two layers are those of the"
  " groups that leave the window, as in other layers (the official cache makes"
  " them of the first tokens)",
)
def cca(
  local: Budget = budgets.Count(1024),
  group: int = 16,
  weighted: bool = True,
) -> Slots:
  """A window, and one weighted mean for each group of tokens before it.

  Made for models that are fine-tuned with it; the cache holds the window and
  the means.

  Args:
    local: last tokens that a query sees exactly, at least.
    group: tokens a group.
    weighted: False for plain means, to compare with.
  """
  attend = CoreContext(group, local, weighted)
  return Slots(attend=attend, cache=Cores())


@recipe(
  "sepllm",
  family="llm",
  paper="SepLLM: Accelerate Large Language Models by Compressing One Segment"
  " into One Separator",
  arxiv="2412.12094",
  code="HKUDS/SepLLM",
  training="both",
  evidence="HKUDS/SepLLM:Streaming-SepLLM/sepllm_kv_cache/kv_cache_manager.py,"
  " Training-SepLLM/ (f250f59)",
  deviations="a cache holds the newest `separators` ones in either form; a"
  " prompt keeps its own positions while it is read, and is always cut at its"
  " end",
)
def sepllm(
  tokens: tuple[int, ...] = (),
  first: int = 4,
  separators: int = 64,
  window: Budget = budgets.Count(256),
  slack: int = 0,
  reindexed: bool = False,
) -> Slots:
  """The first tokens, a window, and separators, which represent segments.

  `tokens` are the ids of separators in the tokenizer. Without `slack` a step
  sees what the mask of a prompt would show it. Streaming: slack=476,
  window=budgets.Count(256), reindexed=True; the cache evicts, after a step's
  attention, once more than `slack` entries too many are there.

  Args:
    tokens: ids of separators in the tokenizer.
    first: first tokens that always stay.
    separators: newest separators that the cache holds.
    window: last tokens that always stay.
    slack: entries too many that are let in before the cache evicts.
    reindexed: positions are those within the cache.
  """
  budget = budgets.Sum(budgets.Always(first + separators), window)
  newest = Observed(
    fn=bind(importance.separators, tokens=tokens), needs=("token",)
  )
  keep = lambda question: KeepTop(bind(answer, question=question), strict=True)
  arriving = bind(importance.arriving_separators, tokens=tokens)
  trim = Trim(
    keep(Remembered()), remember=newest, after=slack > 0, slack=slack,
    always=slack == 0, arriving=arriving,
  )  # fmt: skip
  return Slots(
    attend=Separators(tokens, first, window),
    cache=KV(
      evicting(keep(newest), budget, first=first, last=window),
      Exact(rotated=not reindexed, reindexed=reindexed),
      trim=trim,
    ),
  )  # fmt: skip


@recipe(
  "attamba",
  family="llm",
  paper="Attamba: Attending To Multi-Token States",
  arxiv="2411.17685",
  code="abdelfattah-lab/attamba",
  training="learned",
  evidence="abdelfattah-lab/attamba:apps/attamba/core_attamba.py,"
  " lingua/transformer.py (3b3b30c), whose ends of chunks and mask were run"
  " next to these; its state-space kernel needs a GPU and was read",
  deviations="state-space models start anew at the first token of a chunk, as"
  " in the paper (the release does so at every token); the last token of a"
  " text ends no chunk (there it takes the place of the last end); of a chunk"
  " that is not complete the cache keeps inputs, not states; the model's"
  " projections of keys and values are there, but not used",
)
def attamba(
  chunk: int = 8,
  lead: int = 1,
  state: int = 128,
  hidden: int | None = None,
  heads: int = 8,
  kernel: int = 4,
) -> Slots:
  """Queries see one key for each chunk, made by a state-space model.

  Args:
    chunk: tokens a chunk.
    lead: newest tokens before itself that a query sees.
    state: features of a state for each channel.
    hidden: channels of the state-space models; None: the width.
    heads: of those models.
    kernel: taps of their causal convolution.
  """
  attend = MultiTokenStates(chunk, lead, state, hidden, heads, kernel)
  return Slots(attend=attend, cache=MultiTokenCache())


@recipe(
  "sentinel_tokens",
  family="llm",
  paper="Taking a Deep Breath: Enhancing Language Modeling of Large Language"
  " Models with Sentinel Tokens",
  arxiv="2406.10985",
  training="learned",
  evidence="weak: the abstract, summaries and the mask of Figure 1; no code was"
  " found in repositories that name the paper",
  deviations="how long chunks are is up to the data, and whether a sentinel"
  " sees earlier ones an option, as neither is told; a sentinel that is"
  " generated sees everything",
)
def sentinel_tokens(
  tokens: tuple[int, ...] = (), earlier: bool = False
) -> Slots:
  """Tokens that end chunks of a prompt see their own chunk alone.

  The data puts them there, for example with `with_landmarks` of
  `tokjax.attention.landmark`, and asks for no prediction at them.

  Args:
    tokens: their ids.
    earlier: whether they also see those of earlier chunks.
  """
  return Slots(attend=Sentinels(tokens, earlier))


@recipe(
  "lightning_attention",
  family="llm",
  paper="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence"
  " Lengths in Large Language Models",
  arxiv="2401.04658",
  code="OpenNLPLab/lightning-attention",
  training="learned",
  evidence="OpenNLPLab/lightning-attention:lightning_attn/ops/triton/"
  "lightning_attn2.py, examples/module/tnl_attn.py (d15c385), the module run"
  " next to this one on the same arrays",
  deviations="the output gate is an option, off by default (official: a gate of"
  " the rank of one head's width)",
)
def lightning_attention(
  silu: bool = True, norm: bool = True, gate_rank: int = 0, block: int = 64
) -> Slots:
  """Linear attention with decay; the cache is one matrix a head.

  Args:
    silu: queries, keys and values go through SiLU first.
    norm: outputs of all heads together go through a layer norm.
    gate_rank: of the output gate; 0: no gate.
    block: tokens of a tile of the kernel.
  """
  return Slots(attend=Linear(silu, norm, gate_rank, block), cache=LinearState())
