"""Test and time everything that runs on a GPU, in one go: ``python -m benchmarks.gpu``.

Runs tests/model/test_cuda.py, measures the card's own matrix rates, trains the ``small`` and ``original`` sizes with
``bin/train`` on made-up text (B 32, 128 and 256; float32, TF32 and bfloat16), and writes one report: tokens/s, their
share of the measured bfloat16 rate, memory at the peak, and where the time of a step goes. It ends within
``--minutes``; what was left out is listed in the report. The status is 1 if a test or a training failed.

The machine needs torch with CUDA. Other packages that it lacks can travel as wheels: on a machine with a network
``python -m benchmarks.gpu --collect wheels`` downloads them (some 40 MB), and ``--wheels wheels`` on the GPU machine
installs those that are missing into a temporary folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.step import lstm_flops, softmax_flops
from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import PRESETS
from lapse_elmo.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parent.parent
# What bin/train and the tests import in addition to torch and its own requirements: (module, distribution).
PACKAGES = (
    ("mpich", "mpich"), ("mpi4py", "mpi4py"), ("h5py", "h5py"), ("safetensors", "safetensors"), ("tqdm", "tqdm"),
    ("tomli_w", "tomli-w"), ("backports.zstd", "backports.zstd"), ("pytest", "pytest"), ("pluggy", "pluggy"),
    ("iniconfig", "iniconfig"), ("hypothesis", "hypothesis"), ("sortedcontainers", "sortedcontainers"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
NUM_WORDS, NUM_SENTENCES, MEAN_LENGTH = 100_000, 100_000, 25  # of the text that is made up
SAMPLES = 8192
PHASES = ("pull", "compute", "agree", "push")  # of a step, in metrics.jsonl
SECONDS_PER_RUN = 12.0  # of training, after the start
TF32 = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}  # torch then takes TF32 for float32 products


@dataclass(frozen=True)
class GpuOptions:
    """What to run, and for how long."""

    minutes: float = option(8.0, metavar="N", help="time for everything")
    output: str = option("gpu-report", metavar="DIR", help="folder for report.md, results.json and the test log")
    sizes: tuple[str, ...] = option(("small", "original"), help="small, original")
    batches: tuple[int, ...] = option((128, 256, 32), metavar="B", help="sentences per step, most important first")
    precisions: tuple[str, ...] = option(("bf16", "tf32", "fp32"), help="bf16, tf32, fp32, most important first")
    seconds: float = option(SECONDS_PER_RUN, metavar="N", help="training time of each run")
    device: str = option("cuda", choices=("cuda", "cpu"), help="cpu tries the program itself, without a GPU")
    collect: str | None = option(None, metavar="DIR", help="only download the wheels that a GPU machine may lack")
    python: str = option("3.12", metavar="VERSION", help="Python of the GPU machine, for --collect")
    wheels: str | None = option(None, metavar="DIR", help="install the packages that are missing from here")


def collect(folder: str, python: str) -> None:
    """Download the wheels of PACKAGES, with the versions of this environment, for another machine."""
    from importlib.metadata import version

    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    names = [f"{name}=={version(name)}" for _, name in PACKAGES]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--python-version", python, *platforms, "-d", folder, *names], check=True)


def missing(modules: tuple[tuple[str, str], ...] = PACKAGES) -> list[str]:
    """Return the distributions whose modules cannot be found."""

    def found(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # of the package around it
            return False

    # The wheel of MPICH has no module: it brings libmpi and mpirun.
    return [name for module, name in modules if not (launcher() if module == "mpich" else found(module))]


def launcher() -> str | None:
    """Return the mpirun next to this Python or on the PATH, None without one."""
    return shutil.which("mpirun", path=f"{sys.prefix}/bin:{os.environ.get('PATH', '')}")


def install(wheels: str, site: Path) -> dict[str, str]:
    """Install missing packages into ``site``; return the environment in which programs find them."""
    names = missing()
    if names:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links", wheels]
        subprocess.run([*command, "--target", str(site), *names], check=True)
    return {
        "PYTHONPATH": f"{site}:{ROOT}",
        "PATH": f"{site}/bin:{sys.prefix}/bin:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": f"{site}/lib:{os.environ.get('LD_LIBRARY_PATH', '')}",
    }


def matrix_rates(device: torch.device, size: int = 8192) -> dict[str, float]:
    """Return the rates of square products in FLOP/s, by precision: the best of five."""
    rates = {}
    size = size if device.type == "cuda" else 512
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        times = []
        for _ in range(6):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(first, second)
            synchronize(device)
            times.append(time.perf_counter() - start)
        rates[name] = 2.0 * size**3 / min(times[1:])
    torch.backends.cuda.matmul.allow_tf32 = False
    return rates


def synchronize(device: torch.device) -> None:
    """Wait for all work on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_flops(size: str) -> float:
    """Return the operations of one token in training: products of LSTM and sampled softmax, both directions."""
    width, cells, layers = (PRESETS[size][name] for name in ("projection_size", "cell_size", "num_layers"))
    return lstm_flops(width, cells, layers) + 2 * softmax_flops(width, SAMPLES)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Sample the card's memory in use, by all processes, while the context is open; yields a function of the peak."""
    peak, over = [0.0], threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            free, total = torch.cuda.mem_get_info(device)
            peak[0] = max(peak[0], float(total - free))

    thread = threading.Thread(target=sample, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield lambda: peak[0]
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def make_corpus(folder: Path, environment: dict[str, str]) -> None:
    """Write shards of words drawn from Zipf's law, and a vocabulary of up to NUM_WORDS."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(MEAN_LENGTH) - 0.18, 0.6, NUM_SENTENCES), 2, 120).astype(int)
    odds = 1.0 / np.arange(1, NUM_WORDS + 1)
    words = rng.choice(NUM_WORDS, int(lengths.sum()), p=odds / odds.sum())
    texts: dict[str, Iterable[np.ndarray]] = {
        "train.txt": np.split(words, np.cumsum(lengths)[:-1]), "heldout.txt": words[:400].reshape(20, 20),
    }
    for name, sentences in texts.items():
        text = "\n".join(" ".join(f"w{word}" for word in sentence) for sentence in sentences)
        (folder / name).write_text(text + "\n", encoding="ascii")
    program = [sys.executable, "bin/preprocess"]
    vocab = ["vocab", str(folder / "train.txt"), "--output", str(folder / "vocab.txt"), "--threshold", "1"]
    shards = [
        "shards", str(folder / "train.txt"), "--heldout", str(folder / "heldout.txt"), "--vocab",
        str(folder / "vocab.txt"), "--output", str(folder / "shards"),
    ]
    for arguments in (vocab, shards):
        subprocess.run([*program, *arguments], cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)


def train(
    folder: Path, size: str, batch: int, precision: str, options: GpuOptions, environment: dict[str, str]
) -> dict[str, Any]:
    """Train for some seconds; return tokens/s, seconds by phase, memory at the peak, and the profile's table."""
    run_dir = folder / f"{size}-{batch}-{precision}"
    profiled = ["--profile", "5"] if batch == options.batches[0] else []
    command = [
        sys.executable, "bin/train", "--shards", str(folder / "shards"), "--vocab", str(folder / "vocab.txt"),
        "--run-dir", str(run_dir), "--preset", size, "--batch-size", str(batch), "--first-batch", "0",
        "--num-samples", str(SAMPLES), "--precision", "bf16" if precision == "bf16" else "fp32", "--device",
        options.device, "--max-minutes", str(options.seconds / 60), "--epochs", "1000", "--report-every", "5",
        "--save-every-minutes", "0", "--progress", "none", *profiled,
    ]
    more = TF32 if precision == "tf32" else {}
    with peak_memory(torch.device(options.device)) as peak:
        found = subprocess.run(command, cwd=ROOT, env={**environment, **more}, capture_output=True, text=True)
    if found.returncode:
        return {"error": (found.stderr.strip().splitlines() or ["no message"])[-1], "status": found.returncode}
    # As in ranks_learning.records, whose imports need packages that may be in the folder of wheels alone.
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    reports = [entry for entry in lines if entry["kind"] == "train"][1:]  # the first includes the warm-up
    if not reports:
        return {"error": f"less than 10 steps in {options.seconds} s"}
    result: dict[str, Any] = {
        name: statistics.median(entry[name] for entry in reports)
        for name in reports[0] if name == "train/tokens_per_s" or name.startswith("step/")
    }
    result["peak_bytes"] = peak()
    table = run_dir / "profile/rank-00000.txt"
    if table.exists():
        result["profile"] = table.read_text()
    return result


def report(options: GpuOptions, about: dict[str, Any], runs: dict[str, dict[str, Any]], left_out: list[str]) -> str:
    """Return the report as Markdown."""
    rates = ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in about["rates"].items())
    lines = [
        f"# {about['device']}, torch {torch.__version__}", "",
        f"Products of 8,192 x 8,192 in TFLOP/s: {rates}.",
        f"tests/model/test_cuda.py: {about['tests']}.", "",
        f"| size | B | precision | tokens/s | share of the bf16 rate | {', '.join(PHASES)} (ms) | peak memory (GB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in runs.items():
        size, batch, precision = name.split("-")
        if "error" in result:
            lines.append(f"| {size} | {batch} | {precision} | failed: {result['error']} | | | |")
            continue
        speed = result["train/tokens_per_s"]
        share = speed * training_flops(size) / about["rates"]["bf16"]
        phases = ", ".join(f"{1e3 * result[f'step/{phase}_s']:.1f}" for phase in PHASES)
        peak = f"{result['peak_bytes'] / 1e9:.1f}"
        lines.append(f"| {size} | {batch} | {precision} | {speed:,.0f} | {share:.1%} | {phases} | {peak} |")
    if left_out:
        lines += ["", f"Left out, as --minutes {options.minutes:g} were over: {', '.join(left_out)}."]
    for name, result in runs.items():
        if "profile" in result:
            lines += ["", f"## A step of {name}", "", "```", result["profile"].strip(), "```"]
    return "\n".join(lines) + "\n"


def run_tests(output: Path, environment: dict[str, str]) -> tuple[bool, str]:
    """Run the GPU tests; return whether they passed, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "tests/model/test_cuda.py", "-rs"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (output / "tests.log").write_text(found.stdout + found.stderr)
    return found.returncode == 0, (found.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")


def measure(options: GpuOptions) -> bool:
    """Run everything and write the report; return whether nothing failed."""
    end = time.monotonic() + 60 * options.minutes
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no GPU that torch can use here: --device cpu tries the program without one")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        if options.wheels:
            environment |= install(options.wheels, folder / "site")
        elif names := missing():
            raise ConfigError(f"these packages are missing: {', '.join(names)}; bring them with --collect and --wheels")
        passed, tests = run_tests(output, environment)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        about = {"device": name, "tests": tests, "rates": matrix_rates(device)}
        make_corpus(folder, environment)
        runs: dict[str, dict[str, Any]] = {}
        left_out = []
        longest = 2 * options.seconds + 5  # start and end of a run included, until one was longer
        for precision in options.precisions:
            for batch in options.batches:
                for size in options.sizes:
                    key = f"{size}-{batch}-{precision}"
                    if time.monotonic() + longest > end:
                        left_out.append(key)
                        continue
                    start = time.monotonic()
                    runs[key] = train(folder, size, batch, precision, options, environment)
                    longest = max(longest, time.monotonic() - start)
                    (output / "results.json").write_text(json.dumps({**about, "runs": runs}, indent=1))
                    (output / "report.md").write_text(report(options, about, runs, left_out))
        (output / "report.md").write_text(report(options, about, runs, left_out))
    print((output / "report.md").read_text())
    return passed and not any("error" in result for result in runs.values())


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
