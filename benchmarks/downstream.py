"""Measure whether the vectors help a tagger: ``python -m benchmarks.downstream MODEL --train FILE --test FILE``.

FILE is in CoNLL-U (a Universal Dependencies treebank; the default columns are its words and universal parts of speech)
or in another format of one word per line and an empty line after each sentence, for instance chunking in CoNLL-2000
(``--columns 0 2``) or named entities in CoNLL-2003 (``--columns 0 3``). The vectors are frozen; a linear classifier
(and, where there are several layers, a scalar mix of them) is trained on them. Compared are

- ``biLM``: all layers of MODEL with a scalar mix, as ELMo is used, and its top layer alone,
- ``word table``: MODEL's word vectors without the LSTM,
- ``random biLM``: an LSTM of random weights over MODEL's word table: what context alone gives without training,
- ``random table``: a random vector per word: what the words' identities give a linear classifier,
- ``most frequent tag`` of each word in the training file: no vectors at all.

Every random part and the classifier depend on the seed; the table shows the mean and the range over ``--seeds``.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lapse_elmo
from lapse_elmo.config.cli import option, parse
from lapse_elmo.errors import CorpusError, UserError
from lapse_elmo.model.bilm import BiLM, ScalarMix
from lapse_elmo.trained import TrainedModel

BATCH_WORDS = 1024
CHOOSING = 10  # every tenth training sentence chooses the epoch and is not trained on


@dataclass(frozen=True)
class Downstream:
    """Which vectors, on which task."""

    model: str = option(metavar="MODEL", positional=True, help="a run, a checkpoint or an exported model")
    train: str = option(metavar="FILE", help="tagged training sentences")
    test: str = option(metavar="FILE", help="tagged test sentences")
    columns: tuple[int, ...] = option((1, 3), metavar="N", help="columns of words and tags, the first is 0")
    seeds: tuple[int, ...] = option((1, 2, 3), metavar="N", help="seeds of the classifier and of the random parts")
    epochs: int = option(20, metavar="N", help="passes over the training words; the best is taken")
    learning_rate: float = option(3e-3, metavar="RATE", help="Adam's rate for the classifier")
    output: str | None = option(None, metavar="FILE", help="write the figures as JSON, too")


@dataclass(frozen=True)
class Sentences:
    """Words and tags of a file, one list per sentence."""

    words: list[list[str]]
    tags: list[list[str]]

    def flat(self) -> Iterator[tuple[str, str]]:
        """Yield all (word, tag)."""
        for words, tags in zip(self.words, self.tags, strict=True):
            yield from zip(words, tags, strict=True)


def read(path: str, columns: Sequence[int]) -> Sentences:
    """Read a file of one word per line.

    Comments, multi-word tokens and empty nodes of CoNLL-U, and the document marks of CoNLL-2003, are skipped.

    Raises:
        CorpusError: if the file cannot be read, has no sentences, or a line has too few columns.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CorpusError(f"cannot read {path}: {error}") from None
    found = Sentences([], [])
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not fields:
            if words:
                found.words.append(words)
                found.tags.append(tags)
                words, tags = [], []
            continue
        is_comment = line.startswith("# ") and not words  # within a sentence it is the word "#"
        if is_comment or line.startswith("-DOCSTART-") or (len(fields) == 10 and not fields[0].isdigit()):
            continue
        if len(fields) <= max(columns):
            raise CorpusError(f"{path}:{number}: {len(fields)} columns, --columns asks for {max(columns)}: {line!r}")
        words.append(fields[columns[0]].replace(" ", "_"))
        tags.append(fields[columns[1]])
    if not found.words:
        raise CorpusError(f"{path} has no sentences")
    return found


def vectors(model: TrainedModel, sentences: Sequence[list[str]]) -> Tensor:
    """Return all words' vectors, (layers, words, 2D) float32."""
    return torch.from_numpy(np.concatenate(list(model.iter_embed(sentences)), 1))


def random_bilm(model: TrainedModel, seed: int) -> TrainedModel:
    """Return ``model`` with an LSTM of random weights, initialised as at the start of training."""
    fresh = BiLM(model.stored.options, torch.Generator().manual_seed(seed))
    dense = {name: parameter.detach().numpy() for name, parameter in fresh.named_parameters()}
    return TrainedModel(dataclasses.replace(model.stored, read_dense=lambda: dense))


def random_vectors(model: TrainedModel, sentences: Sequence[list[str]], seed: int) -> Tensor:
    """Return a random vector for each word of the vocabulary, and one for all others: (1, words, D)."""
    size = model.stored.options.projection_size
    ids = np.concatenate([model.vocabulary.encode(words) for words in sentences])
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((ids.max() + 1, size), np.float32)[ids][None])


class Probe(nn.Module):
    """A linear classifier on a scalar mix of layers, standardised by the training words' mean and deviation."""

    def __init__(self, train: Tensor, num_tags: int) -> None:
        super().__init__()
        self.mean = train.mean(1, keepdim=True)
        self.scale = 1 / train.std(1, keepdim=True).clamp_min(1e-5)
        self.mix = ScalarMix(len(train))
        self.linear = nn.Linear(train.shape[2], num_tags)
        nn.init.zeros_(self.linear.weight)

    def forward(self, layers: Tensor) -> Tensor:
        """Return logits (words, tags) of vectors (layers, words, size)."""
        return self.linear(self.mix(list((layers - self.mean) * self.scale)))


def right_words(train: Tensor, tags: Tensor, is_choosing: Tensor, test: Tensor, task: Downstream, seed: int) -> Tensor:
    """Train a probe and classify the test words.

    Args:
        train: vectors of the training words, (layers, words, size).
        tags: their tags, (words,) int64.
        is_choosing: (words,) bool: the words that choose the epoch and are not trained on.
        test: vectors of the test words.
        task: epochs and learning rate.
        seed: of the order of the words.

    Returns:
        The tags of the test words, by the epoch that was best on the words that choose, (test words,) int64.
    """
    torch.manual_seed(seed)
    fit, fit_tags = train[:, ~is_choosing], tags[~is_choosing]
    probe = Probe(fit, int(tags.max()) + 1)
    optimizer = torch.optim.Adam(probe.parameters(), task.learning_rate)
    best, found = -1.0, torch.empty(0)
    for _ in range(task.epochs):
        for chosen in torch.randperm(len(fit_tags)).split(BATCH_WORDS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(probe(fit[:, chosen]), fit_tags[chosen]).backward()
            optimizer.step()
        with torch.no_grad():
            share = float((probe(train[:, is_choosing]).argmax(1) == tags[is_choosing]).float().mean())
            if share > best:
                best, found = share, probe(test).argmax(1)
    return found


def most_frequent(train: Sentences, test: Sentences) -> list[str]:
    """Return for each test word its most frequent tag in training; that of all words for an unseen one."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    total = Counter(tag for _, tag in train.flat())
    for word, tag in train.flat():
        counts[word][tag] += 1
    return [counts.get(word, total).most_common(1)[0][0] for word, _ in test.flat()]


def measure(task: Downstream) -> dict[str, list[list[float]]]:
    """Return for each kind of vectors and each seed the share of right tags: of all words, known, unknown, unseen."""
    model = lapse_elmo.load(task.model)
    train, test = read(task.train, task.columns), read(task.test, task.columns)
    names = sorted({tag for _, tag in train.flat()})
    number = {name: n for n, name in enumerate(names)}
    tags = torch.tensor([number[tag] for _, tag in train.flat()])
    is_choosing = torch.tensor([n % CHOOSING == 0 for n, words in enumerate(train.words) for _ in words])
    truth = torch.tensor([number.get(tag, -1) for _, tag in test.flat()])
    known = torch.tensor([word in model.vocabulary for word, _ in test.flat()])
    seen_words = {word for word, _ in train.flat()}
    seen = torch.tensor([word in seen_words for word, _ in test.flat()])
    groups = (torch.ones_like(known), known, ~known, ~seen)
    unknown, unseen = (float((~group).float().mean()) for group in (known, seen))
    print(
        f"{model}: {len(tags):,} training and {len(truth):,} test words, {len(names)} tags; {unknown:.1%} of the "
        f"test words are not in the model's vocabulary, {unseen:.1%} not in the training file"
    )

    def shares(found: Tensor) -> list[float]:
        right = (found == truth).float()
        return [float(right[group].mean()) for group in groups]

    texts = (train.words, test.words)
    table: dict[str, list[list[float]]] = defaultdict(list)
    layers = [vectors(model, words) for words in texts]
    size = model.stored.options.projection_size
    for seed in task.seeds:
        untrained = random_bilm(model, seed)
        kinds = {
            "biLM, all layers mixed": layers,
            "biLM, top layer": [part[-1:] for part in layers],
            "word table": [part[:1, :, :size] for part in layers],
            "random biLM over the word table, mixed": [vectors(untrained, words) for words in texts],
            "random table": [random_vectors(model, words, seed) for words in texts],
        }
        for kind, (fit, judged) in kinds.items():
            table[kind].append(shares(right_words(fit, tags, is_choosing, judged, task, seed)))
            print(f"seed {seed}: {kind}: {table[kind][-1][0]:.4f}", file=sys.stderr, flush=True)
    table["most frequent tag"].append(shares(torch.tensor([number[tag] for tag in most_frequent(train, test)])))
    return dict(table)


def main() -> None:
    """Run the benchmark."""
    task = parse(Downstream, sys.argv[1:], prog="benchmarks.downstream", description=__doc__.splitlines()[0])
    table = measure(task)
    print("| vectors | all words | in the model's vocabulary | not in it | not in the training file |")
    print("|---" * 5 + "|")
    for kind, seeds in table.items():
        cells = [
            f"{statistics.mean(column):.2%}" + (f" ({min(column):.2%} to {max(column):.2%})" if len(column) > 1 else "")
            for column in zip(*seeds, strict=True)
        ]
        print(f"| {kind} | {' | '.join(cells)} |")
    if task.output:
        Path(task.output).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks.downstream: {error}")
