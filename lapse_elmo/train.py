"""``bin/train``: the training loop, in the order of what happens."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from lapse_elmo import checkpoint
from lapse_elmo.ahead import read_ahead
from lapse_elmo.batches import Batch
from lapse_elmo.checkpoint import Manifest, Saver
from lapse_elmo.config.cli import as_tables
from lapse_elmo.config.training import DEFAULT_SHARDS, DEFAULT_VOCAB, Config, parse_train
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.corpus.vocabulary import VocabularyFile
from lapse_elmo.cursor import Cursor
from lapse_elmo.devices import Device, choose_device
from lapse_elmo.divergence import MARGIN_NATS, advice
from lapse_elmo.errors import ConfigError, CorpusError, TrainingError
from lapse_elmo.evaluate import evaluate, unigram_perplexity
from lapse_elmo.initial import initialise
from lapse_elmo.memory import check_memory
from lapse_elmo.metrics.profile import StepProfile
from lapse_elmo.metrics.run_log import Meter, RunLog
from lapse_elmo.metrics.server_meter import ServerMeter
from lapse_elmo.milestones import Milestones
from lapse_elmo.mpi.exit import abort
from lapse_elmo.mpi.signals import COMPLETE, INTERRUPTED, RESUMABLE, StopSignals
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters
from lapse_elmo.plan import plan_lines, show_plan
from lapse_elmo.run_folder import Corpus, Hold, Start, find_start, name_run, prepare
from lapse_elmo.run_state import EpochResult, RunState, summary
from lapse_elmo.schedule import Schedule
from lapse_elmo.step import AnnouncedBatch, TrainingStep
from lapse_elmo.watchdog import Watchdog

# What a rank says to all at a step, in addition to the saver's own flags: save, end for good, or save and end for now.
SAVE, END, SIGNAL = 4, 8, 16


def main(argv: list[str], enter: Callable[[], World]) -> int:
    """Parse, join the world, train; the exit status."""
    config = parse_train(argv)
    with StopSignals() as stop, Watchdog(config.run.stall_minutes, "bin/train") as watchdog:
        world = enter()
        stop.at_once = lambda: abort(world, INTERRUPTED, quietly=True)
        if config.server.nodes > 1:
            world.split(config.server.nodes)
        watchdog.join(world)
        config = name_run(config, world)
        corpus = open_corpus(config, world)
        with Hold(Path(config.run.run_dir), world, active=not config.run.dry_run):
            world.progress.enter("start, looking for a checkpoint")
            start = find_start(config, corpus, world)
            device = choose_device(config.devices, world)
            memory = check_memory(config, corpus.vocabulary.size, corpus.train, world)
            if not config.run.dry_run:
                return train(config, world, corpus, device, start, stop, memory)
            show_plan(config, world, corpus, device, start, memory)
            return COMPLETE


def train(
    config: Config, world: World, corpus: Corpus, device: Device, start: Start, stop: StopSignals,
    memory: tuple[str, ...],
) -> int:
    """Collective: make the parameters, new or as they were saved, and train; the exit status."""
    run_dir = Path(config.run.run_dir)
    first_sample = start.step * config.training.accumulate
    world.progress.enter("start, making the parameters")
    parameters = Parameters(config, corpus.vocabulary.size, world, device.device, first_sample=first_sample)
    if start.path is None:
        memory = (*initialise(parameters, config, corpus.vocabulary, world), *memory)
    world.agree(lambda: prepare(run_dir, config, start))  # the first to write, once nothing else can be refused
    if start.path is not None:
        world.progress.enter("start, reading the checkpoint")
        checkpoint.restore(start.path, start.manifest, parameters, world)
    training = Training(config, world, corpus, parameters, device, start, stop)
    training.announce(memory)
    status = training.run()
    if status == COMPLETE and world.rank == 0:
        unigram = math.exp(training.state.watch.bound - MARGIN_NATS)
        print(summary(training.state.results, unigram, run_dir))
    parameters.server.close()
    return status


class Training:
    """A run from its start, at the beginning or at a checkpoint, to its end (collective)."""

    def __init__(
        self, config: Config, world: World, corpus: Corpus, parameters: Parameters, device: Device, start: Start,
        stop: StopSignals,
    ) -> None:
        self.config = config
        self.world = world
        self.corpus = corpus
        self.parameters = parameters
        self.device = device
        self.stop = stop
        self.run_dir = Path(config.run.run_dir)
        self.cursor = Cursor(config, world, corpus.train, start.cursor)
        self.state = world.together(lambda: RunState.of(start.manifest["state"]) if start.manifest else RunState())
        if math.isinf(self.state.watch.bound):
            unigram = unigram_perplexity(corpus.train, corpus.heldout, config.data.boundaries, world)
            self.state.watch.bound = math.log(unigram) + MARGIN_NATS
        self.sentence_tokens = min(corpus.train.num_tokens / corpus.train.num_sentences, config.data.max_length)
        self.schedule = Schedule(config.optimizer, self.cursor.run_sentences() * self.sentence_tokens)
        self.evaluate_every = config.training.evaluate_every
        self.max_s = config.training.max_minutes * 60 or math.inf
        self.log = RunLog(
            self.run_dir, config.run, self.cursor.num_steps, world.rank == 0, self.max_s, self.cursor.step,
            world.allgather(world.host),
        )
        self.server_meter = ServerMeter(parameters.server, world)
        self.server_meter.go_on(self.state.served)
        self.milestones = Milestones(config.run.save_at_tokens, start.manifest.get("milestones"))
        self.saver = saver_of(self.run_dir, world, start, config.run.keep_checkpoints)
        self.saved_s = time.monotonic()
        self.start = start

    def announce(self, memory: tuple[str, ...]) -> None:
        """Collective: log who does what, and what is about to be trained."""
        plan = plan_lines(self.config, self.world, self.corpus, self.device, self.cursor, self.start)
        for line in (*plan, *memory):
            self.log.log_line(line)
        for emulated in self.parameters.server.emulated:
            self.log.log_line(f"--ps {self.config.server.ps}: {emulated}")

    def run(self) -> int:
        """Train until the epochs, steps, minutes or patience are over, or a signal asks for an end; the exit status."""
        every, cursor, state, log = self.config.run, self.cursor, self.state, self.log
        targets = sentence_targets(self.config, self.corpus.train)
        step_once = TrainingStep(self.config, self.world, self.parameters, self.device.device, targets, self.flag)
        if step_once.remark:
            log.log_line(step_once.remark)
        profile = StepProfile(self.run_dir, every.profile, self.world.rank)
        signalled = False
        with self.saver:
            if state.evaluation_due:
                self.save(self.evaluate())
            # Clocks differ between ranks; they must agree, or some would train while others leave.
            over = any(self.world.allgather(cursor.finished or state.elapsed_s > self.max_s or self.out_of_patience))
            made = read_ahead(iter(()) if over else cursor.batches())
            source = look_ahead(made, step_once, self.config.training.lookahead)
            for announced in source:
                log.epoch = cursor.epoch + 1
                with profile.of_step():
                    result = step_once(announced, cursor.step + 1, self.rate())
                epoch_ended = cursor.trained([part.batch for part in announced])
                state.add(result)
                milestone = self.milestones.add(result.num_tokens, cursor.step)
                self.refuse_divergence(state.watch.seen())
                log.step(cursor.step, state.meter)
                self.saver.look(result.flags)
                signalled, over, save = (any(flag & name for flag in result.flags) for name in (SIGNAL, END, SAVE))
                over = over or cursor.finished
                if cursor.step % every.report_every == 0 or over:
                    served = self.server_meter.metrics(state.meter.num_steps)
                    log.report(
                        cursor.step, state.meter, {**served, "train/trained_tokens": self.trained_tokens},
                        self.server_meter.placement(), self.phases_of_slowest(),
                    )
                    state.meter = Meter()
                state.evaluation_due = epoch_ended or over or comes_round(self.evaluate_every, cursor.step)
                perplexity = self.evaluate() if state.evaluation_due and not signalled else None
                over = over or self.out_of_patience
                save = save or milestone or comes_round(every.save_every_steps, cursor.step)
                save = save and not state.watch.suspicious
                if perplexity is not None or signalled or save:
                    self.save(perplexity)
                if over or signalled:
                    break
            self.world.progress.enter(f"last save, after step {cursor.step}")
            self.saver.finish()
        profile.close()
        step_once.close()
        if signalled:
            log.log_line(farewell(self.stop.asked, cursor.step, self.run_dir))
        log.close()
        return RESUMABLE if signalled else COMPLETE

    def phases_of_slowest(self) -> dict[str, float]:
        """Collective: seconds by phase of the rank that computed longest since the last report."""
        meter = self.state.meter
        slowest = meter.slowest()  # the same on all ranks
        return self.world.bcast(meter.seconds, slowest[0]) if slowest and self.world.size > 1 else {}

    @property
    def trained_tokens(self) -> int:
        """Tokens of all ranks, in all epochs: sentences times their mean length, by which batch and rate go."""
        return round(self.cursor.trained_sentences * self.sentence_tokens)

    def rate(self) -> float:
        """The learning rate of the next step."""
        cursor, length = self.cursor, self.sentence_tokens
        return self.schedule.rate(cursor.trained_sentences * length, cursor.step_sentences * length)

    def refuse_divergence(self, seen: str) -> None:
        """:raises TrainingError: on every rank, if something was ``seen`` that shows that the training diverges."""
        if not seen:
            return
        self.saver.finish()
        best = self.saver.best  # the newest one may have the step in it that did the harm
        kept = "no evaluated checkpoint is saved yet"
        if best is not None:
            kept = f"the best checkpoint is {best[1]} (resume it by --resume with --overwrite)"
        raise TrainingError(
            f"training diverges at step {self.cursor.step:,}: {seen}; {kept}; {advice(self.rate())}"
        ).on_every_rank()

    def flag(self) -> int:
        """What this rank has to say to all at a step."""
        minutes = self.config.run.save_every_minutes
        save = 0 < minutes * 60 < time.monotonic() - self.saved_s
        over = self.state.elapsed_s > self.max_s
        return self.saver.flag | save * SAVE | over * END | bool(self.stop.asked) * SIGNAL

    @property
    def out_of_patience(self) -> bool:
        return self.state.out_of_patience(self.config.training.patience)

    def save(self, perplexity: float | None) -> None:
        """Collective: begin to save a checkpoint; ``perplexity`` is held-out, where it was measured at this step."""
        start = time.perf_counter()
        self.world.progress.enter(f"save at step {self.cursor.step}")
        self.state.served = self.server_meter.pending()
        self.saver.pinned = {checkpoint.path_of(self.run_dir, step) for step in self.milestones.steps}
        with self.server_meter.aside():
            self.saver.start(self.parameters, self.cursor, self._manifest(), perplexity)
        self.state.meter.seconds["save"] = self.state.meter.seconds.get("save", 0.0) + time.perf_counter() - start
        self.saved_s = time.monotonic()

    def _manifest(self) -> Manifest:
        results = self.state.results
        return {
            "vocabulary_sha256": self.corpus.vocabulary.sha256, "num_classes": self.corpus.vocabulary.size,
            "num_train_tokens": self.corpus.train.num_tokens, "config": as_tables(self.config),
            "corpus": self.corpus.names(), "state": self.state.plain(),
            "results": {"heldout_perplexity": results[-1].heldout.mean} if results else {},
            "milestones": self.milestones.plain(),
        }

    def evaluate(self) -> float:
        """Collective: settle the parameters and measure held-out perplexity."""
        state, cursor, log, whole = self.state, self.cursor, self.log, self.state.whole
        tokens_per_s = whole.tokens_per_s
        self.world.progress.enter(f"evaluation at step {cursor.step}")
        self.parameters.sync_parameters()
        start = time.perf_counter()
        with self.server_meter.aside():
            heldout = evaluate(
                self.parameters, self.corpus.heldout, self.config.data, self.config.training.batch_size, self.world,
                self.device.device,
            )
        if not math.isfinite(heldout.mean):
            raise TrainingError(
                f"held-out perplexity is not finite at step {cursor.step}; this model is not saved; lower "
                "--learning-rate, --loss-scale or --clip-norm"
            ).on_every_rank()
        self.refuse_divergence(state.watch.seen_heldout(math.log(heldout.mean)))
        log.write(
            "epoch", cursor.step,
            {
                "epoch": math.ceil(cursor.epochs_done), "train/epoch_loss_nats": whole.loss,
                "train/epoch_tokens": whole.num_tokens, "train/epoch_tokens_per_s": tokens_per_s,
                "train/trained_tokens": self.trained_tokens,
                "train/cut_sentences": whole.num_cut,
                "heldout/forward_perplexity": heldout.forward, "heldout/backward_perplexity": heldout.backward,
                "heldout/mean_perplexity": heldout.mean, "heldout/evaluation_s": time.perf_counter() - start,
            },
        )
        log.log_line(
            f"step {cursor.step:,}, {cursor.epochs_done:.2f} epochs: loss {whole.loss:.3f}, held-out perplexity "
            f"{heldout.mean:.1f} (forward {heldout.forward:.1f}, backward {heldout.backward:.1f})"
        )
        if whole.num_cut:
            log.log_line(f"{whole.num_cut:,} sentences were cut at --max-length {self.config.data.max_length}")
        state.results.append(
            EpochResult(cursor.step, cursor.epochs_done, whole.num_tokens, tokens_per_s, whole.loss, heldout)
        )
        state.evaluation_due = False
        if not cursor.within_epoch:
            state.whole = Meter()
        return heldout.mean


def comes_round(every: int, step: int) -> bool:
    """Whether ``step`` is one of every so many; 0 is never."""
    return every > 0 and step % every == 0


def saver_of(run_dir: Path, world: World, start: Start, num_newest: int) -> Saver:
    """The saver of a run: what it started from, and the best of the run, are kept."""
    if start.path is None or start.path.parent.parent.resolve() != run_dir.resolve():
        return Saver(run_dir, world, num_newest=num_newest)
    best = start.manifest["best"]
    path = checkpoint.path_of(run_dir, best["step"]) if best else None
    known = (best["perplexity"], path) if path is not None and path.is_dir() else None
    kept = [other for other in reversed(checkpoint.candidates(run_dir)) if other.name <= start.path.name]
    return Saver(run_dir, world, kept[-num_newest:], known, num_newest)


def farewell(signal: str, step: int, run_dir: Path) -> str:
    """What rank 0 says when a signal has ended the run."""
    return (
        f"{signal or 'a signal to another rank'} ended the run: a checkpoint of step {step:,} is saved; the same "
        f"command with --run-dir {run_dir} goes on from there"
    )


def open_corpus(config: Config, world: World) -> Corpus:
    """Collective: the vocabulary and both splits of shards, checked against each other."""
    data = config.data

    def check_defaults() -> None:
        if data.shards == DEFAULT_SHARDS and not Path(data.shards).exists():
            raise CorpusError(
                f"there are no shards at {DEFAULT_SHARDS} yet: run 'make train' for a first corpus, or bin/preprocess "
                "vocab and bin/preprocess shards on your text (README.md), or name others by --shards and --vocab"
            )
        if data.vocab == DEFAULT_VOCAB and data.shards != DEFAULT_SHARDS and not Path(data.vocab).exists():
            raise CorpusError(f"there is no vocabulary at {DEFAULT_VOCAB}: name that of {data.shards} by --vocab")

    world.progress.enter("start, opening the corpus")
    world.agree(check_defaults)
    vocabulary = world.agree(lambda: VocabularyFile.check(data.vocab))
    train_set = ShardSet.open_on_all(world, data.shards, "train", vocabulary)
    heldout = ShardSet.open_on_all(world, data.heldout or data.shards, "heldout", vocabulary)
    if train_set.num_sentences < world.size * config.training.accumulate:
        parts = f" with {config.training.accumulate} parts each" if config.training.accumulate > 1 else ""
        raise ConfigError(
            f"{train_set.num_sentences} training sentences cannot be shared by {world.size} ranks{parts}: start fewer "
            f"ranks{' or lower --accumulate' if parts else ''}"
        ).on_every_rank()
    if not data.boundaries and (data.max_length == 1 or heldout.num_tokens == heldout.num_sentences):
        raise ConfigError(
            "the held-out sentences have no targets: single tokens need --boundaries"
        ).on_every_rank()
    return Corpus(vocabulary, train_set, heldout)


def sentence_targets(config: Config, shards: ShardSet) -> float:
    """How many targets, of both directions, a sentence has on average."""
    length = min(shards.num_tokens / shards.num_sentences, config.data.max_length)
    return max(2 * (length + (1 if config.data.boundaries else -1)), 1.0)


def look_ahead(
    source: Iterator[tuple[Batch, ...]], step_once: TrainingStep, lookahead: int
) -> Iterator[list[AnnouncedBatch]]:
    """The steps' batches of ``source``, announced ``lookahead`` clocks before they are handed out."""
    announced: deque[list[AnnouncedBatch]] = deque()
    for clock, batches in enumerate(source):
        announced.append([step_once.announce(batch, clock) for batch in batches])
        if len(announced) > lookahead:
            yield announced.popleft()
    yield from announced
