"""Text files, vocabularies and HDF5 shards: how a corpus is read, written and checked."""
