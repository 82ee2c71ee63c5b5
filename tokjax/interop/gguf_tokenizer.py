"""Tokenizers from the metadata of GGUF files.

A file has a vocabulary, merges or scores, and the name of the rule that splits
text into words; the same tokenizer of the `tokenizers` library is made of it.
Ids are those of `transformers` 5.24 (integrations/gguf), and of llama.cpp in
the points where those two differ: tokens that a file marks as control or as
user-defined stay whole in every vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import (
  AddedToken,
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)
from tokenizers import (
  Tokenizer as Published,
)

from tokjax.interop import fields
from tokjax.interop.chat import Chat
from tokjax.interop.tokenizer import Tokenizer, check_ids

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"

# How text is split before byte-level merges, by `tokenizer.ggml.pre`.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
TEKKEN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
  rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
  **dict.fromkeys(
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), LLAMA3
  ),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
  "tekken": TEKKEN,
}
# Digits one by one, then GPT-2's rule; and that rule alone.
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
PLAIN = ("default", "gpt-2", "mpt", "olmo")
# A word that is in the vocabulary is one token, whatever the merges; and a text
# begins with the token for that.
WHOLE_WORDS = (*(n for n in SPLITS if SPLITS[n] == LLAMA3), "tekken")
COMPOSED = tuple(n for n in SPLITS if SPLITS[n] == QWEN2)
# Tokens that end a turn or a text in the families that are read. A file states
# one, and tuned models end with another one than they were trained on first.
END_TEXTS = (
  "<|endoftext|>",
  "<|im_end|>",
  "<|eot_id|>",
  "<|eom_id|>",
  "<|end_of_text|>",
  "<end_of_turn>",
  "<eos>",
  "</s>",
)


def tokenizer_of(
  metadata: fields.Json, source: str, vocabulary: int, *, by_id: bool = False
) -> Tokenizer | None:
  """The tokenizer of a file; None if it has none.

  Args:
    metadata: of the file.
    source: its name, for messages.
    vocabulary: rows of the model's embedding, which ids must be below.
    by_id: pieces are merged in the order of their ids, not of their scores
      (Gemma, whose scores do not say the order).

  Raises:
    ConfigError: a kind of tokenizer that is not read, or values that contradict
      each other.
    ValueError: it has ids that the model has no embedding for.
  """
  kind = metadata.get("tokenizer.ggml.model")
  if kind in (None, "none", "no_vocab"):
    return None
  with fields.problems_of(source):
    part = Part(metadata)
    if kind == "gpt2":
      published = byte_level(part)
    elif kind == "llama":
      published = gemma(part) if by_id else sentencepiece(part)
    else:
      raise fields.wrong(
        "tokenizer.ggml.model", kind, "'gpt2' (byte-level) or 'llama'"
      )
    add_tokens(published, part)
    add_ends(published, part, by_default=begins(part))
    ends, chat = ends_of(part), chat_of(part)
  check_ids(source, published.get_vocab(), ends, vocabulary)
  return Tokenizer(published, ends, chat)


class Part:
  """What a file says of its tokenizer, checked.

  Attributes:
    tokens: texts, by id.
    types: one of NORMAL, ..., by id.
    pre: the rule that splits text.
  """

  def __init__(self, metadata: fields.Json):
    self.metadata = metadata
    self.tokens = self.get("tokens", fields.strings)
    if len(set(self.tokens)) != len(self.tokens):
      raise ValueError("tokenizer.ggml.tokens has texts that are there twice")
    types = self.get("token_type", listed)
    self.types = [NORMAL] * len(self.tokens) if types is None else types
    self.same_length("token_type", self.types)
    self.pre = self.get("pre", fields.optional(fields.string, "default"))

  def get(self, name: str, read: fields.Reader) -> Any:
    """A value by a reader of `fields`."""
    return read(self.metadata, f"tokenizer.ggml.{name}")

  def same_length(self, name: str, values: Sequence[Any]) -> None:
    if len(values) != len(self.tokens):
      raise ValueError(
        f"tokenizer.ggml.{name} has {len(values)} entries for"
        f" {len(self.tokens)} tokens"
      )

  def id_of(self, name: str) -> int | None:
    """The id of a special token, such as "bos"; None if there is none."""
    found = self.get(f"{name}_token_id", fields.optional(fields.natural))
    if found is not None and found >= len(self.tokens):
      raise ValueError(
        f"tokenizer.ggml.{name}_token_id={found}: there are"
        f" {len(self.tokens)} tokens"
      )
    return found

  def marked(self, kinds: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Ids and texts of tokens of these types."""
    for i, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
      if kind in kinds:
        yield i, text


def listed(part: fields.Json, name: str) -> list[Any] | None:
  """A list of numbers; None if it is absent."""
  value = part.get(name)
  if value is not None and not isinstance(value, np.ndarray):
    raise fields.wrong(name, value, "a list of numbers")
  return None if value is None else value.tolist()


def byte_level(part: Part) -> Published:
  """BPE on bytes: GPT-2, Llama 3, Qwen, SmolLM, Mistral Nemo."""
  known = (*SPLITS, *DIGITS, *PLAIN)
  if part.pre not in known:
    raise fields.wrong(
      "tokenizer.ggml.pre", part.pre, f"one of {', '.join(sorted(known))}"
    )
  spelled = byte_alphabet()
  whole = {i for i, _ in part.marked((CONTROL, USER_DEFINED))}
  alphabet = set(spelled)
  ids = {}
  for i, text in enumerate(part.tokens):
    if i not in whole and not alphabet.issuperset(text):
      text = "".join(spelled[byte] for byte in text.encode())
    ids[text] = i
  made = bpe(ids, merges_of(part), ignore_merges=part.pre in WHOLE_WORDS)
  prefix = part.get("add_space_prefix", fields.optional(fields.flag, False))
  level = pre_tokenizers.ByteLevel
  if part.pre in SPLITS:
    split = pre_tokenizers.Split(Regex(SPLITS[part.pre]), "isolated")
    steps = [split, level(add_prefix_space=prefix, use_regex=False)]
  else:
    steps = [level(add_prefix_space=prefix)]
    if part.pre in DIGITS:
      steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
  made.pre_tokenizer = pre_tokenizers.Sequence(steps)
  made.decoder = decoders.ByteLevel()
  if part.pre in COMPOSED:
    made.normalizer = normalizers.NFC()
  return made


def bpe(
  ids: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> Published:
  """A tokenizer that merges pairs.

  Raises:
    ValueError: a merge is of texts that are not in the vocabulary.
  """
  try:
    return Published(models.BPE(vocab=ids, merges=merges, **options))
  except Exception as error:  # the library raises nothing more precise
    raise ValueError(f"tokenizer.ggml.merges: {error}") from error


def merges_of(part: Part) -> list[tuple[str, str]]:
  """The merges that a file lists."""
  found = []
  for entry in part.get("merges", fields.strings):
    # A merge may begin with a space that belongs to its first part.
    left, gap, right = entry[1:].partition(" ")
    if not gap:
      raise ValueError(
        f"tokenizer.ggml.merges has {entry!r}: must be two texts with a space"
        " between them"
      )
    found.append((entry[:1] + left, right))
  return found


def sentencepiece(part: Part) -> Published:
  """BPE on characters with scores, bytes for others: Llama 2, Mistral."""
  scores = part.get("scores", listed)
  if scores is None:
    raise ValueError("has no 'tokenizer.ggml.scores'")
  part.same_length("scores", scores)
  made = pieces(part, part.tokens, [-score for score in scores])
  prefix = part.get("add_space_prefix", fields.optional(fields.flag, True))
  scheme = "first" if prefix else "never"
  made.pre_tokenizer = pre_tokenizers.Metaspace(
    replacement=SPACE, prepend_scheme=scheme, split=False
  )
  steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback()]
  steps.append(decoders.Fuse())
  if prefix:
    steps.append(decoders.Strip(content=" ", left=1))
  made.decoder = decoders.Sequence(steps)
  return made


def gemma(part: Part) -> Published:
  """Gemma's: no space in front, words end behind theirs, order by id."""
  # Tokens of spaces alone are stored as spaces.
  texts = [
    SPACE * len(text) if text and not text.strip(" ") else text
    for text in part.tokens
  ]
  made = pieces(part, texts, range(len(texts)))
  made.normalizer = normalizers.Replace(" ", SPACE)
  made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
  made.decoder = decoders.Sequence(
    [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  return made


def pieces(
  part: Part, texts: Sequence[str], order: Sequence[float | int]
) -> Published:
  """BPE whose merges follow from a vocabulary: low orders first."""
  ids = {text: i for i, text in enumerate(texts)}
  if len(ids) != len(texts):
    raise ValueError("tokenizer.ggml.tokens has texts that are there twice")
  unknown = part.id_of("unknown")
  return bpe(
    ids,
    implied_merges(ids, texts, order),
    unk_token=None if unknown is None else texts[unknown],
    fuse_unk=True,
    byte_fallback=True,
  )


def implied_merges(
  ids: dict[str, int], texts: Sequence[str], order: Sequence[float | int]
) -> list[tuple[str, str]]:
  """Every way to make a piece of two others, best pieces first.

  Of two ways to make one piece, that with the longer left part comes first, as
  in `transformers`.
  """
  found = []
  for text, rank in zip(texts, order, strict=True):
    for cut in range(len(text) - 1, 0, -1):
      left, right = text[:cut], text[cut:]
      if left in ids and right in ids:
        found.append((rank, -cut, cut - len(text), left, right))
  found.sort(key=lambda entry: entry[:3])
  return [entry[3:] for entry in found]


def byte_alphabet() -> str:
  """GPT-2's character for each of the 256 bytes."""
  visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in visible]
  spelled = {byte: chr(byte) for byte in visible}
  spelled |= {byte: chr(256 + i) for i, byte in enumerate(others)}
  return "".join(spelled[byte] for byte in range(256))


def add_tokens(published: Published, part: Part) -> None:
  """Control and user-defined tokens stay whole in a text."""
  ids = published.get_vocab()
  for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
    added = [
      AddedToken(text, normalized=False, special=special)
      for _, text in part.marked((kind,))
      # Gemma's spaces have another spelling in the vocabulary.
      if text in ids
    ]
    add = published.add_special_tokens if special else published.add_tokens
    add(added)


def begins(part: Part) -> bool:
  """Whether texts begin with a token for that, if a file does not say."""
  kind = part.metadata["tokenizer.ggml.model"]
  return kind == "llama" or part.pre in WHOLE_WORDS


def add_ends(published: Published, part: Part, *, by_default: bool) -> None:
  """The tokens that stand in front of a text and behind it."""
  front = part.get("add_bos_token", fields.optional(fields.flag, by_default))
  behind = part.get("add_eos_token", fields.optional(fields.flag, False))
  names = [("bos", front), ("eos", behind)]
  asked = {name: part.id_of(name) for name, wanted in names if wanted}
  ids = {name: found for name, found in asked.items() if found is not None}
  if not ids:
    return
  single = ["$A"]
  special = [(part.tokens[found], found) for found in ids.values()]
  if "bos" in ids:
    single.insert(0, part.tokens[ids["bos"]])
  if "eos" in ids:
    single.append(part.tokens[ids["eos"]])
  published.post_processor = processors.TemplateProcessing(
    single=single, special_tokens=special
  )


def ends_of(part: Part) -> tuple[int, ...]:
  """Ids that end a text: those that are stated, and those with known texts."""
  stated = [part.id_of(name) for name in ("eos", "eot", "eom")]
  known = [i for i, text in part.marked((CONTROL,)) if text in END_TEXTS]
  return tuple(sorted({i for i in (*stated, *known) if i is not None}))


def chat_of(part: Part) -> Chat | None:
  """The chat template of a file."""
  read = fields.optional(fields.string)
  template = read(part.metadata, "tokenizer.chat_template")
  if template is None:
    return None
  names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
  ids = {ours: part.id_of(theirs) for ours, theirs in names.items()}
  return Chat(
    template,
    tuple(
      (f"{name}_token", part.tokens[i])
      for name, i in ids.items()
      if i is not None
    ),
  )
