"""Read, write and verify a corpus: text files, vocabularies and HDF5 shards."""
