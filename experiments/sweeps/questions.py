"""Sweeps of vision-language models: right answers, FLOPs, bytes and times."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import typed, visual_tokens
from experiments.sweeps import intervals, question_budget, question_report
from experiments.sweeps.probe import words_of
from experiments.sweeps.programs import speedup
from experiments.sweeps.question_models import (
  QUESTION_MODELS,
  Asked,
  QuestionModel,
)
from experiments.sweeps.report import Plot, Table
from experiments.sweeps.results import Results, Row
from experiments.sweeps.subject import Job, OptionsSweep, Unfit
from tokjax.analysis import cost, gallery, merge_map
from tokjax.models import (
  VisionLanguage,
  VisionLanguageGenerator,
  generation,
  vlm_generation,
  vlm_prompts,
)
from tokjax.models.decoder_slots import Capacities
from tokjax.models.generation import Generation
from tokjax.models.vlm import Prompts

ALL = "all"
# So many questions that name a cell say which patches remain.
NAMED = 60


@dataclasses.dataclass(frozen=True)
class Questions(OptionsSweep):
  """Settings of a sweep of a vision-language model.

  Attributes:
    subject: the model and its questions; "trained_questions" or
      "published_questions".
    keeps: fractions of the visual tokens that remain at the end.
    answer: tokens of an answer that are generated to score it.
    steps: of decoding that are timed, for each batch.
    pictures: number of images of `kept.png`.
  """

  subject: Annotated[Any, typed.OneOf(QUESTION_MODELS)]
  families: tuple[str, ...] = ("vlm",)
  keeps: tuple[float, ...] = (0.5, 0.25, 0.125)
  picture_keep: float = 0.25
  answer: int = 1
  steps: int = 8
  pictures: int = 4

  SUBJECTS = QUESTION_MODELS
  STEM, PICTURE = "vlm_pareto", "kept.png"
  DEPENDS = ("subject", "batch_size", "options", "answer")
  NOTHING = "none"
  TOGETHER = 4

  def __post_init__(self):
    super().__post_init__()
    self.at_least_one("answer", "steps", "pictures")

  def prepare(self, workdir: pathlib.Path) -> "QuestionsSubject":
    """See `Sweep.prepare`."""
    return QuestionsSubject(self, self.subject.prepare(workdir))


class Packed(NamedTuple):
  """A batch of questions as one shape.

  Attributes:
    prompts: on the device.
    room: the most tokens of each kind (static).
    real: how many rows are no filling.
  """

  prompts: Prompts
  room: Capacities
  real: int


@dataclasses.dataclass(frozen=True)
class Program:
  """A model with a recipe, whose prefill is one compiled program.

  Attributes:
    job: what was compiled.
    generator: the model.
    batches: all questions, packed for it.
    run: from parameters, prompts and a key to a `Generation`.
    cost: of the prefill of a batch, vision and selection included, by the
      compiler's own analysis.
  """

  job: Job
  generator: VisionLanguageGenerator
  batches: Sequence[Packed]
  run: Callable[..., Generation]
  cost: cost.Cost

  def step(self, params: Any, going: Generation, token) -> Generation:
    """A step of decoding; `going` is used up."""
    decoder = self.generator.model.decoder
    return generation.decode_step(decoder, params["language"], going, token)

  def decode(
    self, params: Any, going: Generation, count: int
  ) -> list[jax.Array]:
    """The first `count` tokens of each answer, without sampling."""
    tokens = [going.logits.argmax(-1).astype(jnp.int32)]
    for _ in range(count - 1):
      going = self.step(params, going, tokens[-1])
      tokens.append(going.logits.argmax(-1).astype(jnp.int32))
    return tokens


@dataclasses.dataclass(frozen=True)
class QuestionsSubject:
  """A vision-language model under the settings of a sweep; a `Subject`."""

  settings: Questions
  model: QuestionModel

  @property
  def origin(self) -> str:
    return self.model.origin

  @functools.cached_property
  def _kind(self) -> np.ndarray:
    """Of each question."""
    return np.array([one.question.kind for one in self.model.asked])

  def compile(self, job: Job) -> Program:
    """See `Subject.compile`.

    The prompt has as many tokens as the longest one of all questions needs.
    """
    asked, size = self.model.asked, self.settings.batch_size
    room = max(self.settings.steps, self.settings.answer)
    try:
      model = self.model.build(job.slots())
      generator = generator_of(model, self.model, asked, size, room)
      batches = [
        pack(generator, asked[first : first + size], size)
        for first in range(0, len(asked), size)
      ]
      first = batches[0]

      leaves, tree = jax.tree.flatten(first.prompts)

      def prefill(params, leaves, key):
        prompts = tree.unflatten(leaves)
        return vlm_generation.prefill(
          model, params, prompts, room, None, first.room, key
        )

      jitted = jax.jit(prefill)
      inputs = self.model.params, leaves, jax.random.key(0)
      compiled = jitted.lower(*inputs).compile()
    except ValueError as error:
      raise Unfit(job, str(error)) from error
    spent = cost.measure(jitted, *inputs, compiled=compiled)
    run = lambda params, prompts, key: compiled(
      params, jax.tree.leaves(prompts), key
    )
    return Program(job, generator, batches, run, spent)

  def score(self, programs: Sequence[Program], whole: Program) -> list[Row]:
    """Right answers by kind of question, drift, FLOPs and bytes.

    Means over seeds; intervals are those of `intervals.lost`, question by
    question. Drift is the mean Kullback-Leibler divergence of the first token
    from the unreduced model's, in nats. Random recipes draw the same keys in
    every run. FLOPs and bytes are those of one question.
    """
    right, logits = self._answers(whole)
    rows = []
    for program in programs:
      own, moved = right, np.zeros(right.shape)
      if program is not whole:
        own, other = self._answers(program)
        moved = (np.exp(logits) * (logits - other)).sum(axis=-1)
      row = {**self._row(right, own, moved), **self._sizes(program)}
      looks = self._looks(program) if program is whole else None
      rows.append({**row, **self._kept(program), "looks": looks})
    return rows

  def _answers(self, program: Program) -> tuple[np.ndarray, np.ndarray]:
    """Which are right, `[seeds, n]`; log probabilities of first tokens."""
    right, logits = [], []
    for params in self.model.weights:
      hits, found, begin = [], [], 0
      for i, batch in enumerate(program.batches):
        going = program.run(params, batch.prompts, jax.random.key(i))
        log_p = jax.nn.log_softmax(going.logits)[: batch.real]
        said = np.stack(program.decode(params, going, self.settings.answer), 1)
        asked = self.model.asked[begin : (begin := begin + batch.real)]
        hits += [self._right(*both) for both in zip(asked, said, strict=False)]
        found.append(np.asarray(log_p))
      right.append(hits)
      logits.append(np.concatenate(found))
    return np.array(right), np.stack(logits)

  def _right(self, asked: Asked, said: np.ndarray) -> bool:
    """Whether generated tokens, up to an end, contain the answer's words."""
    tokenizer, ids = self.model.tokenizer, said.tolist()
    ends = [i for i, token in enumerate(ids) if token in tokenizer.ends]
    text = tokenizer.decode(ids[: min(ends, default=len(ids))])
    own, wanted = words_of(text), words_of(asked.question.answer)
    return f" {' '.join(wanted)} " in f" {' '.join(own)} "

  def _row(self, right: np.ndarray, own: np.ndarray, moved: np.ndarray) -> Row:
    """What is scored of one program."""
    row: Row = {}
    for kind in (ALL, *self.model.kinds):
      chosen = (self._kind == kind) | (kind == ALL)
      row[f"accuracy_{kind}"] = float(own[:, chosen].mean())
      found = intervals.lost(right[:, chosen], own[:, chosen])
      row[f"lost_{kind}"] = found["lost"]
      row[f"lost_{kind}_interval"] = found["lost_interval"]
      row[f"lost_{kind}_by_seed"] = found["lost_by_seed"]
    right_words = question_budget.words_of(own)
    return {**row, "right": right_words, "drift": float(moved.mean())}

  def _sizes(self, program: Program) -> Row:
    """Tokens, FLOPs and bytes of one question."""
    going = self._prefilled(program)
    size, held = self.settings.batch_size, program.generator.bytes(going)
    logical = np.broadcast_to(np.asarray(held.logical), (size,))
    return {
      "image_tokens": program.generator.image_tokens,
      "gflops": program.cost.flops / size / 1e9,
      "gflops_exact": program.cost.exact,
      "logical_bytes": float(logical.mean()),
      "physical_bytes": held.physical / size,
    }

  def _prefilled(self, program: Program) -> Generation:
    """What the first batch left."""
    prompts = program.batches[0].prompts
    return program.run(self.model.params, prompts, jax.random.key(0))

  def calls(self, program: Program) -> dict[str, Callable[[], Any]]:
    """What is timed: prefill, the way to the first token, and decoding.

    The first token counts from prompts and pixels on the host to its id there.
    """
    params, key = self.model.params, jax.random.key(0)
    prompts, going = program.batches[0].prompts, self._prefilled(program)
    size, asked = self.settings.batch_size, self.model.asked

    def first():
      packed = pack(program.generator, asked[:size], size)
      logits = program.run(params, packed.prompts, key).logits
      return np.asarray(logits.argmax(-1))

    # Steps use buffers up; to copy them is a small part of the time.
    def decode():
      copy = jax.tree.map(jnp.copy, going)
      return program.decode(params, copy, self.settings.steps)

    run = lambda: program.run(params, prompts, key)
    found = {"prefill": run, "first": first, "decode": decode}
    # Compiles the steps.
    jax.block_until_ready([call() for call in found.values()])
    return found

  def speed(self, seconds: Mapping[str, np.ndarray]) -> Row:
    """Milliseconds of a batch by the best round; speed-ups."""
    best = {name: 1e3 * float(x[:, 0].min()) for name, x in seconds.items()}
    best["decode"] /= max(self.settings.steps - 1, 1)
    times = {f"{name}_ms": value for name, value in best.items()}
    ups = {f"{name}_speedup": speedup(x) for name, x in seconds.items()}
    return {**times, **ups}

  def plot(self, results: Results) -> Plot:
    """See `Subject.plot`."""
    return question_report.plot(results, (ALL, *self.model.kinds))

  def table(self, results: Results) -> Table:
    """See `Subject.table`."""
    return question_report.table(results, self.model.kinds)

  def picture(
    self, results: Results, methods: Sequence[str], path: pathlib.Path
  ) -> None:
    """Which patches each method leaves of the first images.

    Methods that the model cannot be built with, or that cannot be followed
    through a whole sequence, are left out.
    """
    del results
    settings, maps = self.settings, {}
    asked = self.model.asked[: settings.pictures]
    if self.model.config.pinpoints:
      return
    for method in methods:
      job = settings.job(method, settings.picture_keep)
      stages = self._stages(job, asked)
      if stages:
        maps[method] = stages[-1].groups(self.model.config.vision.grid)
    images = np.stack([one.image for one in asked])
    questions = " ".join(f"{one.question.text}" for one in asked)
    gallery.draw_methods(
      merge_map.displayable(images), maps, path,
      title=f"Patches that remain, keep {settings.picture_keep:g}",
      note=questions, side=96,
    )  # fmt: skip

  def _stages(
    self, job: Job, asked: Sequence[Asked]
  ) -> list[visual_tokens.Stage] | None:
    """What is left of patches after each stage; None: cannot be followed."""
    if self.model.config.pinpoints:
      return None
    try:
      model = self.model.build(job.slots())
      generator = generator_of(model, self.model, asked, len(asked))
      prompts = pack(generator, asked, len(asked)).prompts
      key = jax.random.key(0)
      found = visual_tokens.look(model, self.model.params, prompts, key)
    except ValueError:
      return None
    return found

  @property
  def _naming(self) -> list[Asked]:
    """Some of the questions that name a cell."""
    asked = self.model.asked
    return [one for one in asked if one.question.box is not None][:NAMED]

  def _looks(self, whole: Program) -> list[list[float]] | None:
    """Where the last token of questions that name a cell looks.

    Means over these questions, for each block of the language model: its
    attention to the patches of the cell, and to all patches. None: no question
    names a cell, or images are cut into crops.
    """
    asked, model = self._naming, self.model
    if not asked or model.config.pinpoints:
      return None
    generator = generator_of(whole.generator.model, model, asked, len(asked))
    prompts = pack(generator, asked, len(asked)).prompts
    found = visual_tokens.attention(model.config, model.params, prompts)
    grid = model.config.vision.grid
    named = np.stack([one.question.named(grid) for one in asked])
    return [
      [float((x * named).sum(-1).mean()), float(x.sum(-1).mean())]
      for x in found
    ]

  def _kept(self, program: Program) -> Row:
    """How many patches remain at the end, and of cells that are asked about.

    Of questions that name a cell, by the first weights; None: there are none,
    or the recipe cannot be followed through a whole sequence.
    """
    asked = self._naming
    stages = self._stages(program.job, asked) if asked else None
    if stages is None:
      return {"kept": None, "kept_named": None}
    if not stages:
      return {"kept": 1.0, "kept_named": 1.0}
    grid, remains = self.model.config.vision.grid, stages[-1].remains
    named = np.stack([one.question.named(grid) for one in asked])
    return {
      "kept": float(remains.mean()),
      "kept_named": float(remains[named].mean()),
    }


def generator_of(
  model: VisionLanguage,
  source: QuestionModel,
  asked: Sequence[Asked],
  size: int,
  decode: int = 1,
) -> VisionLanguageGenerator:
  """A generator with room for the longest prompt, which all are padded to.

  Args:
    model: built with the slots of a recipe.
    source: of its parameters.
    asked: all questions.
    size: of batches.
    decode: tokens that can be generated.
  """
  count = vlm_generation.tokens_per_image(model.config, model.slots)
  cut = lambda one: vlm_prompts.crops_of(one.image, model.config).pixels
  crops = [len(cut(one)) for one in asked]
  # Where images are cut, a newline ends each row of each crop at most.
  most, each = max(crops), count * 2 if model.config.pinpoints else count
  longest = max(len(one.prompt) for one in asked) - 1 + most * each
  return VisionLanguageGenerator(
    model, source.params, longest, decode, buckets=(longest,),
    image_buckets=(most, most * size),
  )  # fmt: skip


def pack(
  generator: VisionLanguageGenerator, asked: Sequence[Asked], size: int
) -> Packed:
  """A batch of `size` questions, filled up with the first of them."""
  rows = [*asked, *(asked[:1] * (size - len(asked)))]
  prompts, room = generator.pack(
    [one.prompt for one in rows], [[one.image] for one in rows]
  )
  return Packed(prompts, room, len(asked))
