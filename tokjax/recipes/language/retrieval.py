"""Retrieval by decoders: what a step or a chunk of queries reads."""

from tokjax import budgets
from tokjax.attention.block_memory import BlockMemory
from tokjax.attention.head_chunks import HeadChunks
from tokjax.attention.landmark import Landmark
from tokjax.attention.probe_query import ProbeQuery
from tokjax.attention.soft_vote import SoftVote
from tokjax.budgets import Budget
from tokjax.cache.kv import KV
from tokjax.cache.persistent import Persistent
from tokjax.cache.reads import Pages
from tokjax.cache.retriever import Retriever
from tokjax.cache.shared_pages import SharedPages
from tokjax.recipes.registry import recipe
from tokjax.reduce.free import ALL, Free
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_top
from tokjax.signals import Last, Rows
from tokjax.slots import Slots

# Products of the last token's queries with all keys, summed over heads.
LAST_QUERY = Rows(of=Last(), form="logits", over="sum")


@recipe(
  "quest",
  family="llm",
  paper="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
  arxiv="2406.10774",
  code="mit-han-lab/Quest",
  evidence="mit-han-lab/Quest:evaluation/quest_attention.py (01c1623)",
  deviations="a context within the budget is read whole; the official code"
  " rounds its length down to pages and leaves one page out",
)
def quest(
  budget: Budget = budgets.Count(1024),
  page: int = 16,
  least: int = 3,
  from_layer: int = 2,
) -> Slots:
  """Each query head reads the pages whose extremes fit its query best.

  Args:
    budget: tokens that a step reads.
    page: tokens a page.
    least: pages that are always read.
    from_layer: layers below it read everything.
  """
  return Slots(cache=KV(read=Pages(budget, page, least, from_layer)))


@recipe(
  "tidaldecode",
  family="llm",
  paper="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent"
  " Sparse Attention",
  arxiv="2410.05076",
  code="DerrickYLJ/TidalDecode",
  evidence="DerrickYLJ/TidalDecode:src/tidal_build/modify_llama.py (d67a1bd)",
)
def tidaldecode(
  budget: Budget = budgets.Count(256),
  layers: tuple[int | float, ...] = (2, 0.4),
) -> Slots:
  """Two layers choose tokens for all layers above them, head by head.

  Args:
    budget: tokens that are handed on.
    layers: the two that choose, as numbers or fractions of the depth.
  """
  return Slots(cache=KV(read=Persistent(budget, layers)))


@recipe(
  "delta",
  family="llm",
  paper="DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context"
  " Reasoning",
  arxiv="2510.09883",
  code="hoenza/DELTA",
  evidence="hoenza/DELTA:DELTA/Engine/DELTA/page_score.py, page_selector_v2.py"
  " (c354073), the selector run next to this one on the same scores",
  deviations="the layers that choose are fractions of the depth ({2, 14, 22} of"
  " 28); scores of pages are compared exactly, where the official selector"
  " subtracts 1e-7 times the page's number",
)
def delta(
  budget: Budget = budgets.Count(1024),
  page: int = 16,
  newest: int = 8,
  layers: tuple[int | float, ...] = (2, 0.5, 0.79),
) -> Slots:
  """A few layers choose pages, which all heads of the layers above them read.

  `tokjax.cache.shared_pages.selecting_layers` finds those layers.

  Args:
    budget: tokens that a step reads, in whole pages.
    page: tokens a page.
    newest: last pages that are always read, inside the budget.
    layers: those that choose, as numbers or fractions of the depth; where
      attention changes most from layer to layer.
  """
  return Slots(cache=KV(read=SharedPages(budget, page, newest, layers)))


@recipe(
  "gemfilter",
  family="llm",
  paper="Discovering the Gems in Early Layers: Accelerating Long-Context LLMs"
  " with 1000x Input Token Reduction",
  arxiv="2409.17422",
  code="SalesforceAIResearch/GemFilter",
  evidence="SalesforceAIResearch/GemFilter:my_baseline/GemFilter/"
  "llama_select_attention.py (5f79b1a)",
)
def gemfilter(
  layer: int | float = 0.4,
  budget: Budget = budgets.Count(1024),
  kernel: int = 5,
) -> Slots:
  """An early layer chooses tokens; the model starts again with those alone.

  Args:
    layer: that chooses, as a number or a fraction of the depth.
    budget: tokens that remain of the prompt.
    kernel: neighbours that scores are averaged over, odd.
  """
  rule = keep_top(LAST_QUERY, pool=kernel)
  once = budgets.Once(budget, layer)
  return Slots(Reduce(rule, once, at="output", free=Free(ALL), again=True))


@recipe(
  "promptdistill",
  family="llm",
  paper="PromptDistill: Query-based Selective Token Retention in Intermediate"
  " Layers for Efficient Large Language Model Inference",
  arxiv="2503.23274",
  code="declare-lab/PromptDistill",
  evidence="declare-lab/PromptDistill:models/llama.py (472bfef)",
  deviations="one stage; caches of the layers below are kept (truncation 0);"
  " the query is that of the prompt's last token",
)
def promptdistill(
  layer: int | float = 0.4,
  budget: Budget = budgets.Count(1024),
  kernel: int = 5,
) -> Slots:
  """Layers above an early one go on with the tokens that it chooses.

  Args:
    layer: that chooses, as a number or a fraction of the depth.
    budget: tokens that remain of the prompt.
    kernel: neighbours that scores are averaged over, odd.
  """
  rule = keep_top(LAST_QUERY, pool=kernel)
  once = budgets.Once(budget, layer)
  return Slots(Reduce(rule, once, at="output", free=Free(ALL, last=1)))


@recipe(
  "infllm",
  family="llm",
  paper="InfLLM: Unveiling the Intrinsic Capacity of LLMs for Understanding"
  " Extremely Long Sequences with Training-Free Memory",
  arxiv="2402.04617",
  code="thunlp/InfLLM",
  evidence="thunlp/InfLLM:inf_llm/attention/context_manager.py (12b7079)",
  deviations="blocks stay in device memory; which of them an accelerator caches"
  " does not change results; a token that has left the window but is in no"
  " block yet counts once (with several queries in a chunk the official code"
  " counts some of them twice)",
)
def infllm(
  first: int = 128,
  local: int = 4096,
  budget: Budget = budgets.Count(2048),
  block: int = 128,
  representatives: int = 4,
  chunk: int = 512,
) -> Slots:
  """A window, and blocks of the distant past that fit a chunk of queries.

  Args:
    first: first tokens that are always read.
    local: size of the window.
    budget: tokens of the blocks that are read.
    block: tokens a block.
    representatives: tokens whose mean key represents a block.
    chunk: queries that retrieve together, at most `local`.
  """
  attend = BlockMemory(first, local, budget, block, representatives, chunk)
  return Slots(attend=attend, cache=Retriever())


@recipe(
  "actqkv",
  family="llm",
  paper="Activation-aware Probe-Query: Effective Key-Value Retrieval for"
  " Long-Context LLMs Inference",
  arxiv="2502.13542",
  code="MrXiaoaa/ActQKV",
  evidence="MrXiaoaa/ActQKV:benchmark/actqkv/attention/"
  "context_manager_activate_3.py (175c84b), its statistics, probe and budgets"
  " run next to these on the same arrays",
  deviations="what queries usually are is remembered for each layer and text"
  " (the official code shares one memory between all layers and texts, and"
  " weighs queries alike in its first 1001 windows); how dense layers are is"
  " measured beforehand and given, not followed while generating; the option of"
  " a question that is known in advance is left out",
)
def actqkv(
  first: int = 128,
  local: int = 4096,
  budget: Budget = budgets.Count(2048),
  block: int = 128,
  representatives: int = 4,
  chunk: int = 512,
  least: int = 32,
  densities: tuple[float, ...] = (),
) -> Slots:
  """InfLLM's memory, searched by the unusual queries of a chunk.

  `tokjax.attention.probe_query.densities_of` measures densities.

  Args:
    first: first tokens that are always read.
    local: size of the window.
    budget: tokens of the blocks that a layer reads in the mean.
    block: tokens a block.
    representatives: tokens whose mean key represents a block.
    chunk: queries that retrieve together, at most `local`.
    least: blocks that are read in any case.
    densities: of each layer, by which decoding shares the budget; (): alike.
  """
  attend = ProbeQuery(
    first, local, budget, block, representatives, chunk, least, densities
  )
  return Slots(attend=attend, cache=Retriever())


@recipe(
  "tokenselect",
  family="llm",
  paper="TokenSelect: Efficient Long-Context Inference and Length Extrapolation"
  " for LLMs via Dynamic Token-Level KV Cache Selection",
  arxiv="2411.02886",
  code="pzs19/TokenSelect",
  evidence="pzs19/TokenSelect:patcher/token_retrieval.py (8e1e97f)",
  deviations="query head h reads key head h // (H / G) (the official kernel"
  " takes h mod G); votes are float32, not bfloat16",
)
def tokenselect(
  first: int = 128,
  local: int = 512,
  budget: Budget = budgets.Count(2048),
  chunk: int = 512,
  kernel: int = 1,
  rotate_query: bool = False,
  reuse: float | None = None,
) -> Slots:
  """Heads vote for single tokens, which are read as if they were adjacent.

  Args:
    first, local: tokens at either end that are always read.
    budget: tokens chosen between them.
    chunk: queries that choose together, at most `local`.
    kernel: neighbours that votes are max-pooled over, odd; 1: not pooled.
    rotate_query: the voting query is rotated to local positions.
    reuse: cosine to the query that chose last, from which its choice is used
      again; None: every chunk chooses.
  """
  attend = SoftVote(first, local, budget, chunk, kernel, rotate_query, reuse)
  return Slots(attend=attend, cache=Retriever())


@recipe(
  "longheads",
  family="llm",
  paper="LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
  arxiv="2402.10685",
  code="LuLuLuyi/LongHeads",
  evidence="LuLuLuyi/LongHeads:modeling_longheads/modeling_llama.py (1c9f72e)",
  deviations="a query of a long prompt sees its own token too (the official"
  " rows end before it); while decoding, too, the newest token's chunk, the one"
  " before and the first are read, also where that token completes its chunk",
)
def longheads(budget: Budget = budgets.Count(4096), chunk: int = 256) -> Slots:
  """Each head reads chunks of text that fit, never beyond trained lengths.

  Args:
    budget: tokens that a head reads, in whole chunks, three at least.
    chunk: tokens a chunk.
  """
  return Slots(attend=HeadChunks(budget, chunk), cache=Retriever())


@recipe(
  "landmark_attention",
  family="llm",
  paper="Landmark Attention: Random-Access Infinite Context Length for"
  " Transformers",
  arxiv="2305.16300",
  code="epfml/landmark-attention",
  training="learned",
  evidence="epfml/landmark-attention:llama/llama_mem.py, lm_benchmark"
  " (d963e50)",
  deviations="landmarks stand at fixed places, which the data provide; only"
  " landmarks of the blocks that are read take part in the softmax",
)
def landmark_attention(block: int = 63, budget: Budget | None = None) -> Slots:
  """Blocks are read through landmark tokens that learn to represent them.

  Without a budget all blocks are read: the form for training.
  `tokjax.attention.landmark.with_landmarks` puts the tokens into a text.

  Args:
    block: ordinary tokens between landmarks.
    budget: tokens of the blocks that a query head reads; None: all.
  """
  return Slots(attend=Landmark(block, budget), cache=Retriever())
