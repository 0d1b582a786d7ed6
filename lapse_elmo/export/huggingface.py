"""A Hugging Face folder, which a current transformers and sentence-transformers load with ``trust_remote_code=True``.

``config.json``, ``modeling_lapse_elmo.py`` (plain torch, nothing of lapse-elmo), ``model.safetensors``,
``tokenizer.json`` (a word-level fast tokenizer that splits at white space) with ``tokenizer_config.json``, and
``README.md``, the model card.
``AutoModel`` gives contextual vectors, ``AutoModelForCausalLM`` the forward language model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lapse_elmo import __version__
from lapse_elmo.corpus.files import atomic_output, atomic_write, sync_directory
from lapse_elmo.corpus.vocabulary import PADDING_TOKEN, SPECIAL
from lapse_elmo.export.folder import refuse_foreign, softmax_of
from lapse_elmo.trained.huggingface_files import CONFIG, MODEL_TYPE, TOKENIZER, WEIGHTS
from lapse_elmo.trained.stored import StoredModel, Table

MODELING = "modeling_lapse_elmo.py"
CARD, TOKENIZER_CONFIG = "README.md", "tokenizer_config.json"
MODULES, POOLING = "modules.json", "1_Pooling"  # of sentence-transformers: the mean of the words' vectors
_SENTENCE_TRANSFORMERS = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": POOLING, "type": "sentence_transformers.models.Pooling"},
]
_NEVER = -1e4  # the bias of the padding's class: its probability is 0 in float32

Tensor = tuple[str, tuple[int, ...], Iterator[np.ndarray]]


def refuse(folder: Path, overwrite: bool) -> None:
    """Raise OutputError if ``folder`` may not be replaced."""
    refuse_foreign(folder, overwrite, {CONFIG, MODELING, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, CARD, MODULES, POOLING})


def write(stored: StoredModel, folder: Path, overwrite: bool) -> list[str]:
    """Write the folder, whole or not at all, and return lines to print.

    Raises:
        OutputError: If it cannot be written.
    """
    softmax = softmax_of(stored)
    padding = _free_name(PADDING_TOKEN, stored)
    with atomic_output(folder, overwrite) as hidden:
        hidden.mkdir()
        write_safetensors(hidden / WEIGHTS, list(_tensors(stored, softmax)))
        atomic_write(hidden / CONFIG, _json(config_of(stored)))
        atomic_write(hidden / TOKENIZER, _json(tokenizer_of(stored, padding)))
        atomic_write(hidden / TOKENIZER_CONFIG, _json(_tokenizer_config(padding)))
        atomic_write(hidden / MODELING, (Path(__file__).parent / MODELING).read_bytes())
        atomic_write(hidden / CARD, card_of(stored).encode())
        atomic_write(hidden / MODULES, json.dumps(_SENTENCE_TRANSFORMERS, indent=1).encode())
        pooling = {"word_embedding_dimension": 2 * stored.options.projection_size, "pooling_mode_mean_tokens": True}
        atomic_write(hidden / POOLING / "config.json", _json(pooling))
        sync_directory(hidden)
    return [f"{folder}: a Hugging Face folder ({stored.vocabulary.size:,} words) of {stored.path}"]


def config_of(stored: StoredModel) -> dict[str, Any]:
    """``config.json``."""
    sizes = stored.options
    return {
        "model_type": MODEL_TYPE, "architectures": ["LapseElmoForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_lapse_elmo.LapseElmoConfig", "AutoModel": "modeling_lapse_elmo.LapseElmoModel",
            "AutoModelForCausalLM": "modeling_lapse_elmo.LapseElmoForCausalLM",
        },
        "vocab_size": stored.vocabulary.size + 1, "projection_size": sizes.projection_size,
        "cell_size": sizes.cell_size, "num_layers": sizes.num_layers, "cell_clip": sizes.cell_clip,
        "projection_clip": sizes.projection_clip, "context": sizes.context, "boundaries": stored.boundaries,
        "hidden_size": 2 * sizes.projection_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "torch_dtype": "float32",
        "num_train_tokens": stored.about.get("num_train_tokens"), "lapse_elmo_version": __version__,
    }


def tokenizer_of(stored: StoredModel, padding: str) -> dict[str, Any]:
    """``tokenizer.json``: white space separates words, an unknown word is ``<UNK>``; ids are the model's."""
    special = [padding, *SPECIAL]
    words = [*special, *stored.vocabulary.words]
    added = [
        {"id": number, "content": token, "single_word": True, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for number, token in enumerate(special)
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(words)}, "unk_token": SPECIAL[2]},
    }


def _tokenizer_config(padding: str) -> dict[str, Any]:
    begin, end, unknown = SPECIAL
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": padding, "bos_token": begin, "eos_token": end,
        "unk_token": unknown, "clean_up_tokenization_spaces": False, "model_max_length": 10000,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _free_name(name: str, stored: StoredModel) -> str:
    while name in stored.vocabulary:
        name = f"<{name}>"
    return name


def _tensors(stored: StoredModel, softmax: Table) -> Iterator[Tensor]:
    """(name, shape, blocks of rows) of every tensor; row 0 of the tables is padding's."""
    size, rows = stored.options.projection_size, stored.vocabulary.size + 1

    def embedding() -> Iterator[np.ndarray]:
        yield np.zeros((1, size), np.float32)
        yield from (chunk for _, chunk in stored.embedding.chunks())

    def weights() -> Iterator[np.ndarray]:
        yield np.zeros((1, size), np.float32)
        yield from (chunk[:, :size] for _, chunk in softmax.chunks())

    def bias() -> Iterator[np.ndarray]:
        yield np.full(1, _NEVER, np.float32)
        yield from (chunk[:, size] for _, chunk in softmax.chunks())

    yield "embedding.weight", (rows, size), embedding()
    yield "softmax.weight", (rows, size), weights()
    yield "softmax.bias", (rows,), bias()
    for name, array in stored.dense.items():
        yield name, array.shape, iter([array])


def write_safetensors(path: Path, tensors: list[Tensor]) -> None:
    """Write a safetensors file, block by block: the library would hold all tensors in memory.

    The format: the header's length in 8 bytes, the header (JSON, padded to 8 bytes with blanks), the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, _ in tensors:
        end = start + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, blocks in tensors:
            for block in blocks:
                file.write(np.ascontiguousarray(block, "<f4").data.cast("B"))
        file.flush()
        os.fsync(file.fileno())


def card_of(stored: StoredModel) -> str:
    """``README.md``: what the model is, from what, and how to use it."""
    sizes, about = stored.options, stored.about
    config, versions = about.get("config") or {}, about.get("versions") or {}
    perplexity = (about.get("results") or {}).get("heldout_perplexity")
    tokens, unknown = about.get("num_train_tokens"), "not recorded"
    facts = {
        "Sizes": f"D {sizes.projection_size}, C {sizes.cell_size}, L {sizes.num_layers} in each direction",
        "Vocabulary": f"{stored.vocabulary.size:,} words, `<S>`, `</S>` and `<UNK>` among them",
        "Training data": f"shards `{config['data']['shards']}`" if config else unknown,
        "Training tokens": f"{tokens:,} per epoch" if tokens else unknown,
        "Step": f"{about['step']:,}" if about.get("step") else unknown,
        "Held-out perplexity": f"{perplexity:.1f} (full softmax, both directions)" if perplexity else unknown,
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or unknown,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: transformers
tags: [elmo, lapse-elmo, word-embeddings, feature-extraction]
pipeline_tag: feature-extraction
---

# A sparse ELMo, trained by lapse-elmo

A bidirectional LSTM language model over words. Its text must be tokenised as its training text was; the tokenizer
splits at white space only, and a word that the vocabulary lacks is `<UNK>`.

| | |
|---|---|
{table}

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
model = AutoModel.from_pretrained(PATH, trust_remote_code=True).eval()
batch = tokenizer(["a sentence of words"], return_tensors="pt", padding=True)
with torch.no_grad():
    vectors = model(**batch).last_hidden_state     # (sentences, words, {2 * sizes.projection_size}), the top layer
    layers = model(**batch, output_hidden_states=True).hidden_states    # {sizes.num_layers + 1}, word vectors first
```

`AutoModelForCausalLM` is its forward direction. The models put `<S>` and `</S>` around a sentence by themselves. Each
sentence starts at zero state, so its vectors do not depend on what was embedded before. For sentence-transformers:
`SentenceTransformer(PATH, trust_remote_code=True)`, the mean of the top layer's word vectors.
"""


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"
