"""``bin/export``: a saved model as the files that bilm-tf writes, which AllenNLP and pytorch-fast-elmo read too.

``options.json``
    sizes and switches, under bilm-tf's names. Without ``char_cnn`` it is a model of word vectors.
``weights.hdf5``
    float32, for products x @ W. ``embedding`` (V, D), row i for line i of the vocabulary. For each direction d (0
    forward, 1 backward) and layer l, below ``RNN_{d}/RNN/MultiRNNCell/Cell{l}/LSTMCell``: ``W_0`` (2D, 4C), rows of the
    input, then of the recurrent state, columns of the gates i, g, f, o; ``B`` (4C,), the forget gate's part 1 lower,
    since readers add 1; ``W_P_0`` (C, D). ``softmax/W`` (V, D) and ``softmax/b`` (V,): what predicts words; of a model
    with ``--context mix`` also ``mix/scalars`` (L + 1,) and ``mix/gamma`` (1,), for perplexity.
``vocab.txt``
    V lines, ``<S>``, ``</S>`` and ``<UNK>`` first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapse_elmo.checkpoint import SavedModel
from lapse_elmo.config.using import parse_export
from lapse_elmo.corpus.files import made_whole, refuse_existing, sync_directory, write_whole
from lapse_elmo.corpus.hdf5 import Hdf5Output
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import OutputError
from lapse_elmo.model.bilm import BiLM
from lapse_elmo.parameters import Parameters
from lapse_elmo.world import World

OPTIONS, WEIGHTS, VOCABULARY = "options.json", "weights.hdf5", "vocab.txt"


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Parse, read the model, write the files."""
    options = parse_export(argv)
    world = enter()
    folder = Path(options.output)
    world.agree(lambda: refuse_foreign(folder, options.overwrite))
    saved = SavedModel.open(options.model, options.vocab, world)
    parameters = saved.parameters(world, torch.device("cpu"))
    world.agree(lambda: write_export(saved, parameters, folder, options.overwrite))
    parameters.server.close()
    if world.rank == 0:
        print(f"{folder}: {OPTIONS}, {WEIGHTS}, {VOCABULARY} ({saved.vocabulary.size:,} words) of {saved.path}")
        if not saved.config.data.boundaries:
            print("it was trained without <S> and </S>, which readers put around each sentence: take them away there")


def refuse_foreign(folder: Path, overwrite: bool) -> None:
    """:raises OutputError: if ``folder`` is there and may not be replaced, or holds what is no export."""
    refuse_existing(folder, overwrite)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: give the name of a folder as --output")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(names - {OPTIONS, WEIGHTS, VOCABULARY})
    if others:
        raise OutputError(f"{folder} holds other files ({others[0]}), which would be lost: give another --output")


def write_export(saved: SavedModel, parameters: Parameters, folder: Path, overwrite: bool) -> None:
    """The folder of a model, whole or not at all; ``parameters`` are in evaluation mode.

    :raises OutputError: if it cannot be written.
    """
    with made_whole(folder, overwrite) as hidden:
        hidden.mkdir()
        with Hdf5Output(hidden / WEIGHTS) as file:
            for name, array in dense_arrays(parameters.model):
                file.write(name, array)
            size = saved.config.model.projection_size
            rows = ((first, weights.numpy()) for first, weights in parameters.embedding.chunks())
            file.write_rows("embedding", (parameters.num_classes, size), rows)
            bias = np.empty(parameters.num_classes, np.float32)

            def softmax() -> Iterator[tuple[int, np.ndarray]]:
                for first, weights in parameters.softmax.chunks():
                    bias[first : first + len(weights)] = weights[:, size]
                    yield first, weights[:, :size].numpy()

            file.write_rows("softmax/W", (parameters.num_classes, size), softmax())
            file.write("softmax/b", bias)
        write_whole(hidden / OPTIONS, json.dumps(bilm_options(saved), indent=1).encode() + b"\n")
        Vocabulary.from_words(saved.vocabulary.words).save(hidden / VOCABULARY)
        sync_directory(hidden)


def bilm_options(saved: SavedModel) -> dict[str, Any]:
    """What bilm-tf keeps beside the weights."""
    config, model = saved.config, saved.config.model
    return {
        "bidirectional": True,
        "lstm": {
            "dim": model.cell_size, "projection_dim": model.projection_size, "n_layers": model.num_layers,
            "cell_clip": model.cell_clip, "proj_clip": model.projection_clip, "use_skip_connections": True,
        },
        "n_tokens_vocab": saved.vocabulary.size, "dropout": model.dropout,
        "all_clip_norm_val": config.optimizer.clip_norm, "batch_size": config.training.batch_size,
        "unroll_steps": config.data.max_length + 2 * config.data.boundaries,
        "n_negative_samples_batch": config.softmax.num_samples,
        "n_epochs": math.ceil(config.training.epochs), "n_train_tokens": saved.manifest.get("num_train_tokens", 0),
    }


def dense_arrays(model: BiLM) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of everything but the tables."""
    for direction, name in enumerate(("forward", "backward")):
        for layer in range(model.options.num_layers):
            cell = model.lstm.get_submodule(f"{name}_layer_{layer}")
            weights = {key: value.detach().cpu().numpy() for key, value in cell.named_parameters()}
            both = np.concatenate([weights["input_linearity.weight"], weights["state_linearity.weight"]], 1)
            bias = weights["state_linearity.bias"].copy()
            size = len(bias) // 4
            bias[size : 2 * size] -= 1
            group = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            yield f"{group}/W_0", np.ascontiguousarray(_reordered(both).T)
            yield f"{group}/B", _reordered(bias)
            yield f"{group}/W_P_0", np.ascontiguousarray(weights["state_projection.weight"].T)
    if model.mix is not None:
        yield "mix/scalars", model.mix.scalars.detach().cpu().numpy()
        yield "mix/gamma", model.mix.gamma.detach().cpu().numpy()


def _reordered(gates: np.ndarray) -> np.ndarray:
    """Blocks of the gates i, f, g, o along the first axis as i, g, f, o."""
    i, f, g, o = np.split(gates, 4)
    return np.concatenate([i, g, f, o])
