@HEADER@
set -eo pipefail

say() { echo "dtune: $*"; }

# Would end this shell: kept until there are ranks to tell.
pending=()
trap 'pending+=(USR1)' USR1
trap 'pending+=(USR2)' USR2
trap 'pending+=(TERM)' TERM

# The last element of a job array has the id of the whole array: with SLURM_JOB_ID alone, requeue
# and scancel would hit every element.
self=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
  self=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
fi
restart=${SLURM_RESTART_COUNT:-0}

@SETTINGS@
set -u

# Nothing is written where another job works in this folder, or waits to.
other=
if [[ -f $run_dir/job.json ]]; then
  other=$(sed -n 's/.*"job_id": "\([^"]*\)".*/\1/p' "$run_dir/job.json" | head -n 1)
fi
if [[ -n $other && $other != "$self" ]]; then
  now=$(squeue --noheader --states=all --format=%T --jobs="$other" 2>/dev/null || true)
  case $now in
    PENDING* | REQUEUED* | REQUEUE_HOLD* | REQUEUE_FED* | SPECIAL_EXIT* | RUNNING* | \
      COMPLETING* | CONFIGURING* | RESIZING* | SIGNALING* | STAGE_OUT* | STOPPED* | SUSPENDED*)
      say "run_dir=$run_dir has a job already: $other is $now; end it by dtune cancel $run_dir," \
        "or name another run_dir"
      exit 2
      ;;
  esac
fi

# A file of the run folder, replaced as a whole: others read it at any time.
replace() {
  cat >"$run_dir/.tmp-$1-$self"
  mv -f "$run_dir/.tmp-$1-$self" "$run_dir/$1"
}

logs=$run_dir/logs
mkdir -p "$logs"
# In place of what an earlier job left; the first rank writes its own once all ranks are there.
starting='the ranks are starting'
printf '{"state": "running", "message": "%s", "time": %s}\n' "$starting" "$(date +%s)" |
  replace status.json

# Each task makes one once USR1 does not end it any more.
listens=$logs/.tmp-listens-$self
rm -f "$listens"-*
all_listen() {
  local tasks=${SLURM_NTASKS:-$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))}
  (($(compgen -G "$listens-*" | wc -l) >= tasks))
}

step='' cancelled='' resender=''
# Ranks that are starting do not hear it yet. To those that run, a second one says to hurry: it is
# passed on, and they know by the time between whether it is the same one sent twice.
save_and_stop() {
  if [[ -n $resender ]]; then
    kill -0 "$resender" 2>/dev/null || scancel --signal=USR1 "$self" || true
    return 0
  fi
  {
    # On a shared disk they may be seen late; ranks that run have made theirs long ago.
    for _ in $(seq 300); do
      all_listen && break
      sleep 0.2
    done
    while grep -qs "$starting" "$run_dir/status.json"; do
      scancel --signal=USR1 "$self" || true
      sleep 2
    done
    # To the ranks of this element alone; without --batch it does not reach this shell.
    if grep -qs '"state": "running"' "$run_dir/status.json"; then
      scancel --signal=USR1 "$self" || true
    fi
  } &
  resender=$!
}
# The time limit comes near (--signal=B:USR1), or somebody asks: save, stop, and be requeued.
trap 'say "USR1, saving and stopping"; save_and_stop' USR1
# From `dtune cancel`: the same, and no requeue.
trap 'say "cancelled, saving and stopping"; cancelled=yes; save_and_stop' USR2
# From scancel, or from Slurm where it preempts the job and requeues it itself: it reaches the ranks
# without help, and this shell only waits for them to save.
trap 'say "TERM, saving and stopping"; cancelled=yes' TERM

if ! grep -qs "\"job_id\": \"$self\"" "$run_dir/job.json"; then
  printf '{"launcher": "slurm", "job_id": "%s", "time": %s}\n' "$self" "$(date +%s)" |
    replace job.json
fi

# Node names need not resolve; NodeAddr is the address that Slurm itself uses. In the order of
# SLURM_NODEID, for the ranks; this shell runs on the first of them.
addresses=()
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
  addresses+=("$(scontrol show node "$node" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')")
done
# Not torchrun's usual port, and not one that another job on this node listens on.
port=$((20000 + SLURM_JOB_ID % 10000))
while (exec 3<>"/dev/tcp/${addresses[0]}/$port") 2>/dev/null; do
  port=$((20000 + (port - 19999) % 10000))
done

export DTUNE_NODE_ADDRESSES="${addresses[*]}"
export MASTER_ADDR=${addresses[0]} MASTER_PORT=$port
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
# torch 2.13: a restart would read the addresses of the attempt before it from a shared store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds to save after scancel: as in shutdown_seconds of dtune_launch/torchrun.py. Slurm's KillWait
# may be shorter.
silent=$(sed -n '/^watch:/,/^[^ ]/s/^  save: \([0-9]*\).*/\1/p' <<<"$frozen")
silent=${silent:-1800}
if [[ -z ${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-} ]]; then
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$((silent > 0 ? silent + 300 : 86400))
fi
# Since 22.05 srun does not take it over from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

say "job $self, restart $restart, $SLURM_NNODES nodes x $nproc processes, $run_dir"

# On each node. Until the agent passes USR1 on to its ranks, it would die of it. A folder written
# elsewhere may come late, and on a disk of another machine never.
# shellcheck disable=SC2016  # Variables of the node.
on_node='
trap "" USR1
folder=$0
for _ in $(seq 60); do [[ -d $folder ]] && break; sleep 0.5; done
if [[ ! -d $folder ]]; then
  echo "dtune: $SLURMD_NODENAME does not see $folder; name a run_dir on a shared disk" >&2
  exit 2
fi
: >"$1-$SLURM_PROCID"
exec "${@:2}"'

@LAUNCH@ &
step=$!
# The ranks are told as soon as they hear, also of TERM, which has not reached them.
for name in "${pending[@]}"; do
  kill -s "$name" $$
  save_and_stop
done
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do  # A signal ended the wait, not srun.
  code=0
  wait "$step" || code=$?
done
if [[ -n $resender ]]; then
  kill "$resender" 2>/dev/null || true
fi
rm -f "$listens"-*

# srun's code says that something happened; status.json says what.
state=$(sed -n 's/.*"state": "\([a-z_]*\)".*/\1/p' "$run_dir/status.json" | head -n 1)
at_step=$(sed -n 's/^ *"step": \([0-9]*\).*/\1/p' "$run_dir/status.json" | head -n 1)
at_step=${at_step:-0}
say "$state at step $at_step (srun ended with $code)"
case $state in
  done) exit 0 ;;
  config_error) exit 2 ;;
  preempted) ;;
  *) exit $((code == 0 ? 1 : code)) ;;
esac

if [[ -n $cancelled ]]; then
  exit 75
fi
# Without a step since the last time, going on would go on for ever. What an earlier job wrote does
# not count: this one may have gone back.
mark=$logs/requeued-at-step
marked_by='' marked=0
if [[ -f $mark ]]; then
  read -r marked_by marked <"$mark" || true
fi
if [[ $marked_by == "$self" ]] && ((at_step <= marked)); then
  say "no step since the last requeue; not requeued"
  exit 75
fi
if ((restart >= max_requeues)); then
  say "requeued $max_requeues times, which is the limit; not requeued"
  exit 75
fi
echo "$self $at_step" >"$mark"
trap - TERM  # Which the requeue ends this script with.
if ! scontrol requeue "$self"; then
  say "all is saved, but Slurm did not requeue the job; submit it again to go on"
  exit 75
fi
sleep 60
