"""``lapse_elmo.load``: open a trained model."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lapse_elmo.trained.model import TrainedModel
from lapse_elmo.trained.opening import open_stored


def load(
    path: str | os.PathLike[str], *, vocab: str | os.PathLike[str] = "", embedding: str | os.PathLike[str] = "",
    device: str | torch.device = "cpu", precision: str = "fp32", verify: bool = False,
) -> TrainedModel:
    """Open a trained model, without MPI, server or compiler; its tables are memory-mapped.

    Args:
        path: A run (opens its newest checkpoint; ``RUN/best`` is its best one), a checkpoint, a directory
            that ``bin/export`` wrote in the format ``elmo`` or ``huggingface``, or a model of word vectors by bilm-tf.
        vocab: The vocabulary file, if it is not in the model's directory.
        embedding: For bilm-tf, the HDF5 file of ``dump_token_embeddings``, if it is not in the model's directory.
        device: The torch device on which the LSTM and the softmax compute.
        precision: ``bf16`` multiplies in bfloat16 within the LSTM, which is faster on processors and GPUs that can, and
            changes vectors by 0.1 to 1 %; states and sums stay float32.
        verify: Whether to verify a checkpoint's checksums first, which reads all of it.

    Raises:
        CheckpointError: If there is no model, a file is missing or damaged, shapes or vocabulary do not match, or it
            is a character-CNN model.
        CorpusError: If the vocabulary file is malformed.
        ValueError: If ``precision`` is unknown.

    >>> model = load(MODEL)
    >>> model.embed(["w01 w02 w00"], layers="average")[0].shape
    (3, 32)
    """
    return TrainedModel(open_stored(Path(path), vocab=vocab, embedding=embedding, verify=verify), device, precision)
