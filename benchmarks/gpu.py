"""Test and time everything that runs on a GPU, in one go: ``python -m benchmarks.gpu``.

It measures the card's own matrix rates, runs tests/model/test_cuda.py and the sum of dense gradients over NCCL, trains
the ``small`` and ``original`` sizes with ``bin/train`` on made-up text (B 32, 128 and 256; float32, TF32 and bfloat16),
evaluates, embeds and scores with the first of these models, and trains with two ranks. Everything is in one file,
report.md: results of the parts, tokens/s, their share of the measured bfloat16 rate, memory at the peak, where the time
of a step goes, and the output of parts that failed. results.json has the numbers again.

Each part has a time of its own, after which it is killed and the next one starts; together they end within
``--minutes``. What was left out is listed. The status is 1 if a part failed.

The machine needs torch with CUDA. Other packages that it lacks can travel as wheels: on a machine with a network
``python -m benchmarks.gpu --collect wheels`` downloads them (some 40 MB; with the repository, more than 64 MB are
refused), and ``--wheels wheels`` on the GPU machine installs those that are missing into a temporary folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_device import peak_memory
from benchmarks.gpu_packages import ROOT, collect, install, launcher, missing
from benchmarks.gpu_report import PROFILED, report, speed
from lapse_elmo.config.cli import option, parse
from lapse_elmo.errors import ConfigError, UserError

MEAN_LENGTH, TEXT_SENTENCES = 25, 2000  # of the text that is made up, and of its part that is embedded
TF32 = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}  # torch then takes TF32 for float32 products
MARGIN_S, GRACE_S = 12.0, 3.0  # kept for the last report; from asking a part to stop to killing it
LEAST_S = 5.0  # a part does not start with less
# Seconds after which a part is killed, if no less time is left.
DEVICE_S, TESTS_S, MEAN_S, CORPUS_S, PROGRAM_S, RANKS_S = 60.0, 120.0, 60.0, 90.0, 45.0, 60.0
START_S = 45.0  # of a training, before and after its --seconds
PARTS = ("tests", "mean", "evaluate", "embed", "embed-bf16", "score", "ranks")
SHOWN_LINES = 60  # of a part's output


@dataclass(frozen=True)
class GpuOptions:
    """What to run, and for how long."""

    minutes: float = option(8.0, metavar="N", help="time for everything")
    output: str = option("gpu-report", metavar="DIR", help="directory of report.md, with all of it, and results.json")
    sizes: tuple[str, ...] = option(("small", "original"), help="small, original")
    batches: tuple[int, ...] = option((128, 256, 32), metavar="B", help="sentences per step, most important first")
    precisions: tuple[str, ...] = option(("bf16", "tf32", "fp32"), help="bf16, tf32, fp32, most important first")
    seconds: float = option(12.0, metavar="N", help="training time of each run")
    steps: int = option(0, metavar="N", help="most steps of each run (0: as many as fit)")
    words: int = option(100_000, metavar="N", help="words of the vocabulary")
    sentences: int = option(100_000, metavar="N", help="training sentences")
    samples: int = option(8192, metavar="S", help="negative samples per step")
    parts: tuple[str, ...] = option(
        PARTS, metavar="NAME", help="parts in addition to the trainings, mean being that of gradients, ranks two of "
        f"them: {', '.join(PARTS)}"
    )
    device: str = option("cuda", choices=("cuda", "cpu"), help="cpu tries the program itself, without a GPU")
    collect: str | None = option(None, metavar="DIR", help="only download the wheels that a GPU machine may lack")
    python: str = option("3.12", metavar="VERSION", help="Python of the GPU machine, for --collect")
    wheels: str | None = option(None, metavar="DIR", help="install the packages that are missing from here")


def run_limited(
    command: Sequence[str], seconds: float, environment: dict[str, str], grace_s: float = GRACE_S
) -> dict[str, Any]:
    """Run a command and all that it starts for at most ``seconds``.

    Returns:
        ``error`` in one line, "" if its status is 0; ``said``, its last line; ``output``, the last lines of both
        streams; and ``seconds``.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as file:  # no pipe, which a process left behind would keep open
        process = subprocess.Popen(
            list(command), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            for number in (signal.SIGTERM, signal.SIGKILL):  # launchers end their ranks at the first
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):  # what hangs in a driver outlives SIGKILL, too
                    process.wait(grace_s)
        file.seek(0)
        lines = file.read().decode(errors="replace").strip().splitlines()
    said = lines[-1].strip("= ") if lines else "no output"
    failed = f"status {process.returncode}: {said}" if process.returncode else ""
    error = f"killed after {seconds:.0f} s" if late else failed
    output = "\n".join(lines[-SHOWN_LINES:])
    return {"error": error, "said": said, "output": output, "seconds": time.monotonic() - start}


class Session:
    """The parts, the time that is left, and the report, which is rewritten after each part.

    Attributes:
        results: As :func:`benchmarks.gpu_report.report` takes them.
    """

    def __init__(self, options: GpuOptions, folder: Path, end: float) -> None:
        self.options, self.folder, self._end = options, folder, end
        self._longest_s = 2 * options.seconds + LEAST_S  # of a training, start and end included, until one was longer
        self.environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        self.results: dict[str, Any] = {
            "about": {}, "parts": {}, "runs": {}, "left_out": [], "num_samples": options.samples,
            "minutes": options.minutes, "options": asdict(options),
        }

    @property
    def left_s(self) -> float:
        """Seconds left for parts."""
        return self._end - MARGIN_S - 2 * GRACE_S - time.monotonic()

    def part(self, name: str, command: Sequence[str], seconds: float, **environment: str) -> dict[str, Any] | None:
        """Run a part; return its result, None if there is no time for it."""
        if self.left_s < LEAST_S:
            self.results["left_out"].append(name)
            return None
        done = run_limited(command, min(seconds, self.left_s), {**self.environment, **environment})
        done["said"] = done["said"].replace(f"{self.folder}/", "")
        self.results["parts"][name] = done
        self.write()
        return done

    def program(self, name: str, *arguments: str) -> list[str]:
        """Return the command line of a program in ``bin/`` on the device."""
        return [sys.executable, f"bin/{name}", *arguments, "--device", self.options.device]

    def training(self, key: str, num_ranks: int = 1) -> list[str]:
        """Return the command line of the training ``SIZE-BATCH-PRECISION``."""
        options, folder = self.options, self.folder
        size, batch, precision = key.split("-")
        command = self.program(
            "train", "--shards", str(folder / "shards"), "--vocab", str(folder / "vocab.txt"), "--run-dir",
            str(folder / f"{key}-{num_ranks}"), "--preset", size, "--batch-size", batch, "--first-batch", "0",
            "--num-samples", str(options.samples), "--precision", "bf16" if precision == "bf16" else "fp32",
            "--max-minutes", str(options.seconds / 60), "--epochs", "1000", "--report-every", "5",
            "--save-every-minutes", "0", "--progress", "none",
        )
        return [*command, *(["--max-steps", str(options.steps)] if options.steps else [])]

    def train(self, key: str) -> None:
        """Train one size, batch and precision, and keep its speed, memory at the peak and profile."""
        options, run_dir = self.options, self.folder / f"{key}-1"
        if self.left_s < self._longest_s:
            self.results["left_out"].append(key)
            return
        profiled = key.split("-")[1] == str(options.batches[0])
        command = [*self.training(key), *(["--profile", str(PROFILED)] if profiled else [])]
        environment = {**self.environment, **(TF32 if key.endswith("tf32") else {})}
        with peak_memory(torch.device(options.device)) as peak:
            done = run_limited(command, min(options.seconds + START_S, self.left_s), environment)
        self.results["runs"][key] = done
        self._longest_s = max(self._longest_s, done["seconds"])
        done["peak_bytes"] = peak()
        # As in ranks_learning.records, whose imports need packages that may be in the folder of wheels alone.
        metrics, table = run_dir / "metrics.jsonl", run_dir / "profile/rank-00000.txt"
        if not done["error"]:
            done |= speed([json.loads(line) for line in metrics.read_text().splitlines()], profiled)
        if not done["error"] and "tokens_per_s" not in done:
            done["error"] = f"no report after the warm-up in {options.seconds:g} s: give more --seconds or --steps"
        if table.exists():
            done["profile"] = table.read_text()
        self.write()

    def write(self) -> None:
        """Write the report so far."""
        output = Path(self.options.output)
        (output / "report.md").write_text(report(self.results), encoding="utf-8")
        (output / "results.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")

    @property
    def failed(self) -> bool:
        """Whether a part or a training failed."""
        return any(done["error"] for done in (*self.results["parts"].values(), *self.results["runs"].values()))


def make_corpus(session: Session) -> None:
    """Write shards of words drawn from Zipf's law, and a vocabulary of up to --words."""
    folder, num_words, num_sentences = session.folder, session.options.words, session.options.sentences
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(MEAN_LENGTH) - 0.18, 0.6, num_sentences), 2, 120).astype(int)
    odds = 1.0 / np.arange(1, num_words + 1)
    words = rng.choice(num_words, int(lengths.sum()), p=odds / odds.sum())
    sentences = np.split(words, np.cumsum(lengths)[:-1])
    texts: dict[str, Iterable[np.ndarray]] = {
        "train.txt": sentences, "text.txt": sentences[:TEXT_SENTENCES], "heldout.txt": words[:400].reshape(20, 20),
    }
    for name, some in texts.items():
        text = "\n".join(" ".join(f"w{word}" for word in sentence) for sentence in some)
        (folder / name).write_text(text + "\n", encoding="ascii")
    train, vocab = str(folder / "train.txt"), str(folder / "vocab.txt")
    program = [sys.executable, "bin/preprocess"]
    session.part("vocabulary", [*program, "vocab", train, "--output", vocab, "--threshold", "1"], CORPUS_S)
    shards = [
        "shards", train, "--heldout", str(folder / "heldout.txt"), "--vocab", vocab, "--output", str(folder / "shards"),
    ]
    session.part("shards", [*program, *shards], CORPUS_S)


def run_before_trainings(session: Session) -> None:
    """Measure the device, run the tests and the mean of dense gradients, and make the corpus."""
    device, python = session.options.device, sys.executable
    found = session.part("device", [python, "-m", "benchmarks.gpu_device", device], DEVICE_S)
    if found and not found["error"]:
        session.results["about"] = json.loads(found["said"])
        found["said"] = "measured"
    if "tests" in session.options.parts:
        session.part("tests", [python, "-m", "pytest", "tests/model/test_cuda.py", "-rs"], TESTS_S)
    if "mean" in session.options.parts:
        mean = session.folder / "mean"
        mean.mkdir()
        command = [python, "tests/dense_mean_program.py", device, str(mean)]
        num_gpus = session.results["about"].get("gpus", 0)
        if num_gpus > 1:
            command = [str(launcher()), "-n", str(num_gpus), *command]
        done = session.part("mean", command, MEAN_S, PYTHONPATH=f"{session.environment.get('PYTHONPATH', '')}:{ROOT}")
        if done and not done["error"]:
            done["said"] = ", ".join(json.loads(line)[0] for line in (mean / "0.jsonl").read_text().splitlines())
    make_corpus(session)


def run_programs(session: Session, key: str) -> None:
    """Evaluate, embed and score with the model of the training ``key``."""
    folder = session.folder
    model, text = str(folder / f"{key}-1"), str(folder / "text.txt")
    commands = {
        "evaluate": ("evaluate", model),
        "embed": ("embed", model, text, "--output", str(folder / "fp32.hdf5")),
        "embed-bf16": ("embed", model, text, "--output", str(folder / "bf16.hdf5"), "--precision", "bf16"),
        "score": ("score", model, text, "--output", str(folder / "scores.tsv")),
    }
    for name, (program, *arguments) in commands.items():
        if name in session.options.parts:
            session.part(name, session.program(program, *arguments), PROGRAM_S)


def measure(options: GpuOptions) -> bool:
    """Run everything and write the report; return whether nothing failed."""
    end = time.monotonic() + 60 * options.minutes
    Path(options.output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as text:
        session = Session(options, Path(text), end)
        if options.wheels:
            session.environment |= install(options.wheels, session.folder / "site")
        elif names := missing():
            raise ConfigError(f"these packages are missing: {', '.join(names)}; bring them with --collect and --wheels")
        run_before_trainings(session)
        if device := session.results["parts"].get("device", {}).get("error"):
            raise ConfigError(f"the device {options.device} does not work: {device}; --device cpu tries the program")
        keys = [
            f"{size}-{batch}-{precision}"
            for precision in options.precisions for batch in options.batches for size in options.sizes
        ]
        session.train(keys[0])
        run_programs(session, keys[0])
        if "ranks" in options.parts:
            session.part("ranks", [str(launcher()), "-n", "2", *session.training(keys[0], 2)], RANKS_S)
        for key in keys[1:]:
            session.train(key)
        session.write()
    print((Path(options.output) / "report.md").read_text(encoding="utf-8"))
    return not session.failed


def main() -> None:
    """Run the benchmark."""
    options = parse(GpuOptions, sys.argv[1:], prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    if options.collect:
        collect(options.collect, options.python)
    elif not measure(options):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks.gpu: {error}")
