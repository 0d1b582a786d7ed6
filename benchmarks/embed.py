"""Compare model.embed with AllenNLP's ElmoLstm, and measure the time to open a model and the memory of bin/embed.

    python -m benchmarks.embed [RUN] [--text FILE] [--preset NAME] [--only opening|speed|memory] [--megabytes MB ...]
                               [--ranks N]

Without RUN, a model with random weights, 793,471 words and the ``small`` sizes is made. It is opened as a folder of
every kind: bilm-tf's files, a Hugging Face folder, and the checkpoint of a run that starts from it. Both sides embed
the same batches on one thread with the same weights: they look up word vectors, compute all layers, and make an array
per sentence. They take turns; the result is the median of the repeats. Times are CPU times of the process, which other
programs on the machine hardly affect, except for those of bin/embed, which are wall-clock times.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import lapse_elmo
from lapse_elmo import train
from lapse_elmo.config.preprocessing import ShardsOptions
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.export import elmo, huggingface
from lapse_elmo.model import reference
from lapse_elmo.model.bilm import BiLM, BiLMOptions
from lapse_elmo.mpi.world import solo
from lapse_elmo.trained import TrainedModel
from lapse_elmo.trained.sentences import batches_of, windows
from lapse_elmo.trained.stored import ArrayTable, StoredModel
from preprocess.shards import make_shards

SIZES = {"smallest": (16, 32), "small": (128, 512), "original": (512, 4096)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--text", help="file of one sentence per line (default: random sentences of 8 to 40 words)")
    parser.add_argument("--preset", choices=SIZES, default="small")
    parser.add_argument("--words", type=int, default=793_471, help="vocabulary size of the random model")
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 10], help="sizes of the texts for memory")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of the programs whose memory is measured")
    parser.add_argument("--only", choices=("opening", "speed", "memory"), help="measure only this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.run) if options.run else random_model(
            Path(folder) / "model", options.words, *SIZES[options.preset]
        )
        model = lapse_elmo.load(path)
        if options.only in (None, "opening"):
            kinds = (path,) if options.run else (path, *other_kinds(model, Path(folder), *SIZES[options.preset]))
            for kind in kinds:
                cpu_s, wall_s = opening_s(kind)
                print(f"opening {kind.name}: {cpu_s:.2f} CPU s, {wall_s:.2f} s (torch imported before)")
        sentences = load_or_make_text(model, options.text, options.sentences)
        if options.only in (None, "speed"):
            compare(model, sentences, options.repeats)
            for ranks in (1, 2):
                program(path, sentences, Path(folder), ranks)
        if options.only in (None, "memory"):
            memory(path, Path(folder), sentences, options.megabytes, options.ranks)


def random_model(folder: Path, num_words: int, size: int, cell: int) -> Path:
    """Make an exported model with random weights."""
    sizes = BiLMOptions(projection_size=size, cell_size=cell)
    model = BiLM(sizes, torch.Generator().manual_seed(1))
    rng = np.random.default_rng(1)
    vocabulary = Vocabulary.from_words(f"w{number}" for number in range(num_words - 3))
    rows = rng.standard_normal((num_words, size), np.float32)
    dense = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    table = ArrayTable(rows)
    softmax = ArrayTable(rows, np.zeros(num_words, np.float32))
    elmo.write(StoredModel(folder, "checkpoint", sizes, True, vocabulary, table, softmax, lambda: dense), folder, False)
    return folder


def other_kinds(model: TrainedModel, folder: Path, size: int, cell: int) -> tuple[Path, Path]:
    """Write the model as a Hugging Face folder, and make a run that starts from it and saves a checkpoint."""
    hub, run, few, heldout = folder / "huggingface", folder / "run", folder / "few", folder / "heldout"
    huggingface.write(model.stored, hub, False)
    for text in (few, heldout):
        text.write_text("".join(f"w{number} w{number + 1}\n" for number in range(64)), encoding="utf-8")
    shards, vocabulary = str(folder / "shards"), str(model.stored.path / "vocab.txt")
    make_shards(ShardsOptions((str(few),), (str(heldout),), vocab=vocabulary, output=shards, num_shards=1), solo())
    argv = ["--shards", shards, "--vocab", vocabulary, "--init-from", str(model.stored.path), "--run-dir", str(run)]
    argv += ["--projection-size", str(size), "--cell-size", str(cell), "--max-steps", "1", "--progress", "none"]
    train.main([*argv, "--threads", "1", "--device", "cpu"], solo)
    return hub, run


def opening_s(path: Path) -> tuple[float, float]:
    """Measure the CPU and wall-clock seconds of lapse_elmo.load in a new process; the fastest of three."""
    code = (
        "import sys, time, torch, lapse_elmo, lapse_elmo.trained; start = time.process_time(), time.perf_counter();"
        "lapse_elmo.load(sys.argv[1]); print(time.process_time() - start[0], time.perf_counter() - start[1])"
    )
    command = [sys.executable, "-c", code, str(path)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    return min(float(cpu_s) for cpu_s, _ in runs), min(float(wall_s) for _, wall_s in runs)


def load_or_make_text(model: TrainedModel, path: str | None, count: int) -> list[list[str]]:
    """Return the first ``count`` sentences of a file, or random ones."""
    if path:
        with open(path, encoding="utf-8") as file:
            return [line.split() for line, _ in zip(file, range(count), strict=False)]
    rng = np.random.default_rng(2)
    words = model.vocabulary.words
    indices = np.minimum(rng.zipf(1.2, (count, 40)), len(words)) - 1
    return [[words[index] for index in indices[row, : rng.integers(8, 41)]] for row in range(count)]


def compare(model: TrainedModel, sentences: list[list[str]], repeats: int) -> None:
    """Print the speed of model.embed and of AllenNLP's ElmoLstm, and the difference of their results."""
    sizes = model.stored.options
    lstm = reference.elmo_lstm()(
        sizes.projection_size, sizes.projection_size, sizes.cell_size, sizes.num_layers,
        memory_cell_clip_value=sizes.cell_clip or None, state_projection_clip_value=sizes.projection_clip or None,
    )
    lstm.load_state_dict(model.bilm.lstm.state_dict())
    lstm.eval()
    embedding = model.stored.embedding

    @torch.no_grad()
    def theirs() -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for window in windows(iter(sentences), 64):
            own = [np.empty(0)] * len(window)
            for numbers, batch in batches_of(window, 64, model.vocabulary, True):
                rows = torch.from_numpy(embedding.weights(batch.input_rows))
                packed = torch.nn.functional.embedding(torch.from_numpy(batch.input_index), rows)
                tokens, mask = batch.packing.unpack(packed), batch.packing.mask()
                lstm.reset_states()
                layers = torch.cat([torch.cat([tokens, tokens], 2)[None], lstm(tokens, mask)])
                for row, number in enumerate(numbers):
                    own[number] = layers[:, row, 1 : 1 + len(window[number])].numpy().copy()
            found += own
        return found

    num_words = sum(map(len, sentences))
    rounded = TrainedModel(model.stored, precision="bf16")
    sides: dict[str, Callable[[], list[np.ndarray]]] = {
        "AllenNLP's ElmoLstm": theirs, "model.embed": lambda: model.embed(sentences),
        "model.embed, bf16": lambda: rounded.embed(sentences),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    results: dict[str, list[np.ndarray]] = {}
    for repeat in range(repeats + 1):
        for side, run in sides.items():
            start = time.process_time()
            results[side] = run()
            if repeat:
                times[side].append(time.process_time() - start)
    reference_s, *_ = (statistics.median(times[side]) for side in sides)
    exact = np.concatenate([vectors.reshape(-1) for vectors in results["AllenNLP's ElmoLstm"]])
    for side in sides:
        found = np.concatenate([vectors.reshape(-1) for vectors in results[side]])
        seconds, error = statistics.median(times[side]), np.linalg.norm(found - exact) / np.linalg.norm(exact)
        print(
            f"{side}: {num_words / seconds:,.0f} words per CPU second, {reference_s / seconds:.2f} times AllenNLP's; "
            f"largest difference {np.abs(found - exact).max():.1e}, of the norm {error:.1e}"
        )


def program(path: Path, sentences: list[list[str]], folder: Path, ranks: int) -> None:
    """Print the speed of bin/embed."""
    text = folder / "text"
    text.write_text("".join(" ".join(words) + "\n" for words in sentences * 4), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), sys.executable, "bin/embed", str(path)]
    done = subprocess.run(
        [*command, str(text), "--output", str(folder / "out.hdf5"), "--overwrite", "--threads", "1"],
        capture_output=True, text=True,
    )
    print(f"bin/embed, {ranks} ranks: {done.stdout.strip().rpartition(';')[2].strip() or done.stderr.strip()}")


def memory(path: Path, folder: Path, sentences: list[list[str]], sizes: list[float], ranks: int) -> None:
    """Print the peak resident memory of the ranks of bin/embed and bin/score, by size of text."""
    lines = "".join(" ".join(words) + "\n" for words in sentences).encode()
    (folder / "words").write_text("\n".join(sorted({words[0] for words in sentences})[:20]), encoding="utf-8")
    output = str(folder / "memory_output.npz")
    kinds = {
        "embed --pool mean": ["--pool", "mean"], "embed --words": ["--words", str(folder / "words")], "embed": [],
        "score": [],
    }
    # VmHWM and not getrusage, whose maximum an exec leaves at that of the process that started it: at ours.
    code = (
        "import sys, importlib; from lapse_elmo.mpi.launch import enter;"
        "importlib.import_module('lapse_elmo.' + sys.argv[1]).main(sys.argv[2:], enter);"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "sys.stdout.write('peak ' + peak.split()[1] + '\\n')"
    )
    command = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), sys.executable, "-c", code]
    text = folder / "memory_text"
    for megabytes in sizes:
        with open(text, "wb") as file:
            while file.tell() < megabytes * 1e6:
                file.write(lines)
        for kind, options in kinds.items():
            argv = [kind.split()[0], str(path), str(text), *options, "--output", output, "--overwrite"]
            start = time.perf_counter()
            done = subprocess.run([*command, *argv, "--threads", "1"], stdout=subprocess.PIPE, text=True, check=True)
            seconds = time.perf_counter() - start
            peaks = [int(line.split()[1]) / 1024 for line in done.stdout.splitlines() if line.startswith("peak ")]
            print(
                f"memory of bin/{kind}, {ranks} ranks, over {text.stat().st_size / 1e6:,.1f} MB of text: "
                f"{' and '.join(f'{peak:,.0f}' for peak in sorted(peaks))} MB; {seconds:,.0f} s, "
                f"output {Path(output).stat().st_size / 1e9:.2f} GB", flush=True,
            )
            Path(output).unlink()


if __name__ == "__main__":
    main()
