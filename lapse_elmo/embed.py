"""``bin/embed``: contextual vectors of text, in the formats that other programs read.

Words (the default): an HDF5 file like bilm-tf's and AllenNLP's, with one float32 dataset per line of text, named by the
number of the line, counted from 0 over all texts. Its shape is (L + 1, T, 2D) for T words, with the word vectors
first and forward halves before backward halves, or (T, 2D) with ``--layers top`` or ``--layers average``. A line
without words has a dataset with T = 0. The vectors of sentence boundaries are left out, as in bilm-tf. With
``--sentence-to-index`` the file also has ``sentence_to_index`` (1,), a JSON string that maps each line to the name of
its dataset.

Sentences (``--pool mean``): an HDF5 file with one dataset ``means`` of shape (N, 2D) or (N, L + 1, 2D); row i belongs
to line i.

Target words (``--words FILE``): a NumPy archive (.npz) with an array of shape (n, 2D) or (n, L + 1, 2D) for each word
in FILE, which has the vectors of its n occurrences in the order of the text.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lapse_elmo.config.trained_model import EmbedConfig, parse_embed
from lapse_elmo.corpus.files import atomic_output, refuse_existing, write_failed
from lapse_elmo.corpus.hdf5 import Hdf5Output
from lapse_elmo.corpus.text import find_texts
from lapse_elmo.devices import choose_device
from lapse_elmo.mpi.world import World
from lapse_elmo.rounds import run_rounds
from lapse_elmo.trained import TrainedModel
from lapse_elmo.trained.opening import open_together
from lapse_elmo.trained.sentences import mean_of_words
from lapse_elmo.trained.targets import TargetVectors, read_targets

INDEX, MEANS = "sentence_to_index", "means"

Write = Callable[[int, "list[str]", np.ndarray], None]


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Parse, open the model, embed the lines of the texts, and write the vectors."""
    options = parse_embed(argv)
    world = enter()
    world.agree(lambda: refuse_existing(options.output, options.overwrite))
    texts = world.agree(lambda: find_texts(options.texts))
    targets = world.agree(lambda: read_targets(Path(options.words))) if options.words else []
    stored = open_together(options.model, options.vocab, world)
    model = TrainedModel(stored, choose_device(options.devices, world).device, options.precision)
    start = time.perf_counter()
    wanted = frozenset(targets)

    def compute(window: list[list[str]]) -> list[np.ndarray]:
        found = model.embed_window(window, options.layers, options.batch_size)
        if options.pool == "mean":
            return [mean_of_words(vectors) for vectors in found]
        if not targets:
            return found
        places = ([place for place, word in enumerate(words) if word in wanted] for words in window)
        return [vectors[..., some, :] for vectors, some in zip(found, places, strict=True)]

    with contextlib.ExitStack() as stack:
        writer = world.together(lambda: _unused if world.rank else _writer(options, targets, model, stack))
        num_lines, num_words = run_rounds(texts, options.batch_size, world, compute, writer)
        world.agree(stack.close)
    if world.rank == 0:
        speed = num_words / (time.perf_counter() - start)
        print(f"{options.output}: {num_lines:,} lines, {num_words:,} words; {speed:,.0f} words/s")
        unknown = sum(word not in model.vocabulary for word in targets)
        if unknown:
            print(f"{unknown:,} of {len(targets):,} target words are not in the vocabulary: their vectors are <UNK>'s")


def _writer(options: EmbedConfig, targets: list[str], model: TrainedModel, stack: contextlib.ExitStack) -> Write:
    """Return a function that writes the result of one line; closing ``stack`` completes the file."""
    hidden = stack.enter_context(atomic_output(options.output, options.overwrite))
    try:
        if targets:
            shape = (model.num_layers + 1, model.dimension) if options.layers == "all" else (model.dimension,)
            archive = stack.enter_context(TargetVectors(hidden, targets, shape))
            return lambda number, words, vectors: _guarded(options, lambda: archive.add(words, vectors))
        output = stack.enter_context(Hdf5Output(hidden))
    except OSError as error:
        raise write_failed(options.output, error) from None
    if options.pool == "mean":
        return lambda number, words, mean: _guarded(options, lambda: output.append(MEANS, mean))
    index: dict[str, str] = {}
    if options.sentence_to_index:
        stack.callback(lambda: output.write_text(INDEX, json.dumps(index, ensure_ascii=False)))

    def write(number: int, words: list[str], vectors: np.ndarray) -> None:
        _guarded(options, lambda: output.write(str(number), vectors))
        if options.sentence_to_index:
            index[" ".join(words)] = str(number)

    return write


def _guarded(options: EmbedConfig, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise write_failed(options.output, error) from None


def _unused(number: int, words: list[str], vectors: np.ndarray) -> None:
    raise AssertionError("rank 0 alone writes")
