# Sourced by the batch scripts here. `launch PROGRAM [OPTION ...]` runs a program on every task of the allocation and
# returns its exit status. `warned` is 1 once Slurm has warned the job of its time limit, 0 again if it was cancelled.
# shellcheck shell=bash

set -uo pipefail

# shellcheck source=slurm/site.sh
source slurm/site.sh

# Open MPI's mpirun starts its ranks in the allocation by itself. The MPICH that `make setup` installs speaks pmi2; a
# Slurm that was built without it leaves that MPICH's own mpirun.
if [[ -z ${launcher+set} ]]; then
  if [[ ${MPI4PY_MPIABI:-} == openmpi* ]]; then
    launcher=(mpirun --bind-to none)
  elif srun --mpi=list 2>&1 | grep --quiet --word-regexp pmi2; then
    # A killed rank must end the job: without kill-on-bad-exit the others would wait for it for ever.
    # Since Slurm 22.05 the job's cores for each task are not passed on to its steps.
    launcher=(srun --mpi=pmi2 --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"})
  else
    launcher=(.venv/bin/mpirun)
  fi
fi

# Each job in which a rank hung leaves a report here. srun returns the status of the hanging rank, which had to be killed,
# and not the one that bin/train ended the job with: this file tells.
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
  # Slurm sends its warning to the batch script alone. A job that ends (cancelled, preempted, out of time) gets SIGTERM,
  # and its ranks get it from Slurm; srun would pass on a second one.
  trap 'interrupted=1 warned=1; kill -USR1 "$step" 2>/dev/null' USR1
  trap 'interrupted=1 warned=0' TERM
  while ((interrupted)); do # a signal ends `wait` before the program has ended
    interrupted=0
    wait "$step"
    status=$?
  done
  trap - USR1 TERM
  if (($(stalls) > before)); then status=76; fi
  return "$status"
}
