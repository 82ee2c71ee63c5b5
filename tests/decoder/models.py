"""Tiny decoders of every family, with random parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.rotary import Rotary
from tokjax.slots import Slots

SIZE = dict(
  vocabulary=40,
  width=16,
  depth=2,
  heads=4,
  kv_heads=2,
  mlp_dim=24,
  length=64,
  head_dim=8,
)
SLIDING = dict(layers=("sliding", "full"), window=4)
GEMMA = dict(
  **SLIDING,
  post_norms=True,
  norm_from_one=True,
  embed_scale=True,
  activation="gelu_tanh",
)
FAMILIES = {
  "llama2": dict(kv_heads=4, tied=False),
  "llama3": dict(rotary=Rotary(500.0, "llama3", 8.0, 16)),
  "mistral": dict(layers=("sliding",), window=4, tied=False),
  "qwen2": dict(
    qkv_bias=True, rotary=Rotary(1000.0, "yarn", 4.0, 16, fast=32.0)
  ),
  "qwen3": dict(qk_norm=True, rotary=Rotary(scaling="linear", factor=2.0)),
  "gemma2": dict(
    **GEMMA, query_scale=20.0, attention_softcap=3.0, logit_softcap=2.0
  ),
  "gemma3": dict(**GEMMA, qk_norm=True, local_rotary=Rotary(30.0)),
}


def config(**changes) -> DecoderConfig:
  return DecoderConfig(**{**SIZE, **changes})


PLAIN = Slots()


def decoder(slots: Slots = PLAIN, **changes) -> Decoder:
  return Decoder(config(**changes), slots)


@functools.cache
def params_of(config: DecoderConfig, slots: Slots = PLAIN):
  """Parameters that are all drawn, and different from each other."""
  shapes = jax.eval_shape(
    Decoder(config, slots).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 2), jnp.int32),
  )
  leaves, tree = jax.tree.flatten(shapes["params"])
  rng = np.random.default_rng(0)
  drawn = [
    jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for leaf in leaves
  ]
  return jax.tree.unflatten(tree, drawn)


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.integers(1, SIZE["vocabulary"], (batch, length)).astype(np.int32)
