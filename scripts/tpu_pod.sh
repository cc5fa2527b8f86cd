#!/usr/bin/env bash
# Trains on a slice of a TPU pod, with gcloud: from a laptop, or any machine with the repository.
#
#   scripts/tpu_pod.sh create --name=pod --zone=us-central2-b --type=v4-32 --spot
#   scripts/tpu_pod.sh setup                          the repository and its packages, to all workers
#   scripts/tpu_pod.sh run -- --config=configs/pmnist.py --workdir=/mnt/share/runs/pmnist
#   scripts/tpu_pod.sh logs [WORKER|all]              follows what a worker's run writes (default 0)
#   scripts/tpu_pod.sh status                         of the node, and of the run on each worker
#   scripts/tpu_pod.sh resume -- ARGUMENTS OF run     a node that was preempted: made and run anew
#   scripts/tpu_pod.sh watch -- ARGUMENTS OF run      does so by itself, until the run has finished
#   scripts/tpu_pod.sh stop                           runs save a checkpoint and leave
#   scripts/tpu_pod.sh delete
#
# Options, before the `--`, and the variables that stand for them:
#
#   --name=     TPU_NAME      of the node
#   --zone=     TPU_ZONE
#   --type=     TPU_TYPE      such as v4-32
#   --version=  TPU_VERSION   of its software: tpu-ubuntu2204-base (the default) for v4 and older,
#                             v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e
#   --project=  TPU_PROJECT   default: gcloud's
#   --spot      TPU_SPOT=1    cheaper, and may be preempted at any time
#   --python=   TPU_PYTHON    default: python3.11, which Ubuntu 22.04 offers beside its own
#   --mount=    TPU_MOUNT     command by which `setup` mounts the shared folder on every worker; it
#                             may be run again: mountpoint -q /mnt/share || sudo mount ...
#   --every=    TPU_EVERY     seconds between two looks of `watch` (default 60)
#   --dry-run                 prints the commands, each a line to paste, and runs none
#
# The workdir has to lie where all workers read and write the same files, and where they outlive the
# node: in a mounted folder, such as Filestore (NFS), or a bucket by gcsfuse. A path gs://... will
# not do, the code writes plain files. The data need such a place too: --config.data_dir. A worker
# has several devices: --config.parallel.devices=0 uses all of them.
#
# Several workers at once need the SSH key in the agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
FOLDER=bnlstm_jax # of the repository on a worker, in the home folder
ON_WORKER="bash $FOLDER/scripts/tpu_pod.sh on-worker"

fail() {
    echo "error: $*" >&2
    exit 2
}

# ---- Commands, run or printed.

# A word as any POSIX shell reads it, like Python's shlex.quote.
quote() {
    local apostrophe="'" escaped="'\"'\"'"
    case $1 in
        '' | *[!A-Za-z0-9@%+=:,./_-]*) printf "'%s'" "${1//$apostrophe/$escaped}" ;;
        *) printf '%s' "$1" ;;
    esac
}

# Words with a blank between them, each quoted.
quoted() {
    local word separator=
    for word; do
        printf '%s' "$separator"
        quote "$word"
        separator=' '
    done
}

do_it() {
    if [ -n "$dry_run" ]; then
        quoted "$@"
        echo
    else
        "$@"
    fi
}

tpu_vm() { # create, describe and delete, with more options behind
    local verb=$1
    shift
    do_it gcloud compute tpus tpu-vm "$verb" "$name" "${place[@]}" "$@"
}

on_worker() { # 0, 1, ... or all; and the command
    do_it gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

# ---- The subcommands, as this machine sees them.

create() {
    [ -n "$type" ] || fail "which TPU? give --type=TYPE or TPU_TYPE, such as v4-32"
    tpu_vm create --accelerator-type="$type" --version="$version" ${spot:+--spot}
}

setup() {
    local archive=${XDG_CACHE_HOME:-$HOME/.cache}/bnlstm_jax-$name.tar.gz
    do_it mkdir -p "$(dirname "$archive")"
    do_it tar -czf "$archive" -C "$ROOT" --exclude=./.venv --exclude=./data --exclude=./runs .
    do_it gcloud compute tpus tpu-vm scp "$archive" "$name:$FOLDER.tar.gz" "${place[@]}" --worker=all
    on_worker all "mkdir -p $FOLDER && tar -xzf $FOLDER.tar.gz -C $FOLDER && \
$ON_WORKER setup $(quoted "$python" "$mount")"
}

run() {
    on_worker all "$ON_WORKER run $(quoted "$@")"
}

logs() {
    on_worker "${1:-0}" "$ON_WORKER logs"
}

state() { # of the node; in a dry run the command for it
    tpu_vm describe --format='value(state)'
}

status() {
    local now
    now=$(state)
    echo "$now"
    if [ -n "$dry_run" ] || [ "$now" = READY ]; then
        on_worker all "$ON_WORKER status"
    fi
}

resume() {
    local now
    now=$(state || echo MISSING)
    if [ -n "$dry_run" ]; then
        echo "$now"
    elif [ "$now" = READY ]; then
        fail "$name is READY, it was not preempted: use run, or first stop and delete"
    fi
    [ "$now" = MISSING ] || delete
    create
    setup
    run "$@"
}

watch() {
    if [ -n "$dry_run" ]; then
        status
        resume "$@" | tail -n +2 # less the question for the state
        return
    fi
    local now before=''
    while true; do
        now=$(state || echo MISSING)
        if [ "$now" = READY ]; then
            now=$(runs)
        fi
        case $now in
            "not started") again setup && again run -- "$@" || now="$now: setup or run failed" ;;
            "ended with status "*)
                [ "$now" = "$before" ] || ! lost_a_worker "$now" || again run -- "$@" || true
                ;;
            PREEMPTED | TERMINATED | MISSING)
                again resume -- "$@" || now="$now: not resumed" # there may be no TPU to be had
                ;;
        esac
        [ "$now" = "$before" ] || echo "$(date '+%F %T') $name: $now"
        [ "$now" != "ended with status 0" ] || return 0
        # A preemption ends the runs first, and is told only then.
        if [[ $now = ended* && $now = "$before" ]]; then
            fail "the run $now: see scripts/tpu_pod.sh logs all"
        fi
        before=$now
        sleep "$every"
    done
}

# Whether runs ended because a worker was lost: JAX then aborts the others (134), unless they fail
# first (1) in a collective operation.
lost_a_worker() {
    [[ $1 =~ ^"ended with status"(' '(134|137|143))+$ && $1 =~ ' '134 ||
        $1 = "ended with status 1 137" ]]
}

# What the runs of a node do that is READY.
runs() {
    local all failure=0
    all=$(on_worker all "$ON_WORKER status") || failure=$?
    case $failure,$all in
        255,*) echo "cannot be reached" ;; # for the moment, or it is being preempted
        0,*running*) echo running ;;
        0,*"not started"* | [!0]*) echo "not started" ;;
        *) echo "ended with status $(sed 's/.* //' <<<"$all" | sort -u | xargs)" ;;
    esac
}

# A subcommand in a process of its own, which ends where one of its commands fails.
again() {
    local verb=$1
    shift
    bash "${BASH_SOURCE[0]}" "$verb" ${options[@]+"${options[@]}"} "$@"
}

stop() {
    on_worker all "$ON_WORKER stop"
}

delete() {
    tpu_vm delete --quiet
}

# ---- What they do on a worker, in its copy of the repository.

worker() {
    local verb=$1
    shift
    cd "$ROOT"
    [ "$verb" = setup ] || [ -e .venv/ready ] || fail "$(hostname) is not set up"
    case $verb in
        setup)
            local python=$1 mount=$2
            [ -z "$mount" ] || bash -c "$mount"
            sudo apt-get update -q # which the machine may be doing by itself after its start
            sudo apt-get install -q -y -o DPkg::Lock::Timeout=600 "$python-venv"
            "$python" -m venv .venv
            .venv/bin/python -m pip install --quiet 'jax[tpu]>=0.10,<0.12' -r requirements.txt
            touch .venv/ready
            ;;
        run)
            if running; then
                fail "$(hostname): a run goes on: stop it first"
            fi
            refuse_local "$(workdir "$@")"
            rm -f run.pid run.status
            # In a session of its own, without a terminal: it goes on when SSH is gone.
            # shellcheck disable=SC2016 # the inner shell is to expand these
            setsid nohup bash -c '"$@" & echo $! >run.pid; wait $!; echo $? >run.status' bash \
                .venv/bin/python -m experiments.main --distributed "$@" \
                >>run.log 2>&1 </dev/null &
            until [ -s run.pid ]; do sleep 0.1; done
            ;;
        logs) exec tail -n 50 -F run.log ;;
        status) echo "$(hostname): $(status_here)" ;;
        stop)
            ! running || kill -TERM "$(cat run.pid)"
            while running; do sleep 0.1; done
            echo "$(hostname): $(status_here)"
            ;;
        *) fail "there is no on-worker $verb" ;;
    esac
}

running() {
    [ -s run.pid ] && [ ! -e run.status ] && kill -0 "$(cat run.pid)" 2>/dev/null
}

status_here() {
    if running; then
        echo running
    elif [ -s run.status ]; then
        echo "ended with status $(cat run.status)"
    else # or the machine was started anew since
        echo "not started"
    fi
}

# The workdir that the arguments of a run give.
workdir() {
    local previous=
    for word; do
        case $word in
            --workdir=* | -workdir=*) echo "${word#*=}" && return ;;
        esac
        case $previous in
            --workdir | -workdir) echo "$word" && return ;;
        esac
        previous=$word
    done
}

# Refuses a workdir on the worker's own disk.
refuse_local() {
    local folder=$1
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    case $(stat -f -c %T "$folder") in
        ext2/ext3 | xfs | btrfs | zfs | tmpfs | overlayfs)
            fail "--workdir=$1 lies on the disk of $(hostname) alone: it has to be in a folder" \
                "that all workers share, such as a mounted Filestore or a bucket by gcsfuse (--mount)"
            ;;
    esac
}

# ---- The command line.

if [ "${1:-}" = on-worker ]; then
    shift
    worker "$@"
    exit
fi

name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} project=${TPU_PROJECT:-}
version=${TPU_VERSION:-tpu-ubuntu2204-base} spot=${TPU_SPOT:-} python=${TPU_PYTHON:-python3.11}
mount=${TPU_MOUNT:-} every=${TPU_EVERY:-60} dry_run=
subcommand=${1:-}
case $subcommand in
    help | -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
esac
SUBCOMMANDS="create setup run logs status resume watch stop delete"
case " $SUBCOMMANDS " in
    *" ${subcommand:-none} "*) shift ;;
    *) fail "${subcommand:+$subcommand is no subcommand: }give one of ${SUBCOMMANDS// /, }" ;;
esac
options=() which=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --spot) spot=1 ;;
        --python=*) python=${1#*=} ;;
        --mount=*) mount=${1#*=} ;;
        --every=*) every=${1#*=} ;;
        --dry-run) dry_run=1 ;;
        *)
            [[ $subcommand = logs && -z $which && $1 =~ ^(all|[0-9]+)$ ]] ||
                fail "$1: no such option (they are written --name=pod; the run's come behind --)"
            which=$1
            ;;
    esac
    options+=("$1")
    shift
done
[ "${1:-}" != -- ] || shift
[ -n "$name" ] || fail "which node? give --name=NAME or TPU_NAME"
[ -n "$zone" ] || fail "where? give --zone=ZONE or TPU_ZONE"
[[ $every =~ ^[0-9]+$ ]] || fail "--every=$every: give a number of seconds"
case $subcommand in
    run | resume | watch)
        case $(workdir "$@") in
            '') fail "which workdir? $subcommand -- --config=... --workdir=FOLDER" ;;
            gs://*)
                fail "--workdir=$(workdir "$@"): the code writes plain files: give a folder that" \
                    "all workers share, where the bucket is mounted by gcsfuse, or a Filestore"
                ;;
            /*) ;;
            *) fail "--workdir=$(workdir "$@"): give the full path of a folder that all workers share" ;;
        esac
        ;;
    logs) set -- ${which:+"$which"} ;;
    *) [ $# = 0 ] || fail "$subcommand takes no arguments, there is $1" ;;
esac
if [ -z "$dry_run" ] && ! command -v gcloud >/dev/null; then
    fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
fi
place=("--zone=$zone" ${project:+"--project=$project"})
"$subcommand" "$@"
