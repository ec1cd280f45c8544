#!/bin/bash
# Run a job on Ray, on all nodes of the allocation:  slurm/ray-cluster.sh jobs/JOB.py [FLAG]...
# All launchers call this. It starts Ray on each node, runs the job on the first, stops what it started, and exits with
# the job's status. A job that saved and stopped on a signal is queued again.
set -u

say() { printf '%(%F %T)T launcher: %s\n' -1 "$*" >&2; }

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: not in a Slurm job: start it from the project's folder by  sbatch slurm/train.sh  and the like" >&2
    exit 2
fi
. slurm/environment.sh

head=$SLURMD_NODENAME
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
num_cpus=() # per node; Slurm writes 4(x2),2
IFS=, read -ra groups <<< "$SLURM_JOB_CPUS_PER_NODE"
for group in "${groups[@]}"; do
    [[ $group =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]]
    for ((i = 0; i < ${BASH_REMATCH[3]:-1}; i++)); do num_cpus+=("${BASH_REMATCH[1]}"); done
done
logs=logs/$SLURM_JOB_NAME-$SLURM_JOB_ID-ray
start_limit_s=${RAY_START_LIMIT_S:-300}
output=$(mktemp -d "$job_folder-output.XXXXXX") # output of the steps
mem_per_node=${SLURM_MEM_PER_NODE:-0} mem_per_cpu=${SLURM_MEM_PER_CPU:-0}
# Steps would read these as their own requests.
unset "${!SLURM_MEM_PER@}" "${!SLURM_GPUS_PER@}" SLURM_GPUS SLURM_NTASKS SLURM_NPROCS "${!SLURM_NTASKS_PER@}" \
    "${!SLURM_CPUS_PER@}" "${!SLURM_TRES_PER@}" SLURM_TASKS_PER_NODE

steps=() # process ids of the steps, in node order
driver=
asked= # requeue or cancel
trap 'asked=${asked:-requeue}; [ -z "$driver" ] || kill -USR1 "$driver" 2> /dev/null' USR1
trap 'asked=cancel; rm -rf "$output"; [ -z "$driver" ] || kill -TERM "$driver" 2> /dev/null' TERM INT

on_node() { # NODE COMMAND...: a step beside the others, with all of the job's resources on that node
    local node=$1
    shift
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --mem=0 --cpu-bind=none --input=none --export=ALL \
        "${step_options[@]}" "${step_prefix[@]}" "$@"
}

find_head_ip() { # the IP address that Slurm uses: a node's own name may resolve to the loopback
    local address
    if [ -n "${RAY_INTERFACE:-}" ]; then
        ip -4 -o address show dev "$RAY_INTERFACE" | sed 's/.*inet \([0-9.]*\).*/\1/'
        return
    fi
    address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    { getent ahostsv4 "$address" | cut -d ' ' -f 1 && hostname -I | tr ' ' '\n'; } | grep -v '^127\.' | head -n 1
}

choose_ports() { # set port: three ports from there on, below Linux's ephemeral ports, that no other job here has
    local offset=$((SLURM_JOB_ID % 4000)) i
    for ((i = 0; i < 4000; i++)); do
        port=$((20000 + (offset + i) % 4000 * 3))
        in_use $port || in_use $((port + 1)) || in_use $((port + 2)) || return
    done
}

in_use() { (exec 3<> "/dev/tcp/$head_ip/$1") 2> /dev/null; }

start_ray() {
    local i memory_mb cpus
    for i in "${!nodes[@]}"; do
        memory_mb=$((mem_per_node ? mem_per_node : mem_per_cpu * num_cpus[i]))
        cpus=${num_cpus[i]}
        # Among several large nodes the head keeps some CPUs, and their memory, for the driver and for Ray itself.
        if [ "${nodes[i]}" = "$head" ] && ((${#nodes[@]} > 1 && cpus >= 16)); then cpus=$((cpus - cpus / 8)); fi
        on_node "${nodes[i]}" bash slurm/ray-node.sh "$head" "$head_ip" "$port" "$cpus" "$memory_mb" \
            > "$output/${nodes[i]}" 2>&1 &
        steps+=($!)
    done
}

await_ray() { # wait until Ray runs on every node, or report which node failed, and why
    local i missing limit=$((SECONDS + start_limit_s)) told=$((SECONDS + 15))
    while [ -z "$asked" ]; do
        missing=()
        for i in "${!nodes[@]}"; do
            grep -qs "Ray runtime started" "$output/${nodes[i]}" && continue
            missing+=("${nodes[i]}")
            if ! kill -0 "${steps[i]}" 2> /dev/null; then
                say "failed: Ray did not start on ${nodes[i]}:"
                tail -n 15 "$output/${nodes[i]}" >&2
                return 1
            fi
        done
        ((${#missing[@]})) || return 0
        if ((SECONDS > limit)); then
            say "failed: no Ray on ${missing[*]} after $start_limit_s s (RAY_START_LIMIT_S): can ${missing[*]}" \
                "reach $head_ip:$port on $head? Leave a bad node out by  sbatch --exclude=NODE"
            for i in "${missing[@]}"; do tail -n 5 "$output/$i" >&2; done
            return 1
        fi
        if ((SECONDS > told)); then
            say "waiting for Ray on ${missing[*]}"
            told=$((SECONDS + 15))
        fi
        sleep 0.2
    done
}

introduce() {
    say "Ray runs on ${#nodes[@]} node(s): ${nodes[*]} (start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID)"
    say "dashboard http://$head_ip:$((port + 2)); from your own machine:" \
        "ssh -L 8265:$head_ip:$((port + 2)) $USER@$SLURM_SUBMIT_HOST  and http://localhost:8265"
    say "its token: srun --jobid=$SLURM_JOB_ID --overlap --nodes=1 --ntasks=1 --nodelist=$head cat $job_folder/token"
    say "running $*"
}

run_job() { # return the job's exit status
    local i lost=()
    if ((${#step_options[@]})); then
        on_node "$head" python "$@" &
    else
        "${inside[@]}" python "$@" &
    fi
    driver=$!
    while kill -0 $driver 2> /dev/null; do
        for i in "${!nodes[@]}"; do
            if [ -z "${lost[i]:-}$asked" ] && ! kill -0 "${steps[i]}" 2> /dev/null; then
                lost[i]=yes
                say "Ray has ended on ${nodes[i]}, nobody here asked it to:"
                tail -n 3 "$output/${nodes[i]}" >&2
                if [ "${nodes[i]}" = "$head" ]; then
                    end_job
                    return 1
                fi
            fi
        done
        sleep 0.5
    done
    wait $driver
}

end_job() {
    local i
    kill -TERM $driver 2> /dev/null
    for ((i = 0; i < 20; i++)); do
        kill -0 $driver 2> /dev/null || return
        sleep 0.5
    done
    kill -KILL $driver 2> /dev/null
    wait $driver 2> /dev/null # quiet: bash would report the kill
}

keep_ray_logs() {
    local i copies=()
    for i in "${!nodes[@]}"; do
        kill -0 "${steps[i]}" 2> /dev/null || continue
        mkdir -p "$logs/${nodes[i]}"
        on_node "${nodes[i]}" cp -r "$job_folder/session_latest/logs/." "$logs/${nodes[i]}" > "$output/copying" 2>&1 &
        copies+=($!)
    done
    wait "${copies[@]}"
    say "Ray's own logs are in $logs/"
}

end_ray() {
    kill -TERM "${steps[@]}" 2> /dev/null # srun forwards it
    wait
    rm -rf "$output"
}

head_ip=$(find_head_ip)
[ -n "$head_ip" ] || usage_error "no address of $head is found: set RAY_INTERFACE in slurm/site.sh, see site.example.sh"
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS
choose_ports
start_ray
status=1
if await_ray && [ -z "$asked" ]; then
    introduce "$@"
    export RAY_ADDRESS=$head_ip:$port FIXED_NODES=1
    run_job "$@"
    status=$?
    # Slurm may have stopped only Ray, as it does before it takes the nodes away.
    if ((status != 0 && status != 2)) && grep -qsx "asked to end" "$output/$head"; then status=75; fi
fi
case $status in 0 | 2 | 75) ;; *) [ -n "$asked" ] || keep_ray_logs ;; esac
end_ray

# 75: everything is saved. Above 128: the signal came before the job could handle it; finished work is still saved.
if [ "$asked" != cancel ] && { ((status == 75)) || { [ "$asked" = requeue ] && ((status > 128 || status == 1)); }; }; then
    say "the job is stopped and goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || say "it could not be queued again: submit the same command, it goes on"
    status=75
fi
exit $status
