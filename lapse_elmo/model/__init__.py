"""The language model in plain torch: LSTM, biLM, softmax and optimizers, independent of the server, MPI and files.

Shape letters, used throughout: B sentences, T positions, D projection and embedding size, C cell size, L layers,
V vocabulary size, N targets, U distinct words, S samples.
"""
