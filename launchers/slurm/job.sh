# shellcheck shell=bash
# One job: Ray on all nodes of the allocation as one step, the driver as another, and what happens when one of them ends.
# Sourced by the batch scripts with CONFIG and overrides as arguments. They may set `step_options` (more options of srun) and
# `wrap` (a command that the others run in), so that nothing but this file and node.sh runs outside of a container.

here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launchers/common.sh
source "$here/../common.sh"
(($# > 0)) || { say "usage: sbatch train.sbatch CONFIG [section.key=value ...]" && exit 2; }

caught= # the signal, once there is one
trap 'caught=USR1' USR1
trap 'caught=TERM' TERM INT

# The environment: a container's, or an installation in the folder of submission; then what RLHF_SETUP, a file to source, makes.
[[ -n ${IMAGE:-} || ! -x $PWD/.venv/bin/rlhf ]] || export PATH=$PWD/.venv/bin:$PATH
# shellcheck source=/dev/null
[[ -z ${RLHF_SETUP:-} ]] || source "$RLHF_SETUP"

restart=${SLURM_RESTART_COUNT:-0}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
count=${#hosts[@]}
declare -a step_options wrap # keeps what the batch script has set
step=(srun --overlap --cpu-bind=none --input=none "${step_options[@]}")
on_head=("${step[@]}" --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" "${wrap[@]}")

command=${RLHF_COMMAND:-train}
run_dir=$("${on_head[@]}" python -m rlhf.cluster.launching run-folder --command "$command" "$@") || exit
LOGS=$run_dir/slurm/$SLURM_JOB_ID-$restart
mkdir -p "$LOGS"

# Where the head listens. On a shared node the port of another job's cluster must differ.
[[ -n ${HEAD_IP:-} ]] || HEAD_IP=$("${on_head[@]}" python -m rlhf.cluster.launching address "${hosts[-1]}") || exit
RAY_PORT=${RAY_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export HEAD_IP RAY_PORT START_DEADLINE_S GRACE_S LOGS

# Only who can read this file can join the cluster or use it.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$LOGS/token
(umask 077 && new_token >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

finish() { # the driver first; Ray's step by its id, because SIGTERM to srun itself would kill the nodes unheard
  trap '' USR1 TERM INT
  ((${#parts[@]} < 2)) || stop "${parts[1]}"
  if alive "${parts[0]}"; then
    [[ ! -f $LOGS/step ]] || scancel --signal=TERM "$SLURM_JOB_ID.$(<"$LOGS/step")" || true
    ended_within "$GRACE_S" "${parts[0]}" || stop "${parts[0]}"
  fi
  rm -f "$RAY_AUTH_TOKEN_PATH" "$LOGS/step"
}

say "Ray on $count nodes, head $HEAD_IP:$RAY_PORT on ${hosts[0]}; logs in $LOGS"
"${step[@]}" --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --kill-on-bad-exit=1 --output="$LOGS/node-%n-%N.log" \
  "${wrap[@]}" bash -c "$(<"$here/node.sh")" &
parts=($!)
trap finish EXIT
"${on_head[@]}" python -m rlhf.cluster.launching nodes "$HEAD_IP:$RAY_PORT" --count "$count" --deadline "$START_DEADLINE_S" &
parts+=($!)
wait -n "${parts[@]}" || true
if alive "${parts[1]}" && [[ -z $caught ]]; then
  say "a Ray node did not start; see $LOGS"
  exit 1
fi

status=1
if [[ -z $caught ]] && wait "${parts[1]}"; then
  options=()
  if ((restart > 0)) && [[ -f $run_dir/manifest.json ]]; then
    options=(--resume)
    if [[ -s $run_dir/metrics.jsonl ]] && ! compgen -G "$run_dir/checkpoints/step-*/state.json" > /dev/null; then
      say "no checkpoint is complete: the run begins anew, its record so far is kept as *.before-restart-$restart.jsonl"
      for name in metrics evaluations samples; do
        if [[ -f $run_dir/$name.jsonl ]]; then mv "$run_dir/$name.jsonl" "$run_dir/$name.before-restart-$restart.jsonl"; fi
      done
    fi
  fi
  say "restart $restart: rlhf $command $* ${options[*]}"
  "${on_head[@]}" rlhf "$command" "$@" cluster.address="$HEAD_IP:$RAY_PORT" "${options[@]}" \
    > >(tee "$LOGS/driver.log") 2>&1 &
  parts[1]=$!
  supervise "${parts[1]}" "${parts[0]}"
fi

if [[ $caught == USR1 ]]; then # the time limit comes, or the node is wanted
  finish
  if ((restart < ${MAX_RESTARTS:-20})); then
    say "requeued; it will continue from the last complete checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  say "not requeued: restart $restart of at most ${MAX_RESTARTS:-20} (MAX_RESTARTS)"
  exit 1
fi
[[ $caught != TERM ]] || status=143
exit "$status"
