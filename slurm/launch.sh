# Sourced by the batch scripts here. `launch PROGRAM [OPTION ...]` runs a program on every task of the allocation and
# returns its exit status. `warned` is 1 after Slurm has warned the job of its time limit, and 0 again if the job was then cancelled.
# shellcheck shell=bash

set -uo pipefail

# shellcheck source=slurm/site.sh
source slurm/site.sh

# Open MPI's mpirun finds the allocation by itself. The MPICH that `make setup` installs needs srun with pmi2; if Slurm was
# built without pmi2, that MPICH's own mpirun starts the ranks.
if [[ -z ${launcher+set} ]]; then
  if [[ ${MPI4PY_MPIABI:-} == openmpi* ]]; then
    launcher=(mpirun --bind-to none)
  elif srun --mpi=list 2>&1 | grep --quiet --word-regexp pmi2; then
    # kill-on-bad-exit: a killed rank must end the job; otherwise the other ranks would wait for it forever.
    # cpus-per-task: since Slurm 22.05, srun does not inherit it from the job.
    launcher=(srun --mpi=pmi2 --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"})
  else
    launcher=(.venv/bin/mpirun)
  fi
fi

# If a rank hangs, bin/train appends a report to this file and ends the job with status 76. srun returns the status of the
# hanging rank instead, which had to be killed; so `launch` looks for a new report.
export LAPSE_ELMO_STALLS=$PWD/$SLURM_JOB_NAME-$SLURM_JOB_ID.stalls
stalls() {
  if [[ -e $LAPSE_ELMO_STALLS ]]; then grep --count 'the job ends with status 76' "$LAPSE_ELMO_STALLS"; else echo 0; fi
}

# shellcheck disable=SC2034  # read by train.sbatch
warned=0
launch() {
  local step status=0 interrupted=1 before
  before=$(stalls)
  "${launcher[@]}" "$@" &
  step=$!
  # Slurm sends its warning (USR1) only to this script, so it is forwarded. When a job is cancelled, preempted or out of
  # time, Slurm sends SIGTERM to the ranks too; forwarding it would make srun send a second one.
  trap 'interrupted=1 warned=1; kill -USR1 "$step" 2>/dev/null' USR1
  trap 'interrupted=1 warned=0' TERM
  while ((interrupted)); do # a trapped signal makes `wait` return before the program has ended
    interrupted=0
    wait "$step"
    status=$?
  done
  trap - USR1 TERM
  if (($(stalls) > before)); then status=76; fi
  return "$status"
}
