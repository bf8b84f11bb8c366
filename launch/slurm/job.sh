#!/usr/bin/env bash
# The batch script of every job: runs one `plasticity` command on all tasks of the allocation. run.sh and the scripts of study.py start it.
# Resources (partition, nodes, GPUs, time) come from the options of sbatch, never from here.
#
# Set PLASTICITY if the program is not on the PATH of the compute nodes, such as /shared/venv/bin/plasticity.
set -euo pipefail

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
exec srun --kill-on-bad-exit=1 "${PLASTICITY:-plasticity}" "$@"
