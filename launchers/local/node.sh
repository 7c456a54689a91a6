# shellcheck shell=bash
# The Ray node of one host, as long as stdin is open; the token is its first line. Passed as text to `bash -c` by hosts.sh, with
# what it needs in variables and options of `ray start` as arguments.
# shellcheck disable=SC2154 # the variables

read -r RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
cd "$folder" || exit
export PATH=$path:$PATH
# shellcheck source=/dev/null
[ -z "$setup" ] || source "$setup"
python -m rlhf.cluster.launching head "$head" --deadline "$deadline" || exit
temp=$(python -m rlhf.cluster.launching session-folder) || exit
exec 3<&0
ray start --block --disable-usage-stats --temp-dir="$temp" --address="$head" "$@" </dev/null &
ray=$!
{ cat; kill -TERM "$ray"; } <&3 >/dev/null 2>&1 &
wait "$ray"
