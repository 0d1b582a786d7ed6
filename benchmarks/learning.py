"""Held-out perplexity after a number of ids: ``python -m benchmarks.learning TRAIN_TEXT HELDOUT_TEXT [-- OPTION ...]``.

Builds vocabulary (threshold 3) and shards of the text and trains the ``small`` sizes with the defaults of
``bin/train``, or with the options given after ``--``, on all cores (or RANKS of the environment), until ``IDS`` ids,
boundary ids counted, were trained.
benchmarks/learning.md holds the figures and those of the peers on the same text.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IDS = 1_490_000  # what bilm-tf was given for the anchor


def run(*command: str) -> None:
    """One program of this repository, which prints as it goes."""
    subprocess.run(command, cwd=ROOT, check=True)


def main(argv: list[str]) -> None:
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
        size = options[options.index("--batch-size") + 1] if "--batch-size" in options else "32"
        steps = math.ceil(IDS / (ids_of_epoch(shards) / steps_of_epoch(shards, ranks, int(size))))
        run(
            *(f"{sys.prefix}/bin/mpirun", "-n", str(ranks), "bin/train", "--shards", shards, "--vocab", vocab),
            *("--run-dir", run_dir, "--epochs", "1000", "--max-steps", str(steps), *options),
        )
        for line in Path(run_dir, "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "epoch":
                print(f"{record['epoch']:3}  {record['heldout/mean_perplexity']:.1f}")


def ids_of_epoch(shards: str) -> int:
    """Tokens and boundary ids of an epoch."""
    from lapse_elmo.corpus.shards import ShardSet

    with ShardSet.open(shards, "train") as train:
        return train.num_tokens + 2 * train.num_sentences


def steps_of_epoch(shards: str, ranks: int, batch_size: int) -> int:
    """Steps that every rank takes in an epoch."""
    from lapse_elmo.corpus.shards import ShardSet

    with ShardSet.open(shards, "train") as train:
        return math.ceil(math.ceil(train.num_sentences / ranks) / batch_size)


if __name__ == "__main__":
    main(sys.argv[1:])
