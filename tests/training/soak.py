"""``make soak``: a run of 4 ranks that is killed 20 times is the run that was not, to the bit.

At each kill a rank drawn by lot gets SIGKILL: at a random instant, or (every other time) while a checkpoint is being
written. After it every checkpoint that has a name must be whole, and nothing may be left running. The next start goes
on. Bounded: it ends within ``LIMIT_S``, or fails.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lapse_elmo import checkpoint
from tests import mpi
from tests.training.corpora import Prepared, assert_same_run, prepare, random_sentences, records, train_job

RANKS, KILLS, STEPS_PER_KILL, LIMIT_S = 4, 20, 6, 1800
OPTIONS = (
    "--sync", "--epochs", "3", "--batch-size", "4", "--report-every", "1", "--save-every-steps", "3",
    "--projection-size", "64", "--num-samples", "256", "--evaluate-every", "5", "--first-batch", "8", "--growth-tokens",
    "3000", "--warmup-tokens", "2000", "--schedule", "cosine",
)


def main(seed: int) -> None:
    """Print one line per kill, and raise if a check fails."""
    start = time.monotonic()
    lots = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [f"w{number}" for number in range(20_000)]
        sentences = [" ".join(words[i : i + 15]) for i in range(0, len(words), 15)]
        corpus = prepare(folder, [*sentences[:640], *random_sentences(2, 40, 90, (3, 9))], sentences[:20])
        undisturbed, killed = folder / "undisturbed", folder / "killed"
        print(f"seed {seed}: an undisturbed run of {RANKS} ranks", flush=True)
        train_to_the_end(corpus, undisturbed, start)
        in_saves = sum(kill(corpus, killed, number, lots, start) for number in range(KILLS))
        train_to_the_end(corpus, killed, start)
        assert_same_run(undisturbed, killed)
        assert not [path for path in (killed / checkpoint.FOLDER).iterdir() if path.name.startswith(".")]
        steps = records(killed)[-1]["step"]
    print(
        f"{KILLS} kills, {in_saves} of them in the middle of a save: after {steps} steps the same bits as undisturbed; "
        f"{time.monotonic() - start:.0f} s"
    )


def train_to_the_end(corpus: Prepared, run_dir: Path, start: float) -> None:
    with train_job(RANKS, corpus, run_dir, *OPTIONS, fork=False) as job:
        ended = job.wait(LIMIT_S - (time.monotonic() - start))
    assert ended.returncode == 0 and not ended.survivors, ended.output


def kill(corpus: Prepared, run_dir: Path, number: int, lots: random.Random, start: float) -> bool:
    """Start or resume, kill a rank, and check what is left; return whether a save was under way."""
    step = max(STEPS_PER_KILL * number + lots.randrange(STEPS_PER_KILL), last_step(run_dir)) + 1  # one that is new
    in_save = number % 2 == 1
    with train_job(RANKS, corpus, run_dir, *OPTIONS, fork=False) as job:
        wait_until(lambda: last_step(run_dir) >= step, job, start)
        if in_save:
            wait_until(lambda: bool(partial(run_dir)), job, start)
            time.sleep(lots.random() * 0.02)
        else:
            time.sleep(lots.random() * 0.5)
        rank = lots.randrange(RANKS)
        os.kill(sorted(job.rank_pids())[rank], signal.SIGKILL)
        killed = time.monotonic()
        ended = job.wait(30)
    assert ended.returncode not in (0, 2, 75) and not ended.survivors, ended.output
    whole = []
    for path in checkpoint.candidates(run_dir):
        checkpoint.check_files(path, checkpoint.read_manifest(path))
        whole.append(path.name)
    caught = bool(partial(run_dir))
    print(
        f"kill {number + 1:2}: rank {rank} at step {last_step(run_dir)}, {'in a save' if caught else 'between saves'}; "
        f"the job ended after {time.monotonic() - killed:.1f} s; whole: {', '.join(whole) or 'none yet'}", flush=True,
    )
    return caught


def wait_until(reached: Callable[[], bool], job: mpi.RunningJob, start: float) -> None:
    while not reached():
        assert job.running() and time.monotonic() - start < LIMIT_S, job.text()
        time.sleep(0.001)


def last_step(run_dir: Path) -> int:
    try:
        last = (run_dir / "metrics.jsonl").read_bytes().rsplit(b'"step": ', 1)
    except FileNotFoundError:
        return 0
    return int(last[1].split(b",")[0]) if len(last) == 2 and b"," in last[1] else 0


def partial(run_dir: Path) -> list[Path]:
    return list((run_dir / checkpoint.FOLDER).glob(".step-*.partial"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
