#!/usr/bin/env bash
# One plasticity command on the GPUs of this machine: one process that drives all of them (the default), or several that share them.
#
#   launch/local/processes.sh [--dry-run] [--gpus 0,1,2,3] [--processes N] [--port P] -- COMMAND ...
#   launch/local/processes.sh -- study --config C --workdir W
#   launch/local/processes.sh --gpus 0,1,2,3 --processes 2 -- pretrain --config C --workdir W --member wd0.1
#
# Use several processes if one Python process cannot feed all GPUs, or to test a multi-host run on one machine.
# After a failure, the same command resumes from the last checkpoint.
set -euo pipefail

fail() {
  echo "processes.sh: $*" >&2
  exit 2
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  exit 0
fi
dry_run=0 processes=1 gpus="" port=12355
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --gpus | --processes | --port)
      (($# > 1)) || fail "$1 has no value."
      declare "${1#--}=$2"
      shift
      ;;
    *) fail "$1 is not an option; usage: processes.sh [--dry-run] [--gpus 0,1] [--processes N] [--port P] -- COMMAND ..." ;;
  esac
  shift
done
(($# > 1)) || fail "no command after --; give a plasticity command, such as: -- study --config C --workdir W"
shift
[[ $processes =~ ^[1-9][0-9]{0,3}$ ]] || fail "--processes=$processes must be a number of at least 1."
[[ $port =~ ^[1-9][0-9]{0,4}$ && $port -lt 65536 ]] || fail "--port=$port must be a port, from 1 to 65535."
[[ -z $gpus || $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus=$gpus must be numbers separated by commas, such as 0,1,2,3."

if [[ -z $gpus ]] && ((processes > 1)); then
  gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,) || true
  [[ -n $gpus ]] || fail "nvidia-smi lists no GPUs; give them: --gpus 0,1,2,3"
fi
IFS=, read -ra all <<<"$gpus"
((processes == 1 || ${#all[@]} % processes == 0)) || fail "${#all[@]} GPUs do not divide by --processes=$processes; give --gpus a multiple of it."

plasticity=${PLASTICITY:-plasticity}
if ((!dry_run)) && ! command -v "$plasticity" >/dev/null; then
  fail "$plasticity is not on the PATH; activate the environment that has it, or export PLASTICITY."
fi

started=()
trap '((${#started[@]} == 0)) || kill "${started[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  command=(env)
  if ((processes > 1)); then
    share=$((${#all[@]} / processes))
    command+=("CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${all[*]:i*share:share}")" "$plasticity" "$@")
    command+=("--coordinator=localhost:$port" "--num-processes=$processes" "--process-id=$i")
  else
    [[ -z $gpus ]] || command+=("CUDA_VISIBLE_DEVICES=$gpus")
    command+=("$plasticity" "$@")
  fi
  if ((dry_run)); then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" &
    started+=($!)
  fi
done

# A process that loses its peers ends by itself, so only wait here: for all processes, even after a signal.
status=0
for pid in "${started[@]+"${started[@]}"}"; do
  result=0
  while wait "$pid" || result=$?; kill -0 "$pid" 2>/dev/null; do result=0; done
  ((result <= status)) || status=$result
done
exit "$status"
