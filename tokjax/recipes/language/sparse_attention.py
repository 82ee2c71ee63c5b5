"""Sparse attention of decoders: queries of a prompt see some of its keys."""

from tokjax import budgets
from tokjax.attention.dynamic_chunks import LOSS as BOUNDARIES
from tokjax.attention.dynamic_chunks import DynamicChunks
from tokjax.attention.eliminated import LOSS as PAIRS
from tokjax.attention.eliminated import Eliminated
from tokjax.attention.estimated import Antidiagonal, VerticalSlash
from tokjax.attention.matched_codes import LOSS as CODEWORDS
from tokjax.attention.matched_codes import MatchedCodes
from tokjax.attention.static import Band
from tokjax.budgets import Budget
from tokjax.losses import Told
from tokjax.recipes.registry import recipe
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
