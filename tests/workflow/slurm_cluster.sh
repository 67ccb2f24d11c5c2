#!/usr/bin/env bash
# Runs a small target of the ci scale through a real SLURM on this machine, with profiles/slurm as it is.
#
#   tests/workflow/slurm_cluster.sh [TARGET ...]        default: coco memory; about 5 minutes on 2 free cores; reproduce: all jobs, 20 minutes
#
# Needs root, a machine without a SLURM of its own, `apt-get install slurm-wlm munge`, and the Python on PATH with
# `pip install '.[slurm]'`. The cluster has a node without GPU (partition cpu) and one with two GPUs that do not exist
# (partition gpu), listens on loopback alone, and is stopped at the end. The last lines count the jobs that SLURM ran by
# partition, state and rule; the status is that of snakemake. results/ci is written as usual: delete it to run all jobs.
set -euo pipefail
cd "$(dirname "$0")/../.."
[[ $# -gt 0 ]] || set -- coco memory
if [[ -e /etc/slurm/slurm.conf ]]; then
  echo "/etc/slurm/slurm.conf exists: this machine has a SLURM of its own, which this script would replace" >&2
  exit 2
fi
place=$(mktemp -d)
chmod 755 "$place"
host=$(hostname -s)

stop() {
  scancel --user="$(id -un)" 2>/dev/null || true
  for name in slurmd-c1 slurmd-g1 slurmctld munged; do
    [[ ! -s $place/$name.pid ]] || kill "$(<"$place/$name.pid")" || true
  done
  rm -f /etc/slurm/slurm.conf /etc/slurm/gres.conf
  echo "SLURM is stopped; its logs are in $place"
}
trap stop EXIT

mkdir -p "$place"/{state,spool-c1,spool-g1} /etc/slurm
cat >"$place/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=27817
AuthType=auth/munge
AuthInfo=socket=$place/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool-%n
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd-%n.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# squeue lists ended jobs for so many seconds: there is no database that sacct could ask.
MinJobAge=7200
GresTypes=gpu
NodeName=c1 NodeHostname=$host NodeAddr=127.0.0.1 Port=27818 CPUs=4 RealMemory=64000
NodeName=g1 NodeHostname=$host NodeAddr=127.0.0.1 Port=27819 CPUs=16 RealMemory=192000 Gres=gpu:2
PartitionName=cpu Nodes=c1 Default=YES MaxTime=INFINITE
PartitionName=gpu Nodes=g1 MaxTime=INFINITE
CONF
printf "NodeName=g1 Name=gpu File=%s\n" /dev/null /dev/zero >"$place/gres.conf"
# Steps of jobs look here, whatever SLURM_CONF says.
ln -s "$place/slurm.conf" "$place/gres.conf" /etc/slurm/
# A training run gets two GPUs, and so two processes by torchrun, which find no GPU and train on the CPU.
# With GPUS=1, its records equal those of a local run.
echo "overrides: {jobs: {gpus: ${GPUS:-2}, threads: ${GPUS:-2}}}" >"$place/own.yaml"

dd if=/dev/urandom of="$place/key" bs=1024 count=1 status=none
chmod 400 "$place/key"
munged --force --key-file="$place/key" --socket="$place/munge.socket" --pid-file="$place/munged.pid" \
  --log-file="$place/munged.log" --seed-file="$place/munged.seed"
slurmctld
slurmd -N c1
slurmd -N g1
for _ in {1..60}; do
  [[ $(sinfo --noheader --Node --format=%t | sort -u) != idle ]] || break
  sleep 1
done
sinfo --Node --format="%N %P %c %m %G %t"

status=0
snakemake --workflow-profile profiles/slurm --jobs 4 --configfile "$place/own.yaml" --config scale=ci -- "$@" || status=$?
echo "jobs by partition, state, GPUs and rule:"
squeue --states=all --noheader --Format=Partition:8,State:12,tres-per-job:16,Comment:40 \
  | sed 's/_wildcards.*//' | sort | uniq -c
exit "$status"
