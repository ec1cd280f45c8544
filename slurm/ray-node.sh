#!/bin/bash
# Run Ray on one node until a signal stops it:  ray-node.sh HEAD IP_OF_HEAD PORT NUM_CPUS MEMORY_MB
# ray-cluster.sh starts it as a step on each node. "Ray runtime started" on standard output means that Ray runs.
set -u
. slurm/environment.sh
head=$1 head_ip=$2 port=$3 num_cpus=$4 memory_mb=$5
logs=logs/$SLURM_JOB_NAME-$SLURM_JOB_ID-ray/$SLURMD_NODENAME

asked=
# Slurm sends the signal to every process of the step, Ray's too, and kills soon after. So clean up at once.
trap '[ -n "$asked" ] || echo "asked to end"; asked=yes; rm -rf "$job_folder"' TERM INT

# Find this node's address towards the head, and the name of that network. A host name may resolve to the loopback, and
# torch and NCCL might choose another network.
find_network='
import fcntl, socket, struct, sys
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
probe.connect((sys.argv[1], 9))
ip = probe.getsockname()[0]
for _, name in socket.if_nameindex():
    try:
        address = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))[20:24]  # SIOCGIFADDR
    except OSError:
        continue
    if socket.inet_ntoa(address) == ip:
        print(ip, name)
'

head_answers() { (exec 3<> "/dev/tcp/$head_ip/$port") 2> /dev/null; }

wait_for_head() {
    until head_answers; do
        [ -z "$asked" ] || exit 0
        sleep 0.2
    done
}

requeue_without_head() { # when the head's host dies, the batch script dies too, but Slurm may let the job run on
    local hosts
    while [ -z "$asked" ]; do
        hosts=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *NodeList=//p')
        if [ -n "$hosts" ] && ! scontrol show hostnames "$hosts" | grep -qx "$head"; then
            scontrol requeue "$SLURM_JOB_ID"
            return
        fi
        sleep 5
    done
}

rm -rf "$job_folder"
(umask 077 && mkdir -p "$TMPDIR") || exit 1
read -r ip interface < <("${inside[@]}" python -c "$find_network" "$head_ip")
[ -n "${ip:-}" ] || { echo "no python, or no network that reaches $head_ip" >&2 && exit 1; }
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}

options=(--block --disable-usage-stats --node-ip-address="$ip" --temp-dir="$job_folder")
options+=(--num-cpus="$num_cpus" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --min-worker-port=0 --max-worker-port=0)
if ((memory_mb)); then
    # A third of the memory for objects, if shared memory has that much.
    room_mb=$(df --output=avail --block-size=1M /dev/shm | tail -n 1)
    objects_mb=$((memory_mb * 3 / 10 < room_mb * 9 / 10 ? memory_mb * 3 / 10 : room_mb * 9 / 10))
    options+=(--object-store-memory=$((objects_mb << 20)) --memory=$(((memory_mb - objects_mb) << 20)))
fi
if [ "$SLURMD_NODENAME" = "$head" ]; then
    (umask 077 && echo "$RAY_AUTH_TOKEN" > "$job_folder/token")
    options+=(--head --port="$port" --ray-client-server-port=$((port + 1)))
    options+=(--include-dashboard=true --dashboard-host="$ip" --dashboard-port=$((port + 2)))
else
    wait_for_head
    options+=(--address="$head_ip:$port")
fi
"${inside[@]}" ray start "${options[@]}" &
ray=$!
while kill -0 $ray 2> /dev/null; do wait $ray; done # a signal interrupts wait
wait $ray
status=$?
if [ -z "$asked" ]; then mkdir -p "$logs" && cp -r "$job_folder/session_latest/logs/." "$logs"; fi
rm -rf "$job_folder"
if [ -z "$asked" ] && ! head_answers; then requeue_without_head; fi
exit $status
