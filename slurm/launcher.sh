# Sourced by launch.sh, and by the scripts for LSF and PBS, where there is no srun. `find_launcher` sets the array `launcher` to a command that starts the ranks of this job.
#
# Which one fits depends on the family of the MPI library and on what the site's Slurm was built with. `srun --mpi=list`
# says what Slurm was built with, not what works: a listed plugin can lack its library, and most Slurms list cray_shasta. So
# the ways that suit the family are tried in turn, with two ranks; the first under which these see each other is taken.
# Outside Slurm, `num_tasks` is the number of ranks of the job.
# shellcheck shell=bash

probe_limit_s=120 # for one way; on a cold parallel file system Python's start alone can take a minute

# Prints the plugins of Slurm that suit a family, the best one first.
plugins_for() {
  case $1 in
    cray) echo cray_shasta pmi2 pmix ;;
    openmpi) echo pmix ;;
    mpich | mvapich) echo pmi2 pmix cray_shasta ;;
    intel) echo pmi2 pmix ;; # only if I_MPI_PMI_LIBRARY names Slurm's libpmi2.so or libpmix.so
    *) echo pmix pmi2 ;;
  esac
}

# Prints the mpiruns that may belong to a family, one a line, with the options of that family.
mpiruns_for() {
  local name
  case $1 in
    openmpi)
      for name in mpirun.openmpi mpirun; do # the first is Debian's name for it
        if command -v "$name" >/dev/null; then echo "$name --bind-to none"; fi
      done ;;
    *)
      for name in .venv/bin/mpirun mpirun; do
        if command -v "$name" >/dev/null; then echo "$name"; fi
      done ;;
  esac
}

# Whether `launcher` starts two ranks (one if the job has one) that see each other; its output goes into $probe_output.
launcher_fits() {
  local ranks=$((${num_tasks:-${SLURM_NTASKS:-1}} < 2 ? 1 : 2)) nodes options=(-n)
  nodes=$((${SLURM_JOB_NUM_NODES:-1} < ranks ? 1 : ranks))
  if [[ ${launcher[0]} == srun ]]; then options=(--nodes="$nodes" --ntasks-per-node="$ranks" --ntasks); fi
  # An mpirun must not read the script's input, which may be the rest of the script.
  probe_output=$(timeout "$probe_limit_s" "${launcher[@]}" "${options[@]}" "$ranks" bin/_probe world "$ranks" </dev/null 2>&1)
}

find_launcher() {
  local family listed plugin report=""
  family=$(bin/_probe family) || return
  listed=$(command -v srun >/dev/null && srun --mpi=list 2>&1)
  for plugin in $(plugins_for "$family"); do
    if ! grep --quiet --word-regexp -- "$plugin" <<<"$listed"; then continue; fi
    # kill-on-bad-exit: a killed rank must end the job; otherwise the other ranks would wait for it forever.
    # cpus-per-task: since Slurm 22.05, srun does not inherit it from the job.
    launcher=(srun "--mpi=$plugin" --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"})
    if launcher_fits; then break; fi
    report+="${launcher[*]}: $(head -n 1 <<<"$probe_output")"$'\n'
    launcher=()
  done
  while [[ -z ${launcher[*]-} ]] && read -r -a launcher; do
    if launcher_fits; then break; fi
    report+="${launcher[*]}: $(head -n 1 <<<"$probe_output")"$'\n'
    launcher=()
  done < <(mpiruns_for "$family")
  if [[ -z ${launcher[*]-} ]]; then
    printf '%s' "$report" >&2
    echo "launcher: no launcher fits the MPI library (family: $family); set \`launcher\` in slurm/site.sh" >&2
    return 2
  fi
  echo "launcher: ${launcher[*]} starts the ranks (MPI family: $family)"
}
