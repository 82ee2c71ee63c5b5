"""Tokenizers in GGUF files: the ids of the tokenizer that was written."""

import json

import numpy as np
import pytest
from tokenizers import (
  Regex,
  Tokenizer,
  decoders,
  models,
  pre_tokenizers,
  trainers,
)

from tests.interop import gguf_files
from tests.interop.test_gguf_hostile import write
from tokjax import interop
from tokjax.interop import gguf_tokenizer
from tokjax.interop.gguf_file import GgufFile

TEXTS = (
  "Hello world, it's 12345 o'clock: don't panic!",
  "  def f(x):\n\treturn x**2   # squares\n\n\nend",
  "\u00fcn\u00efcode \u6771\u4eac \U0001f389 e\u0301 x\u00b2 \u0661\u0662 A1b2",
  " lead and trail ",
  "",
)
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(steps):
  """A byte-level tokenizer with these steps before its merges."""
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Sequence(steps)
  made.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet,
    show_progress=False,
  )  # fmt: skip
  made.train_from_iterator([text * 3 for text in TEXTS], trainer)
  return made


def byte_level_file(path, made, pre, **more):
  """The vocabulary and merges of a tokenizer in a file."""
  ids = made.get_vocab()
  tokens = sorted(ids, key=ids.__getitem__)
  merges = json.loads(made.to_str())["model"]["merges"]
  return gguf_files.write(
    path,
    "llama",
    {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.pre": pre,
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
      "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
      "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2,
      **{f"tokenizer.{key}": value for key, value in more.items()},
    },
    {},
  )


def read(path, vocabulary=1000, **options):
  file = GgufFile(path)
  return gguf_tokenizer.tokenizer_of(
    file.metadata, str(path), vocabulary, **options
  )


def level(**options):
  return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


STEPS = {
  "gpt-2": [level()],
  "smollm": [pre_tokenizers.Digits(individual_digits=True), level()],
  "llama-bpe": [
    pre_tokenizers.Split(Regex(LLAMA3), "isolated"), level(use_regex=False),
  ],
}  # fmt: skip


@pytest.mark.parametrize("pre", STEPS)
def test_byte_level_ids_are_those_of_the_tokenizer_written(pre, tmp_path):
  made = trained(STEPS[pre])
  ours = read(byte_level_file(tmp_path / "t.gguf", made, pre))
  front = [1] if pre == "llama-bpe" else []
  for text in TEXTS:
    ids = made.encode(text).ids
    assert ours.encode(text) == front + ids
    assert ours.decode(ids) == text
  turn = "<|im_start|>user\nhi<|im_end|>"
  assert made.encode(turn).ids == ours.encode(turn)[len(front) :]
  assert ours.encode(turn)[len(front)] == 1
  assert ours.ends == (0, 2)


def test_what_stands_in_front_and_behind(tmp_path):
  made = trained(STEPS["gpt-2"])
  file = byte_level_file(
    tmp_path / "t.gguf", made, "gpt-2",
    **{"ggml.add_bos_token": True, "ggml.add_eos_token": True},
  )  # fmt: skip
  ids = read(file).encode("Hello")
  assert ids == [1, *made.encode("Hello").ids, 2]


def pieces():
  """Characters, bytes and words with scores, as SentencePiece has them."""
  words = "the he in th an and ing \u2581t \u2581th \u2581the \u2581a \u2581an"
  words = [*words.split(), "\u2581and", "\u2581\u2581", "er", "her", "ther"]
  letters = sorted({*"".join(words), *"abcdefghijklmnopqrstuvwxyz.,'"})
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  types = [2, 3, 3] + [6] * 256
  tokens += words + letters
  types += [1] * (len(words) + len(letters))
  scores = [0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))]
  return tokens, types, scores


def merged(text, tokens, scores):
  """SentencePiece's rule, step by step: the leftmost of the best pairs."""
  ids = {token: i for i, token in enumerate(tokens)}
  parts = list(text.replace(" ", "\u2581"))
  while True:
    found = [
      (-scores[ids[a + b]], i)
      for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
      if a + b in ids
    ]
    if not found:
      break
    i = min(found)[1]
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  out = []
  for part in parts:
    spelled = [f"<0x{byte:02X}>" for byte in part.encode()]
    out += [ids[part]] if part in ids else [ids[s] for s in spelled]
  return out


def sentencepiece_file(path, **more):
  tokens, types, scores = pieces()
  return gguf_files.write(
    path,
    "llama",
    {
      "tokenizer.ggml.model": "llama",
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.token_type": types,
      "tokenizer.ggml.scores": scores,
      "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2,
      "tokenizer.ggml.unknown_token_id": 0,
      **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    },
    {},
  )


SENTENCES = (
  "the other and the inner thing", "an  and", "hi, it's \u6771!", "zzz ther",
)  # fmt: skip


def test_sentencepiece_ids_follow_its_rule(tmp_path):
  tokens, _, scores = pieces()
  ours = read(sentencepiece_file(tmp_path / "t.gguf"))
  for text in SENTENCES:
    expected = [1, *merged(" " + text, tokens, scores)]
    assert ours.encode(text) == expected
    assert ours.decode(expected) == text
  assert ours.encode("<s>an")[:2] == [1, 1]
  plain = read(
    sentencepiece_file(
      tmp_path / "u.gguf", add_space_prefix=False, add_bos_token=False
    )
  )
  assert plain.encode("the") == merged("the", tokens, scores)


def test_gemma_merges_by_id(tmp_path):
  """Its scores do not say the order; spaces are stored as they are."""
  tokens, types, scores = pieces()
  tokens[tokens.index("\u2581\u2581")] = "  "
  rng = np.random.default_rng(0)
  path = gguf_files.write(
    tmp_path / "t.gguf",
    "gemma3",
    {
      "tokenizer.ggml.model": "llama",
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.token_type": types,
      "tokenizer.ggml.scores": rng.permutation(scores).tolist(),
      "tokenizer.ggml.bos_token_id": 1,
    },
    {},
  )
  ours = read(path, by_id=True)
  tokens, _, scores = pieces()
  for text in ("the other and the inner thing", "an  and", "zzz ther"):
    # Words end behind their space.
    assert ours.encode(text)[0] == 1
    assert ours.decode(ours.encode(text)) == text
  assert ours.encode("ther") == [1, *merged("ther", tokens, scores)]
  assert ours.encode("  ") == [1, tokens.index("\u2581\u2581")]


def test_chat_template_and_its_tokens(tmp_path):
  template = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  )
  made = trained(STEPS["gpt-2"])
  file = byte_level_file(
    tmp_path / "t.gguf", made, "gpt-2", chat_template=template
  )
  ours = read(file)
  messages = [dict(role="user", content="it's 12")]
  text = "<|im_start|><|im_start|>user\nit's 12<|im_end|>\n<|im_start|>"
  assert ours.chat.render(messages) == text + "assistant\n"
  assert ours.encode_chat(messages) == made.encode(text + "assistant\n").ids
  with pytest.raises(ValueError, match="has no chat template"):
    read(byte_level_file(tmp_path / "u.gguf", made, "gpt-2")).encode_chat([])


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"ggml.pre": "martian"}, "tokenizer.ggml.pre='martian': must be one of"),
    ({"ggml.model": "bert"}, "tokenizer.ggml.model='bert': must be 'gpt2'"),
    ({"ggml.token_type": [1, 2]}, "token_type has 2 entries for"),
    ({"ggml.tokens": ["a", "a"]}, "texts that are there twice"),
    ({"ggml.merges": ["ab"]}, "merges has 'ab'"),
    ({"ggml.merges": ["zz zz"]}, "merges"),
    ({"ggml.eos_token_id": 5000}, "eos_token_id=5000: there are"),
    ({"chat_template": 3}, "chat_template=3: must be a string"),
  ],
)
def test_tokenizers_that_contradict_themselves(changes, message, tmp_path):
  made = trained(STEPS["gpt-2"])
  path = tmp_path / "t.gguf"
  with pytest.raises(interop.ConfigError, match=message):
    read(byte_level_file(path, made, "gpt-2", **changes))


def test_ids_beyond_the_embedding(tmp_path):
  made = trained(STEPS["gpt-2"])
  path = byte_level_file(tmp_path / "t.gguf", made, "gpt-2")
  with pytest.raises(ValueError, match="has ids up to"):
    read(path, vocabulary=40)
  assert interop.load(write(tmp_path / "none.gguf"))[2] is None
