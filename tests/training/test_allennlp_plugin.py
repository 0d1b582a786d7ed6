"""A model in AllenNLP 2.10.1: a tagger from a configuration file that learns, and Elmo(None, None, n, module=...)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi import ROOT
from tests.training.corpora import Prepared, random_sentences, train_alone

# `python -m allennlp train`, and what was made of it: in one process, since AllenNLP's imports take seconds.
PROGRAM = """
import json, runpy, sys, warnings
warnings.simplefilter("ignore")
folder = sys.argv[1]
from allennlp.modules.elmo_lstm import ElmoLstm  # before anything of ours: a plain import works
assert "lapse_elmo" not in sys.modules
import torch
torch.set_num_threads(1)
sys.argv = ["allennlp", "train", folder + "/tagger.json", "--serialization-dir", folder + "/tagger"]
sys.argv += ["--include-package", "lapse_elmo.allennlp_plugin"]
runpy.run_module("allennlp", run_name="__main__", alter_sys=True)
import lapse_elmo.allennlp_plugin as plugin
from allennlp.models.archival import load_archive
from allennlp.modules.elmo import Elmo
metrics = json.load(open(folder + "/tagger/metrics.json"))
again = load_archive(folder + "/tagger/model.tar.gz").model.eval()
embedder = next(module for module in again.modules() if isinstance(module, plugin.LapseElmoEmbedder))
mix = [parameter.tolist() for name, parameter in embedder.named_parameters() if "scalar_parameters" in name]
import lapse_elmo
trained = lapse_elmo.load(folder + "/run")
elmo = Elmo(None, None, 2, dropout=0.0, module=plugin.AllenNlpModule(trained)).eval()
ids = trained.module().ids(["w01 w02 w00", "w05"])
found = elmo(ids)
wanted = torch.from_numpy(trained.embed(["w01 w02 w00"], "average")[0])
print(json.dumps({
    "accuracy": metrics["best_validation_accuracy"], "first": metrics["training_accuracy"], "mix": mix,
    "difference": float((found["elmo_representations"][1][0, :3] - wanted).abs().max()),
    "mask": found["mask"].tolist(), "dimension": elmo.get_output_dim(), "again": type(again).__name__,
    "trainable": [name for name, parameter in embedder.named_parameters() if parameter.requires_grad],
}))
"""


def tagged(line: str) -> str:
    """Tag each word with the parity of the word before it, which vectors without context cannot predict."""
    words = line.split()
    before = ["w00", *words]
    tags = ("odd" if int(last[1:]) % 2 else "even" for last in before)
    return " ".join(f"{word}###{tag}" for word, tag in zip(words, tags, strict=False))


def python(*arguments: str, home: Path) -> str:
    """Return the output of Python, which finds our packages and AllenNLP's."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(home)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def test_a_tagger_learns(small: Prepared, tmp_path: Path) -> None:
    for module in ("spacy", "transformers", "lmdb", "nltk", "sklearn"):
        pytest.importorskip(module, reason="AllenNLP's own requirements are those of the tests (requirements-dev.txt)")
    train_alone(small, tmp_path / "run", "--epochs", "4")
    for name, seed, count in (("train", 5, 300), ("dev", 6, 60)):
        lines = map(tagged, random_sentences(seed, count, 20, (3, 9)))
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    kind = {"type": "lapse-elmo", "model": str(tmp_path / "run")}
    config = {
        "dataset_reader": {"type": "sequence_tagging", "word_tag_delimiter": "###", "token_indexers": {"elmo": kind}},
        "train_data_path": str(tmp_path / "train"), "validation_data_path": str(tmp_path / "dev"),
        "model": {
            "type": "simple_tagger",
            "text_field_embedder": {"token_embedders": {"elmo": {**kind, "dropout": 0.1}}},
            "encoder": {"type": "pass_through", "input_dim": 32},
        },
        "data_loader": {"batch_size": 16, "shuffle": True},
        "trainer": {
            "optimizer": {"type": "adam", "lr": 0.03}, "num_epochs": 20, "validation_metric": "+accuracy",
            "cuda_device": -1,
        },
        "random_seed": 1, "numpy_seed": 1, "pytorch_seed": 1,
    }
    (tmp_path / "tagger.json").write_text(json.dumps(config))
    found = json.loads(python("-c", PROGRAM, str(tmp_path), home=tmp_path).splitlines()[-1])
    tags = (tmp_path / "dev").read_text().replace("\n", " ").split()
    even = sum(tag.endswith("even") for tag in tags) / len(tags)
    assert found["accuracy"] > max(even, 1 - even) + 0.05, (found, even)  # always the commoner tag
    assert len(found["mix"]) == 3 and all(abs(scalar[0]) > 1e-3 for scalar in found["mix"])
    assert all("scalar_mix" in name for name in found["trainable"])
    assert found["difference"] < 1e-5 and found["dimension"] == 32 and found["again"] == "SimpleTagger"
    assert found["mask"] == [[True, True, True], [True, False, False]]
