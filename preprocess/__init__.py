"""The verbs of ``bin/preprocess``: from text to a vocabulary and shards."""
