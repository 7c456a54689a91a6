# shellcheck shell=bash
# The Ray node of one SLURM node, until it is told to end. The first node is the head, where the others join. Passed as text to
# `bash -c`, because a container does not see the launchers' folder.

# Short, because Ray makes Unix sockets in it, and this user's alone: Ray lets everybody write into the folder inside.
temp=$(mktemp -d "${RAY_TMP:-/tmp}/rlhf-ray-XXXXXX") || exit
options=(--block --disable-usage-stats --temp-dir="$temp/ray" --num-cpus="$SLURM_CPUS_ON_NODE")
if [[ $SLURM_NODEID == 0 ]]; then
  echo "$SLURM_STEP_ID" >"$LOGS/step" # for who ends this step
  options+=(--head --node-ip-address="$HEAD_IP" --port="$RAY_PORT" --include-dashboard=false)
else
  python -m rlhf.cluster.launching head "$HEAD_IP:$RAY_PORT" --deadline "$START_DEADLINE_S" || exit
  options+=(--address="$HEAD_IP:$RAY_PORT")
fi
if [[ -n ${ROLLOUT_NODES:-} ]]; then # for cluster.node_resources: the last nodes are for rollout
  role=policy_node
  ((SLURM_NODEID < SLURM_JOB_NUM_NODES - ROLLOUT_NODES)) || role=rollout_node
  options+=(--resources="{\"$role\": 1}")
fi

told=
trap 'told=yes; kill -TERM $! 2>/dev/null' TERM
# shellcheck disable=SC2086 # several words
ray start "${options[@]}" ${RAY_START_ARGS:-} &
ray=$!
while kill -0 "$ray" 2>/dev/null; do wait "$ray"; status=$?; done

# What actors wrote to stderr is only in Ray's own logs.
mkdir -p "$LOGS/ray-$SLURMD_NODENAME"
cp -r "$temp"/ray/session_latest/logs/. "$LOGS/ray-$SLURMD_NODENAME"
rm -rf "$temp"
if [[ -z $told ]]; then
  echo "Ray ended by itself with status $status" >&2
  sleep "$GRACE_S" & # SLURM ends all nodes after this one; until then the driver can say what it lost
  wait "$!"
  exit 1
fi
