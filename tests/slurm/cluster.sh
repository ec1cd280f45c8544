#!/bin/bash
# A real Slurm cluster on one machine, for root: munged, slurmctld, and hosts that each run a slurmd.
#   cluster.sh up FOLDER NUM_HOSTS   make FOLDER, start everything, wait until all hosts are idle
#   cluster.sh host FOLDER I         start host I again, after it has died
#   cluster.sh down FOLDER           end what was started, and nothing else
# A host has a network, a host name, processes, /tmp and /dev/shm of its own; other folders are shared, as on a cluster.
# Killing the process in FOLDER/pid/nodeI.pid is a power cut: everything on that host ends with it.
# FOLDER/login COMMAND... runs a command on the login host, where sbatch is. FOLDER must not be below /tmp.
set -euo pipefail

COMMAND=$1
FOLDER=$2
PROJECT=$(cd "$(dirname "$0")/../.." && pwd)
NET=10.77.0
CPUS=8
MEMORY_MB=16000
# Names of networks belong to the whole machine: one prefix a cluster.
PREFIX=slurm-$(basename "$FOLDER" | md5sum | cut -c 1-6)

make_networks() { # a bridge on the login host, and a cable from it to each host; nothing touches the machine's own
    local i login=$PREFIX-login
    ip netns add "$login"
    ip -n "$login" link set lo up
    ip -n "$login" link add br0 type bridge
    ip -n "$login" address add $NET.1/24 dev br0
    ip -n "$login" link set br0 up
    for ((i = 1; i <= $1; i++)); do
        ip netns add "$PREFIX-node$i"
        ip -n "$login" link add "cable$i" type veth peer name eth0 netns "$PREFIX-node$i"
        ip -n "$login" link set "cable$i" master br0 up
        ip -n "$PREFIX-node$i" link set lo up
        ip -n "$PREFIX-node$i" address add "$NET.$((10 + i))/24" dev eth0
        ip -n "$PREFIX-node$i" link set eth0 up
    done
}

write_configuration() {
    local i
    printf '127.0.0.1 localhost\n%s.1 login\n' $NET > hosts
    for ((i = 1; i <= $1; i++)); do printf '%s.%d node%d\n' $NET $((10 + i)) $i >> hosts; done
    printf 'Name=gpu File=/dev/%s\n' null zero > gres.conf # no GPU, but Slurm hands them out like two
    cat > slurm.conf << END
ClusterName=test
SlurmctldHost=login($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until credentials of its first start have expired; two minutes by default.
AuthInfo=socket=$FOLDER/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool.%n
SlurmctldPidFile=$FOLDER/pid/slurmctld.pid
SlurmdPidFile=$FOLDER/pid/slurmd.%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
DefMemPerCPU=1500
KillWait=10
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=15
MessageTimeout=10
MpiDefault=none
PropagateResourceLimitsExcept=MEMLOCK
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
    for ((i = 1; i <= $1; i++)); do
        echo "NodeName=node$i NodeAddr=$NET.$((10 + i)) CPUs=$CPUS RealMemory=$MEMORY_MB Gres=gpu:2" >> slurm.conf
    done
    cat >> slurm.conf << END
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=20 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=20 PriorityTier=2 PreemptMode=OFF
END
    cat > login << END
#!/bin/bash
# nsenter, for "ip netns exec" would hide /sys/fs/cgroup.
exec nsenter --net=/run/netns/$PREFIX-login unshare --uts --mount sh -c '
    hostname login && mount --bind "$FOLDER/hosts" /etc/hosts && exec env "\$@"' sh "SLURM_CONF=$FOLDER/slurm.conf" "\$@"
END
    chmod +x login
}

start_munged() {
    (umask 077 && dd if=/dev/urandom of=munge/key bs=128 count=1 status=none)
    munged --key-file="$FOLDER/munge/key" --socket="$FOLDER/munge/socket" --pid-file="$FOLDER/pid/munged.pid" \
        --log-file="$FOLDER/munge/log" --seed-file="$FOLDER/munge/seed"
}

start_host() {
    local name=node$1
    mkdir -p "spool.$name"
    # Debian maps a machine's name to 127.0.1.1 on the machine itself, which must mislead nobody.
    { echo "127.0.1.1 $name" && grep -v " $name\$" hosts; } > "hosts.$name"
    # A project that lies below /tmp must be seen in the host's own /tmp too.
    # shellcheck disable=SC2016
    setsid nsenter --net="/run/netns/$PREFIX-$name" unshare --uts --pid --mount --fork --kill-child=KILL --mount-proc \
        bash -c '
            hostname "$1" && mount --bind "$2/hosts.$1" /etc/hosts
            mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
            mkdir -p "$2/project" && mount --bind "$3" "$2/project"
            mount -t tmpfs -o size=2g,mode=1777 tmpfs /tmp
            [ -d "$3" ] || { mkdir -p "$3" && mount --bind "$2/project" "$3"; }
            # A root file system for containers: the programs of this machine, without what a container brings itself.
            mkdir -p "$2"/image/{dev,proc,sys,tmp,run}
            for folder in /*; do
                case $folder in /dev | /proc | /sys | /tmp | /run) continue ;; esac
                if [ -L "$folder" ]; then
                    ln -sfn "$(readlink "$folder")" "$2/image$folder"
                elif [ -d "$folder" ]; then
                    mkdir -p "$2/image$folder" && mount --rbind "$folder" "$2/image$folder"
                fi
            done
            SLURM_CONF=$2/slurm.conf exec slurmd -D -N "$1"' bash "$name" "$FOLDER" "$PROJECT" \
        < /dev/null >> "log/$name.out" 2>&1 &
    echo $! > "pid/$name.pid"
}

end_process() { # PID_FILE: ask it, then kill it
    local pid i
    [ -f "$1" ] || return 0
    pid=$(< "$1")
    kill -TERM "$pid" 2> /dev/null || return 0
    for ((i = 0; i < 50; i++)); do
        [ -d "/proc/$pid" ] || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2> /dev/null || true
}

case $COMMAND in
    up)
        mkdir -p "$FOLDER"/{munge,state,pid,log}
        cd "$FOLDER"
        chmod 755 . munge
        make_networks "$3"
        write_configuration "$3"
        start_munged
        setsid ./login slurmctld -D < /dev/null > log/slurmctld.out 2>&1 &
        echo $! > pid/login.pid
        for ((i = 1; i <= $3; i++)); do start_host "$i"; done
        for ((i = 0; i < 300; i++)); do
            [ "$(./login sinfo -h -N -p main -t idle -o %N 2> /dev/null | wc -l)" = "$3" ] && exit 0
            sleep 0.1
        done
        echo "the hosts do not come up:" >&2
        tail -n 5 log/*.log log/*.out >&2
        exit 1
        ;;
    host)
        cd "$FOLDER"
        start_host "$3"
        ;;
    down)
        cd "$FOLDER" || exit 0
        # unshare passes no SIGTERM on; what is on a host ends with it.
        for file in pid/node*.pid; do kill -KILL "$(< "$file")" 2> /dev/null || true; done
        for file in pid/login.pid pid/munged.pid; do end_process "$file"; done
        for network in $(ip netns list | cut -d ' ' -f 1 | grep "^$PREFIX-"); do
            # shellcheck disable=SC2046
            kill -KILL $(ip netns pids "$network") 2> /dev/null || true
            ip netns delete "$network"
        done
        ;;
    *)
        sed -n '2,9p' "$0" >&2
        exit 2
        ;;
esac
