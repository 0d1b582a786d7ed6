"""The commands of ``bin/preprocess``, which turn text into a vocabulary and shards."""
