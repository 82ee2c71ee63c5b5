"""FastV and VisionZip beside their official code, on one small random model.

  python -m scripts.bench_official --python PYTHON --fastv DIR --visionzip DIR
    --out DIR [--width 1024] [--depth 4] [--repeats 5]

DIR are checkouts of pkunlp-icler/FastV (d165972) and of
dvlab-research/VisionZip (3151f6d); PYTHON has torch and what FastV's copy of
transformers 4.39 needs (tokenizers below 0.19, huggingface_hub below 1). A
LLaVA of random weights is made there and saved; both sides read it and take the
same image and prompt: CLIP-L/14 at 336 pixels and a Llama, both of `--depth`
blocks, 63 tokens of text.

For each of no method, FastV (K=2, R=50 %) and VisionZip (54 + 10): whether the
same tokens are kept, the largest difference of the logits, and milliseconds of
prefill, vision included, the best of the repeats; ratios above 1 say that
tokjax is faster. Processes take turns. Both have two threads.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import numpy as np

IMAGE, TEXT, VOCABULARY = 999, 63, 1000
SYSTEMS = ("plain", "fastv", "visionzip")
BLOCK, DROPPED = 2, 0.5
DOMINANT, CONTEXTUAL = 54, 10
LLAMA = ("src", "FastV", "llava-hf", "transformers", "src")


def inputs() -> tuple[list[int], np.ndarray]:
  """A prompt with one placeholder, and normalised pixels."""
  rng = np.random.default_rng(1)
  text = rng.integers(1, IMAGE, TEXT).tolist()
  pixels = rng.normal(size=(336, 336, 3)).astype(np.float32)
  return [*text[:35], IMAGE, *text[35:]], pixels


def best_of(repeats: int, run) -> tuple[float, object]:
  """Milliseconds of the fastest run but the first, and the last result."""
  times, result = [], None
  for _ in range(repeats + 1):
    begin = time.perf_counter()
    result = run()
    times.append(time.perf_counter() - begin)
  return 1e3 * min(times[1:]), result


def make(folder: pathlib.Path, width: int, depth: int) -> None:
  """Saves a model of random weights; runs next to the official code."""
  import torch
  from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
  )

  vision = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=depth,
    num_attention_heads=16, image_size=336, patch_size=14,
  )  # fmt: skip
  text = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=depth,
    intermediate_size=width * 43 // 16, num_attention_heads=width // 128,
    num_key_value_heads=width // 128, max_position_embeddings=1024,
    rms_norm_eps=1e-5,
  )  # fmt: skip
  config = LlavaConfig(vision, text, image_token_index=IMAGE)
  model = LlavaForConditionalGeneration(config)
  torch.manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      # Wide enough that scores of tokens are far from equal.
      if x.ndim > 1:
        x.normal_(std=0.05)
      elif name.endswith("bias"):
        x.zero_()
  model.save_pretrained(folder)


def official(
  system: str, folder: pathlib.Path, visionzip: pathlib.Path, repeats: int
) -> dict:
  """Runs the official code, in its environment."""
  import torch
  from transformers import LlavaForConditionalGeneration

  torch.set_num_threads(2)
  model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
  tower, found = model.vision_tower, {}
  see = lambda x: tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]
  if system == "visionzip":
    # Its package imports LLaVA, which none of this needs.
    package = types.ModuleType("visionzip")
    package.__path__ = [str(visionzip / "visionzip")]
    sys.modules["visionzip"] = package
    utils = importlib.import_module("visionzip.utils")
    encoder = importlib.import_module("visionzip.clip_encoder")
    utils.apply_info(tower, DOMINANT - 1, CONTEXTUAL)
    depth = len(tower.vision_model.encoder.layers)
    # Written for 24 blocks there.
    tower.r = [0] * (depth - 2) + [1, 0]
    utils.CLIPEncoderLayer.forward = utils.CLIP_EncoderLayer_forward
    utils.CLIPAttention.forward = utils.CLIPAttention_forward
    own = types.SimpleNamespace(
      vision_tower=tower, device=tower.device, dtype=tower.dtype
    )

    def see(x):
      features, index = encoder.CLIPVisionTower_VisionZip.forward(own, x)
      found["kept"] = sorted((index[0, 1:] - 1).tolist())
      return features

  ids, pixels = inputs()
  ids, at = torch.tensor([ids]), ids.index(IMAGE)
  pixels = torch.tensor(pixels).permute(2, 0, 1)[None]
  language = model.language_model
  embed = language.get_input_embeddings()

  def hook(_, args, kwargs):
    own = kwargs["position_ids"][0] - at
    found["kept"] = own[(own >= 0) & (own < 576)].tolist()

  if system == "fastv":
    language.model.layers[BLOCK].register_forward_pre_hook(
      hook, with_kwargs=True
    )

  def run():
    with torch.no_grad():
      features = model.multi_modal_projector(see(pixels))
      x = embed(ids)
      x = torch.cat([x[:, :at], features, x[:, at + 1 :]], dim=1)
      given = dict(inputs_embeds=x, use_cache=True)
      if system != "fastv":
        return language(**given).logits[0, -1]
      how = dict(
        fastv_k=BLOCK, fastv_r=DROPPED, image_token_start_index=at,
        image_token_length=features.shape[1],
      )  # fmt: skip
      return language.fastv_forward(**given, fastv_config=how).logits[0, -1]

  ms, logits = best_of(repeats, run)
  return {"ms": ms, "logits": logits.tolist(), "kept": found.get("kept")}


def ours(system: str, folder: pathlib.Path, repeats: int) -> dict:
  """The same with tokjax."""
  import jax

  from experiments import visual_tokens
  from tokjax import interop, recipes
  from tokjax.models import VisionLanguageGenerator, vlm_generation
  from tokjax.slots import Slots

  slots = {
    "plain": Slots,
    "fastv": lambda: recipes.get("fastv", layer=BLOCK),
    "visionzip": lambda: recipes.get("visionzip"),
  }[system]()
  model, params, _ = interop.load(folder, slots=slots)
  ids, pixels = inputs()
  tokens = TEXT + vlm_generation.tokens_per_image(model.config, slots)
  generator = VisionLanguageGenerator(
    model, params, tokens, decode=8, buckets=(tokens,)
  )
  packed, room = generator.pack([ids], [[pixels]])
  run = lambda: jax.block_until_ready(generator.prefill_packed(packed, room))
  ms, going = best_of(repeats, run)
  kept = None
  if system != "plain":
    # What remains behind the last stage; a contextual token is no patch.
    (stage,) = visual_tokens.look(model, params, packed, None)
    share = stage.share[0]
    if system == "visionzip":
      share = share[1:DOMINANT]
    kept = np.flatnonzero(share.sum(axis=0) > 1e-6).tolist()
  logits = np.asarray(going.logits)[0]
  return {"ms": ms, "logits": logits.tolist(), "kept": kept}


def child(python: str, path: list[str], own: list[str]) -> str:
  """The output of this file in a process of its own."""
  done = subprocess.run(
    [python, __file__, *own], capture_output=True, text=True, check=False,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
  )  # fmt: skip
  if done.returncode:
    raise SystemExit(done.stderr.strip() or f"exit code {done.returncode}")
  return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--python", default=sys.executable)
  parser.add_argument("--fastv", type=pathlib.Path)
  parser.add_argument("--visionzip", type=pathlib.Path)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--width", type=int, default=1024)
  parser.add_argument("--depth", type=int, default=4)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--one", default="", help=argparse.SUPPRESS)
  args = parser.parse_args()
  folder = args.out / "model"
  if args.one:
    side, _, system = args.one.partition(" ")
    if side == "make":
      make(folder, args.width, args.depth)
    elif side == "official":
      found = official(system, folder, args.visionzip, args.repeats)
      print(json.dumps(found))
    else:
      print(json.dumps(ours(system, folder, args.repeats)))
    return
  for name in ("fastv", "visionzip"):
    if getattr(args, name) is None or not getattr(args, name).is_dir():
      parser.error(f"--{name}: give the folder of a checkout")
  root = str(pathlib.Path(__file__).parents[1])
  given = [
    f"--out={args.out}", f"--visionzip={args.visionzip}",
    f"--width={args.width}", f"--depth={args.depth}",
    f"--repeats={args.repeats}",
  ]  # fmt: skip
  theirs = (args.python, [str(args.fastv.joinpath(*LLAMA))])
  if not (folder / "config.json").exists():
    child(*theirs, [*given, "--one=make"])
  print("system\tsame tokens\tlogits apart\tofficial ms\ttokjax ms\tratio")
  for system in SYSTEMS:
    a = json.loads(child(*theirs, [*given, f"--one=official {system}"]))
    b = json.loads(
      child(sys.executable, [root], [*given, f"--one=ours {system}"])
    )
    apart = np.abs(np.subtract(a["logits"], b["logits"])).max()
    same = "-" if a["kept"] is None else a["kept"] == b["kept"]
    print(
      f"{system}\t{same}\t{apart:.1e}\t{a['ms']:.0f}\t{b['ms']:.0f}"
      f"\t{a['ms'] / b['ms']:.2f}", flush=True,
    )  # fmt: skip


if __name__ == "__main__":
  main()
