"""What each cut costs is what a model cut so predicts otherwise, and the cheapest goes, one after the other."""

import copy
import math

import pytest
import torch
from hooks import has_hooks

from coldstill.pipeline.models import find_parts, take_apart
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.students import cut_costs
from coldstill.pipeline.students.cut_costs import CutRound, cheapest_cuts
from coldstill.pipeline.students.depth import cut_blocks

ROWS = [torch.randint(1, 384, (length,), generator=torch.Generator().manual_seed(length)) for length in (24, 17, 30)]
SIX = {"num_hidden_layers": 6}


def mean_kl(teacher, student, rows=ROWS):
    """KL(teacher || student), in nats a token, of two models that are run whole."""
    total, number = 0.0, 0
    with torch.no_grad():
        for row in rows:
            log_p, log_q = (model(input_ids=row.unsqueeze(0)).logits[0].log_softmax(-1) for model in (teacher, student))
            total += float((log_p.exp() * (log_p - log_q)).sum())
            number += len(row)
    return total / number


def silence(model, *blocks):
    """Let blocks write nothing to the stream."""
    with torch.no_grad():
        for block in blocks:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.model.layers[block].get_submodule(name).weight.zero_()
    return model


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "gpt2", "gpt_neox", "bamba"]
)
def test_a_cost_is_what_the_model_that_is_cut_so_predicts_otherwise(build_model, architecture):
    changes = {"head_dim": 8} if "gemma" in architecture else {}
    if architecture == "bamba":
        changes = {
            "attn_layer_indices": [1, 3, 5],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        }
    model = build_model(architecture, sliding_window=8, **SIX, **changes)
    before = copy.deepcopy(model.state_dict())
    parts = take_apart(model)
    first, second = cheapest_cuts(parts, ROWS, remove=2, show_progress=False)
    assert first.costs.keys() == set(range(6))
    for gone, costs in (([], first.costs), ([first.removed], second.costs)):
        for block, cost in costs.items():
            kept = [other for other in range(6) if other not in (*gone, block)]
            assert cost == pytest.approx(mean_kl(model, cut_blocks(parts, kept)), rel=1e-3)
    assert first.removed == min(first.costs, key=first.costs.__getitem__)
    assert not has_hooks(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_blocks_that_do_nothing_go_first_the_later_of_them_before_the_earlier(build_model):
    model = silence(build_model(**SIX), 1, 4)
    rounds = cheapest_cuts(take_apart(model), ROWS, remove=3, show_progress=False)
    assert [cut.removed for cut in rounds[:2]] == [4, 1]
    assert rounds[0].costs[4] == pytest.approx(0.0, abs=1e-5)
    assert rounds[2].costs[rounds[2].removed] > 1e-2


def test_what_is_out_of_the_question_is_not_measured_again(build_model):
    model = silence(build_model(num_hidden_layers=12), 2, 3, 5, 7, 8, 10)
    rounds = cheapest_cuts(take_apart(model), ROWS, remove=3, show_progress=False)
    assert len(rounds[0].costs) == 12
    for cut in rounds[1:]:
        assert set(cut.costs) <= {2, 3, 5, 7, 8, 10}


def test_as_many_positions_are_read_as_it_takes_and_no_more(build_model, monkeypatch):
    monkeypatch.setattr(cut_costs, "POSITIONS", 40)
    parts = take_apart(build_model())
    read = cheapest_cuts(parts, ROWS, remove=1, show_progress=False)
    assert read == cheapest_cuts(parts, [ROWS[0], ROWS[1][:16]], remove=1, show_progress=False)


def test_a_model_that_is_more_than_its_blocks_is_refused_in_one_line(build_model):
    parts = find_parts(build_model("gemma3n_text", **SIX, head_dim=8, num_kv_shared_layers=0))
    with pytest.raises(ModelError, match=r"method is kl, but Gemma3n\w+ cannot be run without some block: ") as refused:
        cheapest_cuts(parts, ROWS, remove=1, show_progress=False)
    assert "\n" not in str(refused.value)


def test_a_record_says_costs_by_block_and_nothing_where_one_is_no_number():
    assert CutRound(1, {0: math.inf, 1: 0.123456}).record() == {"removed": 1, "kl": {"0": None, "1": 0.1235}}
