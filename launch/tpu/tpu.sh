#!/usr/bin/env bash
# A Cloud TPU slice through a queued resource: create it, install on all hosts, run one plasticity command on all, follow it, delete it.
#
#   export TPU_NAME=grid TPU_ZONE=us-west4-a TPU_TYPE=v5litepod-16      # TPU_PROJECT, TPU_RUNTIME: those of gcloud and of the type otherwise
#   launch/tpu/tpu.sh create [--spot]      requests the slice
#   launch/tpu/tpu.sh wait                 prints the state until the slice is ready
#   launch/tpu/tpu.sh install              this folder as it is now, its environment, and the pinned data and tokenizers, on every host
#   launch/tpu/tpu.sh run study --config configs/llama_1b_20tpp.py --workdir gs://bucket/work
#   launch/tpu/tpu.sh attach               follows worker 0's log; Ctrl-C does not stop the run
#   launch/tpu/tpu.sh logs                 the last lines of every host
#   launch/tpu/tpu.sh stop | state | delete
#   launch/tpu/tpu.sh --dry-run COMMAND ... prints the commands and runs nothing
#
# `install` copies every file that git does not ignore, also what is not committed: a config of your own needs no commit. Give it to `run` by its path
# in this folder. What the config reads besides (corpus, tasks, reward model) must lie where every host sees it: plasticity data --config C lists it.
# On Cloud TPU, jax finds hosts and coordinator by itself: every host runs the same command without extra flags.
# All hosts must see the workdir (gs://...). A spot slice can be preempted at any time (state SUSPENDED): delete, create --spot, wait, install,
# and run the same command; the study resumes from its last checkpoints.
set -euo pipefail

fail() {
  echo "tpu.sh: $*" >&2
  exit 2
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  exit 0
fi
dry_run=0
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
action=${1:-}
case $action in
  create | wait | install | run | attach | logs | stop | state | delete) shift ;;
  *) fail "'$action' is not a command; give create, wait, install, run, attach, logs, stop, state or delete." ;;
esac
[[ -n ${TPU_NAME:-} ]] || fail "TPU_NAME is not set; export the name of the slice."
[[ -n ${TPU_ZONE:-} ]] || fail "TPU_ZONE is not set; export a zone that has the type, such as us-west4-a."
((dry_run)) || command -v gcloud >/dev/null || fail "gcloud is not on the PATH; install the Google Cloud CLI and log in."

where=(--zone="$TPU_ZONE")
[[ -z ${TPU_PROJECT:-} ]] || where+=(--project="$TPU_PROJECT")

send() {
  if ((dry_run)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
queued() { send gcloud compute tpus queued-resources "$1" "$TPU_NAME" "${where[@]}" "${@:2}"; }
on() { send gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"; }

case $action in
  create)
    [[ -n ${TPU_TYPE:-} ]] || fail "TPU_TYPE is not set; export an accelerator type, such as v5litepod-16, v4-32, v5p-128 or v6e-16."
    case $TPU_TYPE in
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v4-*) runtime=tpu-ubuntu2204-base ;;
      *) runtime=${TPU_RUNTIME:-} ;;
    esac
    [[ -n $runtime ]] || fail "TPU_TYPE=$TPU_TYPE has no known runtime; export TPU_RUNTIME, or give v4-*, v5litepod-*, v5p-* or v6e-*."
    [[ $* == "" || $* == --spot ]] || fail "create accepts only --spot, not '$*'."
    queued create --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" --runtime-version="${TPU_RUNTIME:-$runtime}" "$@"
    ;;
  state) queued describe --format='value(state.state)' ;;
  wait)
    if ((dry_run)); then
      queued describe --format='value(state.state)'
      exit 0
    fi
    while true; do
      state=$(queued describe --format='value(state.state)')
      echo "$(date +%H:%M:%S) $TPU_NAME: $state"
      case $state in
        ACTIVE) exit 0 ;;
        FAILED | SUSPENDING | SUSPENDED) echo "tpu.sh: $TPU_NAME is $state; delete it and create it again." >&2 && exit 1 ;;
      esac
      sleep "${TPU_POLL_SECONDS:-30}"
    done
    ;;
  install)
    archive=$(mktemp -d)/plasticity_jax.tar.gz
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    top=$(cd "$(dirname "$0")/../.." && pwd)
    if ((dry_run)); then
      printf 'tar -czf %q -C %q FILES   # every file that git does not ignore\n' "$archive" "$top"
    else
      # A file that was deleted and not committed is listed too.
      git -C "$top" ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        [[ ! -e $top/$file && ! -L $top/$file ]] || printf '%s\0' "$file"
      done | tar -czf "$archive" -C "$top" --null -T -
    fi
    send gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:" "${where[@]}" --worker=all
    # uv installs its own Python, because the TPU images have 3.10. jax[tpu] includes libtpu.
    on all "set -e; mkdir -p plasticity_jax; tar xzf plasticity_jax.tar.gz -C plasticity_jax; cd plasticity_jax; python3 -m pip install --quiet --user uv
      [ -d .venv ] || ~/.local/bin/uv venv --quiet --seed --python 3.12 .venv
      .venv/bin/pip install --quiet -e '.[data,gcs,harness,tpu]'; make wheels wheels-sentencepiece-32k wheels-dolma2"
    ;;
  run)
    (($#)) || fail "run needs a plasticity command, such as: run study --config C --workdir gs://bucket/work"
    # Detached, so that the run survives a lost connection. Refuses to start while another run is active.
    on all "cd plasticity_jax
      if kill -0 \$(cat ~/plasticity.pid 2>/dev/null) 2>/dev/null; then echo 'a run is still active here; stop it first' >&2; exit 2; fi
      setsid nohup .venv/bin/plasticity$(printf ' %q' "$@") >>~/plasticity.log 2>&1 </dev/null & echo \$! >~/plasticity.pid"
    ;;
  attach) on 0 "tail -n 100 -F --pid=\$(cat ~/plasticity.pid) ~/plasticity.log" ;;
  logs) on all "hostname; tail -n 20 ~/plasticity.log" ;;
  stop) on all "kill \$(cat ~/plasticity.pid)" ;;
  delete) queued delete --force --quiet ;;
esac
