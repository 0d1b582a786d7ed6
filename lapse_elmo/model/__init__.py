"""The language model in plain torch: LSTM, biLM, softmax and optimizers. It knows no server, no MPI and no files.

Shape letters, as everywhere: B sentences, T positions, D projection and embedding size, C cell size, L layers,
V vocabulary size, N targets, U distinct words, S samples.
"""
