"""The shared case of a recipe in a host."""

import functools

from tests.contract import hosts
from tests.contract.case import Case
from tests.contract.decoder_runs import DecoderCase
from tests.contract.vision_runs import VisionCase
from tests.contract.vlm_prompt_runs import PromptCase
from tests.contract.vlm_runs import VisionLanguageCase

CASES = {
  hosts.VisionHost: VisionCase,
  hosts.DecoderHost: DecoderCase,
  hosts.VisionLanguageHost: VisionLanguageCase,
  hosts.PromptHost: PromptCase,
}


@functools.lru_cache(maxsize=4)
def case(recipe: str, host: str) -> Case:
  """The shared case of a recipe in a host.

  Tests of a recipe follow each other; the programs of earlier ones are let go.
  """
  (found,) = [h for h in hosts.HOSTS if h.name == host]
  return CASES[type(found)](recipe, found)
