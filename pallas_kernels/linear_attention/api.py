"""`linear_attention`: the public function.

Lightning Attention-2 (arXiv 2401.04658): per head, with decay factor w,

    out[t] = scale * q[t] . S[t]         S[t] = w * S[t - 1] + k[t]^T v[t]

that is, causal attention without a softmax whose pair (t, s) is weighted by
`w ** (t - s)`. Any feature map is applied to q and k by the caller.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import choice
from pallas_kernels.linear_attention import op
from pallas_kernels.linear_attention import operands as forms

_PACKAGE = "pallas_kernels.linear_attention"


def linear_attention(
  q: Float[Array, "*b n h d"],
  k: Float[Array, "*b n g d"],
  v: Float[Array, "*b n g e"],
  *,
  log_decay: Float[Array, "..."] | None = None,
  initial_state: Float[Array, "*b h d e"] | None = None,
  scale: float = 1.0,
  return_state: bool = False,
  block: int = 128,
  precision: jax.lax.PrecisionLike = None,
  implementation: str | None = None,
) -> Any:
  """Causal linear attention, forward and backward, in time linear in length.

  Args:
    q: `[*b, n, H, D]`.
    k: `[*b, n, G, D]`, G dividing H: head h uses key head `h // (H // G)`.
    v: `[*b, n, G, Dv]`.
    log_decay: log of the decay factor, at most 0, broadcastable to `[*b, H]`;
      None means no decay. Differentiable.
    initial_state: `[*b, H, D, Dv]`, S before the first token; default zeros.
    scale: static factor on the result.
    return_state: whether to return the last state too, for decoding on.
    block: tile length in tokens; the TPU kernels take the next multiple of
      128, the GPU kernel has tiles of its own. Results differ by rounding only.
    precision: `jax.lax.Precision` of the products.
    implementation: None (by platform, and "xla" for a single token), "tpu",
      "tpu_interpret", "gpu", "gpu_interpret", "xla" or "reference". The TPU
      kernels take bfloat16 and float32, the GPU kernel bfloat16 and float16.

  Returns:
    `[*b, n, H, Dv]` in q's dtype, and with `return_state` a tuple of that and
    the state `[*b, H, D, Dv]` in float32 (float64 for float64). Later tokens
    have no influence on earlier ones, also where they are not finite.

  Raises:
    ValueError: for shapes that do not fit, or an unknown implementation.
    NotImplementedError: if the named implementation cannot run this call.
  """
  operands = forms.canonical(q, k, v, log_decay, initial_state)
  params = forms.Params(float(scale), block, precision)
  if implementation is None and q.shape[-3] == 1:
    implementation = "xla"  # A tile of the kernels would be all padding.
  chosen = choice.choose(
    choice.implementations(_PACKAGE), (operands, params), implementation
  )
  out, state = op.attend(chosen, params, operands)
  out = out.reshape(q.shape[:-1] + v.shape[-1:]).astype(q.dtype)
  state = state.reshape(q.shape[:-3] + state.shape[1:])
  return (out, state) if return_state else out
