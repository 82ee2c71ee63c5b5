"""One keep ratio, shared out among joined recipes."""

import pytest

from experiments.sweeps import subject
from experiments.typed import ConfigError
from tokjax import recipes
from tokjax.recipes import __main__ as command
from tokjax.recipes import registry
from tokjax.slots import Slots


def test_each_part_is_given_its_power_of_the_keep_ratio():
  name = "divprune^1/4+fastv^0.25+snapkv^1/2+kivi"
  found = recipes.find(name)
  assert found.name == "divprune^1/4+fastv^1/4+snapkv^1/2+kivi"
  slots = recipes.get(name, keep=0.0625)
  expected = recipes.compose(
    recipes.get("divprune", keep=0.5),
    recipes.get("fastv", keep=0.5),
    recipes.get("snapkv", keep=0.25),
    "kivi",
  )
  assert slots == expected
  # Without shares reductions share it, and the cache is given all of it.
  assert slots != recipes.get("divprune+fastv+snapkv+kivi", keep=0.0625)
  # The name of what was found finds it again.
  assert recipes.find(found.name) == found


def test_options_reach_the_parts():
  slots = recipes.get("fastv^1/2+snapkv^1/2", keep=0.25, window=3, layer=1)
  assert slots == recipes.compose(
    recipes.get("fastv", keep=0.5, layer=1),
    recipes.get("snapkv", keep=0.5, window=3),
  )


@pytest.mark.parametrize(
  ("name", "keep", "message"),
  [
    ("fastv^1/2+snapkv^1/3", 0.5, "shares 1/2, 1/3 must sum to 1"),
    ("fastv^x+snapkv^1/3", 0.5, "the share 'x' .* a positive number"),
    ("fastv^1/0+snapkv", 0.5, "the share '1/0'"),
    ("fastv^-1+snapkv^2", 0.5, "the share '-1'"),
    ("fastv^1+snapkv", 0.5, "'snapkv' is turned by a keep ratio, and has no"),
    ("fastv^1/2+kivi^1/2", 0.5, "'kivi' is not turned .* leave out its share"),
    ("fastv^1/2+snapkv^1/2", None, "shares out a keep ratio: give keep"),
    ("fastv^1/2+snapkv^1/2", 0.0, "keep=0.0"),
  ],
)
def test_what_cannot_be_shared_is_refused(name, keep, message):
  with pytest.raises(ValueError, match=message):
    recipes.get(name, keep=keep)


def test_a_share_alone_is_no_name():
  with pytest.raises(KeyError, match="unknown recipe 'tome\\^1/2'"):
    registry.find("tome^1/2")


def test_commands_refuse_in_one_line():
  with pytest.raises(SystemExit, match="^error: .*shares 1/2 must sum to 1"):
    command.main(["fastv^1/2+snapkv"])
  with pytest.raises(ConfigError, match="shares 1/2 must sum to 1"):
    subject.find("fastv^1/2+snapkv")


def test_what_no_keep_ratio_turns_takes_no_share():
  # ToDRE's second stage decides by itself how many tokens go.
  (own,) = recipes.get("fastv", keep=0.25).reduce
  (late,) = recipes.get("todre", least=0.1).reduce
  both = Slots((own, late))
  assert both.reductions == 1
  assert both.with_keep(0.25).reduce == (own, late)
