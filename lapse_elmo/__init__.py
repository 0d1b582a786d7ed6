"""Sparse ELMo: a bidirectional LSTM language model trained through a parameter server on MPI ranks."""

__version__ = "0.1.0"
