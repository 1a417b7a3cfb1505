"""What a teacher's work costs on a machine, with its weights whole or streamed: memory, bytes read, hours.

The arithmetic stands in docs/plan.md. How blocks stream, when they wait, and where, is what stage one does.
"""

from dataclasses import dataclass

from coldstill.cache import laying
from coldstill.pipeline.estimates.teacher_memory import affordable_tokens
from coldstill.pipeline.models.placement import WeightBytes, fits_whole
from coldstill.pipeline.recipe.sections import Placement
from coldstill.pipeline.stage_one.streamed_capture import SHARE_OF_FREE
from coldstill.pipeline.stage_one.streamed_shards import BEARABLE_WAIT


@dataclass(frozen=True)
class Machine:
    """What stage one would run on.

    Attributes:
        flops: Floating-point operations a second that it reaches in a forward pass.
        disk_rate: Bytes a second that weights are read with.
        memory_bytes: Of its GPU.
        host_bytes: Of its host.
    """

    flops: float = 400e12
    disk_rate: float = 2e9
    memory_bytes: float = 80e9
    host_bytes: float = 256e9


@dataclass(frozen=True)
class PlacementCost:
    """What one way for the teacher's weights to lie in memory costs.

    Attributes:
        placement: `whole` or `streamed`.
        weight_bytes: Weights on the GPU at once.
        work_bytes: The most that the work on them takes there: a batch inside a block, or a shard that is encoded.
        super_batch_tokens: Tokens that pass a block together; None where the teacher is whole.
        waiting_bytes: What they hold between two blocks.
        is_waiting_on_host: Whether they wait on the host.
        device_bytes: Taken of the GPU in all.
        fits: Whether that, and what the host holds, fits into the machine.
        read_bytes: Weights read from the disk in all.
        hours: Of stage one, on one such machine; workers divide them.
    """

    placement: Placement
    weight_bytes: int
    work_bytes: int
    super_batch_tokens: int | None
    waiting_bytes: int
    is_waiting_on_host: bool
    device_bytes: int
    fits: bool
    read_bytes: int
    hours: float


@dataclass(frozen=True)
class TeacherTask:
    """The work of a teacher over the rows of a recipe.

    Attributes:
        machine: Where it runs.
        weights: The teacher's.
        waiting_bytes: Of a token that waits between two blocks.
        work_bytes: The most that the work on weights that are there takes on the GPU.
        num_tokens: Tokens of all rows.
        block_flops: Of a token, in all blocks.
        head_flops: Of all tokens, in the output head.
    """

    machine: Machine
    weights: WeightBytes
    waiting_bytes: int
    work_bytes: int
    num_tokens: int
    block_flops: float
    head_flops: float

    def whole(self) -> PlacementCost:
        """Return what it costs to load all weights once; they pass the host, whole, on their way."""
        machine, total = self.machine, self.weights.total
        device_bytes = total + self.work_bytes
        is_chosen = fits_whole(self.weights, [machine.memory_bytes, machine.host_bytes])
        seconds = (self.num_tokens * self.block_flops + self.head_flops) / machine.flops + total / machine.disk_rate
        return PlacementCost(
            placement="whole",
            weight_bytes=total,
            work_bytes=self.work_bytes,
            super_batch_tokens=None,
            waiting_bytes=0,
            is_waiting_on_host=False,
            device_bytes=device_bytes,
            fits=is_chosen and device_bytes <= machine.memory_bytes,
            read_bytes=total,
            hours=seconds / 3600,
        )

    def streamed(self) -> PlacementCost:
        """Return what it costs to read the blocks once for each super-batch, behind the work on the block before."""
        machine, weights = self.machine, self.weights
        together = self._super_batch_tokens()
        waiting = together * self.waiting_bytes
        left = machine.memory_bytes - weights.streamed
        on_host = waiting > SHARE_OF_FREE * left
        device_bytes = weights.streamed + self.work_bytes + (0 if on_host else waiting)
        of_blocks, num_passes = weights.total - weights.others, -(-self.num_tokens // together)
        working_s = min(together, self.num_tokens) * self.block_flops / machine.flops
        passing_s = max(working_s, of_blocks / machine.disk_rate)
        # Embedding, head and the first block are read before there is work to hide that behind.
        first_s = (weights.others + weights.largest_block) / machine.disk_rate
        seconds = num_passes * passing_s + self.head_flops / machine.flops + first_s
        return PlacementCost(
            placement="streamed",
            weight_bytes=weights.streamed,
            work_bytes=self.work_bytes,
            super_batch_tokens=together,
            waiting_bytes=waiting,
            is_waiting_on_host=on_host,
            device_bytes=device_bytes,
            fits=device_bytes <= machine.memory_bytes and waiting <= SHARE_OF_FREE * machine.host_bytes,
            read_bytes=weights.others + num_passes * of_blocks,
            hours=seconds / 3600,
        )

    def _super_batch_tokens(self) -> int:
        """Return how many tokens come to pass a block together: twice as many while it waits, and memory allows."""
        most = affordable_tokens(self.machine.host_bytes, self.waiting_bytes)
        reading_s = (self.weights.total - self.weights.others) / self.machine.disk_rate
        together = laying.SHARD_TOKENS
        while 2 * together <= most and together < self.num_tokens:
            working_s = together * self.block_flops / self.machine.flops
            if reading_s - working_s <= BEARABLE_WAIT * reading_s:
                break
            together *= 2
        return together
