"""``inspect``: describe shards and verify their checksums."""

from __future__ import annotations

import os

import numpy as np

from lapse_elmo.config.preprocessing import InspectOptions
from lapse_elmo.corpus.shards import ShardFile, find_shards
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import CorpusError
from lapse_elmo.mpi.world import World

_BAR_WIDTH = 50
_BLOCK_OFFSETS = 1 << 18  # sentence offsets per read


def inspect_shards(options: InspectOptions, world: World) -> None:
    """Print a description of each shard, and verify it.

    Raises:
        CorpusError: A shard is damaged, or was made with another vocabulary than the one given.
    """
    vocabulary = Vocabulary.load(options.vocab) if options.vocab else None
    for path in find_shards(options.shards):
        shard = ShardFile(path)
        try:
            _check_vocabulary(shard, vocabulary)
            print("\n".join(_description(shard)))
            print("\n".join(_histogram(shard)))
            print("\n".join(_first_sentences(shard, options.sentences, vocabulary)))
            shard.verify()
            print("  verified     all checksums, offsets, ids and counts\n", flush=True)
        finally:
            shard.close()


def _check_vocabulary(shard: ShardFile, vocabulary: Vocabulary | None) -> None:
    if vocabulary is not None and vocabulary.sha256 != shard.header.vocabulary_sha256:
        raise CorpusError(
            f"shard {shard.path} was made with the vocabulary of SHA-256 {shard.header.vocabulary_sha256[:16]}..., "
            f"but the one given has {vocabulary.sha256[:16]}...; give --vocab the file that it was made with"
        )


def _description(shard: ShardFile) -> list[str]:
    header = shard.header
    sources = shard.sources()
    shown = ", ".join(sources[:3]) + (f", ... ({len(sources)} files)" if len(sources) > 3 else "")
    rate = header.num_unknown / max(header.num_tokens, 1)
    size = os.path.getsize(shard.path)
    return [
        shard.path,
        f"  shard        {header.shard_index} of {header.num_shards}, {header.split} text, {size:,} bytes",
        f"  sentences    {header.num_sentences:,}",
        f"  tokens       {header.num_tokens:,} ({header.num_tokens / max(header.num_sentences, 1):.1f} per sentence)",
        f"  unknown      {header.num_unknown:,} ({rate:.2%})",
        f"  vocabulary   {header.vocabulary_size:,} classes, SHA-256 {header.vocabulary_sha256}",
        f"  set          {header.set_sha256}",
        f"  sources      {shown}",
        f"  options      {header.options}",
    ]


def _histogram(shard: ShardFile) -> list[str]:
    """Return a histogram of sentence lengths as lines of text; each bin is twice as wide as the one before."""
    num_sentences = shard.header.num_sentences
    if not num_sentences:
        return ["  lengths      no sentences"]
    bins = np.zeros(64, np.int64)
    longest = 0
    for start in range(0, num_sentences, _BLOCK_OFFSETS):
        lengths = np.diff(shard.offsets(start, min(start + _BLOCK_OFFSETS, num_sentences) + 1))
        longest = max(longest, int(lengths.max()))
        bins += np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64), minlength=64)
    lines = [f"  lengths      longest {longest:,} tokens"]
    for power in range(int(np.flatnonzero(bins)[-1]) + 1):
        low = (1 << power - 1) + 1 if power else 1
        share = bins[power] / num_sentences
        bar = "#" * round(_BAR_WIDTH * bins[power] / bins.max())
        lines.append(f"  {low:>5,} to {1 << power:<6,} {share:6.1%} {bar}".rstrip())
    return lines


def _first_sentences(shard: ShardFile, count: int, vocabulary: Vocabulary | None) -> list[str]:
    count = min(count, shard.header.num_sentences)
    tokens, lengths = shard.read(np.arange(count))
    lines = []
    for number, ids in enumerate(np.split(tokens, np.cumsum(lengths)[:-1]) if count else []):
        words = vocabulary.decode(ids.tolist()) if vocabulary else map(str, ids.tolist())
        lines.append(f"  sentence {number}   {' '.join(words)}")
    return lines or ["  (no sentences shown)"]
