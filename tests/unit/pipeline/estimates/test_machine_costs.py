"""Hours and memory of a teacher on a machine that is described: held against the same worked out block by block."""

from dataclasses import replace

import pytest

from coldstill.pipeline.estimates.machine_costs import Machine, TeacherTask
from coldstill.pipeline.models.placement import WeightBytes

SHARD = 32_768
# Of a Llama of 70B parameters.
WEIGHTS = WeightBytes(total=141_107_412_992, largest_block=1_711_308_800, others=4_202_708_992, num_blocks=80)
TASK = TeacherTask(
    machine=Machine(flops=400e12, disk_rate=2e9, memory_bytes=80e9, host_bytes=256e9),
    weights=WEIGHTS,
    waiting_bytes=2 * 8192,
    work_bytes=10**9,
    num_tokens=10**9,
    block_flops=138e9,
    head_flops=1e15,
)


def on(**machine: float) -> TeacherTask:
    return replace(TASK, machine=replace(TASK.machine, **machine))


def simulated_s(task: TeacherTask, together: int) -> float:
    """Pass super-batches through blocks one by one: when a block begins, the next one begins to be read."""
    machine, blocks = task.machine, task.weights.num_blocks
    reading_s = (task.weights.total - task.weights.others) / blocks / machine.disk_rate
    done = task.weights.others / machine.disk_rate
    read = done + reading_s
    left = task.num_tokens
    while left > 0:
        working_s = min(together, left) * task.block_flops / blocks / machine.flops
        left -= together
        for _ in range(blocks):
            begun = max(done, read)
            read, done = begun + reading_s, begun + working_s
    return done + task.head_flops / machine.flops


def test_a_whole_teacher_takes_its_operations_and_is_read_once():
    cost = on(memory_bytes=200 * 10**9).whole()
    assert cost.hours == pytest.approx((10**9 * 138e9 + 1e15) / 400e12 / 3600 + 141.1 / 2 / 3600, rel=1e-3)
    assert (cost.read_bytes, cost.device_bytes, cost.fits) == (WEIGHTS.total, WEIGHTS.total + 10**9, True)
    assert not TASK.whole().fits
    assert not on(memory_bytes=200 * 10**9, host_bytes=150 * 10**9).whole().fits, "weights pass the host on their way"


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(TASK, id="reading hides"),
        pytest.param(on(disk_rate=0.2e9, host_bytes=2 * 10**9), id="reading is what takes time"),
        pytest.param(replace(on(flops=20e12), num_tokens=10**8), id="a slow GPU"),
    ],
)
def test_hours_of_streaming_are_those_of_passing_block_after_block(task: TeacherTask):
    cost = task.streamed()
    assert cost.super_batch_tokens is not None
    assert 3600 * cost.hours == pytest.approx(simulated_s(task, cost.super_batch_tokens), rel=0.01)


def test_a_super_batch_is_as_large_as_its_reading_takes_to_hide():
    # A block is read in 0.86 s, in which 199,000 tokens pass it.
    assert TASK.streamed().super_batch_tokens == 8 * SHARD
    assert on(disk_rate=4e9).streamed().super_batch_tokens == 4 * SHARD
    assert on(disk_rate=100e9).streamed().super_batch_tokens == SHARD
    assert on(flops=800e12).streamed().super_batch_tokens == 16 * SHARD
    # Half of the host's memory holds no more than that.
    assert on(host_bytes=4 * 4 * SHARD * 8192).streamed().super_batch_tokens == 4 * SHARD


def test_streams_wait_on_the_host_where_the_gpu_has_no_room():
    there, elsewhere = TASK.streamed(), on(memory_bytes=10 * 10**9).streamed()
    assert there.waiting_bytes == elsewhere.waiting_bytes == 8 * SHARD * 16384
    assert (there.is_waiting_on_host, elsewhere.is_waiting_on_host) == (False, True)
    assert there.device_bytes == WEIGHTS.streamed + 10**9 + there.waiting_bytes
    assert elsewhere.device_bytes == WEIGHTS.streamed + 10**9
    assert there.fits
    assert elsewhere.fits
    assert not on(memory_bytes=8 * 10**9).streamed().fits, "two blocks, embedding and head take 7.6 GB"


def test_weights_are_read_once_for_each_super_batch():
    cost = TASK.streamed()
    assert cost.super_batch_tokens is not None
    passes = -(-(10**9) // cost.super_batch_tokens)
    assert cost.read_bytes == WEIGHTS.others + passes * (WEIGHTS.total - WEIGHTS.others)
