"""slurm.conf of a throw-away cluster, and the ports and job ids that no other cluster of the machine has."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

NUM_SLOTS = 10  # clusters at a time on one machine
FIRST_PORT, PORTS_PER_SLOT = 16800, 16  # below the ports that jobs derive from their id (20000 to 29999)
JOB_IDS_PER_SLOT = 1000

CONFIG = """\
ClusterName=fx{slot}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for cred_expire (default 120 s) before it may start again
AuthInfo=socket={root}/munge.socket,cred_expire=5
# ids of clusters that run side by side differ, and so do the ports that jobs derive from them
FirstJobId={first_job_id}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/ctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/ctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmctldDebug=debug
# there may be no cgroups in a container
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# more CPUs are claimed than the machine has; without this the nodes drain with "Low CPUs"
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait={kill_wait_s}
SlurmdTimeout={slurmd_timeout_s}
# ended jobs stay visible to `scontrol show job`: without a database there is no sacct
MinJobAge=3600
InactiveLimit=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000 State=UNKNOWN\n"
PARTITION = "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


def config_text(
    root: Path, slot: int, nodes: list[str], cpus_per_node: int, kill_wait_s: int, slurmd_timeout_s: int
) -> str:
    """slurm.conf for the nodes of a slot, all on this machine under names that need not resolve."""
    host, port = socket.gethostname(), FIRST_PORT + slot * PORTS_PER_SLOT
    text = CONFIG.format(
        slot=slot,
        host=host,
        port=port,
        root=root,
        first_job_id=(slot + 1) * JOB_IDS_PER_SLOT,
        kill_wait_s=kill_wait_s,
        slurmd_timeout_s=slurmd_timeout_s,
    )
    for number, name in enumerate(nodes, start=1):
        text += NODE.format(name=name, host=host, port=port + number, cpus=cpus_per_node)
    return text + PARTITION


def take_slot(num_nodes: int) -> tuple[int, int]:
    """(number, locked file) of the first slot whose ports nobody uses; the lock ends with this process."""
    for slot in range(NUM_SLOTS):
        path = Path(tempfile.gettempdir()) / f"mmscale-slurm-slot-{slot}.lock"
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        first = FIRST_PORT + slot * PORTS_PER_SLOT
        if all(_is_free(port) for port in range(first, first + num_nodes + 1)):
            return slot, lock
        os.close(lock)
    raise AssertionError(
        f"expected a free slot for a cluster, found all {NUM_SLOTS} taken (ports from {FIRST_PORT}); end other clusters"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
