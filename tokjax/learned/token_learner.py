"""TokenLearner's pooling map (version 1.1)."""

import flax.linen as nn
from jaxtyping import Array, Float

from tokjax.reduce.stage import Stage
from tokjax.signals import Answers
from tokjax.tokens import Tokens


class TokenLearner(nn.Module):
  """One logit for every free token and output: an MLP on the normed token.

  Ryoo et al., 2021; checked against scenic's projects/token_learner/model.py
  (TokenLearnerModuleV11). The softmax over tokens is the rule's.
  """

  hidden: int = 64

  complete = True

  @nn.compact
  def __call__(
    self, tokens: Tokens, answers: Answers, stage: Stage
  ) -> Float[Array, "b f m"]:
    del answers
    x = nn.LayerNorm(name="norm")(tokens.x[:, stage.protected :])
    x = nn.gelu(nn.Dense(self.hidden, name="fc1")(x))
    return nn.Dense(stage.keep, name="fc2")(x)
