"""Signals are questions: what a rule asks of a layer, and the answers.

A question is a frozen dataclass. A rule carries its questions
(`asks(Keys())(rule)`, or as bound options), a model computes the answers to
what is asked and nothing else, and the rule reads `site[question]`. An int
layer counts from the block at which the rule acts: 0 is this block, -1 the one
before. `Block(i)` is block i of the model. Answers of earlier blocks travel
through the plans in between.

At the input of a block, layer 0 is a look-ahead: the block's own projections
of the tokens that arrive, before any is removed (PyramidDrop).
"""

from tokjax.signals.questions import CLASS
from tokjax.signals.questions import OF_THE_CALL
from tokjax.signals.questions import OF_TOKENS
from tokjax.signals.questions import Attention
from tokjax.signals.questions import Block
from tokjax.signals.questions import By
from tokjax.signals.questions import Derived
from tokjax.signals.questions import Grid
from tokjax.signals.questions import Hidden
from tokjax.signals.questions import Keys
from tokjax.signals.questions import Last
from tokjax.signals.questions import Of
from tokjax.signals.questions import Peaks
from tokjax.signals.questions import Queries
from tokjax.signals.questions import Question
from tokjax.signals.questions import Random
from tokjax.signals.questions import Received
from tokjax.signals.questions import Rows
from tokjax.signals.questions import Transition
from tokjax.signals.questions import Values
from tokjax.signals.questions import asks
from tokjax.signals.questions import questions_of
from tokjax.signals.questions import unanswered
from tokjax.signals.visual_tokens import OF_IMAGES
from tokjax.signals.visual_tokens import Merged
from tokjax.signals.visual_tokens import Origin
from tokjax.signals.visual_tokens import Origins
from tokjax.signals.visual_tokens import Recalled
from tokjax.signals.visual_tokens import Seen
from tokjax.signals.answers import Answers
from tokjax.signals.answers import reduce_heads
