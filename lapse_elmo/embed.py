"""``bin/embed``: contextual vectors of text, in the layout of bilm-tf's and AllenNLP's embedding files.

The HDF5 file has one float32 dataset a line of text, named by the line's number from 0 on through all texts: (L + 1, T,
2D) for T words, the word vectors first, forward halves before backward ones; or (T, 2D), if only the top layer or the
average of all is wanted. A line without words has a dataset with T = 0. The vectors of the sentence boundaries that the
model has read are left out, as by bilm-tf.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lapse_elmo.batches import make_batch
from lapse_elmo.checkpoint import SavedModel
from lapse_elmo.config.using import EmbedConfig, parse_embed
from lapse_elmo.corpus.files import made_whole, refuse_existing, write_failed
from lapse_elmo.corpus.hdf5 import Hdf5Output
from lapse_elmo.corpus.text import cut_into_parts, find_texts, read_blocks
from lapse_elmo.devices import choose_device
from lapse_elmo.errors import CorpusError
from lapse_elmo.metrics.terminal import stderr_is_terminal
from lapse_elmo.parameters import Parameters
from lapse_elmo.world import World

LONGEST = 10_000  # words of a line: a longer one is no sentence, and its vectors would not fit a machine's memory


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Parse, read the model, embed the lines in rounds of a batch a rank."""
    options = parse_embed(argv)
    world = enter()
    world.agree(lambda: refuse_existing(options.output, options.overwrite))
    texts = world.agree(lambda: find_texts(options.texts))
    saved = SavedModel.open(options.model, options.vocab, world)
    device = choose_device(options.devices, world).device
    parameters = saved.parameters(world, device)
    start = time.perf_counter()
    num_lines, num_words = _embed(options, texts, saved, parameters, world)
    parameters.server.close()
    if world.rank == 0:
        speed = num_words / (time.perf_counter() - start)
        print(f"{options.output}: {num_lines:,} lines, {num_words:,} words; {speed:,.0f} words/s")


def _embed(
    options: EmbedConfig, texts: Sequence[str], saved: SavedModel, parameters: Parameters, world: World
) -> tuple[int, int]:
    """Collective: write the file; the numbers of lines and words in it. All ranks read the text, rank 0 writes."""
    lines = read_lines(texts)
    num_lines = num_words = 0
    silent = world.rank != 0 or not stderr_is_terminal()
    with contextlib.ExitStack() as stack, tqdm(unit=" lines", disable=silent, leave=False) as progress:

        def begin() -> Hdf5Output | None:
            if world.rank:
                return None
            hidden = stack.enter_context(made_whole(options.output, options.overwrite))
            return stack.enter_context(Hdf5Output(hidden))

        output = world.together(begin)
        while taken := world.together(lambda: list(itertools.islice(lines, options.batch_size * world.size))):
            vectors = embed_lines(taken[world.rank :: world.size], saved, parameters, options.layers)
            gathered = world.gather(vectors)

            def write(first: int = num_lines, gathered: list[list[np.ndarray]] = gathered) -> None:
                assert output is not None
                try:
                    for rank, some in enumerate(gathered):
                        for place, array in enumerate(some):
                            output.write(str(first + place * world.size + rank), array)
                except OSError as error:
                    raise write_failed(options.output, error) from None

            world.agree(write)
            num_lines += len(taken)
            num_words += sum(map(len, taken))
            progress.update(len(taken))
        world.agree(stack.close)
    return num_lines, num_words


def read_lines(texts: Sequence[str]) -> Iterator[list[str]]:
    """The words of each line of the texts.

    :raises CorpusError: for a line of more than ``LONGEST`` words, and for whatever is no text.
    """
    number = 0
    for part in cut_into_parts(texts):
        for block in read_blocks(part):
            for line in block.text.removesuffix("\n").split("\n"):
                words = line.split()
                if len(words) > LONGEST:
                    raise CorpusError(
                        f"{part.path} has a line of {len(words):,} words (number {number} of all, from 0): cut it into "
                        f"sentences, of at most {LONGEST:,} words"
                    )
                yield words
                number += 1


@torch.no_grad()
def embed_lines(
    lines: Sequence[Sequence[str]], saved: SavedModel, parameters: Parameters, layers: str
) -> list[np.ndarray]:
    """The vectors of each line, (L + 1, T, 2D) or (T, 2D)."""
    if not lines:
        return []
    model, boundaries = parameters.model, saved.config.data.boundaries
    sizes = [len(words) for words in lines]
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    tokens = np.array(saved.vocabulary.encode(word for words in lines for word in words), np.int64)
    batch = make_batch(tokens, offsets, np.arange(len(lines)), max(sizes, default=0), boundaries)
    device = next(model.parameters()).device
    embedding = parameters.embedding.pull(batch.input_rows).weights.to(device)
    embedded = nn.functional.embedding(torch.from_numpy(batch.input_index).to(device), embedding)
    vectors = model.layers(embedded, torch.from_numpy(batch.mask)).cpu()
    if layers == "top":
        vectors = vectors[-1:]
    elif layers == "average":
        vectors = vectors.mean(0, keepdim=True)
    first = 1 if boundaries else 0
    found = [vectors[:, row, first : first + size].numpy() for row, size in enumerate(sizes)]
    return found if layers == "all" else [array[0] for array in found]
