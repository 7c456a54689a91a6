#!/usr/bin/env bash
# A run on several hosts that this one reaches by ssh, without a scheduler:
#
#   launchers/local/hosts.sh HOSTS CONFIG [section.key=value ...] [--resume]
#
# HOSTS is a file with a host's name per line, this host first; after the name may stand what cluster.node_resources asks for,
# such as rollout_node. docs/launchers/local.md says what the hosts must share, and which variables change what.

set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=launchers/common.sh
source "$here/../common.sh"
(($# > 1)) || { say "usage: hosts.sh HOSTS CONFIG [section.key=value ...] [--resume]" && exit 2; }

hosts=() resources=()
while read -r host resource; do
  [[ -n $host && $host != \#* ]] || continue
  hosts+=("$host")
  offers=
  [[ -z $resource ]] || offers="--resources={\"$resource\": 1}"
  resources+=("$offers")
done <"$1"
shift
count=${#hosts[@]}
((count > 0)) || { say "the file names no host" && exit 2; }

[[ ! -x $PWD/.venv/bin/rlhf ]] || export PATH=$PWD/.venv/bin:$PATH
# shellcheck source=/dev/null
[[ -z ${RLHF_SETUP:-} ]] || source "$RLHF_SETUP"
command=${RLHF_COMMAND:-train}
run_dir=$(python -m rlhf.cluster.launching run-folder --command "$command" "$@") || exit
logs=$run_dir/hosts
mkdir -p "$logs"
[[ -n ${HEAD_IP:-} ]] || HEAD_IP=$(python -m rlhf.cluster.launching address "${hosts[-1]}") || exit
RAY_PORT=${RAY_PORT:-6379}
head=$HEAD_IP:$RAY_PORT

# Only who has the token can join the cluster or use it. It reaches the other hosts as the first line of ssh's stdin, so it is on
# no disk and no command line. A host's Ray lives as long as that stdin is open: until we close descriptor 9, or die.
RAY_AUTH_TOKEN=$(new_token)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
scratch=$(mktemp -d)
mkfifo "$scratch/open"
exec 9<>"$scratch/open"

quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; } # for whatever shell the other host logs in with

# join HOST OPTION...: start the host's Ray node, in the background, with its output in the logs.
join() {
  local words option bin
  bin=$(dirname "$(command -v ray)")
  words="folder=$(quoted "$PWD") path=$(quoted "$bin") setup=$(quoted "${RLHF_SETUP:-}") head=$head deadline=$START_DEADLINE_S"
  words+=" bash -c $(quoted "$(<"$here/node.sh")") node"
  for option in "${@:2}"; do words+=" $(quoted "$option")"; done
  ${SSH:-ssh} -o BatchMode=yes -o ServerAliveInterval=15 "$1" "$words" 9>&- >"$logs/$1.log" 2>&1 \
    < <(printf '%s\n' "$RAY_AUTH_TOKEN" && exec 9>&- cat "$scratch/open") &
}

caught=
trap 'caught=TERM' TERM INT
parts=() # the head, then the connections to the others
# shellcheck disable=SC2329 # the trap calls it
finish() {
  trap '' TERM INT
  stop ${driver:+"$driver"}
  exec 9>&-
  ended_within "$GRACE_S" "${parts[@]:1}" || stop "${parts[@]:1}"
  stop "${parts[@]:0:1}"
  rm -rf "$scratch"
}
trap finish EXIT

# shellcheck disable=SC2206 # several words
extra=(${RAY_START_ARGS:-})
say "Ray on $count hosts, head $head; logs in $logs"
temp=$(python -m rlhf.cluster.launching session-folder) || exit
ray start --head --block --disable-usage-stats --temp-dir="$temp" --node-ip-address="$HEAD_IP" --port="$RAY_PORT" --include-dashboard=false \
  ${resources[0]:+"${resources[0]}"} "${extra[@]}" 9>&- >"$logs/${hosts[0]}.log" 2>&1 &
parts=($!)
for ((i = 1; i < count; i++)); do
  join "${hosts[i]}" ${resources[i]:+"${resources[i]}"} "${extra[@]}"
  parts+=($!)
done
python -m rlhf.cluster.launching nodes "$head" --count "$count" --deadline "$START_DEADLINE_S" 9>&- &
driver=$!
wait -n "$driver" "${parts[@]}" || true
if alive "$driver" && [[ -z $caught ]]; then
  say "a Ray node did not start; see $logs"
  exit 1
fi

status=1
if [[ -z $caught ]] && wait "$driver"; then
  say "rlhf $command $*"
  rlhf "$command" "$@" cluster.address="$head" 9>&- &
  driver=$!
  supervise "$driver" "${parts[@]}"
fi
[[ -z $caught ]] || status=143
exit "$status"
