"""The Python interface to a trained model: contextual vectors, scores, nearest words and predicted words."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lapse_elmo.batches import Batch
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import CheckpointError, CorpusError
from lapse_elmo.model.bilm import BiLM
from lapse_elmo.model.full_softmax import full_softmax_nll
from lapse_elmo.model.products import PRECISIONS
from lapse_elmo.trained.scores import Candidate, SentenceScore, sentence_score, top_indices
from lapse_elmo.trained.sentences import batches_of, by_position, mean_of_words, windows, words_of
from lapse_elmo.trained.stored import StoredModel, Table

if TYPE_CHECKING:
    from lapse_elmo.trained.module import ElmoModule

T = TypeVar("T")

LAYERS = ("all", "average", "top")
_NUM_SPECIAL = 3  # classes 0 to 2 are <S>, </S> and <UNK>


class TrainedModel:
    """A trained biLM, opened by ``lapse_elmo.load``. It computes in evaluation mode, so equal calls give equal results.

    Attributes:
        vocabulary: The :class:`~lapse_elmo.corpus.vocabulary.Vocabulary`. ``word in model.vocabulary`` tests whether a
            word is known; ``model.vocabulary.words`` lists all words, most frequent first.
        stored: The files behind the model, with ``stored.path``, ``stored.kind`` and ``stored.about``.
        device: Where the LSTM and the softmax compute.
        precision: Precision of the LSTM's matrix products, ``fp32`` or ``bf16``.
        dimension: 2D, the size of a contextual vector.
        num_layers: L.

    >>> model = load(MODEL)
    >>> model.dimension, model.num_layers
    (32, 2)
    >>> "w00" in model.vocabulary, "unheard-of" in model.vocabulary
    (True, False)
    """

    def __init__(self, stored: StoredModel, device: str | torch.device = "cpu", precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision should be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.stored, self.precision = stored, precision
        self.vocabulary: Vocabulary = stored.vocabulary
        self.device = torch.device(device)
        self.dimension = 2 * stored.options.projection_size
        self.num_layers = stored.options.num_layers
        self._norms: dict[str, np.ndarray] = {}

    @functools.cached_property
    def bilm(self) -> BiLM:
        """The biLM, a torch.nn.Module without the word table, read from disk at first use.

        >>> sum(parameter.numel() for parameter in load(MODEL).bilm.parameters()) < 20_000
        True
        """
        return self.stored.bilm(self.precision).to(self.device).requires_grad_(False)

    def __repr__(self) -> str:
        sizes = self.stored.options
        return (
            f"TrainedModel({str(self.stored.path)!r}, {self.vocabulary.size:,} words, D {sizes.projection_size}, "
            f"C {sizes.cell_size}, L {sizes.num_layers})"
        )

    def __reduce__(self) -> tuple[type[TrainedModel], tuple[StoredModel, torch.device, str]]:
        return TrainedModel, (self.stored, self.device, self.precision)

    def embed(
        self, sentences: Iterable[str | Sequence[str]], layers: str = "all", batch_size: int = 64
    ) -> list[np.ndarray]:
        """Return the contextual vectors of the words of each sentence.

        Each sentence starts from zero state, so its vectors depend neither on other sentences nor on earlier calls. A
        word that is not in the vocabulary gets the vectors of ``<UNK>`` in its context.

        Args:
            sentences: Strings, which are split at white space, or lists of words, tokenised like the training text.
            layers: ``all`` for (L + 1, T, 2D), of which layer 0 is the word's embedding concatenated with itself;
                ``average`` or ``top`` for (T, 2D).
            batch_size: Number of sentences per batch.

        Returns:
            One float32 array per sentence, in their order; an empty sentence has T = 0.

        Raises:
            TypeError: If ``sentences`` is a single string, or a sentence is not text.
            ValueError: If ``layers`` is unknown.
            CheckpointError: If a parameter of the biLM is missing or has another shape.

        >>> [array.shape for array in load(MODEL).embed(["w01 w02 w00", ["w05"], ""])]
        [(3, 3, 32), (3, 1, 32), (3, 0, 32)]
        """
        return list(self.iter_embed(sentences, layers, batch_size))

    def iter_embed(
        self, sentences: Iterable[str | Sequence[str]], layers: str = "all", batch_size: int = 64
    ) -> Iterator[np.ndarray]:
        """Yield the results of :meth:`embed` one by one; memory does not grow with the number of sentences.

        Args:
            sentences: As in :meth:`embed`; an open file, for instance. Read in windows while results are taken.
            layers: As in :meth:`embed`.
            batch_size: Number of sentences per batch.

        Raises:
            TypeError, ValueError, CheckpointError: As :meth:`embed`, once the result in question is taken.

        >>> sum(len(array) for array in load(MODEL).iter_embed(["w01 w02", "w00"] * 100, "top"))
        300
        """
        if layers not in LAYERS:
            raise ValueError(f"layers should be one of {', '.join(LAYERS)}, not {layers!r}")
        for window in windows(words_of(sentences), batch_size):
            yield from self.embed_window(window, layers, batch_size)

    def embed_window(self, window: Sequence[list[str]], layers: str, batch_size: int) -> list[np.ndarray]:
        """Return the vectors of a window of sentences (lists of words) as :meth:`embed` does.

        >>> load(MODEL).embed_window([["w01", "w02"], ["w00"]], "top", batch_size=64)[0].shape
        (2, 32)
        """
        found: list[np.ndarray] = [np.empty(0)] * len(window)
        first = 1 if self.stored.boundaries else 0
        for numbers, batch in batches_of(window, batch_size, self.vocabulary, self.stored.boundaries):
            vectors = self.layer_vectors(batch)
            if layers == "top":
                vectors = vectors[-1:]
            elif layers == "average":
                vectors = vectors.mean(0, keepdim=True)
            arrays = vectors.cpu().numpy()
            for row, number in enumerate(numbers):
                sentence = arrays[:, row, first : first + len(window[number])]
                # A copy, so that the result does not keep the whole padded batch alive.
                found[number] = (sentence if layers == "all" else sentence[0]).copy()
        return found

    def sentence_vectors(
        self, sentences: Iterable[str | Sequence[str]], layers: str = "average", batch_size: int = 64
    ) -> np.ndarray:
        """Return the mean of each sentence's word vectors.

        Args:
            sentences: As in :meth:`embed`.
            layers: ``average`` or ``top`` for (N, 2D), ``all`` for (N, L + 1, 2D).
            batch_size: Number of sentences per batch.

        Returns:
            Float32, one row per sentence; zeros for a sentence without words.

        Raises:
            TypeError, ValueError, CheckpointError: As :meth:`embed`.

        >>> load(MODEL).sentence_vectors(["w01 w02 w00", "w05"]).shape
        (2, 32)
        """
        means = [mean_of_words(vectors) for vectors in self.iter_embed(sentences, layers, batch_size)]
        shape = (self.num_layers + 1, self.dimension) if layers == "all" else (self.dimension,)
        return np.stack(means) if means else np.zeros((0, *shape), np.float32)

    def score(self, sentences: Iterable[str | Sequence[str]], batch_size: int = 64) -> list[SentenceScore]:
        """Return the log probability of every word in both directions, by the full softmax.

        Args:
            sentences: As in :meth:`embed`.
            batch_size: Number of sentences per batch.

        Returns:
            One :class:`~lapse_elmo.trained.scores.SentenceScore` per sentence, in nats.
            :class:`~lapse_elmo.trained.scores.Totals` computes perplexity and bits per character from them.

        Raises:
            TypeError: If ``sentences`` is a single string, or a sentence is not text.
            CheckpointError: If the model has no softmax (bilm-tf's ``dump_weights`` omits it), or numbers that are not
                finite.

        >>> score = load(MODEL).score(["w01 unheard-of"])[0]
        >>> score.words, score.unknown.tolist(), score.forward.shape, bool((score.forward < 0).all())
        (('w01', 'unheard-of'), [False, True], (2,), True)
        """
        return list(self.iter_score(sentences, batch_size))

    def iter_score(
        self, sentences: Iterable[str | Sequence[str]], batch_size: int = 64
    ) -> Iterator[SentenceScore]:
        """Yield the results of :meth:`score` one by one; memory does not grow with the number of sentences.

        Args:
            sentences: As in :meth:`embed`; an open file, for instance. Read in windows while results are taken.
            batch_size: Number of sentences per batch.

        Raises:
            TypeError, CheckpointError: As :meth:`score`, once the result in question is taken.

        >>> sum(len(score.words) for score in load(MODEL).iter_score(["w01 w02", "w00"] * 100))
        300
        """
        for window in windows(words_of(sentences), batch_size):
            yield from self.score_window(window, batch_size)

    def score_window(self, window: Sequence[list[str]], batch_size: int) -> list[SentenceScore]:
        """Return the scores of a window of sentences (lists of words); reads the softmax table once.

        >>> load(MODEL).score_window([["w01", "w02"], ["w00"]], batch_size=64)[1].words
        ('w00',)
        """
        softmax = self._softmax()
        batches = list(batches_of(window, batch_size, self.vocabulary, self.stored.boundaries))
        contexts = [self._context_vectors(batch) for _, batch in batches]
        targets = np.concatenate([batch.target_rows for _, batch in batches]) if batches else np.empty(0, np.int64)
        if not targets.size:
            nll = np.empty(0)
        else:
            target = torch.from_numpy(targets).to(self.device)
            nll = full_softmax_nll(torch.cat(contexts), self._on_device(softmax), target).cpu().numpy()
            if not np.isfinite(nll).all():  # Totals would take it for a target that nothing predicts
                raise CheckpointError(f"{self.stored.path} cannot predict words: some of its numbers are not finite")
        found: list[SentenceScore | None] = [None] * len(window)
        start = 0
        for numbers, batch in batches:
            tables = by_position(batch, nll[start : start + batch.num_targets])
            start += batch.num_targets
            for row, number in enumerate(numbers):
                place = [table[row] for table in tables]
                found[number] = sentence_score(window[number], *place, boundaries=self.stored.boundaries)
        return [score for score in found if score is not None]

    def nearest(
        self, word: str | np.ndarray, count: int = 10, table: str = "embedding"
    ) -> list[tuple[str, float]]:
        """Return the words whose vectors in a table have the largest cosine similarity, most similar first.

        Args:
            word: A word of the vocabulary, which is excluded from the result, or a vector (D,).
            count: Number of words to return.
            table: ``embedding`` (input vectors) or ``softmax`` (output vectors, without the bias).

        Returns:
            Pairs (word, cosine).

        Raises:
            CorpusError: If the word is not in the vocabulary.
            ValueError: If ``table`` is unknown, or the vector has another shape or no direction.
            CheckpointError: If the softmax is asked for and the model has none.

        >>> [word for word, _ in load(MODEL).nearest("w01", count=2)]  # doctest: +ELLIPSIS
        ['w...', 'w...']
        """
        if table not in ("embedding", "softmax"):
            raise ValueError(f"table should be embedding or softmax, not {table!r}")
        rows = self._softmax() if table == "softmax" else self.stored.embedding
        size = self.stored.options.projection_size
        excluded = -1
        if isinstance(word, str):
            if word not in self.vocabulary:
                raise CorpusError(f"the word {word!r} is not in the vocabulary: there is no vector to compare")
            excluded = self.vocabulary.encode([word])[0] - 1
            vector = rows.weights(np.array([excluded]))[0, :size]
        else:
            vector = np.asarray(word, np.float32)
            if vector.shape != (size,) or not vector.any() or not np.isfinite(vector).all():
                raise ValueError(f"a vector of shape ({size},) is expected, of finite numbers that are not all zero")
        products = np.concatenate([weights[:, :size] @ vector for _, weights in rows.chunks()])
        norms = self._norms_of(table, rows, size)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosines = np.nan_to_num(products / norms / np.linalg.norm(vector), nan=-2.0)
        if excluded >= 0:
            cosines[excluded] = -2.0
        best = top_indices(cosines[_NUM_SPECIAL:], min(count, len(cosines) - _NUM_SPECIAL - (excluded >= 0)))
        return [(self.vocabulary.words[i], float(cosines[_NUM_SPECIAL + i])) for i in best]

    def fill(self, sentence: str | Sequence[str], position: int, count: int = 10) -> list[Candidate]:
        """Return the most probable words at a position of a sentence, whatever word is there.

        The probability of a word is proportional to the product of its probabilities by both directions,
        p(w | words before) p(w | words after), normalised over the vocabulary. For a model without boundaries, only
        the backward direction predicts the first position, and only the forward direction the last.

        Args:
            sentence: A string, which is split at white space, or a list of words.
            position: Index of the word, from 0; negative indices count from the end.
            count: Number of words to return.

        Returns:
            Candidates, most probable first, without ``<S>``, ``</S>`` and ``<UNK>``.

        Raises:
            IndexError: If the sentence has no such position.
            CheckpointError: If the model has no softmax.

        >>> best = load(MODEL).fill("w01 ___ w00", 1, count=3)
        >>> len(best), best[0].probability >= best[1].probability > 0
        (3, True)
        """
        words = next(words_of([sentence]))
        if not -len(words) <= position < len(words):
            raise IndexError(f"position {position} of a sentence of {len(words)} words")
        forward, backward = self._log_probabilities(words, position % len(words))
        both = np.zeros(self.vocabulary.size)
        for direction in (forward, backward):
            both += 0.0 if direction is None else direction
        both -= both.max()
        both -= np.log(np.exp(both).sum())
        best = top_indices(both[_NUM_SPECIAL:], min(count, len(both) - _NUM_SPECIAL))
        probabilities = [np.exp(logs) if logs is not None else None for logs in (both, forward, backward)]
        return [
            Candidate(
                self.vocabulary.words[word],
                *(float(p[_NUM_SPECIAL + word]) if p is not None else float("nan") for p in probabilities),
            )
            for word in best
        ]

    def module(self, layers: str = "all", requires_grad: bool = False) -> ElmoModule:
        """Return the model as a :class:`torch.nn.Module`; see :class:`~lapse_elmo.trained.module.ElmoModule`.

        Args:
            layers: ``all``, ``average`` or ``top``, as in :meth:`embed`, or ``mix`` for learned weights of the layers.
            requires_grad: Whether to fine-tune the LSTM.

        Raises:
            ValueError: If ``layers`` is unknown.
            CheckpointError: If a parameter of the biLM is missing or has another shape.

        >>> layer = load(MODEL).module("average")
        >>> layer(layer.ids(["w01 w02 w00", "w05"])).shape
        torch.Size([2, 3, 32])
        """
        from lapse_elmo.trained.module import ElmoModule

        module = ElmoModule(self.stored, layers=layers, requires_grad=requires_grad, precision=self.precision)
        return module.to(self.device)

    @torch.no_grad()
    def layer_vectors(self, batch: Batch) -> Tensor:
        """Return all layers (L + 1, B, T, 2D) of a batch, including boundaries.

        >>> from lapse_elmo.trained.sentences import batches_of
        >>> model = load(MODEL)
        >>> [(_, batch)] = batches_of([["w01", "w02"]], 64, model.vocabulary, boundaries=True)
        >>> model.layer_vectors(batch).shape
        torch.Size([3, 1, 4, 32])
        """
        tokens = nn.functional.embedding(torch.from_numpy(batch.input_index).to(self.device), self._rows(batch))
        return self.bilm.layers(tokens, batch.packing.to(self.device))

    def _rows(self, batch: Batch) -> Tensor:
        """Return the embeddings (U, D) of a batch's distinct words; reads only these from the memory-mapped table."""
        return torch.from_numpy(self.stored.embedding.weights(batch.input_rows)).to(self.device)

    @torch.no_grad()
    def _context_vectors(self, batch: Batch) -> Tensor:
        """Return the context vectors (N, D) of a batch, forward ones first, in the order of ``batch.target_rows``."""
        return self.bilm.context_vectors(self._rows(batch), torch.from_numpy(batch.input_index), batch.packing)

    def _softmax(self) -> Table:
        if self.stored.softmax is None:
            raise CheckpointError(
                f"{self.stored.path} came without a softmax (bilm-tf's dump_weights omits it), so it can embed but not "
                "predict words; use the run, or an export of bin/export"
            )
        return self.stored.softmax

    def _on_device(self, table: Table) -> Iterator[tuple[int, Tensor]]:
        return ((first, torch.from_numpy(rows).to(self.device)) for first, rows in table.chunks())

    def _norms_of(self, table: str, rows: Table, size: int) -> np.ndarray:
        if table not in self._norms:
            self._norms[table] = np.concatenate([np.linalg.norm(w[:, :size], axis=1) for _, w in rows.chunks()])
        return self._norms[table]

    def _log_probabilities(self, words: list[str], position: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return log p of all classes (V,) at a position, forward and backward; None if it is not predicted."""
        softmax = self._softmax()
        (_, batch), = batches_of([words], 1, self.vocabulary, self.stored.boundaries)
        column = position + (1 if self.stored.boundaries else 0)
        found: list[np.ndarray | None] = []
        # The vectors of a single sentence are in the order of its positions: forward vector i predicts position i + 1,
        # backward vector i predicts position i.
        for context, target in zip(self._context_vectors(batch).chunk(2), (column - 1, column), strict=True):
            if not 0 <= target < batch.num_positions - 1:
                found.append(None)
                continue
            vector = context[target]
            logits = torch.cat([rows[:, :-1] @ vector + rows[:, -1] for _, rows in self._on_device(softmax)])
            found.append(torch.log_softmax(logits.double(), 0).cpu().numpy())
        return found[0], found[1]
