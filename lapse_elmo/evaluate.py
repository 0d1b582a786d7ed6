"""``bin/evaluate``: the perplexity of a saved model on any shards."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable

from lapse_elmo.checkpoint import SavedModel
from lapse_elmo.config.trained_model import parse_evaluate
from lapse_elmo.corpus.files import atomic_write, refuse_existing
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.devices import choose_device
from lapse_elmo.errors import CheckpointError, CorpusError
from lapse_elmo.mpi.world import World
from lapse_elmo.perplexity import measure_perplexity


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Parse, open the model and the shards, measure and report perplexity."""
    options = parse_evaluate(argv)
    world = enter()
    if options.output:
        world.agree(lambda: refuse_existing(options.output, options.overwrite))
    saved = SavedModel.open(options.model, options.vocab, world)
    data = saved.config.data
    device = choose_device(options.devices, world).device
    folder = options.shards or (data.heldout if options.split == "heldout" else "") or data.shards
    if not options.shards:
        world.agree(lambda: _require_shards_of_run(folder, saved))
    with ShardSet.open_on_all(world, folder, options.split, saved.vocabulary) as shards:
        parameters = saved.parameters(world, device)
        start = time.perf_counter()
        result = measure_perplexity(parameters, shards, data, options.batch_size, world, device)
        assert result is not None  # nothing asks it to stop
        seconds = time.perf_counter() - start
        parameters.server.close()
    if not math.isfinite(result.forward_nll + result.backward_nll):
        raise CheckpointError(f"{saved.path} cannot predict words: some of its numbers are not finite").on_every_rank()
    if options.output:
        values = {
            "model": str(saved.path), "shards": folder, "split": options.split, "num_sentences": shards.num_sentences,
            "num_targets": result.num_targets, "num_cut_sentences": result.num_cut,
            "forward_perplexity": result.forward, "backward_perplexity": result.backward,
            "mean_perplexity": result.mean,
        }
        text = json.dumps(values, indent=1).encode() + b"\n"
        world.agree(lambda: atomic_write(options.output, text, options.overwrite))
    if world.rank == 0:
        cut = f"cut          {result.num_cut:,} sentences at --max-length {data.max_length}, as in training\n"
        print(
            f"model        {saved.path}\nshards       {folder} ({options.split}, {shards.num_sentences:,} sentences, "
            f"{result.num_targets:,} targets per direction)\n{cut if result.num_cut else ''}"
            f"forward      {result.forward:.2f}\nbackward     {result.backward:.2f}\nmean         {result.mean:.2f}\n"
            f"speed        {shards.num_tokens / seconds:,.0f} tokens/s"
        )


def _require_shards_of_run(folder: str, saved: SavedModel) -> None:
    """Check that the shards that a run was trained with are where it found them.

    Raises:
        CorpusError: If not. The run may have named them relative to another directory.
    """
    if not os.path.isdir(folder):
        raise CorpusError(
            f"{saved.path} was trained with the shards {folder}, which are not in {os.getcwd()}: give --shards DIR, or "
            "start the program where the run was started"
        )
