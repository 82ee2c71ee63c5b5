"""Attention of decoders: who sees whom in prompts, and what a step reads."""

from typing import Literal

from tokjax import budgets
from tokjax.attention.core_context import CoreContext
from tokjax.attention.dynamic_chunks import LOSS as BOUNDARIES
from tokjax.attention.dynamic_chunks import DynamicChunks
from tokjax.attention.eliminated import LOSS as PAIRS
from tokjax.attention.eliminated import Eliminated
from tokjax.attention.estimated import Antidiagonal, VerticalSlash
from tokjax.attention.linear import Linear, LinearState
from tokjax.attention.matched_codes import LOSS as CODEWORDS
from tokjax.attention.matched_codes import MatchedCodes
from tokjax.attention.multi_token_states import MultiTokenStates
from tokjax.attention.recalibrate import Calibrated, FirstToken, Gated
from tokjax.attention.sentinel import Sentinels
from tokjax.attention.static import Band, Separators
from tokjax.binding import bind
from tokjax.budgets import Budget
from tokjax.cache import scores as importance
from tokjax.cache.answers import Observed, Remembered
from tokjax.cache.cores import Cores
from tokjax.cache.evict import Trim, evicting
from tokjax.cache.kv import KV
from tokjax.cache.multi_token import MultiTokenCache
from tokjax.cache.stores import Exact
from tokjax.losses import Told
from tokjax.recipes.registry import recipe
from tokjax.reduce.rules import KeepTop, answer
from tokjax.slots import Slots

MINFERENCE = (
  "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic"
  " Sparse Attention"
)


@recipe(
  "minference_a_shape",
  family="llm",
  paper=MINFERENCE,
  arxiv="2407.02490",
  code="microsoft/MInference",
  evidence="microsoft/MInference:minference/ops/streaming_kernel.py,"
  " modules/minference_forward.py (fb56c91)",
)
def minference_a_shape(
  first: int = 100, window: Budget = budgets.Count(800), dense: int = 0
) -> Slots:
  """Prompts see the first tokens and a window; `dense`: tri-shape's rows.

  Args:
    first: first tokens that all queries see.
    window: last tokens that a query sees, itself included.
    dense: last queries of the prompt that see everything.
  """
  budget = budgets.Sum(budgets.Always(first), window)
  return Slots(attend=Band(first, budget, dense))


@recipe(
  "minference_vertical_slash",
  family="llm",
  paper=MINFERENCE,
  arxiv="2407.02490",
  code="microsoft/MInference",
  evidence="microsoft/MInference:minference/modules/minference_forward.py"
  " (fb56c91)",
  deviations="distances are widened to the blocks of 128 that they touch; the"
  " official kernel widens them to 64 tokens from the distance on",
)
def minference_vertical_slash(
  vertical: Budget = budgets.Count(1000),
  slash: Budget = budgets.Count(6096),
  queries: int = 64,
  sinks: int = 30,
  near: int = 100,
  least_vertical: int = 30,
  least_slash: int = 50,
  block: int = 128,
) -> Slots:
  """Prompts see the columns and distances that the last queries attend to.

  Args:
    vertical, slash: how many columns and distances are chosen.
    queries: last queries of the prompt that choose.
    sinks, near: first columns and smallest distances that are always chosen,
      as far as there is room.
    least_vertical, least_slash: lower bounds of the two numbers.
    block: tokens that distances are widened to.
  """
  return Slots(
    attend=VerticalSlash(
      vertical, slash, queries, sinks, near, least_vertical, least_slash, block
    )
  )


@recipe(
  "xattention",
  family="llm",
  paper="XAttention: Block Sparse Attention with Antidiagonal Scoring",
  arxiv="2503.16428",
  code="mit-han-lab/x-attention",
  evidence="mit-han-lab/x-attention:xattn/src/Xattention.py, utils.py"
  " (e379887)",
  deviations="one rule for all queries, that of the official code from its"
  " second chunk (of 2048 tokens or more) on; in the first chunk an index there"
  " overwrites the forced first block, and the best other block is taken"
  " whatever it holds; earlier chunks are estimated too where the prompt fills"
  " its chunks exactly (the PyTorch path hides them); the first block is forced"
  " as a column of keys (an option of the official code marks the first row of"
  " queries)",
)
def xattention(mass: float = 0.9, stride: int = 8, block: int = 128) -> Slots:
  """Prompts see the key blocks whose antidiagonals hold most attention.

  Args:
    mass: share of the estimated attention that the chosen blocks hold.
    stride: side of a tile whose antidiagonal is summed; divides the block.
    block: tokens a block of queries or keys.
  """
  return Slots(attend=Antidiagonal(mass, stride, block))


@recipe(
  "dhsa",
  family="llm",
  paper="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for"
  " On-Device LLMs",
  arxiv="2510.24606",
  code="xiongsiheng/DHSA",
  training="learned",
  evidence="xiongsiheng/DHSA:legacy/utils/helper.py, legacy/boundary_predictor/"
  "models.py, loss.py (cc8e9c7), run next to these on the same arrays",
  deviations="of the tokens of a chunk that is kept in part those that come"
  " first stay (torch.topk leaves it open); a token is attended to once, where"
  " the official first blocks repeat their last one; sliding layers see their"
  " whole window; layers do not share their tokens",
)
def dhsa(
  budget: Budget = budgets.Count(1024),
  block: int = 64,
  first: int = 128,
  near: int = 128,
  exact: int = 64,
  window: int = 4,
  apart: int = 8,
  chunks_per_block: int = 8,
  certainty: float = 1.1,
  learns: bool = False,
) -> Slots:
  """Blocks of a prompt's queries see tokens of the chunks that they fit.

  What finds the chunks is trained on a model that stays as it is (`learns`).

  Args:
    budget: tokens that a block sees.
    block: queries a block.
    first: first tokens that every block sees.
    near: last tokens up to the end of a block that it sees.
    exact: last queries of a prompt, which see everything.
    window: tokens on either side of a place that are compared.
    apart: ends of chunks lie farther apart than this.
    chunks_per_block: bound of the number of chunks, for every `block` tokens.
    certainty: logit above which a place may end a chunk.
    learns: training: attention is dense, and what finds the chunks learns where
      later tokens attend very differently to either side.
  """
  losses = (Told(BOUNDARIES),) if learns else ()
  attend = DynamicChunks(
    budget, block, first, near, exact, window, apart, chunks_per_block,
    certainty, learns,
  )  # fmt: skip
  return Slots(attend=attend, losses=losses)


@recipe(
  "spt",
  family="llm",
  paper="SPT: Fine-Tuning Transformer-based Language Models Efficiently with"
  " Sparsification",
  arxiv="2312.10365",
  code="ytgui/SPT-proto",
  training="learned",
  evidence="ytgui/SPT-proto:naive_gpt/layers/basic/quantizer.py,"
  " layers/sparse/attention.py (65ee7de), the quantiser run next to this one on"
  " the same arrays; the lookup of extension/lookup.cu was read",
  deviations="the attention only: the routed feed-forward layers reduce no"
  " tokens; keys are ranked by how many codes agree, earlier ones first among"
  " equals (the official kernel has four grades, counts keys of each residue"
  " modulo 4 apart, and lets early queries see the first key several times);"
  " all products are computed, then masked; padding does not count in the loss",
)
def spt(
  budget: Budget = budgets.Share(1 / 8),
  part: int = 8,
  words: int = 16,
  bound: float = 10.0,
  learns: bool = False,
  dense: bool = False,
) -> Slots:
  """Queries see the keys whose codewords agree most with theirs.

  Args:
    budget: keys that a query sees.
    part: features of a codeword; divides those of a head.
    words: codewords of a part.
    bound: scaled logits are clipped to this on either side.
    learns: codewords are fitted to queries and keys, and these, where they are
      trained, to codewords.
    dense: while they learn, every key is seen, as in the first stage of the
      paper; the release begins with the keys that codewords choose.
  """
  losses = (Told(CODEWORDS, 0.01),) if learns else ()
  attend = MatchedCodes(budget, part, words, bound, learns, dense)
  return Slots(attend=attend, losses=losses)


@recipe(
  "lemo",
  family="llm",
  paper="LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning",
  arxiv="2501.09767",
  code="Pairshoe/Jenga-AE",
  training="learned",
  evidence="Pairshoe/Jenga-AE:src/jenga/models/predictor.py, modeling_llama.py,"
  " modeling_llama_train_predictor.py, modeling_llama_get_sparsity_thresh.py,"
  " ops/ (498cb19); the predictor was run next to this one on the same arrays,"
  " and of the kernels the PyTorch form that ops/flash_block.py has",
  deviations="blocks are chosen for each example (the release sends outputs of"
  " the first one back alone); queries, keys and values of all tokens are"
  " projected; decoding, which the release does not do, reads everything;"
  " pruning of the networks' units and of the MLP's gradients is left out",
)
def lemo(
  budget: Budget = budgets.Share(0.5),
  block: int = 64,
  threshold: float | None = None,
  last: int = 0,
  from_layer: int | float = 0.47,
  to_end: bool = False,
  hidden: int = 128,
  predicts: bool = True,
  learns: bool = False,
) -> Slots:
  """Attention passes blocks of little interest by, which saves training memory.

  Args:
    budget: tokens that remain, in whole blocks.
    block: tokens a block.
    threshold: blocks that score less than this share of the mean go too, as in
      the paper; None: the budget alone decides, as in the release.
    last: last blocks that stay in any case; a text that goes on needs one.
    from_layer: the first layer that eliminates blocks.
    to_end: the last layer eliminates blocks, too.
    hidden: units of the networks that predict scores.
    predicts: scores are predicted; False: measured, to compare with.
    learns: the first stage of training: attention is dense, and the networks
      learn on a model that stays as it is.
  """
  losses = (Told(PAIRS),) if learns else ()
  attend = Eliminated(
    budget, block, threshold, last, from_layer, to_end, hidden, predicts, learns
  )
  return Slots(attend=attend, losses=losses)


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
  "act",
  family="llm",
  paper="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large"
  " Language Models without Training through Attention Calibration",
  arxiv="2406.15765",
  code="GATECH-EIC/ACT",
  evidence="GATECH-EIC/ACT:models/llama_modelling_aug.py, scripts/ (a267af7)",
  deviations="while decoding, the sinks of the prompt are used; the official"
  " code works on whole sequences only",
)
def act(
  keep_sinks: float = 0.4,
  threshold: float = 0.1,
  heads: tuple | None = None,
  spared: tuple[int, int] = (2, 1),
) -> Slots:
  """Takes attention from sinks after the first and spreads it over others.

  Args:
    keep_sinks: what a sink keeps of its attention (beta).
    threshold: mean attention above which a token is a sink (alpha).
    heads: query heads that are changed, for all layers or a tuple for each;
      None: all.
    spared: how many first and last layers are left alone.
  """
  return Slots(attend=Calibrated(keep_sinks, threshold, heads, spared))


@recipe(
  "zerotuning",
  family="llm",
  paper="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large"
  " Language Models Without Training",
  arxiv="2505.11739",
  evidence="weak: the paper's text; its code is anonymous",
)
def zerotuning(
  gamma: float = 1.2,
  heads: tuple | None = None,
  layers_tuned: tuple[int, ...] | None = None,
) -> Slots:
  """Scales attention to the first token; gamma is searched on examples.

  Args:
    gamma: factor on the attention to the first token, above 0.
    heads: query heads that are tuned, for all layers or a tuple for each;
      None: all.
    layers_tuned: layers that are tuned; None: all.
  """
  return Slots(attend=FirstToken(gamma, heads, layers_tuned))


@recipe(
  "gated_attention",
  family="llm",
  paper="Gated Attention for Large Language Models: Non-linearity, Sparsity,"
  " and Attention-Sink-Free",
  arxiv="2505.06708",
  code="qiuzh20/gated_attention",
  training="learned",
  evidence="qiuzh20/gated_attention:modeling_qwen3.py (49645df)",
)
def gated_attention(
  kind: Literal["headwise", "elementwise"] = "elementwise",
  with_bias: bool = False,
) -> Slots:
  """A sigmoid gate of the layer's input on the outputs of all heads.

  Args:
    kind: one gate a query head, or one a channel.
    with_bias: whether the gate's projection has a bias.
  """
  return Slots(attend=Gated(kind=kind, with_bias=with_bias))


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
