#!/usr/bin/env bash
# A real Slurm cluster on one machine, for tests: munged + slurmctld + N slurmd, no systemd, no accounting (as on many
# small clusters, so nothing may need it); key, sockets, spool, logs and pids lie under one folder.
#
#   cluster.sh up [N]       start from scratch (default 4 nodes); a no-op if it is already up with N nodes
#   cluster.sh down         stop everything, kill what jobs left behind, remove the folder
#   cluster.sh status       daemons with their memory, sinfo, squeue; exit 0 only if all nodes are up
#   cluster.sh env          prints the export line that a client needs:  eval "$(cluster.sh env)"
#   cluster.sh kill NODE    kill -9 that node's slurmd only (tasks go on running); slurmctld is a NODE here
#   cluster.sh crash NODE   kill -9 everything of that node: slurmd, slurmstepd and tasks
#   cluster.sh start NODE   start that node's slurmd, or slurmctld, again
#   cluster.sh cut|restore NODE  (SLURM_TEST_NET=net only) take the node's network down / up
#
# Settings, all from the environment:
#   SLURM_TEST_DIR    the folder                            [${TMPDIR:-/tmp}/slurm-test]
#   SLURM_TEST_PORT   first TCP port: slurmctld there, nodes on +1..+N   [17000]
#   SLURM_TEST_NET    none: nodes share host name and network
#                     uts:  each node has its own host name and /etc/hosts (needs root)
#                     net:  as uts, and its own network namespace and address (needs root)  [uts, none if not root]
#   SLURM_TEST_CPUS   CPUs declared on each node            [4]
#   SLURM_TEST_MEM    MiB declared on each node             [4000]
#   SLURM_TEST_GPUS   pretended GPUs on each node (gres/gpu over copies of /dev/null; needs root)  [0]
#   SLURM_TEST_EXTRA  lines appended to slurm.conf          []
set -euo pipefail

DIR=${SLURM_TEST_DIR:-${TMPDIR:-/tmp}/slurm-test}
PORT=${SLURM_TEST_PORT:-17000}
CPUS=${SLURM_TEST_CPUS:-4}
MEM=${SLURM_TEST_MEM:-4000}
GPUS=${SLURM_TEST_GPUS:-0}
NET=${SLURM_TEST_NET:-$([ "$(id -u)" = 0 ] && echo uts || echo none)}
CONF=$DIR/slurm.conf
PREFIX24=198.18.$((PORT / 20 % 256))      # for tests of networks (RFC 2544), used only inside the namespaces
export SLURM_CONF=$CONF
export PATH=$PATH:/usr/sbin:/sbin

log() { echo "cluster.sh: $*" >&2; }
die() { log "$*"; exit 1; }

# a pid that is alive, is not a zombie (pid 1 may reap late) and whose command line names this folder
ours() {
    local pid=$1 state
    [ -n "$pid" ] && [ -r "/proc/$pid/stat" ] || return 1
    state=$(sed 's/.*) //; s/ .*//' "/proc/$pid/stat" 2>/dev/null) || return 1
    [ "$state" != Z ] && [ "$state" != X ] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$DIR/"
}
pidof_file() { cat "$1" 2>/dev/null || true; }
alive() { ours "$(pidof_file "$DIR/run/$1.pid")"; }

# every live process of this cluster's nodes, or of the one named: slurmd, slurmstepd, tasks and their orphans
node_procs() {
    local node=${1:-} i n id p q
    n=$(pidof_file "$DIR/nodes")
    for ((i = 1; i <= ${n:-0}; i++)); do
        [ -z "$node" ] || [ "$node" = "node$i" ] || continue
        if [ -s "$DIR/ns/node$i" ] || mountpoint -q "$DIR/ns/node$i" 2>/dev/null; then
            # all that is in the node's UTS namespace (held by the bind mount, so its number is not reused)
            id="uts:[$(stat -L -c %i "$DIR/ns/node$i")]"
            { find /proc/[0-9]*/ns/uts -maxdepth 0 -printf '%p %l\n' 2>/dev/null || true; } |
                awk -v id="$id" '$2 == id { split($1, a, "/"); print a[3] }'
        else
            # no namespace: slurmd, the slurmstepds that log to the node's file, and their descendants
            p=$(pidof_file "$DIR/run/node$i.pid")
            if ours "$p"; then echo "$p"; fi
            for q in $(pgrep -x slurmstepd || true); do
                if readlink "/proc/$q/fd/"* 2>/dev/null | grep -qxF "$DIR/log/node$i.log"; then tree "$q"; fi
            done
        fi
    done
    return 0
}
tree() { local c; echo "$1"; for c in $(pgrep -P "$1" || true); do tree "$c"; done; }

write_conf() {
    local n=$1 i addr host
    host=$(hostname -s)
    mkdir -p "$DIR"/{run,log,ctld,d,ns,munge}
    chmod 755 "$DIR" "$DIR"/{run,log,ctld,d,ns}
    chmod 711 "$DIR/munge"
    (umask 077; head -c 1024 /dev/urandom >"$DIR/munge/key")
    echo "$n" >"$DIR/nodes"
    echo "$NET" >"$DIR/net"
    local addrs=()
    for ((i = 1; i <= n; i++)); do
        case $NET in
            none) addrs+=(127.0.0.1) ;;
            uts) addrs+=("127.0.0.$((10 + i))") ;;
            net) addrs+=("$PREFIX24.$((10 + i))") ;;
        esac
    done
    {
        cat <<EOF
ClusterName=test$PORT
# the controller's address is this machine's own name: 127.0.0.1 here, the bridge's address inside the nodes
SlurmctldHost=$host$([ "$NET" = net ] || echo "(127.0.0.1)")
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s, least 5)
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$PORT
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/%n.pid
StateSaveLocation=$DIR/ctld
SlurmdSpoolDir=$DIR/d/%n
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/%n.log
SlurmctldDebug=info
SlurmdDebug=info
LogTimeFormat=iso8601_ms
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# a node that comes back after being down serves again; declared CPUs and memory are believed
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=256
# failures are noticed in seconds, not minutes
SlurmdTimeout=10
MessageTimeout=5
KillWait=20
UnkillableStepTimeout=20
JobRequeue=1
# no two clusters in a row number their jobs alike: submitit would take an older job's result file for this one's
FirstJobId=$(($(date +%s) % 60000000 + 1))
# finished jobs stay in scontrol show job for this long
MinJobAge=3600
SchedulerType=sched/backfill
# start a submitted job within a second instead of three
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
EOF
        for ((i = 1; i <= n; i++)); do
            echo "NodeName=node$i NodeHostname=$([ "$NET" = none ] && echo "$host" || echo "node$i") NodeAddr=${addrs[i - 1]} Port=$((PORT + i)) CPUs=$CPUS RealMemory=$MEM$([ "$GPUS" = 0 ] || echo " Gres=gpu:$GPUS") State=UNKNOWN"
        done
        echo "PartitionName=test Nodes=node[1-$n] Default=YES DefaultTime=60 MaxTime=INFINITE State=UP"
        if [ "$GPUS" != 0 ]; then
            echo GresTypes=gpu
            for ((i = 0; i < GPUS; i++)); do mknod "$DIR/d/gpu$i" c 1 3; done
            echo "Name=gpu File=$DIR/d/gpu$([ "$GPUS" = 1 ] && echo 0 || echo "[0-$((GPUS - 1))]")" >"$DIR/gres.conf"
        fi
        [ -z "${SLURM_TEST_EXTRA:-}" ] || printf '%s\n' "$SLURM_TEST_EXTRA"
    } >"$CONF"
    {
        echo "127.0.0.1 localhost"
        if [ "$NET" = net ]; then echo "$PREFIX24.1 $host"; else echo "127.0.0.1 $host"; fi
        for ((i = 1; i <= n; i++)); do echo "${addrs[i - 1]} node$i"; done
    } >"$DIR/hosts"
}

net_up() {
    local n=$1 i
    [ "$NET" != none ] || return 0
    for ((i = 1; i <= n; i++)); do
        : >"$DIR/ns/node$i"
        unshare "--uts=$DIR/ns/node$i" hostname "node$i"
    done
    [ "$NET" = net ] || return 0
    # should the bridge ever be missing, nothing for these addresses may leave the machine
    ip route replace blackhole "$PREFIX24.0/24" metric 4096
    ip link add "br$PORT" type bridge
    ip addr add "$PREFIX24.1/24" dev "br$PORT"
    ip link set "br$PORT" up
    for ((i = 1; i <= n; i++)); do
        ip netns add "slurm$PORT-node$i"
        ip link add "v${PORT}n$i" type veth peer name eth0 netns "slurm$PORT-node$i"
        ip link set "v${PORT}n$i" master "br$PORT" up
        ip -n "slurm$PORT-node$i" addr add "$PREFIX24.$((10 + i))/24" dev eth0
        ip -n "slurm$PORT-node$i" link set lo up
        ip -n "slurm$PORT-node$i" link set eth0 up
    done
}

net_down() {
    local ns f
    for f in "$DIR"/ns/*; do
        if mountpoint -q "$f" 2>/dev/null; then umount "$f"; fi
    done
    command -v ip >/dev/null || return 0
    for ns in $(ip netns list 2>/dev/null | awk '{print $1}' | grep "^slurm$PORT-node" || true); do
        ip netns del "$ns" || true
    done
    if ip link show "br$PORT" >/dev/null 2>&1; then
        ip link del "br$PORT" || true
        ip route del blackhole "$PREFIX24.0/24" metric 4096 2>/dev/null || true
    fi
}

# no descriptor of the caller (a CI pipe, the lock) may stay open in a daemon
quiet() { local out=$1; shift; "$@" </dev/null >>"$DIR/log/$out.out" 2>&1 9>&-; }

start_node() {
    local node=$1 net
    net=$(cat "$DIR/net")
    local run=(slurmd -f "$CONF" -N "$node") ns="$DIR/ns/$node"
    local inside='mount --bind "$1" /etc/hosts && shift && exec "$@"'
    case $net in
        none) quiet "$node" "${run[@]}" ;;
        uts) quiet "$node" nsenter "--uts=$ns" unshare --mount sh -c "$inside" sh "$DIR/hosts" "${run[@]}" ;;
        net) quiet "$node" nsenter "--uts=$ns" "--net=/run/netns/slurm$PORT-$node" unshare --mount sh -c "$inside" sh "$DIR/hosts" "${run[@]}" ;;
    esac
}

start_ctld() {
    quiet slurmctld slurmctld -f "$CONF" || die "slurmctld: $(tail -n 5 "$DIR/log/slurmctld.log" "$DIR/log/slurmctld.out" 2>&1)"
    await 20 ctld_answers_or_died && ctld_answers || die "slurmctld does not answer: $(tail -n 5 "$DIR/log/slurmctld.log")"
}

# poll COMMAND every 50 ms for at most SECONDS
await() {
    local end=$((SECONDS + $1)); shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.05
    done
}
ctld_answers() { scontrol ping 2>/dev/null | grep -q 'is UP'; }
ctld_answers_or_died() { ctld_answers || grep -qs ' fatal: ' "$DIR/log/slurmctld.log"; }
nodes_up() { [ "$(sinfo -h -N -o '%N %t' 2>/dev/null | grep -cE ' (idle|mix|alloc|comp)$')" = "$1" ]; }

healthy() {
    local n=$1 i
    [ -f "$CONF" ] && [ "$(pidof_file "$DIR/nodes")" = "$n" ] && alive munged && alive slurmctld || return 1
    for ((i = 1; i <= n; i++)); do alive "node$i" || return 1; done
    nodes_up "$n"
}

up() {
    local n=${1:-4} i c t0=$EPOCHREALTIME
    for c in munged slurmctld slurmd sbatch srun scontrol; do command -v "$c" >/dev/null || die "$c is missing: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"; done
    # slurmstepd's socket, $DIR/d/nodeN/nodeN_JOBID.4294967291, must stay under 108 bytes
    [ ${#DIR} -le 68 ] || die "$DIR is too long for Unix sockets: 68 characters at most"
    if healthy "$n"; then log "already up with $n nodes"; return 0; fi
    down
    write_conf "$n"
    net_up "$n"
    quiet munged munged --num-threads=4 --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" \
        --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" || die "munged: $(cat "$DIR/log/munged.out")"
    start_ctld
    for ((i = 1; i <= n; i++)); do start_node "node$i" || die "slurmd node$i: $(tail -n 5 "$DIR/log/node$i.log" "$DIR/log/node$i.out" 2>&1)"; done
    await 30 nodes_up "$n" || die "nodes not up: $(sinfo -N; tail -n 5 "$DIR"/log/node1.log)"
    log "up: $n nodes ($NET) in $(awk -v a="$t0" -v b="$EPOCHREALTIME" 'BEGIN{printf "%.2f", b-a}') s; SLURM_CONF=$CONF"
}

stop_pid() { # TERM, at most SECONDS of grace, then KILL
    local grace=$1 pid=$2
    gone() { ! ours "$pid"; }
    kill -TERM "$pid" 2>/dev/null || true
    await "$grace" gone || kill -KILL "$pid" 2>/dev/null || true
}

down() {
    local f p left
    if [ -f "$CONF" ]; then
        # the nodes with all that runs there, at once: scancel would wait KillWait seconds for tasks that
        # ignore TERM, as submitit's do. Three passes, for what was being started meanwhile.
        for _ in 1 2 3; do
            left=$(node_procs; pgrep -f "^slurmd -f $CONF " || true)
            [ -n "$left" ] || break
            kill -KILL $left 2>/dev/null || true
            sleep 0.1
        done
        for p in $(pgrep -f "^slurmctld -f $CONF" || true); do stop_pid 5 "$p"; done
        p=$(pidof_file "$DIR/run/munged.pid")
        if ours "$p"; then stop_pid 10 "$p"; fi
    fi
    net_down
    rm -rf "$DIR"
}

status() {
    [ -f "$CONF" ] || { echo "down"; return 1; }
    local f p total=0 pss n ok=0
    n=$(cat "$DIR/nodes")
    for f in "$DIR"/run/*.pid; do
        p=$(pidof_file "$f")
        if ours "$p"; then
            pss=$(awk '/^Pss:/{print $2}' "/proc/$p/smaps_rollup" 2>/dev/null || echo 0)
            total=$((total + pss))
            echo "$(basename "$f" .pid) pid $p rss $(awk '/^VmRSS/{print $2}' "/proc/$p/status") kB pss $pss kB"
        else
            echo "$(basename "$f" .pid) not running"; ok=1
        fi
    done
    echo "daemons together: pss $total kB"
    sinfo -N -o '%N %t %c %m %E' || ok=1
    squeue || ok=1
    healthy "$n" || ok=1
    return $ok
}

lock() { exec 9>"${DIR%/}.lock"; flock 9; }

case ${1:-} in
    up) mkdir -p "$(dirname "$DIR")"; lock; up "${2:-4}" ;;
    down) mkdir -p "$(dirname "$DIR")"; lock; down; log "down" ;;
    status) status ;;
    env) echo "export SLURM_CONF=$CONF" ;;
    kill) kill -KILL "$(cat "$DIR/run/${2:?node}.pid")" ;;
    crash) left=$(node_procs "${2:?node}"); [ -z "$left" ] || kill -KILL $left ;;
    start) [ "${2:?node}" = slurmctld ] && start_ctld || start_node "$2" ;;
    cut) ip link set "v${PORT}n${2#node}" down ;;
    restore) ip link set "v${PORT}n${2#node}" up ;;
    *) sed -n '2,21s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
