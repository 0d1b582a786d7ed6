"""Remove each guard of the protocol in turn, and see whether the simulator notices.

A mutant is a copy of the source in which one piece of text is replaced. A mutant that survives is either explained in
`HARMLESS` (the guard serves speed only, not a promise) or shows that the simulator's checks are too weak.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.mpi import ROOT

_TIME_S = 3600  # many times what the schedules take


@dataclass(frozen=True)
class Mutant:
    """A guard that is removed."""

    name: str
    file: str  # in lapse_elmo/ps
    before: str
    after: str


MUTANTS = (
    Mutant(
        "copies of frequent rows are not equalled by a quiesce", "embedded.py",
        "self._rows[segment.name].set(rows, values)\n            self",
        "self",
    ),
    Mutant(
        "a set of a frequent row stays on the node of its worker", "embedded.py",
        "elsewhere = self._is_copied(segment, rows)",
        "elsewhere = np.zeros(rows.size, bool)",
    ),
    Mutant(
        "a manager sets its copy of a frequent row and does not forward the set", "node_state.py",
        "elsewhere = is_copied(rows, self.segment.frequent, self.num_nodes, self.node)",
        "elsewhere = np.zeros(rows.size, bool)",
    ),
    Mutant(
        "frequent rows are announced like others", "embedded.py",
        "rows = rows[rows >= segment.frequent]",
        "",
    ),
    Mutant(
        "each node counts its copies of frequent rows as its own", "embedded.py",
        "rows = rows[~self._is_copied(self.layout[name], rows)]",
        "",
    ),
    Mutant(
        "a push to a replicated row stays at the owner", "service.py",
        "if held.any():\n            back",
        "if False:\n            back",
    ),
    Mutant(
        "a round does not mark the owner's own changes", "manager.py",
        "state.holders.mark_changed(held[state.rows.clear_dirty(held)])\n            outdated",
        "outdated",
    ),
    Mutant(
        "set leaves the replica of its node as it is", "service.py",
        "if held.size and message.node == self._node:",
        "if False:",
    ),
    Mutant(
        "set is done before replicas show it", "service.py",
        "if (state.replica_owner[message.rows] != NO_NODE).any():",
        "if False:",
    ),
    Mutant(
        "pending answers are not counted", "manager.py",
        "return sum(map(len, self._jobs.values()))",
        "return 0 * sum(map(len, self._jobs.values()))",
    ),
    Mutant(
        "deltas are not counted as changes", "manager.py",
        "state.holders.mark_changed_by(message.rows, message.node)",
        "pass",
    ),
    Mutant(
        "a request that is forwarded by half counts as served", "routing.py",
        "self.route(message, np.flatnonzero(~owned) + start)",
        "pass",
    ),
    Mutant(
        "what is about to arrive is not waited for", "routing.py",
        "if coming.any():",
        "if False:",
    ),
    Mutant(
        "queued requests are forgotten", "routing.py",
        "return list(queued)",
        "return []",
    ),
    Mutant(
        "queued requests are not looked at when rows arrive", "moves.py",
        "        self._router.rows_arrived()\n",
        "",
    ),
    Mutant(
        "forwarded without the newer stamps", "routing.py",
        "stamps=stamps[chosen], **changes",
        "**changes",
    ),
    Mutant(
        "rows are asked for twice", "moves.py",
        "rows[~(state.rows.present(rows) | state.wanted[rows])]",
        "rows[~state.rows.present(rows)]",
    ),
    Mutant(
        "a want overtakes a drop", "moves.py",
        "        self._rounds.send_drops()  # an owner",
        "        # an owner",
    ),
    Mutant(
        "replicated rows are relocated", "moves.py",
        "(state.holders.num_holders[rows] == 0) & (state.intents[rows] == 0)\n        return",
        "(state.intents[rows] == 0)\n        return",
    ),
    Mutant(
        "replicas are not noted", "moves.py",
        "        state.holders.add(rows, receiver)\n",
        "",
    ),
    Mutant(
        "rows that several hold are promoted", "moves.py",
        "rows = state.holders.sole_rows_of(holder)",
        "rows = state.holders.rows_of(holder)",
    ),
    Mutant(
        "rows that others have got meanwhile are promoted", "moves.py",
        "(state.intents[some] == 0) & (state.holders.num_holders[some] == 1)",
        "state.intents[some] == 0",
    ),
    Mutant(
        "promoted rows stay replicated", "moves.py",
        "                    state.holders.remove(unused, holder)\n",
        "",
    ),
    Mutant(
        "a frozen manager begins rounds and wants rows", "manager.py",
        "if not self._frozen:",
        "if True:",
    ),
    Mutant(
        "localize is answered before the rows come", "moves.py",
        "waiting.rows = waiting.rows[state.wanted[waiting.rows]]",
        "waiting.rows = waiting.rows[:0]",
    ),
    Mutant(
        "localize is answered for one segment only", "moves.py",
        "            if waiting.rows.size:\n                unfinished",
        "            if waiting.rows.size and waiting.request.segment == state.number:\n            "
        "    unfinished",
    ),
    Mutant(
        "a main copy does not replace the replica", "node_state.py",
        "if held.any():",
        "if False:",
    ),
    Mutant(
        "a row's epoch stays when it moves", "node_state.py",
        "epoch_of(self.stamps[rows]) + 1",
        "epoch_of(self.stamps[rows])",
    ),
    Mutant(
        "what arrives is still wanted", "node_state.py",
        "self.wanted[rows] = False\n        update_stamps(self.stamps, rows, stamps)\n        self.replica_owner",
        "update_stamps(self.stamps, rows, stamps)\n        self.replica_owner",
    ),
    Mutant(
        "older stamps overwrite newer ones", "directory.py",
        "np.maximum(known[rows], stamps)",
        "stamps",
    ),
    Mutant(
        "a holder's own changes make it current", "holders.py",
        "current = held.sent_version[indices] == before[which]",
        "current = np.ones(indices.size, bool)",
    ),
    Mutant(
        "rounding is not noted", "holders.py",
        "held.rounded[indices[current]] = True",
        "pass",
    ),
    Mutant(
        "changes have no version", "holders.py",
        "self._version[rows] = self._newest_version",
        "pass",
    ),
    Mutant(
        "exact rounds are as others", "holders.py",
        "if exact:",
        "if False:",
    ),
    Mutant(
        "two rounds at a time", "rounds.py",
        "if self._running or not self._due():",
        "if not self._due():",
    ),
    Mutant(
        "a round's clocks are those of its end", "rounds.py",
        "self._synced[:] = self._snapshot",
        "self._synced[:] = self._clocks",
    ),
    Mutant(
        "a round asks only the owners of replicas that are here", "rounds.py",
        "if any(state.wanted.any() for state in self._states):",
        "if False:",
    ),
    Mutant(
        "a round ends with its first answer", "rounds.py",
        "if not self._awaited:\n            self._finish",
        "if True:\n            self._finish",
    ),
    Mutant(
        "replicas are dropped without a word", "rounds.py",
        "self._drops.append((owner, drop))",
        "pass",
    ),
    Mutant(
        "a round counts although replicas were not refreshed", "rounds.py",
        "if any(kept):",
        "if False:",
    ),
    Mutant(
        "deltas are not sent", "rounds.py",
        "if which.size:",
        "if False:",
    ),
    Mutant(
        "flushes are answered by the round under way", "rounds.py",
        "        self._next_actions.append(action)",
        "        (self._actions if self._running else self._next_actions).append(action)",
    ),
    Mutant(
        "workers do not wait for rounds", "embedded.py",
        "while clock - self._synced[self._world.local_rank] > self._slack:",
        "while False:",
    ),
    Mutant(
        "quiesce is one round", "embedded.py",
        "for _ in range(2):  # deltas",
        "for _ in range(1):  # deltas",
    ),
    Mutant(
        "owned rows are looked at while messages fly", "embedded.py",
        "            drain(self._world, self._requests, self._manager)\n        rows =",
        "        rows =",
    ),
    Mutant(
        "close does not wait for messages", "embedded.py",
        "            drain(self._world, self._requests, self._manager)\n            if",
        "            if",
    ),
    Mutant(
        "a ring is written over", "ring.py",
        "if written + skipped + block.size - int(self._counters[_READ]) > self._capacity:",
        "if False:",
    ),
    Mutant(
        "a ring's end is not marked", "ring.py",
        "if skipped >= _HEADER_BYTES:",
        "if False:",
    ),
    Mutant(
        "messages to one receiver change places", "mailbox.py",
        "for block in self._outbox.pop(to, ()):",
        "for block in reversed(self._outbox.pop(to, ())):",
    ),
    Mutant(
        "a replica is kept for ever", "moves.py",
        "self._rounds.schedule_release(state.number, message.rows[state.intents[message.rows] == 0])",
        "pass",
    ),
    Mutant(
        "drops wait while pushes come back", "service.py",
        "            self._rounds.send_drops()  # else",
        "            # else",
    ),
)
HARMLESS = {
    "frequent rows are announced like others": "costs time only: rows that are on the node are not requested",
    "what is about to arrive is not waited for": "the request travels between the former owners until the row arrives",
    "forwarded without the newer stamps": "the request travels between the former owners until the row arrives",
    "rows that several hold are promoted": "each message's rows are looked at again before they are promoted",
    "a replica is kept for ever": "costs traffic only: it stays a holder until its node announces the row again",
    "drops wait while pushes come back": "the push travels between owner and node until the next round sends the drop",
}


def caught(mutant: Mutant, schedules: int, jobs: int) -> tuple[bool, str]:
    """Return whether the simulator notices the mutant, and the simulator's output."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("lapse_elmo", "tests"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(folder, "lapse_elmo", "ps", mutant.file)
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.before) < 1:
            return False, "its text is not in the source"
        path.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        words = [sys.executable, "-m", "tests.simulator", "--no-shrink"]
        words += ["--schedules", str(schedules), "--jobs", str(jobs)]
        try:
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=_TIME_S)
        except subprocess.TimeoutExpired:
            return True, "no end"
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    last = said[-1] if said else ""
    assert done.returncode == 0 or "repeat it by" in last, f"{mutant.name}: the simulator does not run: {last}"
    return done.returncode != 0, last


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator.mutants", description=__doc__)
    parser.add_argument("--schedules", type=int, default=20_000, help="per mutant, at most")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a mutant's name")
    options = parser.parse_args()
    bad = 0
    for mutant in MUTANTS:
        if options.only not in mutant.name:
            continue
        found, said = caught(mutant, options.schedules, options.jobs)
        fine = found or mutant.name in HARMLESS
        bad += not fine
        verdict, why = ("caught", said) if found else ("survives", HARMLESS.get(mutant.name, said))
        print(f"{verdict:8} {mutant.name}: {why}", flush=True)
    print(f"{len(MUTANTS)} mutants, {bad} survive without an explanation")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
