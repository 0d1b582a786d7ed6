#!/bin/bash
# Train under Flux: flux batch slurm/others/train.flux, from the repository's root. Written from documents, not run under Flux.
#
# Five minutes before its own limit the program gets SIGUSR1, saves and ends with 75. Flux does not requeue by exit status, so
# the script submits the next job to the enclosing Flux, also if a rank hung (76, up to five times in a row).
#flux: --job-name=lapse-elmo
#flux: --nodes=4
#flux: --nslots=128
#flux: --time-limit=12h
#flux: --output=lapse-elmo-{{id}}.log

run_dir=${RUN_DIR:-runs/lapse-elmo-$(date +%Y%m%d-%H%M%S)}
# By this name bin/train knows the jobs that submit each other, and resumes what is saved instead of repeating --overwrite.
export LAPSE_ELMO_JOB=flux-$run_dir
flux run --nodes=4 --ntasks=128 --time-limit=11h55m --signal=USR1@5m bin/train --run-dir "$run_dir" --resume auto
status=$?
hangs=$((status == 76 ? ${HANGS:-0} + 1 : 0))
if ((status == 75 || (status == 76 && hangs <= 5))); then
  flux --parent batch --env="RUN_DIR=$run_dir" --env="HANGS=$hangs" slurm/others/train.flux
fi
exit "$status"
