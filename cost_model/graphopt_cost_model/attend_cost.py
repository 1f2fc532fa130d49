"""What attention over stores takes: the stores of these sequences are read once, new rows are written.

Where in its stores a step is, the host does not know: as many positions are counted as the call says that
there may be, so that what is predicted is a sequence's last step.
"""

from __future__ import annotations

import torch

from graphopt_cost_model.call import Call, TensorSpec
from graphopt_cost_model.phase import Phase

__all__ = ["attend_phases", "attend_workspace", "joint_workspace"]

_TOGETHER, _TILE, _LEAST = 264, 128, 64
"""Programs that an H200 runs at a time, rows of a program where they are many, and keys of a part."""


def _sizes(call: Call) -> tuple[int, int, int, int]:
    """Batch, heads, rows, and keys that are read."""
    batch, heads, rows, _ = call.argument("query").shape
    slots = call.argument("key_store").shape[2]
    return batch, heads, rows, min(int(slots), int(call.argument("length")))


def _widths(call: Call) -> tuple[int, int, int]:
    """Heads of keys, elements of a key and of a value."""
    keys, values = call.argument("key_store"), call.argument("value_store")
    return keys.shape[1], keys.shape[3], values.shape[3]


def attend_phases(call: Call) -> tuple[Phase, ...]:
    """One kernel: new rows to their places, two products over what is there. On a GPU, where few programs
    would leave it idle, keys are shared out in parts, which a second kernel adds up."""
    batch, heads, rows, seen = _sizes(call)
    groups, width, value_width = _widths(call)
    query: TensorSpec = call.argument("query")
    stored = batch * groups * (width + value_width) * call.argument("key_store").dtype.itemsize
    pairs = batch * heads * rows * seen
    read = query.stored_bytes + stored * seen
    written = sum(spec.stored_bytes for spec in call.outputs)
    if call.argument("key") is not None:
        new = stored * int(call.argument("key").shape[2])
        read, written = read + new, written + new
    dtype = str(query.dtype).removeprefix("torch.")
    parts = _parts(query.device, batch * groups * -(-rows * heads // (groups * _TILE)), seen)
    if parts == 1:
        return (Phase(2 * pairs * (width + value_width), pairs, read, written, dtype),)
    # A row of float32 and the logarithm of its sum for each part.
    partial = batch * heads * rows * parts * (value_width + 1) * 4
    written = written - call.outputs[0].stored_bytes + partial
    merged = batch * heads * rows * parts * value_width
    return (
        Phase(2 * pairs * (width + value_width), pairs, read, written, dtype),
        Phase(0, merged, partial, call.outputs[0].stored_bytes, "float32"),
    )


def _parts(device: str, programs: int, seen: int) -> int:
    """About how many parts kernels share keys out in (``graphopt_kernels.attend_launch``)."""
    if not device.startswith("cuda"):
        return 1
    return max(1, min(_TOGETHER // programs, seen // _LEAST))


def attend_workspace(call: Call) -> int:
    """Bytes that a call on the CPU takes beyond its outputs, at most: masks by row and key, and the scores
    where they are written out. Counted in the source (``graphopt_kernels.attend_reference``) and compared
    with what it takes."""
    batch, heads, rows, seen = _sizes(call)
    groups, width, value_width = _widths(call)
    size = call.argument("query").dtype.itemsize
    copies = 0
    new = int(call.argument("positions").shape[0])
    if str(call.packet).endswith("attend_ring") and new > 1:
        seen += new
        copies = batch * groups * seen * (width + value_width) * size
    return copies + _attending(call, batch, heads, rows, seen, width + value_width)


def joint_workspace(call: Call) -> int:
    """The same of attention over what several attentions keep in one store: rows of all blocks are put
    together again, keys and then values (``graphopt_kernels.attend_joint``)."""
    batch, heads, rows, width = call.argument("query").shape
    ring: TensorSpec = call.argument("key_ring")
    groups, value_width = call.argument("key").shape[1], call.argument("value_ring").shape[3]
    blocks, block, size = call.argument("key_blocks").shape[1], ring.shape[2], ring.dtype.itemsize
    seen = (blocks + 1) * block
    wide = max(width, value_width)
    ranks = [basis.shape[-1] for x in ("key", "value") if (basis := call.argument(f"{x}_basis")) is not None]
    # Of a record a copy; some forms of the rows at once; codes and float32 on the way where it is rounded.
    codes = 4 * 6 if "bits=" in call.argument("store") else 0
    far = batch * blocks * block * max(groups * wide, *ranks, 0)
    records = batch * blocks * max(call.argument(f"{x}_blocks").shape[2] for x in ("key", "value"))
    made = records + far * (3 * size + 1 + codes)
    # A block in float64, in ten forms, as it is joined.
    joining = 10 * 8 * batch * ring.shape[1] * block * wide
    keys, values = (batch * groups * seen * each * size for each in (width, value_width))
    attending = _attending(call, batch, heads, rows, seen, width + value_width)
    if size < 4:
        # torch's own attention lays keys and values out anew there.
        attending += int(keys + values)
    return int(keys + values + max(made, joining, attending))


def _attending(call: Call, batch: int, heads: int, rows: int, seen: int, widths: int) -> int:
    size = call.argument("query").dtype.itemsize
    valid = call.argument("valid")
    known = batch if valid is not None else 1
    # All rows read the same rows of a source.
    apart = 1 if str(call.packet).endswith("attend_cross") else rows
    scores = batch * heads * rows * seen
    tabled = str(call.packet).endswith("attend_relative")
    slopes = call.argument("slopes") is not None or tabled
    # Positions of keys, what a mask says of each, places and what they add.
    held = 24 * seen + 8 * apart + known * apart * seen
    if tabled:
        # Distances, twice, and what is added by them.
        held += rows * seen * (16 + 4 * heads)
    elif slopes:
        held += (16 * known * valid.shape[1] if valid is not None else 0) + known * (heads + 1) * seen * 4
    masking = apart * seen * 3 + known * apart * seen
    capped = bool(call.argument("softcap"))
    if capped or call.argument("sinks") is not None:
        attending = scores * max((3 if capped else 2) * size, 8 + (size if size < 4 else 0))
        attending += batch * heads * rows * widths * size
    else:
        mask = known * heads * rows * seen * (4 + (size if size != 4 else 0)) if slopes else 0
        # What torch's own attention turns a boolean mask into, and a block of scores for each thread.
        blocks = torch.get_num_threads() * 5 * min(rows, 64) * min(seen, 512)
        attending = (mask or known * apart * seen * size) + blocks
    return int(held + max(masking, attending))
