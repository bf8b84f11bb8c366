#!/usr/bin/env bash
# Submits one plasticity command, on one node or across nodes: one process per node, which drives all of the node's GPUs.
#
#   launch/slurm/run.sh [--dry-run] [SBATCH OPTIONS] -- COMMAND ...
#   launch/slurm/run.sh --nodes=4 --gpus-per-node=8 --partition=gpu --time=24:00:00 -- pretrain --config C --workdir W --member wd0.1
#   launch/slurm/run.sh --gpus-per-node=8 -- study --config C --workdir W
#
# jax reads hosts, processes and the coordinator from SLURM, so --coordinator is not needed. All nodes must share the workdir.
# SIGTERM comes 90 s before the time limit (--signal=TERM@90): training saves the step in progress, and the job is queued again and resumes. So does a
# preempted one. After a failure, the same command resumes from the last checkpoint.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  exit 0
fi
usage="launch/slurm/run.sh [--dry-run] [SBATCH OPTIONS] -- COMMAND ..."
dry_run=0
options=()
while (($#)) && [[ $1 != -- ]]; do
  if [[ $1 == --dry-run ]]; then dry_run=1; else options+=("$1"); fi
  shift
done
if (($# < 2)); then
  echo "run.sh: no command after --; usage: $usage" >&2
  exit 2
fi
shift

# The defaults come first, so that the user's options override them.
send=(sbatch --ntasks-per-node=1 --requeue --signal=TERM@90 --open-mode=append --job-name="plasticity-$1" "${options[@]}" "$(cd "$(dirname "$0")" && pwd)/job.sh" "$@")
if ((dry_run)); then
  printf '%q ' "${send[@]}"
  echo
elif ! command -v sbatch >/dev/null; then
  echo "run.sh: sbatch is not on the PATH; run this on a login node of a SLURM cluster, or use launch/local." >&2
  exit 2
else
  exec "${send[@]}"
fi
