#!/usr/bin/env bash
# The batch script of every job: one `plasticity` command on all tasks of the allocation. run.sh and the scripts that study.py writes start it.
# Resources (partition, nodes, GPUs, time) come from the options of sbatch, never from here.
#
# PLASTICITY names the program where it is not on the PATH of the compute nodes, such as /shared/venv/bin/plasticity.
set -euo pipefail

if (($# == 0)); then
  echo "job.sh: no command; give one of plasticity, such as: study --config C --workdir W" >&2
  exit 2
fi

# Under SLURM jax gives each process the one GPU with its local number: right for a task per GPU. With a task per node, all of the node's are named.
if [[ -n ${SLURM_GPUS_ON_NODE:-} && ${SLURM_NTASKS:-1} == "${SLURM_JOB_NUM_NODES:-1}" ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# Since SLURM 22.05 srun does not take over --cpus-per-task from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# --kill-on-bad-exit: where one process is lost, none of the others stays behind and holds its node.
exec srun --kill-on-bad-exit=1 "${PLASTICITY:-plasticity}" "$@"
