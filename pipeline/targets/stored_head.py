"""The teacher's output head as a store keeps it: written once by stage one, read wherever logits are rebuilt."""

import torch

from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import read_constants
from coldstill.cache.store import CONSTANTS, Store
from coldstill.cache.writer import write_column
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.targets.encodings import float_bits, from_float_bits, to_numpy

OUTPUT_HEAD = "output_head"


def write_head(store: Store, manifest: Manifest, head: OutputHead) -> None:
    """Keep the output head, so that final states give exact logits without the teacher."""
    dtype = str(head.weight_VD.dtype).removeprefix("torch.")
    stored = "uint16" if dtype == "bfloat16" else dtype
    named = {"weight": head.weight_VD, **({} if head.bias_V is None else {"bias": head.bias_V})}
    host = {name: to_numpy(float_bits(values.detach(), dtype)) for name, values in named.items()}
    specs = {name: ArraySpec(stored, values.shape, axis="shard") for name, values in host.items()}
    column = Column(OUTPUT_HEAD, specs, {"dtype": dtype, "scale": head.scale, "softcap": head.softcap})
    write_column(store, manifest, CONSTANTS, column, host, num_tokens=0, num_rows=0)


def load_head(store: Store, device: torch.device) -> OutputHead:
    """Rebuild the teacher's output head, in float32: the stored states are read exactly.

    Raises:
        IncompleteError: It was never committed.
    """
    arrays, record = read_constants(store, OUTPUT_HEAD)
    weights = {name: from_float_bits(torch.from_numpy(values)).to(device) for name, values in arrays.items()}
    attributes = record.column.attributes
    return OutputHead(weights["weight"], weights.get("bias"), attributes["scale"], attributes["softcap"])
