"""The closing output of a run: a table of its evaluations and next commands, or how to resume it."""

from __future__ import annotations

import shlex
from pathlib import Path

from lapse_elmo import checkpoint
from lapse_elmo.config.training import RunConfig
from lapse_elmo.metrics.run_log import table
from lapse_elmo.program import as_called
from lapse_elmo.run_state import EpochResult

_MAX_ROWS = 20


def summary(results: list[EpochResult], unigram: float, run_dir: Path, best: tuple[float, Path] | None) -> str:
    """Return what a completed run prints: a table of its last evaluations, and commands for its best model.

    Args:
        results: All evaluations of the run.
        unigram: Held-out perplexity of word frequencies alone.
        run_dir: The directory of the run.
        best: Held-out perplexity and directory of the checkpoint to which ``RUN/best`` links, if there is one. A better
            evaluation may have been before the run was resumed in another directory, where its checkpoint is not.
    """
    head = ("epochs", "tokens", "tokens/s", "training loss", "held-out forward", "backward", "mean", "unigram")
    rows = [
        (
            *(f"{r.epoch:.2f}".removesuffix(".00"), f"{r.num_tokens:,}"),
            *(f"{r.tokens_per_s:,.0f}", f"{r.training_loss:.3f}"),
            *(f"{value:.1f}" for value in (r.heldout.forward, r.heldout.backward, r.heldout.mean, unigram)),
        )
        for r in results[-_MAX_ROWS:]
    ]
    lines = [table([head, *rows]), "", f"Perplexity is exp(loss per target); the run is in {run_dir}."]
    if best is not None:
        path, step = shlex.quote(str(run_dir / checkpoint.BEST)), checkpoint.step_of(best[1])
        lines += [
            f"The best model, of step {step:,}, is {path}: perplexity {best[0]:.1f}.",
            f"To evaluate it: bin/evaluate {path} [--shards DIR]",
            f"To export it:   bin/export {path} --output DIR    (for AllenNLP, bilm-tf)",
            f"To embed text:  bin/embed {path} TEXT... --output FILE.hdf5",
        ]
    return as_called("\n".join(["", *lines]))


def stop_message(signal: str, step: int, run: RunConfig) -> str:
    """Return the line to print when a signal has stopped the run; ``signal`` is "" if another rank got it."""
    repeated = ["--overwrite"] * run.overwrite + [f"--resume {shlex.quote(run.resume)}"] * (run.resume != "auto")
    without = f" and without {' and '.join(repeated)}" if repeated else ""  # they would discard or refuse what is saved
    return (
        f"{signal or 'a signal to another rank'} ended the run: a checkpoint of step {step:,} is saved; the same "
        f"command with --run-dir {shlex.quote(run.run_dir)}{without} resumes from it"
    )


def patience_message(patience: int) -> str:
    """Return the line to print when early stopping has ended the run, long before its last step or at a resume."""
    evaluations = "evaluation" if patience == 1 else f"{patience:,} evaluations"
    return (
        f"--patience {patience} ended the run: the last {evaluations} brought no better held-out perplexity; the same "
        "command with a larger --patience resumes it"
    )
