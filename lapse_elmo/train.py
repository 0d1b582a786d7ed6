"""``bin/train``: the training loop, in the order of execution."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from lapse_elmo import checkpoint
from lapse_elmo.ahead import announce_ahead, read_ahead
from lapse_elmo.checkpoint import Manifest
from lapse_elmo.config.cli import as_tables
from lapse_elmo.config.training import Config, parse_train
from lapse_elmo.corpus.node_sentences import keep_sentences
from lapse_elmo.cursor import Cursor
from lapse_elmo.devices import Device, choose_device
from lapse_elmo.divergence import MARGIN_NATS, advice
from lapse_elmo.errors import TrainingError, UserError
from lapse_elmo.forecast import forecast_lines
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
from lapse_elmo.perplexity import measure_perplexity, unigram_perplexity
from lapse_elmo.plan import plan_lines, show_plan
from lapse_elmo.run_folder import TRACE, ResumePoint, RunLock, find_resume_point, name_run, open_saver, prepare
from lapse_elmo.run_state import EpochResult, RunState
from lapse_elmo.schedule import Rates, Schedule
from lapse_elmo.step import TrainingStep
from lapse_elmo.step_report import Vote
from lapse_elmo.summary import patience_message, stop_message, summary
from lapse_elmo.training_data import TrainingData, open_training_data, sentence_targets, sentence_tokens
from lapse_elmo.watchdog import Watchdog


def main(argv: list[str], enter: Callable[[], World]) -> int:
    """Parse the options, join the world and train; return the exit status."""
    config = parse_train(argv)
    only_plan = config.run.dry_run or config.plan.plan_nodes > 0
    with StopSignals() as stop, Watchdog(config.run.stall_minutes, "bin/train") as watchdog:
        world = enter()
        stop.at_once = lambda: abort(world, INTERRUPTED, quietly=True)
        if config.server.nodes > 1:
            world.split(config.server.nodes)
        watchdog.join(world)
        config = name_run(config, world)
        data = open_training_data(config, world)
        with RunLock(Path(config.run.run_dir), world, active=not only_plan):
            world.progress.enter("start, looking for a checkpoint")
            start = find_resume_point(config, data, world)
            device = choose_device(config.devices, world)
            on_gpu = [kind != "cpu" for kind in world.allgather(device.device.type)]
            memory = check_memory(config, data.vocabulary.size, data.train, world, on_gpu)
            if not only_plan:
                return train(config, world, data, device, start, stop, memory)
            if config.plan.plan_nodes:
                memory = (*memory, *forecast_lines(config, world, data, device))
            show_plan(config, world, data, device, start, memory)
            return COMPLETE


def train(
    config: Config, world: World, data: TrainingData, device: Device, start: ResumePoint, stop: StopSignals,
    memory: tuple[str, ...],
) -> int:
    """Make the parameters, new or from a checkpoint, and train (collective); return the exit status.

    Args:
        config: The options.
        world: The world.
        data: What to train on.
        device: Where this rank computes.
        start: The checkpoint to resume from, or the beginning.
        stop: The signals that ask the run to stop.
        memory: Lines for the log, about the memory that the run needs.
    """
    run_dir = Path(config.run.run_dir)
    first_sample = start.step * config.training.accumulate
    world.progress.enter("start, making the parameters")
    parameters = Parameters(config, data.vocabulary.size, world, device.device, first_sample=first_sample)
    if start.path is None:
        memory = (*initialise(parameters, config, data.vocabulary, world), *memory)
    # Writes to the run's directory for the first time: everything that can refuse the run has been checked by now.
    world.agree(lambda: prepare(run_dir, config, start, data.vocabulary))
    if start.files is not None:
        world.progress.enter("start, reading the checkpoint")
        checkpoint.restore(start.files, start.manifest, parameters, world)
    world.together(lambda: parameters.start_trace(run_dir / TRACE))
    training = Training(config, world, data, parameters, device, start, stop)
    training.announce(memory)
    try:
        status = training.run()
    except UserError as error:
        if error.everywhere:
            parameters.save_trace()
        raise
    if status == COMPLETE and world.rank == 0:
        unigram = math.exp(training.state.watch.bound - MARGIN_NATS)
        print(summary(training.state.results, unigram, run_dir, training.saver.best))
    parameters.server.close()
    return status


class Training:
    """A run from its start, at the beginning or at a checkpoint, to its end (all methods are collective)."""

    def __init__(
        self, config: Config, world: World, data: TrainingData, parameters: Parameters, device: Device,
        start: ResumePoint, stop: StopSignals,
    ) -> None:
        self.config = config
        self.world = world
        self.data = data
        self.parameters = parameters
        self.device = device
        self.stop = stop
        self.run_dir = Path(config.run.run_dir)
        keep_sentences([data.train, data.heldout], world)  # first, so that what follows opens no shard
        self.cursor = Cursor(config, world, data.train, start.cursor)
        self.state = world.together(lambda: RunState.of(start.manifest["state"]) if start.manifest else RunState())
        if math.isinf(self.state.watch.bound):
            unigram = unigram_perplexity(data.train, data.heldout, config.data.boundaries, world)
            self.state.watch.bound = math.log(unigram) + MARGIN_NATS
        self.sentence_tokens = sentence_tokens(config, data.train)
        self.schedule = Schedule(config, self.cursor.run_sentences() * self.sentence_tokens)
        self.evaluate_every = config.training.evaluate_every
        self.max_s = config.training.max_minutes * 60 or math.inf
        self.log = RunLog(
            self.run_dir, config.run, self.cursor.num_steps, world.rank == 0, self.max_s - self.state.trained_s,
            self.cursor.step, world.allgather(world.host),
        )
        self.server_meter = ServerMeter(parameters.server, world)
        self.server_meter.resume(self.state.served)
        self.milestones = Milestones(config.run.save_at_tokens, start.manifest.get("milestones"))
        self.saver = open_saver(self.run_dir, world, start, config.run.keep_checkpoints)
        self.saved_s = time.monotonic()
        self.start = start

    def announce(self, memory: tuple[str, ...]) -> None:
        """Log who does what, and what is about to be trained."""
        plan = plan_lines(self.config, self.world, self.data, self.device, self.cursor, self.start)
        for line in (*plan, *memory):
            self.log.log_line(line)
        for emulated in self.parameters.server.emulated:
            self.log.log_line(f"--ps {self.config.server.ps}: {emulated}")

    def run(self) -> int:
        """Train until the epochs, steps, minutes or patience are over, or a signal asks to stop.

        Returns:
            The exit status.
        """
        every, cursor, state, log = self.config.run, self.cursor, self.state, self.log
        targets = sentence_targets(self.config, self.data.train)
        step_once = TrainingStep(self.config, self.world, self.parameters, self.device.device, targets, self.vote)
        if step_once.dense_fallback:
            log.log_line(step_once.dense_fallback)
        profile = StepProfile(self.run_dir, every.profile, self.world.rank)
        save_due = False
        with self.saver:
            stopped = not self.make_up_evaluation()
            # Clocks differ between ranks, so they must agree: otherwise some would train on while others leave.
            over = any(self.world.allgather(cursor.finished or state.elapsed_s > self.max_s or self.out_of_patience))
            over = over or stopped
            batches = read_ahead(iter(()) if over else cursor.batches())
            for announced in announce_ahead(batches, step_once.announce, self.config.training.lookahead):
                log.epoch = cursor.epoch + 1
                with profile.of_step():
                    result = step_once(announced, cursor.step + 1, self.rates(), cursor.at_last_step)
                epoch_ended = cursor.trained([part.batch for part in announced])
                state.add(result)
                # With --local-steps, what is due waits until the nodes have the same parameters.
                settled = result.settled
                stopped = settled and result.votes.stop > 0
                # A save waits for a step that looks good, too, unless there will be no other step.
                savable = settled and (stopped or not state.watch.suspicious)
                milestone = self.milestones.add(result.num_tokens, cursor.step, savable=savable)
                self.refuse_divergence(state.watch.seen())
                log.step(cursor.step, state.meter)
                self.saver.poll(result.votes)
                over = settled and (result.votes.end > 0 or cursor.finished)
                if is_multiple(cursor.step, every.report_every) or over:
                    self.report()
                state.evaluation_due |= epoch_ended or over or is_multiple(cursor.step, self.evaluate_every)
                perplexity = self.evaluate() if state.evaluation_due and settled and not stopped else None
                stopped = stopped or (settled and state.evaluation_due)  # the evaluation ended at a signal
                over = over or self.out_of_patience
                save_due |= result.votes.save > 0 or milestone or is_multiple(cursor.step, every.save_every_steps)
                save = savable and save_due
                save_due = save_due and not savable
                if perplexity is not None or stopped or save:
                    self.save(perplexity)
                if over or stopped:
                    break
            self.world.progress.enter(f"last save, after step {cursor.step}")
            self.saver.finish()
        profile.close()
        step_once.close()
        if stopped:
            log.log_line(stop_message(self.stop.asked, cursor.step, every))
        elif self.out_of_patience:
            log.log_line(patience_message(self.config.training.patience))
        log.close()
        return RESUMABLE if stopped else COMPLETE

    def vote(self) -> Vote:
        """Return this rank's vote of a step (not collective)."""
        minutes = self.config.run.save_every_minutes
        return Vote(
            stop=bool(self.stop.asked),
            end=self.state.elapsed_s > self.max_s,
            save=0 < minutes * 60 < time.monotonic() - self.saved_s,
            written=self.saver.written,
            failed=self.saver.failed,
        )

    def report(self) -> None:
        """Write the metrics of the steps since the last report."""
        meter = self.state.meter
        served = self.server_meter.metrics(meter.num_steps)
        number = (self.cursor.step - 1) // max(self.config.run.report_every, 1)
        self.log.report(
            self.cursor.step, meter, {**served, "train/trained_tokens": self.trained_tokens},
            self.server_meter.placement(number), self.phases_of_slowest(),
        )
        self.state.meter = Meter()

    def phases_of_slowest(self) -> dict[str, float]:
        """Return the seconds by phase of the rank that computed longest since the last report."""
        meter = self.state.meter
        slowest = meter.slowest()  # the same on all ranks
        return self.world.bcast(meter.seconds, slowest[0]) if slowest and self.world.size > 1 else {}

    @property
    def trained_tokens(self) -> int:
        """Tokens trained by all ranks in all epochs, as sentences times their mean length (see ``growth.py``)."""
        return round(self.cursor.trained_sentences * self.sentence_tokens)

    def rates(self) -> Rates:
        """Return the learning rates of the next step."""
        cursor, length = self.cursor, self.sentence_tokens
        return self.schedule.rates(
            cursor.trained_sentences * length, cursor.step_sentences * length, cursor.batch_fraction
        )

    def refuse_divergence(self, seen: str) -> None:
        """End the run if it diverges.

        Args:
            seen: The evidence for it; "" if there is none.

        Raises:
            TrainingError: On every rank, unless ``seen`` is empty.
        """
        if not seen:
            return
        self.saver.finish()
        best = self.saver.best  # not the newest one, which may contain the step that did the harm
        kept = "no evaluated checkpoint is saved yet"
        if best is not None:
            kept = f"the best checkpoint is {best[1]} (resume from it with --resume and --overwrite)"
        change = advice(self.rates().rows, self.config.optimizer.dense_rate)
        raise TrainingError(f"training diverges at step {self.cursor.step:,}: {seen}; {kept}; {change}").on_every_rank()

    @property
    def out_of_patience(self) -> bool:
        """Whether the last --patience evaluations brought no better model."""
        return self.state.out_of_patience(self.config.training.patience)

    def save(self, perplexity: float | None) -> None:
        """Begin to save a checkpoint; ``perplexity`` is held-out, if it was measured at this step."""
        start = time.perf_counter()
        self.world.progress.enter(f"save at step {self.cursor.step}")
        self.state.served = self.server_meter.pending()
        self.saver.pinned = {checkpoint.path_of(self.run_dir, step) for step in self.milestones.steps}
        with self.server_meter.excluded():
            self.saver.start(self.parameters, self.cursor, self._manifest(), perplexity)
        self.state.meter.seconds["save"] = self.state.meter.seconds.get("save", 0.0) + time.perf_counter() - start
        self.saved_s = time.monotonic()

    def _manifest(self) -> Manifest:
        results = self.state.results
        return {
            "vocabulary_sha256": self.data.vocabulary.sha256, "num_classes": self.data.vocabulary.size,
            "num_train_tokens": self.data.train.num_tokens, "config": as_tables(self.config),
            "corpus": self.data.names(), "state": self.state.plain(),
            "results": {
                "heldout_perplexity": results[-1].heldout.mean, "forward_perplexity": results[-1].heldout.forward,
                "backward_perplexity": results[-1].heldout.backward,
            } if results else {},
            "milestones": self.milestones.plain(),
        }

    def make_up_evaluation(self) -> bool:
        """Evaluate, and save the result, if a signal has put that off; return whether no other signal has come."""
        if not self.state.evaluation_due:
            return True
        perplexity = self.evaluate()
        if perplexity is not None:
            self.save(perplexity)
        return perplexity is not None

    def evaluate(self) -> float | None:
        """Measure and log the held-out perplexity, and return it; None if a signal ends it, so that it stays due.

        Raises:
            TrainingError: On every rank, if it is not finite or shows that the run diverges.
        """
        state, cursor, log, epoch_meter = self.state, self.cursor, self.log, self.state.epoch_meter
        tokens_per_s = epoch_meter.tokens_per_s
        self.world.progress.enter(f"evaluation at step {cursor.step}")
        self.parameters.sync_parameters()
        start = time.perf_counter()
        with self.server_meter.excluded(), self.parameters.averaged():
            heldout = measure_perplexity(
                self.parameters, self.data.heldout, self.config.data, self.config.training.batch_size, self.world,
                self.device.device, lambda: self.stop.asked,
            )
        if heldout is None:
            return None
        if not math.isfinite(heldout.mean):
            raise TrainingError(
                f"held-out perplexity is not finite at step {cursor.step}; this model is not saved; lower "
                "--learning-rate, --loss-scale or --clip-norm"
            ).on_every_rank()
        self.refuse_divergence(state.watch.seen_heldout(math.log(heldout.mean)))
        log.epoch = math.ceil(cursor.epochs_done)
        log.write(
            "epoch", cursor.step,
            {
                "epoch": log.epoch, "train/epoch_loss_nats": epoch_meter.loss,
                "train/epoch_tokens": epoch_meter.num_tokens, "train/epoch_tokens_per_s": tokens_per_s,
                "train/trained_tokens": self.trained_tokens,
                "train/cut_sentences": epoch_meter.num_cut,
                "heldout/forward_perplexity": heldout.forward, "heldout/backward_perplexity": heldout.backward,
                "heldout/mean_perplexity": heldout.mean, "heldout/evaluation_s": time.perf_counter() - start,
            },
        )
        log.log_line(
            f"step {cursor.step:,}, {cursor.epochs_done:.2f} epochs: loss {epoch_meter.loss:.3f}, held-out perplexity "
            f"{heldout.mean:.1f} (forward {heldout.forward:.1f}, backward {heldout.backward:.1f})"
        )
        for kind, number in (("", epoch_meter.num_cut), ("held-out ", heldout.num_cut)):
            if number:
                log.log_line(f"{number:,} {kind}sentences were cut at --max-length {self.config.data.max_length}")
        state.results.append(
            EpochResult(
                cursor.step, cursor.epochs_done, epoch_meter.num_tokens, tokens_per_s, epoch_meter.loss, heldout
            )
        )
        state.evaluation_due = False
        if not cursor.within_epoch:
            state.epoch_meter = Meter()
        if self.out_of_patience and state.meter.num_steps:  # the last steps of the run; no report comes after them
            self.report()
        return heldout.mean


def is_multiple(step: int, every: int) -> bool:
    """Return whether ``step`` is a multiple of ``every``; never if ``every`` is 0."""
    return every > 0 and step % every == 0
