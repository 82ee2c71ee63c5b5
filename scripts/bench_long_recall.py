"""Recall beyond the length of training: LongMamba on a small state-space model.

    python -m scripts.bench_long_recall [--steps 600] [--lengths 64 256 1024]

A text is noise with two pairs (key, value) in it and ends with one of the
keys, whose value is asked for. Noise is made of values. The model is trained on
texts of 64 tokens. Then thresholds are calibrated on 100 such texts, and longer
ones are read without a filter and with filters, for several shares of state
that a head has to retain to be filtered (`least`) and factors on thresholds.
Prints the accuracy in percent; for each filter also how many heads are
filtered, and which share of the values to be remembered, and of all other
tokens, these take in from the longest texts.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokjax import receptive_field
from tokjax.models import state_space

TRAINED, KEYS, VALUES, BATCH = 64, 2, 16, 32
MODEL = state_space.StateSpace(
  state_space.StateSpaceConfig(KEYS + VALUES)
)


def texts(seed: int, count: int, length: int):
  """Ids `[count, length]`, the last a key, and the value to be said."""
  rng = np.random.default_rng((seed, length))
  token = rng.integers(KEYS, KEYS + VALUES, (count, length))
  answer = np.zeros(count, np.int64)
  for row, ids in enumerate(token):
    values = rng.integers(KEYS, KEYS + VALUES, KEYS)
    at = 2 * rng.choice((length - 1) // 2, KEYS, replace=False)
    ids[at], ids[at + 1] = np.arange(KEYS), values
    asked = rng.integers(KEYS)
    ids[-1], answer[row] = asked, values[asked]
  return jnp.asarray(token), jnp.asarray(answer)


def loss(params, token, answer):
  """Cross entropy of the values that are asked for."""
  logits = MODEL.apply({"params": params}, token)[0][:, -1]
  return optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()


@functools.partial(jax.jit, static_argnums=2)
def trained(token, answer, steps: int, seed: int):
  """Parameters after so many batches."""
  optimiser = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.warmup_cosine_decay_schedule(0, 5e-3, 50, steps)),
  )
  params = MODEL.init(jax.random.key(seed), token[:1])["params"]

  def step(carry, number):
    params, state = carry
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, number * BATCH, BATCH)
    error, slope = jax.value_and_grad(loss)(params, cut(token), cut(answer))
    update, state = optimiser.update(slope, state, params)
    return (optax.apply_updates(params, update), state), error

  (params, _), errors = jax.lax.scan(
    step, (params, optimiser.init(params)), jnp.arange(steps)
  )
  return params, errors


@jax.jit
def accuracy(params, token, answer, filters):
  """In percent."""
  logits = MODEL.apply({"params": params}, token, filters=filters)[0][:, -1]
  return 100 * (logits.argmax(axis=-1) == answer).mean()


def taken_in(params, token, filters) -> list[str]:
  """Filtered heads, and shares in percent of values and others they take in."""
  delta = np.asarray(MODEL.apply({"params": params}, token)[1].delta)
  value = np.pad(np.asarray(token) < KEYS, [(0, 0), (1, 0)])[:, :-1]
  heads, of_values, of_others = 0, [], []
  for x, filter in zip(delta, filters, strict=True):
    left = jax.vmap(
      lambda d, f=filter: receptive_field.filtered(
        d, jnp.int32(d.shape[0]), f.calibration, least=f.least, factor=f.factor
      )
    )(jnp.asarray(x))
    wide = np.asarray(filter.calibration.retained > filter.least)
    kept = np.asarray(left)[..., wide] > 0
    heads += wide.sum()
    of_values.append(kept[value].reshape(-1))
    of_others.append(kept[~value].reshape(-1))
  share = lambda x: f"{100 * np.concatenate(x).mean():.1f}"
  return [str(heads), share(of_values), share(of_others)]


def main() -> None:
  """Trains, calibrates, reads, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--steps", type=int, default=600)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024]
  )
  args = parser.parse_args()
  data = texts(args.seed, args.steps * BATCH, TRAINED)
  params, errors = trained(*data, args.steps, args.seed)
  print("loss", *(f"{float(x):.2f}" for x in errors[:: args.steps // 8]))
  delta = MODEL.apply({"params": params}, texts(1, 100, TRAINED)[0])[1].delta
  calibrations = [
    receptive_field.calibrate(d, rate, tuple(args.lengths))
    for d, rate in zip(delta, state_space.rates(params), strict=True)
  ]
  print("retained", *(np.round(c.retained, 3) for c in calibrations))
  names = ("least", "factor", *args.lengths, "heads", "values", "others")
  print(*names, sep="\t")
  for least, factor in ((None, 1), (0.3, 1), (0.01, 1), (0.3, 0.5), (0.3, 0.2)):
    filters = least and tuple(
      state_space.Filter(c, least, factor) for c in calibrations
    )
    found = [
      float(accuracy(params, *texts(2, 200, n), filters)) for n in args.lengths
    ]
    cells = [f"{x:.1f}" for x in found]
    if filters:
      cells += taken_in(params, texts(2, 200, args.lengths[-1])[0], filters)
    print(least, factor, *cells, sep="\t", flush=True)


if __name__ == "__main__":
  main()
