"""Measure what a model learns: ``python -m benchmarks.learning TRAIN_TEXT HELDOUT_TEXT [-- OPTION ...]``.

Makes a vocabulary (threshold 3) and shards of the text, trains the ``small`` sizes with the defaults of ``bin/train``
or with the options after ``--``, and prints the held-out perplexity of each epoch. Training uses all cores, or the
number of ranks in the environment variable RANKS, and ends after ``IDS`` ids, boundaries included.
benchmarks/learning.md has the results, and those of the peers on the same text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lapse_elmo.corpus.shards import ShardSet

ROOT = Path(__file__).resolve().parent.parent
IDS = 1_490_000  # as many as bilm-tf was trained with for comparison


def run(*command: str) -> None:
    """Run a program of this repository; its output is shown."""
    subprocess.run(command, cwd=ROOT, check=True)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    cut = argv.index("--") if "--" in argv else len(argv)
    if cut != 2:
        sys.exit(__doc__)
    train, heldout = (str(Path(text).resolve()) for text in argv[:2])
    options = argv[cut + 1 :]
    ranks = int(os.environ.get("RANKS", len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory() as folder:
        vocab, shards, run_dir = (f"{folder}/{name}" for name in ("vocab.txt", "shards", "run"))
        run("bin/preprocess", "vocab", train, "--output", vocab)
        run("bin/preprocess", "shards", train, "--heldout", heldout, "--vocab", vocab, "--output", shards)
        with ShardSet.open(shards, "train") as train_set:
            ids_per_sentence = train_set.num_tokens / train_set.num_sentences + 2
            steps, _ = steps_until(IDS / ids_per_sentence, ranks, options, train_set)
        run(
            *(f"{sys.prefix}/bin/mpirun", "-n", str(ranks), "bin/train", "--shards", shards, "--vocab", vocab),
            *("--run-dir", run_dir, "--epochs", "1000", "--max-steps", str(steps), *options),
        )
        for line in Path(run_dir, "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "epoch":
                print(f"{record['epoch']:3}  {record['heldout/mean_perplexity']:.1f}")


def steps_until(sentences: float, num_ranks: int, options: Sequence[str], shards: ShardSet) -> tuple[int, int]:
    """Compute how long a run must be to train a number of sentences.

    Args:
        sentences: Sentences of all ranks together.
        num_ranks: The number of ranks.
        options: The options of bin/train.
        shards: The training shards.

    Returns:
        The number of steps, and the number of epochs that they reach into.
    """
    from lapse_elmo.config.training import parse_train
    from lapse_elmo.cursor import batch_streams
    from lapse_elmo.mpi.world import solo

    (stream, *_) = batch_streams(parse_train([*options, "--accumulate", str(num_ranks)]), solo(), shards)
    epoch, steps = 0, 0
    while stream.trained_before(epoch, stream.steps_of(epoch)) < sentences - 0.5:
        steps, epoch = steps + stream.steps_of(epoch), epoch + 1
    here = next(n for n in range(stream.steps_of(epoch) + 1) if stream.trained_before(epoch, n) >= sentences - 0.5)
    return steps + here, epoch + 1


if __name__ == "__main__":
    main(sys.argv[1:])
