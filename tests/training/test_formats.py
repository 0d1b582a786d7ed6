"""What ``bin/export`` writes, in the hands of other programs: gensim, spaCy, transformers and sentence-transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lapse_elmo
from lapse_elmo import checkpoint, export
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import CheckpointError, OutputError
from lapse_elmo.export import word2vec
from lapse_elmo.mpi.world import solo
from lapse_elmo.trained.stored import ArrayTable, StoredModel
from tests.mpi import ROOT
from tests.training.corpora import Prepared, prepare, train_alone
from tests.training.other_python import run_in_other_python

LINES = ["w01 w02 w00", "w03 unheard of w00", "w01", "w00 w01 w02 w03 w04 w05 w06 w07"]


@pytest.fixture(scope="module")
def runs(small: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    variants = {"top": (), "mix": ("--context", "mix"), "no boundaries": ("--no-boundaries",)}
    return {name: train_alone(small, folder / name, "--max-steps", "3", *extra) for name, extra in variants.items()}


def exported(run: Path, output: Path, kind: str, *options: str) -> Path:
    export.main([str(run), "--output", str(output), "--format", kind, *options], solo)
    return output


def read_word2vec(path: Path) -> dict[str, np.ndarray]:
    """Read a word2vec file by the description of the format, without our code."""
    data = path.read_bytes()
    head, _, rest = data.partition(b"\n")
    count, size = map(int, head.split())
    found: dict[str, np.ndarray] = {}
    if path.suffix != ".bin":
        for line in rest.decode().splitlines():
            word, *numbers = line.split(" ")
            found[word] = np.array(numbers, np.float32)
    while path.suffix == ".bin" and rest:
        name, _, rest = rest.partition(b" ")
        found[name.decode()], rest = np.frombuffer(rest[: 4 * size], "<f4"), rest[4 * size + 1 :]
    assert len(found) == count and all(vector.shape == (size,) for vector in found.values())
    return found


@pytest.mark.parametrize("name", ["vectors.txt", "vectors.bin"])
def test_word2vec(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    path = exported(runs["top"], tmp_path / name, "word2vec")
    found, trained = read_word2vec(path), lapse_elmo.load(runs["top"])
    assert list(found) == ["<UNK>", *trained.vocabulary.words]
    table = trained.stored.embedding.weights(np.arange(2, trained.vocabulary.size))
    np.testing.assert_array_equal(np.stack(list(found.values())), table)


def test_words_that_word2vec_cannot_hold(runs: dict[str, Path], tmp_path: Path) -> None:
    words = ["plain", "no\u00a0break", "line\u2028end", "two words", "last"]
    table = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    sizes = lapse_elmo.load(runs["top"]).stored.options
    stored = StoredModel(
        tmp_path, "checkpoint", sizes, True, Vocabulary.from_words(words), ArrayTable(table), None, dict
    )
    for name in ("some.txt", "some.bin"):
        lines = word2vec.write(stored, tmp_path / name, False)
        found = read_word2vec(tmp_path / name)
        assert list(found) == ["<UNK>", "plain", "last"] and "3 words that contain white space" in lines[1]
        np.testing.assert_array_equal(found["last"], table[-1])


def test_spacy_reads_word2vec(runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("spacy")
    path = exported(runs["top"], tmp_path / "vectors.txt", "word2vec")
    program = "import sys, spacy.cli; spacy.cli.app(['init', 'vectors', 'xx', sys.argv[1], sys.argv[2]])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(tmp_path / "made")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    import spacy

    vocabulary = spacy.load(tmp_path / "made").vocab
    trained = lapse_elmo.load(runs["top"])
    assert vocabulary.vectors.shape == (trained.vocabulary.size - 2, 16)
    row = trained.stored.embedding.weights(np.array([trained.vocabulary.encode(["w01"])[0] - 1]))[0]
    np.testing.assert_array_equal(vocabulary["w01"].vector, row)


def test_gensim_reads_word2vec(runs: dict[str, Path], tmp_path: Path) -> None:
    paths = [exported(runs["top"], tmp_path / name, "word2vec") for name in ("vectors.txt", "vectors.bin")]
    found = run_in_other_python(
        """
        from gensim.models import KeyedVectors
        text, binary = (KeyedVectors.load_word2vec_format(p, binary=p.endswith(".bin")) for p in arguments)
        assert text.index_to_key == binary.index_to_key and (text.vectors == binary.vectors).all()
        result = [text.index_to_key, text.vectors.tolist(), text.most_similar("w01", topn=5)]
        """,
        [str(path) for path in paths],
    )
    trained = lapse_elmo.load(runs["top"])
    assert found[0] == ["<UNK>", *trained.vocabulary.words]
    np.testing.assert_array_equal(np.array(found[1], np.float32), trained.stored.embedding.weights(np.arange(2, 43)))
    assert [word for word, _ in found[2] if word != "<UNK>"][:4] == [w for w, _ in trained.nearest("w01", 4)]


TRANSFORMERS = """
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
path, lines = arguments
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
assert tokenizer.is_fast
model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
causal = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
result = {"version": transformers.__version__}
for side in ("right", "left"):
    batch = tokenizer(lines, return_tensors="pt", padding=True, padding_side=side)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        layers = model(**batch, output_hidden_states=True)
        logits = causal(**batch).logits
    assert torch.equal(layers.hidden_states[-1], layers.last_hidden_state)
    result[side] = {
        "vectors": [[layer[i][mask[i]].tolist() for layer in layers.hidden_states] for i in range(len(lines))],
        "logits": [logits[i][mask[i]].tolist() for i in range(len(lines))],
        "ids": [batch["input_ids"][i][mask[i]].tolist() for i in range(len(lines))],
    }
ids = tokenizer("<S> " + lines[0], return_tensors="pt")["input_ids"]
with torch.no_grad():
    result["begun"] = causal(ids, labels=ids).logits[0].tolist()
    result["generated"] = causal.generate(ids, max_new_tokens=3, do_sample=False)[0].tolist()
"""


@pytest.mark.parametrize("name", ["top", "mix", "no boundaries"])
def test_transformers_computes_our_numbers(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = exported(runs[name], tmp_path / "hub", "huggingface")
    found: dict[str, Any] = run_in_other_python(TRANSFORMERS, [str(folder), LINES])
    trained = lapse_elmo.load(runs[name])
    vectors, scores = trained.embed(LINES), trained.score(LINES)
    for side in ("right", "left"):
        for line, array, mine, logits, ids in zip(
            LINES, found[side]["vectors"], vectors, found[side]["logits"], found[side]["ids"], strict=True
        ):
            assert ids == trained.vocabulary.encode(line.split())
            np.testing.assert_allclose(np.array(array), mine, atol=1e-5)
            assert len(logits) == len(ids)
        for score, logits, ids in zip(scores, found[side]["logits"], found[side]["ids"], strict=True):
            log_p = log_softmax(np.array(logits))[np.arange(len(ids) - 1), ids[1:]]
            np.testing.assert_allclose(log_p, score.forward[1:], atol=1e-5)
    if name != "no boundaries":
        begun = log_softmax(np.array(found["begun"]))
        first = trained.vocabulary.encode(LINES[0].split())
        np.testing.assert_allclose(begun[[0, 1, 2], first], scores[0].forward, atol=1e-5)
        assert begun[3, 2] == pytest.approx(scores[0].end, abs=1e-5)
        assert len(found["generated"]) <= 4 + 3 and found["generated"][:4] == [1, *first]


def test_the_trainer_divides_the_loss_of_accumulated_batches(runs: dict[str, Path], tmp_path: Path) -> None:
    """It asks the model for ``accepts_loss_kwargs``, and otherwise takes ``**kwargs`` of forward for a yes."""
    folder = exported(runs["top"], tmp_path / "hub", "huggingface")
    accepts, mean, told = run_in_other_python(
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        path, line = arguments
        ids = AutoTokenizer.from_pretrained(path, trust_remote_code=True)(line, return_tensors="pt")["input_ids"]
        causal = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
        losses = [causal(ids, labels=ids, **told).loss.item() for told in ({}, {"num_items_in_batch": 100})]
        result = [getattr(causal, "accepts_loss_kwargs", True), *losses]
        """,
        [str(folder), LINES[3]],
    )
    score = lapse_elmo.load(runs["top"]).score(LINES[3:])[0]
    assert mean == pytest.approx(-score.forward[1:].mean(), abs=1e-5)
    assert accepts == (told != mean)


def test_words_can_be_added_in_transformers(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = exported(runs["top"], tmp_path / "hub", "huggingface")
    found = run_in_other_python(
        """
        import torch
        from transformers import AutoModel, AutoModelForCausalLM
        path, larger, size = arguments
        result = []
        for kind in (AutoModel, AutoModelForCausalLM):
            model = kind.from_pretrained(path, trust_remote_code=True).eval()
            before = model(torch.tensor([[4, 5]]))[0]
            model.resize_token_embeddings(size + 3, mean_resizing=False)
            model.save_pretrained(larger)
            model = kind.from_pretrained(larger, trust_remote_code=True).eval()
            after = model(torch.tensor([[4, 5]]))[0]
            result.append([len(model.embedding.weight), len(model.softmax.weight), len(model.softmax.bias)])
            assert torch.equal(before, after[..., : before.shape[-1]]) and model(torch.tensor([[4, size + 2]]))
        """,
        [str(folder), str(tmp_path / "larger"), lapse_elmo.load(runs["top"]).vocabulary.size + 1],
    )
    assert found == [[lapse_elmo.load(runs["top"]).vocabulary.size + 1 + 3] * 3] * 2


REAL = ROOT.parent / "shared" / "corpus" / "one-billion-word-sample"  # not part of the project
REAL_PARITY = """
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
path, lines = arguments
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
kinds = (AutoModel, AutoModelForCausalLM)
model, causal = (kind.from_pretrained(path, trust_remote_code=True).eval() for kind in kinds)
batch = tokenizer(lines, return_tensors="pt", padding=True)
mask = batch["attention_mask"].bool()
with torch.no_grad():
    layers = model(**batch, output_hidden_states=True).hidden_states
    log_p = causal(**batch).logits.log_softmax(-1)
following = batch["input_ids"][:, 1:]
found = log_p[:, :-1].gather(2, following[:, :, None])[:, :, 0]
result = {
    "vectors": [[layer[i][mask[i]].tolist() for layer in layers] for i in range(len(lines))],
    "forward": [found[i][mask[i, 1:]].tolist() for i in range(len(lines))],
}
"""


def test_transformers_computes_our_numbers_of_real_sentences(tmp_path: Path) -> None:
    files = sorted(REAL.glob("*/news.en*"))
    if len(files) != 5:
        pytest.skip("the shared corpus is not on this machine")
    texts = [path.read_text(encoding="utf-8").splitlines() for path in files]
    (lines,) = (text[:40] for path, text in zip(files, texts, strict=True) if "heldout" in path.name)
    corpus = prepare(tmp_path / "corpus", texts[-1][:400], lines)
    sizes = ("--projection-size", "64", "--cell-size", "256", "--max-steps", "12")
    run = train_alone(corpus, tmp_path / "run", *sizes)
    folder = exported(run, tmp_path / "hub", "huggingface")
    found = run_in_other_python(REAL_PARITY, [str(folder), lines])
    trained = lapse_elmo.load(run)
    scores = trained.score(lines)
    assert 0.05 < np.concatenate([score.unknown for score in scores]).mean() < 0.6
    for array, mine in zip(found["vectors"], trained.embed(lines), strict=True):
        np.testing.assert_allclose(np.array(array), mine, rtol=1e-5, atol=1e-5)
    for array, score in zip(found["forward"], scores, strict=True):
        np.testing.assert_allclose(np.array(array), score.forward[1:], rtol=1e-5, atol=1e-5)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_sentence_transformers_reads_it(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = exported(runs["top"], tmp_path / "hub", "huggingface")
    found = run_in_other_python(
        """
        from sentence_transformers import SentenceTransformer
        path, lines = arguments
        result = SentenceTransformer(path, trust_remote_code=True, device="cpu").encode(lines).tolist()
        """,
        [str(folder), LINES],
    )
    wanted = lapse_elmo.load(runs["top"]).sentence_vectors(LINES, "top")
    np.testing.assert_allclose(np.array(found), wanted, atol=1e-5)


# As http://wiki.nlpl.eu/Vectors/metadata lists them, and as the meta.json of the repository's model 85 has them.
NLPL_FIELDS = {
    "model": ("algorithm", "contents", "corpus", "creators", "dimensions", "documentation", "handle", "id",
              "iterations", "vocabulary size", "window"),
    "algorithm": ("command", "id", "name", "tool", "url", "version"),
    "corpus": ("NER", "case preserved", "description", "id", "language", "lemmatized", "public", "stop words removal",
               "tagger", "tagset", "tokens", "tool", "url"),
}


def test_the_card_and_the_meta_data(small: Prepared, runs: dict[str, Path], tmp_path: Path) -> None:
    card = (exported(runs["top"], tmp_path / "hub", "huggingface") / "README.md").read_text()
    tokens = sum(len(line.split()) for line in small.train)
    assert card.startswith("---\n")
    manifest = checkpoint.read_manifest(checkpoint.find(runs["top"]))
    trained, step, results = manifest["milestones"]["num_tokens"], manifest["step"], manifest["results"]
    both = "forward {forward_perplexity:.1f}, backward {backward_perplexity:.1f}".format(**results)
    mean = np.sqrt(results["forward_perplexity"] * results["backward_perplexity"])
    assert results["heldout_perplexity"] == pytest.approx(mean)
    for says in (
        "D 16, C 32, L 2", "torch 2.", f"training data | {tokens:,} |",
        f"Trained tokens | {trained:,} in {step} steps |",
        f"Held-out perplexity | {results['heldout_perplexity']:.1f} (full softmax), {both} |",
    ):
        assert says in card, card
    meta = json.loads((exported(runs["top"], tmp_path / "elmo", "elmo") / "meta.json").read_text())
    assert meta["vocabulary size"] == 43 and meta["dimensions"] == 32 and meta["corpus"][0]["tokens"] == tokens
    assert {name: sorted(fields) for name, fields in NLPL_FIELDS.items()} == {
        "model": sorted(meta), "algorithm": sorted(meta["algorithm"]), "corpus": sorted(meta["corpus"][0])
    }
    names = {path.name for path in (tmp_path / "elmo").iterdir()}
    assert {entry["filename"] for entry in meta["contents"]} == names


def test_exports_are_exported_again(runs: dict[str, Path], tmp_path: Path) -> None:
    once = exported(runs["mix"], tmp_path / "once", "elmo")
    twice = exported(exported(once, tmp_path / "hub", "huggingface"), tmp_path / "twice", "elmo")
    assert (once / "weights.hdf5").read_bytes() == (twice / "weights.hdf5").read_bytes()
    assert (once / "vocab.txt").read_bytes() == (twice / "vocab.txt").read_bytes()


def test_a_projection_that_bilm_tf_leaves_out(
    small: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_alone(small, tmp_path / "run", "--max-steps", "1", "--cell-size", "8")
    capsys.readouterr()
    exported(run, tmp_path / "elmo", "elmo")
    assert "not for bilm-tf itself" in capsys.readouterr().out
    wanted = lapse_elmo.load(run).embed(LINES)
    for found, vectors in zip(lapse_elmo.load(tmp_path / "elmo").embed(LINES), wanted, strict=True):
        np.testing.assert_allclose(found, vectors, atol=1e-6)


def test_refusals(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("months of work")
    with pytest.raises(OutputError, match="is a directory"):
        exported(runs["top"], tmp_path / "mine", "word2vec", "--overwrite")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        exported(runs["top"], tmp_path / "mine", "huggingface", "--overwrite")
    elmo = exported(runs["top"], tmp_path / "elmo", "elmo")
    import h5py

    with h5py.File(elmo / "weights.hdf5", "r+") as file:
        del file["softmax"]
    with pytest.raises(CheckpointError, match="without a softmax"):
        exported(elmo, tmp_path / "hub", "huggingface")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elmo", "mine"]
