"""Methods that drop by rule, without a look at attention."""

import jax
import numpy as np

from tests.cache.cases import GROUPS, HEADS, STEPS
from tests.cache.reference.layer_input import (
  GROUP,
  SCALE,
  best,
  half,
  kept_then_all,
  masked_prompt,
  rope,
  softmax,
)


def full(s):
  return s.prompt(), kept_then_all(s, [range(s.n)] * GROUPS)


def random_kv(s):
  """The same noise, drawn token by token."""
  kept = []
  for g in range(GROUPS):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), s.layer), g)
    noise = [jax.random.uniform(jax.random.fold_in(key, j)) for j in range(s.n)]
    kept.append(best(noise, half(s.n), [s.n - 1]))
  return s.prompt(), kept_then_all(s, kept)


def knorm(s):
  kept = [
    best([-np.linalg.norm(s.k[j, g]) for j in range(s.n)], half(s.n))
    for g in range(GROUPS)
  ]
  return s.prompt(), kept_then_all(s, kept)


def band_prompt(s, first, total):
  """Fed one by one: the cache holds the first and the last, re-indexed."""
  outs, cache = [], []
  for i in range(s.n + STEPS):
    cache.append(i)
    if len(cache) > total:
      del cache[first]
    out = []
    for h in range(HEADS):
      g = h // GROUP
      q = rope(s.q[i, h], len(cache) - 1)
      w = softmax(
        [SCALE * q @ rope(s.k[j, g], at) for at, j in enumerate(cache)]
      )
      out.append(sum(w[m] * s.v[j, g] for m, j in enumerate(cache)))
    outs.append(np.stack(out))
  return np.stack(outs[: s.n]), np.stack(outs[s.n :])


def streaming_llm(s):
  return band_prompt(s, 2, max(half(s.n), 3))


def minference_a_shape(s):
  first, window = 2, half(s.n)
  return masked_prompt(s, lambda i, j: j < first or j > i - window), full(s)[1]


def sepllm(s, tokens=(3, 7), first=2, most=3):
  window = half(s.n)
  separator = lambda j: s.token[j] in tokens
  prompt = masked_prompt(
    s, lambda i, j: j < first or separator(j) or i - j < window
  )
  cache, outs = list(range(s.n)), []
  for i in range(s.n, s.n + STEPS + 1):
    middle = [j for j in cache[first:-window] if separator(j)][-most:]
    cut = max(len(cache) - window, first)
    cache = cache[:first] + [j for j in middle if j >= first] + cache[cut:]
    if i > s.n:
      outs.append(s.out(i - 1, [cache] * GROUPS))
    cache = [*cache, i]
  return prompt, np.stack(outs)


def sepllm_streaming(s, tokens=(3, 7), first=2, most=3, slack=1):
  """A list that is compressed after the step in which it exceeds its size."""
  local = half(s.n)
  prompt, _ = sepllm(s)
  compressed = lambda cache: [
    *cache[:first],
    *[j for j in cache[first:-local] if s.token[j] in tokens][-most:],
    *cache[-local:],
  ]
  # Ours cuts a prompt at its end, however long it is (a stated deviation).
  cache, outs = compressed(list(range(s.n))), []
  for i in range(s.n, s.n + STEPS):
    cache.append(i)
    out = []
    for h in range(HEADS):
      g = h // GROUP
      q = rope(s.q[i, h], len(cache) - 1)
      w = softmax(
        [SCALE * q @ rope(s.k[j, g], at) for at, j in enumerate(cache)]
      )
      out.append(w @ s.v[cache, g])
    outs.append(np.stack(out))
    if len(cache) > first + most + local + slack:
      cache = compressed(cache)
  return prompt, np.stack(outs)
