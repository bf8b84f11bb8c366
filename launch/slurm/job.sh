#!/usr/bin/env bash
# The batch script of every job: runs one `plasticity` command on all tasks of the allocation. run.sh and the scripts of study.py start it.
#
#   launch/slurm/job.sh COMMAND ...
#
# Resources (partition, nodes, GPUs, time) come from the options of sbatch, never from here.
#
# A job that reaches its time limit saves and is queued again, at most PLASTICITY_REQUEUES times (100; 0 never).
# Set PLASTICITY if the program is not on the PATH of the compute nodes, such as /shared/venv/bin/plasticity.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  exit 0
fi
if (($# == 0)); then
  echo "job.sh: no command; give a plasticity command, such as: study --config C --workdir W" >&2
  exit 2
fi

# Under SLURM, jax gives each process one GPU, by local rank. That suits one task per GPU; for one task per node, name all GPUs of the node.
if [[ -n ${SLURM_GPUS_ON_NODE:-} && ${SLURM_NTASKS:-1} == "${SLURM_JOB_NUM_NODES:-1}" ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# Since SLURM 22.05, srun does not inherit --cpus-per-task from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# --kill-on-bad-exit: if one process is lost, the others do not linger and hold their nodes.
status=0
srun --kill-on-bad-exit=1 "${PLASTICITY:-plasticity}" "$@" || status=$?

# Status 130: SIGTERM has ended the command, which has saved. SLURM sends it (--signal) to the tasks before the time limit, and to those of a job that is
# canceled or preempted, which is no longer RUNNING: this script must not queue those again.
requeues=${PLASTICITY_REQUEUES:-100}
if ((status == 130 && ${SLURM_RESTART_COUNT:-0} < requeues)) && [[ -n ${SLURM_JOB_ID:-} ]] &&
  [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null) == RUNNING ]]; then
  echo "job.sh: queued again as job $SLURM_JOB_ID, to resume (restart $((${SLURM_RESTART_COUNT:-0} + 1)) of at most $requeues)" >&2
  scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$status"
