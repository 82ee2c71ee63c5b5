"""Chat templates: where they come from, and what they may not do."""

import json

import pytest
from tokenizers import Tokenizer as Published
from tokenizers import models, pre_tokenizers

from tokjax.interop.chat import Chat
from tokjax.interop.tokenizer import FILE, Tokenizer

pytest.importorskip("jinja2", reason="chat templates need jinja2")

TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}\n"
  "  {% if message.role == 'system' %}\n"
  "{{ raise_exception('no system') }}\n"
  "  {% endif %}\n"
  "[{{ message.role }}] {{ message.content | trim }}\n"
  "{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = [dict(role="user", content=" hi ")]


@pytest.fixture
def folder(tmp_path):
  words = {"[user]": 0, "hi": 1, "[assistant]": 2, "<s>": 3, "?": 4}
  made = Published(models.WordLevel(words, unk_token="?"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(["<s>"])
  made.save(str(tmp_path / FILE))
  return tmp_path


def configure(folder, **values):
  path = folder / "tokenizer_config.json"
  path.write_text(json.dumps(values))
  return Tokenizer.find(folder)


@pytest.mark.parametrize("token", ["<s>", {"content": "<s>", "lstrip": False}])
@pytest.mark.parametrize("listed", [False, True])
def test_from_tokenizer_config(folder, token, listed):
  template = TEMPLATE
  if listed:
    template = [
      dict(name="tool_use", template="no"),
      dict(name="default", template=TEMPLATE),
    ]
  made = configure(folder, chat_template=template, bos_token=token)
  assert made.chat.render(USER) == "<s>[user] hi\n[assistant]"
  assert made.chat.render(USER, answer=False) == "<s>[user] hi\n"
  assert made.encode_chat(USER) == [3, 0, 1, 2]


def test_a_file_of_its_own_comes_first(folder):
  (folder / "chat_template.jinja").write_text("file {{ eos_token }}")
  made = configure(folder, chat_template="config", eos_token="</s>")
  assert made.chat.render([]) == "file </s>"
  (folder / "tokenizer_config.json").unlink()
  assert Tokenizer.find(folder).chat == Chat("file {{ eos_token }}")


def test_none(folder):
  assert Tokenizer.find(folder).chat is None
  with pytest.raises(ValueError, match="has no chat template"):
    configure(folder, bos_token="<s>").encode_chat(USER)


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(chat_template=3), "chat_template must be a string, or a list"),
    (dict(chat_template=[dict(name="a")]), "chat_template must be a string"),
    (dict(chat_template=[dict(name="a", template=3)]), "must be a string"),
    (
      dict(chat_template=[dict(name=n, template=n) for n in "ab"]),
      "none is 'default'",
    ),
    (dict(chat_template="a", bos_token=3), "bos_token=3: must be a text"),
  ],
)
def test_what_is_no_template(folder, values, message):
  with pytest.raises(ValueError, match=message):
    configure(folder, **values)


@pytest.mark.parametrize(
  "template, message",
  [
    ("{% for", "unexpected|expected"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages[7].content }}", "has no element 7|undefined"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    ("{{ range(1000000000) }}", "too big|OverflowError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{% include 'x' %}", "no loader"),
  ],
)
def test_what_the_sandbox_refuses(template, message):
  with pytest.raises(ValueError, match=f"chat template: .*({message})"):
    Chat(template).render(USER)


def test_functions_that_templates_are_given():
  chat = Chat(
    "{% generation %}{{ messages[0] | tojson }}{% endgeneration %}"
    "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}"
    "{% endfor %}{{ strftime_now('%Y') | length }}"
  )
  text = '{"role": "user", "content": "<é>"}014'
  assert chat.render([dict(role="user", content="<é>")]) == text
