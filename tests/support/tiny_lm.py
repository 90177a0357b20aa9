"""A tiny causal language model, battles with a rule in them, and a hub that serves a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from routellm.routers.base import Pair, TrainingBattles
from routellm.routers.instruction import AFTER, BEFORE
from routellm.routers.outcomes import OUTCOMES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HARD = ("prove", "integral", "theorem", "compile")
EASY = ("hello", "weather", "rhyme", "recipe")
FILLER = ("apple", "river", "tiger", "window", "garden", "pencil", "music", "winter", "a", "the")


def save_tiny_lm(folder: Path, *, seed: int = 0, tied: bool = False, gpt2: bool = False) -> Path:
    """Write an untrained Llama (2 layers, width 64) and a word tokenizer as the hub has them.

    A GPT-2 in its stead has learnt positions where a Llama has relative ones.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    text = " ".join([BEFORE, AFTER, *OUTCOMES, *HARD, *EASY, *FILLER])
    words = ["<unk>", "<s>", "</s>", *dict.fromkeys(re.findall(r"\w+|[^\w\s]+", text))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    shape = {"vocab_size": len(words), "tie_word_embeddings": tied, "initializer_range": 0.1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if gpt2:
            config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **shape)
            model = GPT2LMHeadModel(config)
        else:
            config = LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                **shape,
            )
            model = LlamaForCausalLM(config)
        model.save_pretrained(folder)
    return folder


def rule_prompts(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Return prompts, and whether each needs the strong model (it has one of the hard words)."""
    rng = np.random.default_rng(seed)
    hard = rng.random(n) < 0.5
    prompts = []
    for i in range(n):
        words = [*rng.choice(FILLER, 5), rng.choice(HARD if hard[i] else EASY)]
        prompts.append(" ".join(rng.permutation(words)))
    return prompts, hard


def rule_battles(n: int = 400, seed: int = 1) -> TrainingBattles:
    """Return battles without noise: strong wins on hard prompts, and ties or loses on easy ones."""
    prompts, hard = rule_prompts(n, seed)
    rng = np.random.default_rng(seed + 1)
    preference = np.where(hard, 1.0, rng.choice([0.0, 0.5], n))
    swapped = rng.random(n) < 0.5
    return TrainingBattles(
        prompts=tuple(prompts),
        embeddings=np.empty((n, 0), np.float32),
        prompt=np.arange(n),
        models=("strong", "weak"),
        model_a=np.where(swapped, 1, 0),
        model_b=np.where(swapped, 0, 1),
        preference_a=np.where(swapped, 1 - preference, preference),
        weight=np.ones(n),
        label_kind=np.full(n, "human"),
        validation=np.arange(n) % 8 == 0,
        pair=Pair("strong", "weak"),
    )


@contextlib.contextmanager
def model_hub(
    repo: str, folder: Path | None = None, *, refuses: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder's files as a model repository; yields (endpoint, list of paths asked for).

    `refuses` is the hub's error code for this repository, e.g. ``GatedRepo``.
    """
    asked: list[str] = []
    files = {p.name: p.read_bytes() for p in folder.iterdir()} if folder else {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0]
            wanted = re.fullmatch(rf"/{repo}/resolve/([^/]+)/(.+)", path)
            if repo not in path:
                return self.refuse("RepoNotFound")
            if refuses:
                return self.refuse(refuses)
            if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
                siblings = [{"rfilename": name} for name in files]
                return self.json({"id": repo, "sha": COMMIT, "siblings": siblings})
            if path == f"/api/models/{repo}/tree/{COMMIT}":
                return self.json(
                    [
                        {"type": "file", "path": n, "size": len(b), "oid": COMMIT}
                        for n, b in files.items()
                    ]
                )
            if wanted and wanted[1] not in ("main", COMMIT):
                return self.refuse("RevisionNotFound")
            if wanted and wanted[2] in files:
                body = files[wanted[2]]
                etag = hashlib.sha256(body).hexdigest()
                return self.answer(body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            return self.refuse("EntryNotFound")

        def refuse(self, code: str) -> None:
            self.send_response(401 if code == "GatedRepo" else 404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def json(self, doc: object) -> None:
            self.answer(json.dumps(doc).encode(), {"Content-Type": "application/json"})

        def answer(self, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
