"""The slots of a model: what a recipe returns and a model is built with.

`Slots` holds what fills them; `Attend` and `Cache` are the protocols of a
decoder's attention and of what it remembers, `EncoderAttend` of an encoder's
attention, `Program` of what wraps a whole encoder. A model states which slots
it carries out; others are refused when it is built.

How a decoder calls its slots:

    layers = [Layer(index=i, depth=depth, ...) for i in range(depth)]
    states = [cache.init(layer, b, prompt, decode) for layer in layers]

    carry = {}                                         # one call of the model
    for i, layer in enumerate(layers):
      ...                                              # q, k, v from x
      out, states[i], carry = cache.prefill(
        layer, states[i], arrivals, attend=attend, params=params[i],
        carry=carry, last=True)
      ...                                              # out [b, t, H, D] -> W_O

    carry = {}                                         # one decode step, t = 1
    for i, layer in enumerate(layers):
      out, states[i], carry = cache.decode(
        layer, states[i], arrivals, attend=attend, params=params[i],
        carry=carry)

`prefill` may be called several times with chunks of a prompt, `last=True` with
the final one (a static argument): what it returns then is the state that
`decode` takes, of a smaller physical size where the method compresses. Batches
are ragged: padding is at the end of each prompt (`valid` False), and a chunk
may be all padding for some examples. Layers are called one after the other
(states may differ in shape from layer to layer), and a `carry` goes with them.
The forward pass of training, which remembers nothing, is
`attend(layer, arrivals, Memory.of(arrivals), ...)`.

What a layer of attend and cache learns is one dict, `params`, with the keys
"attend" and "cache" as far as there is something (`parameters` makes it; the
model keeps it with its own parameters); both receive the whole dict.
"""

from tokjax.slots.filling import TAKEN_BY
from tokjax.slots.filling import Slots
from tokjax.slots.protocols import Attend
from tokjax.slots.protocols import Bytes
from tokjax.slots.protocols import Cache
from tokjax.slots.protocols import EncoderAttend
from tokjax.slots.protocols import Program
from tokjax.slots.protocols import State
from tokjax.slots.protocols import for_decoder
from tokjax.slots.protocols import for_encoder
from tokjax.slots.protocols import parameters
