# shellcheck shell=bash
# What the launch scripts of SLURM and of plain hosts share. Ray's nodes and the driver are background processes of the
# script; the first of them that ends, ends all. Sourced, not run; needs bash 4.4 or newer.

START_DEADLINE_S=${START_DEADLINE_S:-300} # longest wait for all Ray nodes, in seconds
GRACE_S=${GRACE_S:-60}                    # time that a part gets to end by itself, in seconds

# A Ray node that is told to end waits for its actors, 30 s by default. The driver has ended then, and theirs is only to go.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

say() { printf '%s launcher: %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

# new_token: a secret of this cluster's own, on stdout.
new_token() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# alive PID...: whether one of the processes runs.
alive() { kill -0 "$@" 2>/dev/null; }

# ended_within SECONDS PID...: whether all processes end in that time.
ended_within() {
  local end=$((SECONDS + $1)) pid
  for pid in "${@:2}"; do
    while alive "$pid"; do
      ((SECONDS < end)) || return 1
      sleep 0.2
    done
  done
}

# stop PID...: ask the processes to end, and make those that do not.
stop() {
  local pid
  for pid in "$@"; do kill -TERM "$pid" 2>/dev/null || true; done
  ended_within "$GRACE_S" "$@" && return 0 # not the status from before a trap
  say "not ended after $GRACE_S s, so killed"
  for pid in "$@"; do kill -KILL "$pid" 2>/dev/null || true; done
}

# shellcheck disable=SC2034 # `status` is for the script
# supervise DRIVER PART...: wait until the driver or one of the Ray nodes has ended, or `caught` is set by a trap. A driver
# that lost a node gets GRACE_S seconds to say so. Sets `status`: the driver's, or 1 if it had to be stopped.
supervise() {
  local driver=$1
  shift
  wait -n "$driver" "$@" || true
  [[ -z ${caught:-} ]] || return 0
  if alive "$driver"; then
    say "a Ray node has ended; the driver has $GRACE_S s to say what it lost"
    if ! ended_within "$GRACE_S" "$driver"; then
      say "the driver goes on without noticing; stopped"
      stop "$driver"
      status=1
      return 0
    fi
  fi
  wait "$driver" && status=0 || status=$?
}
