# Sourced by the batch scripts here. `launch PROGRAM [OPTION ...]` runs a program on every task of the allocation and
# returns its exit status. `warned` is 1 after Slurm has warned the job of its time limit, and 0 again if the job was then cancelled.
# shellcheck shell=bash

# shellcheck disable=SC2034  # read by train.sbatch
warned=0
trap 'warned=1' USR1 # a warning that comes before `launch` starts anything

# Set-ups of modules and vendors, which site.sh may source, read variables that are not set, and take or change the script's
# options: Lmod 9.2 and Intel's setvars.sh do.
script_options=("$@")
set --
# shellcheck source=slurm/site.sh
source slurm/site.sh
set -- "${script_options[@]}"
set -uo pipefail
# shellcheck source=slurm/launcher.sh
source slurm/launcher.sh

if [[ -z ${launcher+set} ]]; then
  find_launcher || exit 2
fi

# After `sbatch --export=NONE` or `--export=NAME,...`, srun would pass no more than that on to the ranks: neither what
# slurm/site.sh exports nor the next variable.
export SLURM_EXPORT_ENV=ALL

# By this name bin/train knows a requeued job again, and resumes what it has saved instead of repeating --overwrite.
export LAPSE_ELMO_JOB=slurm-$SLURM_JOB_ID

# Since Slurm 22.05, srun does not inherit --cpus-per-task from the job; a `launcher` of slurm/site.sh may not give it. An
# mpirun calls srun for one process per node, which would have the cores of one task for all ranks there.
if [[ -n ${SLURM_CPUS_PER_TASK:-} && ${launcher[*]} == *srun* ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# If a rank hangs, bin/train appends a report to this file and ends the job with status 76. srun returns the status of the
# hanging rank instead, which had to be killed; so `launch` looks for a new report.
export LAPSE_ELMO_STALLS=$PWD/$SLURM_JOB_NAME-$SLURM_JOB_ID.stalls
stalls() { lines_with 'the job ends with status 76'; }
# Of one hang there may be a report of each node, so `launch` adds a line to the file for each start that hung.
hangs() { lines_with '^slurm: a rank hung'; }
lines_with() {
  if [[ -e $LAPSE_ELMO_STALLS ]]; then grep --count -- "$1" "$LAPSE_ELMO_STALLS"; else echo 0; fi
}

launch() {
  local step status=0 interrupted=1 before
  before=$(stalls) # may wait for a file system, and a warning meanwhile must be seen
  if ((warned)); then return 75; fi # there is no time left: as if the program had saved at once
  "${launcher[@]}" "$@" &
  step=$!
  # Slurm sends its warning (USR1) only to this script, so it is forwarded. When a job is cancelled, preempted or out of
  # time, Slurm sends SIGTERM to the ranks too; forwarding it would make srun send a second one.
  trap 'interrupted=1 warned=1; kill -USR1 "$step" 2>/dev/null' USR1
  trap 'interrupted=1 warned=0' TERM
  if ((warned)); then kill -USR1 "$step" 2>/dev/null; fi # a warning since the launcher was started
  while ((interrupted)); do # a trapped signal makes `wait` return before the program has ended
    interrupted=0
    wait "$step"
    status=$?
  done
  trap 'warned=1' USR1 # not the default, which would end this script
  trap - TERM
  if (($(stalls) > before)); then
    status=76
    echo "slurm: a rank hung in start ${SLURM_RESTART_COUNT:-0} of the job" >>"$LAPSE_ELMO_STALLS"
  fi
  # A warning that reaches the launcher or a rank before it handles USR1 ends it (128 + 10); nothing had been trained yet.
  if ((warned && status == 138)); then status=75; fi
  return "$status"
}
