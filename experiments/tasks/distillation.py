"""How far a student's answers are from its teacher's."""

import jax
import jax.numpy as jnp
import optax


def distance(
  logits: jax.Array, teacher: jax.Array, temperature: float | None
) -> jax.Array:
  """Mean divergence of distributions over the last axis.

  Args:
    logits, teacher: `[..., classes]`.
    temperature: that both are divided by; the result is scaled by its square
      (Hinton et al., 2015). None: cross entropy with the teacher's best class
      (DeiT's hard distillation).
  """
  logits, teacher = logits.astype(jnp.float32), teacher.astype(jnp.float32)
  if temperature is None:
    label = teacher.argmax(-1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
  log_p = jax.nn.log_softmax(logits / temperature)
  log_q = jax.nn.log_softmax(teacher / temperature)
  divergence = optax.losses.kl_divergence_with_log_targets(log_p, log_q)
  return temperature**2 * divergence.mean()
