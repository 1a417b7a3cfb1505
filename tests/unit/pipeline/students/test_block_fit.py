"""Training one block towards the original's stream: its gradient, what it reads, and its learning rate."""

import pytest
import torch

from coldstill.pipeline.models import take_apart
from coldstill.pipeline.models.forward import block_outputs
from coldstill.pipeline.students.block_fit import BlockFit, block_loss, fit_block
from coldstill.pipeline.students.depth import cut_blocks
from coldstill.pipeline.students.under_way import Channels, RowsUnderWay, Span

ROWS = [torch.randint(1, 384, (length,), generator=torch.Generator().manual_seed(length)) for length in (24, 17, 9)]
_STEP = 3e-3
SPANS = Span.between([0, 3], 4)


def under_way(build_model):
    """A student of two blocks of four, and rows in front of its second one, whose first was disturbed."""
    original = take_apart(build_model("llama"))
    student = take_apart(cut_blocks(original, [span.start for span in SPANS]))
    with torch.no_grad():
        for parameter in student.blocks[0].parameters():
            parameter.mul_(0.5)
        (batch,) = RowsUnderWay.begin(student, original, ROWS)
        batch.aim_behind(original, SPANS[0], Channels.kept(None), has_writers=False)
        batch.student_BTK = batch.run_student(student.blocks[0], 0)
        batch.aim_behind(original, SPANS[1], Channels.kept(None), has_writers=False)
    return student, original, batch


def test_the_gradient_of_a_blocks_fit_is_that_of_finite_differences(build_model):
    student, _, batch = under_way(build_model)
    block = student.blocks[1].double()
    batch.student_BTK = batch.student_BTK.double()
    block.zero_grad()
    block_loss(block, 1, batch).backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in block.named_parameters():
        # Half of it along the gradient: norms compute in float32, and a slope that is nearly level would be noise.
        chance = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction = chance / chance.norm() + parameter.grad / parameter.grad.norm()
        losses = []
        with torch.no_grad():
            for step in (_STEP, -2 * _STEP):
                parameter.add_(direction, alpha=step)
                losses.append(float(block_loss(block, 1, batch)))
            parameter.add_(direction, alpha=_STEP)
        slope = (losses[0] - losses[1]) / (2 * _STEP)
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=0.02), name


def test_a_block_reads_the_students_own_stream_and_aims_at_the_teachers(build_model):
    student, original, batch = under_way(build_model)
    ids_BT = torch.nn.utils.rnn.pad_sequence(ROWS, batch_first=True)
    mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor([[len(row)] for row in ROWS])
    with torch.no_grad(), block_outputs(student.blocks, [0, 1]) as own, block_outputs(original.blocks, [3]) as wanted:
        student.body(input_ids=ids_BT, attention_mask=mask_BT.long())
        original.body(input_ids=ids_BT, attention_mask=mask_BT.long())
        loss = block_loss(student.blocks[1], 1, batch)
    torch.testing.assert_close(batch.student_BTK[mask_BT], own[0][mask_BT])
    error_N = (own[1] - wanted[3])[mask_BT].square().mean(dim=-1) / wanted[3][mask_BT].square().mean(dim=-1)
    torch.testing.assert_close(loss, error_N.mean())


def test_every_position_counts_alike_however_large_the_stream_is_there(build_model):
    _, _, batch = under_way(build_model)
    aim = batch.aims[-1]
    nothing = torch.zeros_like(aim.stream_NK)
    torch.testing.assert_close(aim.error_of(nothing), torch.ones(len(nothing)))


def test_a_fitted_block_is_nearer_to_its_aim_and_no_other_block_changes(build_model):
    student, _, batch = under_way(build_model)
    first = {name: value.clone() for name, value in student.blocks[0].state_dict().items()}
    with torch.no_grad():
        before = float(block_loss(student.blocks[1], 1, batch))
    fit_block(student.blocks[1], 1, [batch], BlockFit(relative_rate=5e-2, num_epochs=20))
    with torch.no_grad():
        assert float(block_loss(student.blocks[1], 1, batch)) < 0.7 * before
    assert all(torch.equal(value, first[name]) for name, value in student.blocks[0].state_dict().items())


def test_each_parameter_moves_by_a_share_of_its_own_size(build_model):
    student, _, batch = under_way(build_model)
    block = student.blocks[1]
    with torch.no_grad():
        block.self_attn.o_proj.weight.mul_(8.0)
    before = {name: value.detach().clone() for name, value in block.named_parameters()}
    fit_block(block, 1, [batch], BlockFit(relative_rate=1e-2))
    for name, value in block.named_parameters():
        # The first step of Adam is as long as its rate.
        moved = float((value - before[name]).abs().max().detach())
        assert moved == pytest.approx(1e-2 * float(before[name].square().mean().sqrt()), rel=1e-2), name


def test_the_learning_rate_rises_to_its_height_and_falls_to_nothing():
    how = BlockFit(relative_rate=1.0, warmup=0.25)
    rates = [how.rate_at(step, 16) for step in range(16)]
    assert rates[:3] == sorted(rates[:3])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert max(rates) > 0.9
    assert rates[-1] < 0.02
