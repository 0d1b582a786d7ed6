"""The lean import of AllenNLP: cheap, invisible, the real files, and a clear message where it is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lapse_elmo.errors import ConfigError
from lapse_elmo.model import reference

ROOT = Path(__file__).parents[2]


def run(script: str) -> str:
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lean_import_leaves_no_trace() -> None:
    output = run(
        "import sys, torch; from lapse_elmo.model import reference; before = set(sys.modules)\n"
        "mix, loss = reference.modules('scalar_mix').ScalarMix, reference.modules('sampled_softmax_loss')\n"
        "found = [reference.elmo_lstm(), mix, loss.SampledSoftmaxLoss]\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('allennlp', 'spacy', 'transformers', 'lmdb')])\n"
        "print(len(set(sys.modules) - before) < 300, [f.__name__ for f in found])\n"
    )
    assert output.split("\n")[0] == "[]"
    assert output.split("\n")[1] == "True ['ElmoLstm', 'ScalarMix', 'SampledSoftmaxLoss']"


def test_weights_can_be_loaded_and_the_real_package_imported_afterwards(tmp_path: Path) -> None:
    script = f"""
import h5py, torch, warnings
from lapse_elmo.model import reference
lean = reference.elmo_lstm()
lstm = lean(2, 2, 3, 1)
with h5py.File({str(tmp_path / "w.hdf5")!r}, "w") as file:
    for direction in (0, 1):
        group = file.create_group(f"RNN_{{direction}}/RNN/MultiRNNCell/Cell0/LSTMCell")
        group["W_0"], group["B"], group["W_P_0"] = torch.ones(4, 12), torch.zeros(12), torch.ones(3, 2)
warnings.simplefilter("ignore")
lstm.load_weights({str(tmp_path / "w.hdf5")!r})
assert lstm.forward_layer_0.state_linearity.bias.tolist() == [0.0] * 3 + [1.0] * 3 + [0.0] * 6
import allennlp.modules
from allennlp.modules.elmo_lstm import ElmoLstm
assert ElmoLstm is not lean and ElmoLstm(2, 2, 3, 1).state_dict().keys() == lstm.state_dict().keys()
reference.modules.cache_clear()
assert reference.elmo_lstm() is ElmoLstm
print("both")
"""
    assert run(script).strip().endswith("both")


def test_missing_allennlp_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reference.modules.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "allennlp"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed.*requirements-nodeps.txt.*fused") as caught:
        reference.elmo_lstm()
    assert "\n" not in str(caught.value)
