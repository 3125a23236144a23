"""Which process of a run this is: flags, environment, SLURM, TPUs, and what is wrong with them."""

import subprocess
import sys

import pytest

from axlearn.common.distributed import Place, find_place
from axlearn.common.distributed._slurm import first_host

OURS = {"DISTRIBUTED_COORDINATOR": "node0:8476", "NUM_PROCESSES": "4", "PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def _facts(place: Place) -> tuple:
    return place.process_id, place.num_processes, place.coordinator


def test_nothing_means_one_process():
    assert find_place({}) == Place()
    assert find_place({"PROCESS_ID": "", "NUM_PROCESSES": ""}) == Place()
    assert find_place({}).is_alone


def test_one_process_needs_no_coordinator():
    assert find_place({}, num_processes=1).is_alone
    assert find_place({"NUM_PROCESSES": "1"}).is_alone
    assert find_place({**OURS, "NUM_PROCESSES": "1", "PROCESS_ID": "0"}).is_alone
    # In a step of SLURM, too: it was said that this process is alone.
    assert find_place(SLURM, num_processes=1).is_alone


def test_flags_and_environment_say_the_same():
    place = find_place(OURS)
    assert _facts(place) == (2, 4, "node0:8476")
    assert str(place) == (
        "process 2 of 4, coordinator node0:8476 (from $DISTRIBUTED_COORDINATOR, $NUM_PROCESSES, $PROCESS_ID)"
    )
    by_flags = find_place({}, coordinator="node0:8476", num_processes=4, process_id=2)
    assert _facts(by_flags) == _facts(place)
    assert set(by_flags.origins.values()) == {"--distributed_coordinator", "--num_processes", "--process_id"}
    mixed = find_place({"NUM_PROCESSES": "4", "PROCESS_ID": "2"}, coordinator="node0:8476", process_id=2)
    assert _facts(mixed) == _facts(place)


@pytest.mark.parametrize(
    ("env", "flags", "message"),
    [
        (
            {},
            {"num_processes": 4},
            r"--num_processes: given, but --distributed_coordinator and --process_id are missing\.\n.*as flags or as",
        ),
        (
            {"PROCESS_ID": "1"},
            {},
            r"\$PROCESS_ID: given, but --distributed_coordinator and --num_processes are",
        ),
        ({**OURS, "PROCESS_ID": ""}, {}, r"but --process_id is missing"),
        ({**OURS, "PROCESS_ID": "4"}, {}, r"\$PROCESS_ID: 4 is none of the 4 processes .*\n.*0 to 3"),
        ({**OURS, "NUM_PROCESSES": "1"}, {}, r"\$PROCESS_ID: 2 is none of the 1 processes"),
        (OURS, {"process_id": 0}, r"--process_id: 0 contradicts \$PROCESS_ID, which is 2"),
        (OURS, {"coordinator": "x:1"}, r"'x:1' contradicts \$DISTRIBUTED_COORDINATOR, which is 'node0:8476'"),
        ({**OURS, "NUM_PROCESSES": "four"}, {}, r"\$NUM_PROCESSES: 'four' is not a number"),
        ({**OURS, "NUM_PROCESSES": "-4"}, {}, r"\$NUM_PROCESSES: '-4' is not a number"),
        ({**OURS, "NUM_PROCESSES": "0"}, {}, r"\$NUM_PROCESSES: 0 processes\.\n.*at least 1"),
        ({**OURS, "DISTRIBUTED_COORDINATOR": "node0"}, {}, r"'node0' is no address\.\n.*HOST:PORT"),
        ({**OURS, "DISTRIBUTED_COORDINATOR": "node0:70000"}, {}, r"'node0:70000' is no address"),
        (
            {**OURS, "NUM_PROCESSES": "x", "PROCESS_ID": "y"},
            {},
            r"does not know its place:\n.*\$NUM_PROCESSES(.|\n)*\$PROCESS_ID",
        ),
        (SLURM, {"num_processes": 8}, r"--num_processes: 8 contradicts SLURM, which started 4 tasks"),
        ({**SLURM, "SLURM_PROCID": "x"}, {}, r"the environment of SLURM: .*'x'"),
        (
            {**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2"},
            {},
            r"SLURM: 2 tasks on this node do not share 3 GPUs equally",
        ),
    ],
)
def test_what_is_no_place_is_refused(env, flags, message):
    with pytest.raises(ValueError, match=message):
        find_place(env, **flags)


def test_slurm_says_all_for_what_srun_starts():
    place = find_place(SLURM)
    # 61440 + 70001 % 4096, as jax.distributed would choose.
    assert _facts(place) == (3, 4, "gpu003:61809")
    assert set(place.origins.values()) == {"SLURM"}
    # What is given besides stands, and the rest is SLURM's.
    assert _facts(find_place(SLURM, coordinator="gpu003:9000")) == (3, 4, "gpu003:9000")
    assert _facts(find_place({**SLURM, **OURS})) == (2, 4, "node0:8476")


def test_what_srun_did_not_start_or_started_alone_is_one_process():
    batch_script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert find_place(batch_script).is_alone
    assert find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).is_alone


@pytest.mark.parametrize(
    ("more", "ids"),
    [
        # As jax does where nothing is known of the GPUs: one each.
        ({}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (4, 5, 6, 7)),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        # Bound to the task by SLURM already.
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_NTASKS_PER_GPU": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=2"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPU_BIND": "verbose,map_gpu:0,1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2", "JAX_PLATFORMS": "cpu"}, None),
        # Not bound.
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPU_BIND": "none", "SLURM_GPUS_PER_TASK": "1"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_TRES_PER_TASK": "cpu=4"}, (1,)),
        # One task on each node: all of its GPUs.
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "3,1"}, None),
    ],
)
def test_tasks_of_a_node_share_its_gpus(more, ids):
    assert find_place({**SLURM, **more}).local_device_ids == ids


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("rack[2-3]n[05,07]", "rack2n05"),
    ],
)
def test_the_first_host_of_a_list(node_list, host):
    assert first_host(node_list) == host


def test_tpus_find_each_other():
    pod = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}
    assert find_place(pod).is_found_by_jax
    assert find_place({}, jax_backend="tpu").is_found_by_jax
    assert find_place({"MEGASCALE_COORDINATOR_ADDRESS": "t0"}).is_found_by_jax
    # One host, another backend, or what was said by hand.
    assert find_place({"TPU_WORKER_HOSTNAMES": "localhost"}).is_alone
    assert find_place(pod, jax_backend="cpu").is_alone
    assert find_place({**pod, "JAX_PLATFORMS": "cpu"}, jax_backend="tpu").is_alone
    assert find_place({**pod, "JAX_PLATFORMS": "tpu,cpu"}).is_found_by_jax
    assert _facts(find_place({**pod, **OURS})) == (2, 4, "node0:8476")


def test_no_jax_is_loaded_to_find_out():
    code = "import sys, axlearn.common.distributed; assert not {'jax', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
