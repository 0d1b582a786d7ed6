"""Export a model as a Hugging Face directory for transformers and sentence-transformers.

Both load it with ``trust_remote_code=True``. The folder holds ``config.json``, ``modeling_lapse_elmo.py`` (plain torch,
independent of lapse-elmo), ``model.safetensors``, ``tokenizer.json`` and ``tokenizer_config.json`` (a word-level fast
tokenizer that splits at white space), the model card ``README.md``, and two files of sentence-transformers.
``AutoModel`` returns contextual vectors; ``AutoModelForCausalLM`` is the forward language model. lapse-elmo itself
reads the words from ``vocab.txt``, which is faster than ``tokenizer.json``; the table ``lapse_elmo`` of ``config.json``
has the format's version and the checksum of ``vocab.txt``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lapse_elmo import __version__
from lapse_elmo.corpus.files import atomic_output, atomic_write, flush_file, flush_path
from lapse_elmo.corpus.vocabulary import PADDING_TOKEN, SPECIAL, Vocabulary
from lapse_elmo.errors import CheckpointError
from lapse_elmo.export.folder import encode_json, refuse_foreign
from lapse_elmo.trained.huggingface_files import CONFIG, MODEL_TYPE, OWN_VERSION, TOKENIZER, VOCABULARY, WEIGHTS
from lapse_elmo.trained.stored import OWN, StoredModel, Table

MODELING = "modeling_lapse_elmo.py"
CARD, TOKENIZER_CONFIG = "README.md", "tokenizer_config.json"
MODULES, POOLING = "modules.json", "1_Pooling"  # for sentence-transformers: the mean of the words' vectors
_SENTENCE_TRANSFORMERS = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": POOLING, "type": "sentence_transformers.models.Pooling"},
]
_PADDING_BIAS = -1e4  # softmax bias of the padding class, whose probability is then 0 in float32

#: A tensor to write: its name, its shape, and its content in consecutive blocks of rows.
TensorBlocks = tuple[str, tuple[int, ...], Iterator[np.ndarray]]


def refuse(folder: Path, overwrite: bool) -> None:
    """Refuse an output directory that must not be replaced.

    Raises:
        OutputError: If it exists without ``overwrite``, or holds files that are not of an export.
    """
    names = {CONFIG, MODELING, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY, CARD, MODULES, POOLING}
    refuse_foreign(folder, overwrite, names)


def write(stored: StoredModel, folder: Path, overwrite: bool) -> list[str]:
    """Write the directory atomically.

    Returns:
        Lines to print for the user.

    Raises:
        OutputError: If the directory cannot be written.
        CheckpointError: If the model has no softmax.
    """
    softmax = stored.softmax
    if softmax is None:
        raise CheckpointError(f"{stored.path} came without a softmax, which this format requires: export from the run")
    padding = _free_name(PADDING_TOKEN, stored)
    vocabulary = Vocabulary.from_words(stored.vocabulary.words)
    with atomic_output(folder, overwrite) as temporary:
        temporary.mkdir()
        write_safetensors(temporary / WEIGHTS, list(_tensors(stored, softmax)))
        atomic_write(temporary / CONFIG, encode_json(config_of(stored, vocabulary.sha256)))
        vocabulary.save(temporary / VOCABULARY)
        atomic_write(temporary / TOKENIZER, encode_json(tokenizer_of(stored, padding)))
        atomic_write(temporary / TOKENIZER_CONFIG, encode_json(_tokenizer_config(padding)))
        atomic_write(temporary / MODELING, (Path(__file__).parent / MODELING).read_bytes())
        atomic_write(temporary / CARD, card_of(stored).encode())
        atomic_write(temporary / MODULES, json.dumps(_SENTENCE_TRANSFORMERS, indent=1).encode())
        pooling = {"word_embedding_dimension": 2 * stored.options.projection_size, "pooling_mode_mean_tokens": True}
        atomic_write(temporary / POOLING / "config.json", encode_json(pooling))
        flush_path(temporary)
    return [f"{folder}: a Hugging Face directory ({stored.vocabulary.size:,} words) of {stored.path}"]


def config_of(stored: StoredModel, vocabulary_sha256: str) -> dict[str, Any]:
    """Return the content of ``config.json``."""
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
        "num_train_tokens": stored.about.get("num_train_tokens"),
        OWN: {
            "version": OWN_VERSION, "vocabulary_sha256": vocabulary_sha256, "written_by": __version__,
            "step": stored.about.get("step"),
        },
    }


def tokenizer_of(stored: StoredModel, padding: str) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``, a tokenizer that splits at white space and has the model's ids."""
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
    """Return a name for a special token that is not a word of the vocabulary."""
    while name in stored.vocabulary:
        name = f"<{name}>"
    return name


def _tensors(stored: StoredModel, softmax: Table) -> Iterator[TensorBlocks]:
    """Yield all tensors; row 0 of the tables belongs to padding."""
    size, rows = stored.options.projection_size, stored.vocabulary.size + 1

    def embedding() -> Iterator[np.ndarray]:
        yield np.zeros((1, size), np.float32)
        yield from (chunk for _, chunk in stored.embedding.chunks())

    def weights() -> Iterator[np.ndarray]:
        yield np.zeros((1, size), np.float32)
        yield from (chunk[:, :size] for _, chunk in softmax.chunks())

    def bias() -> Iterator[np.ndarray]:
        yield np.full(1, _PADDING_BIAS, np.float32)
        yield from (chunk[:, size] for _, chunk in softmax.chunks())

    yield "embedding.weight", (rows, size), embedding()
    yield "softmax.weight", (rows, size), weights()
    yield "softmax.bias", (rows,), bias()
    for name, array in stored.dense.items():
        yield name, array.shape, iter([array])


def write_safetensors(path: Path, tensors: list[TensorBlocks]) -> None:
    """Write a safetensors file block by block; the safetensors library would need all tensors in memory.

    The format is the length of the header (8 bytes, little-endian), the header (JSON, padded with spaces to a multiple
    of 8 bytes) and the data.
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
        flush_file(file)


def card_of(stored: StoredModel) -> str:
    """Return the model card (``README.md``): a description of the model, its training data and its use."""
    sizes, about = stored.options, stored.about
    config, versions = about.get("config") or {}, about.get("versions") or {}
    results, unknown = about.get("results") or {}, "not recorded"
    tokens, trained = about.get("num_train_tokens"), about.get("num_trained_tokens")
    perplexity = f"{results['heldout_perplexity']:.1f} (full softmax)" if "heldout_perplexity" in results else unknown
    if "forward_perplexity" in results:  # older checkpoints have the mean alone
        perplexity += ", forward {forward_perplexity:.1f}, backward {backward_perplexity:.1f}".format(**results)
    facts = {
        "Sizes": f"D {sizes.projection_size}, C {sizes.cell_size}, L {sizes.num_layers} in each direction",
        "Vocabulary": f"{stored.vocabulary.size:,} words, including `<S>`, `</S>` and `<UNK>`",
        "Training data": f"shards `{config['data']['shards']}`" if config else unknown,
        "Tokens of the training data": f"{tokens:,}" if tokens else unknown,
        "Trained tokens": f"{trained:,} in {about['step']:,} steps" if trained and about.get("step") else unknown,
        "Held-out perplexity": perplexity,
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or unknown,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: transformers
tags: [elmo, lapse-elmo, word-embeddings, feature-extraction]
pipeline_tag: feature-extraction
---

# A sparse ELMo, trained by lapse-elmo

A bidirectional LSTM language model over words. Tokenise text in the same way as the training text; the tokenizer
only splits at white space, and words that are not in the vocabulary become `<UNK>`.

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

`AutoModelForCausalLM` is its forward direction. The models add `<S>` and `</S>` around each sentence. Each sentence
starts from zero state, so its vectors do not depend on earlier sentences. With sentence-transformers,
`SentenceTransformer(PATH, trust_remote_code=True)` returns the mean of the top layer's word vectors.
"""
