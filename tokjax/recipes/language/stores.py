"""Other ways to store a cache: fewer bits, features, layers, or slots."""

from tokjax.cache.convolved import Convolved
from tokjax.cache.kivi import Kivi
from tokjax.cache.kv import KV
from tokjax.cache.low_rank import LowRank
from tokjax.cache.mixed import Mixed
from tokjax.cache.shared import Following, SharedKeys
from tokjax.cache.vidkv import VidKV
from tokjax.recipes.registry import recipe
from tokjax.slots import Slots


@recipe(
  "kivi",
  family="cache",
  paper="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
  arxiv="2402.02750",
  code="jy-yuan/KIVI",
  evidence="jy-yuan/KIVI:models/llama_kivi.py, quant/new_pack.py (876b4d2)",
)
def kivi(bits: int = 2, group: int = 32, residual: int = 128) -> Slots:
  """Keys in few bits by channel, values by token, the last tokens exact.

  Args:
    bits: of a code.
    group: tokens (keys) or channels (values) that share a scale.
    residual: last tokens, which stay exact; a multiple of `group`.
  """
  return Slots(cache=KV(store=Kivi(bits, group, residual)))


@recipe(
  "zipcache",
  family="cache",
  paper="ZipCache: Accurate and Efficient KV Cache Quantization with Salient"
  " Token Identification",
  arxiv="2405.14256",
  code="ThisisBillhe/ZipCache",
  evidence="ThisisBillhe/ZipCache:zipcache/models/CompressUtils/,"
  " modeling_llama.py (b6932b9)",
  deviations="saliency is divided by the number of probes that see a key, as in"
  " the paper (the code counts all queries); probes are drawn without"
  " replacement; decoded tokens are coded once, in batches of their own, and"
  " values head by head",
)
def zipcache(
  bits: tuple[int, int] = (4, 2), plain: float = 0.4, gap: int = 100
) -> Slots:
  """Tokens that probing queries attend to get more bits than the others.

  Args:
    bits: of salient tokens, and of the others.
    plain: part of the tokens that are not salient.
    gap: generated tokens that are kept exact before they are coded.
  """
  return Slots(cache=Mixed(bits, plain, gap))


@recipe(
  "vidkv",
  family="cache",
  paper="Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language"
  " Models",
  arxiv="2503.16257",
  code="KD-TAO/VidKV",
  evidence="KD-TAO/VidKV:transformers/src/transformers/vidkv_quant.py,"
  " cache_utils.py (0e55c39), the quantisers run next to these on the same"
  " arrays",
  deviations="codes are read as the paper says (the release reads signs as 0"
  " and 1, and ternary codes without their scale); half of the transform is"
  " stored, from which the other follows; channels are chosen for each example,"
  " not for the batch; bits that give no channel two bits are refused, where"
  " the release takes 32 channels; text tokens are coded like visual ones, as"
  " in the release, and protecting visual tokens by their similarity to text is"
  " left out",
)
def vidkv(bits: float = 1.5, group: int = 32, buffer: int = 128) -> Slots:
  """Varying key channels in 2 bits, others' transform in 1, values in three.

  Args:
    bits: of keys in the mean, from 1 to 2.
    group: tokens that share a scale.
    buffer: exact tokens from which on all are coded, a multiple of `group`.
  """
  return Slots(cache=KV(store=VidKV(bits, group, buffer)))


@recipe(
  "cskv",
  family="cache",
  paper="CSKV: Training-Efficient Channel Shrinking for KV Cache in"
  " Long-Context Scenarios",
  arxiv="2409.10593",
  code="wln20/CSKV",
  training="learned",
  evidence="wln20/CSKV:cskv_src/modeling/modeling_llama.py,"
  " utils/cache_utils.py, scripts/ (cd79226)",
  deviations="features are stored in the cache's dtype; quantisation-aware"
  " training is left out",
)
def cskv(
  k_density: float = 0.2, v_density: float = 0.2, window: int = 32
) -> Slots:
  """Full windows as low-rank features of the input, the newest one exact.

  `tokjax.cache.low_rank.factors` initialises them from a model's projections,
  `reconstruction` is what they train on.

  Args:
    k_density, v_density: features of keys and values that are stored, as a
      fraction of their channels.
    window: tokens of a window.
  """
  return Slots(cache=LowRank(k_density, v_density, window))


@recipe(
  "pod",
  family="cache",
  paper="Compressing KV Cache for Long-Context LLM Inference with Inter-Layer"
  " Attention Similarity",
  arxiv="2412.02252",
  training="both",
  evidence="weak: the paper's text; no code is public",
  deviations="scores are shared, that is queries too, which the paper leaves"
  " open; grouped by key head",
)
def pod(
  leaders: tuple = (),
  first: int = 16,
  recent: int = 4080,
  threshold: float | None = 0.7,
) -> Slots:
  """Upper layers of a block take scores of distant tokens from its lowest.

  `leaders` names that layer for every layer and key head; see
  `tokjax.cache.shared.leaders` for how it is found. (): no layers share.

  Args:
    leaders: for every layer and key head the layer whose scores it takes over.
    first, recent: near tokens at either end.
    threshold: a query whose near attention is at least this share of the whole
      leaves distant tokens out; None: none does.
  """
  return Slots(
    attend=Following(leaders, first, recent, threshold), cache=SharedKeys()
  )


@recipe(
  "lococo",
  family="cache",
  paper="LoCoCo: Dropping In Convolutions for Long Context Compression",
  arxiv="2406.05317",
  code="VITA-Group/LoCoCo",
  training="learned",
  evidence="VITA-Group/LoCoCo:llama/memory_compressor.py (1be3fec)",
  deviations="one set of tokens per key head; entries are merged at the end of"
  " a block, where the official code does it at the start of the next",
)
def lococo(
  slots: int = 512,
  slack: int = 16,
  block: int = 512,
  kernel: int = 21,
  detach: bool = True,
) -> Slots:
  """A cache of fixed size: heavy hitters, and learned means of the rest.

  Args:
    slots: entries after a merge, even.
    slack: entries beyond that are let in before one.
    block: tokens of a prompt that arrive together.
    kernel: of the convolution, odd.
    detach: what a merge reads is cut off from gradients.
  """
  return Slots(cache=Convolved(slots, slack, block, kernel, detach))
