"""A prefix, inputs and states for tests of fits."""

import torch

from ntk_kernels import ntk_attention, prefix_to_state, reference

F64 = torch.float64
HEADS, DIM, VALUE_DIM = 2, 8, 6


class Sample:
    """A prefix in clusters that share a large mean, and causal inputs of a batch with grouped heads."""

    def __init__(self, rows=400, batch=4, length=64, dtype=F64, spread=0.7):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, dtype=F64, generator=generator)

        clusters = 2 * randn(HEADS, 1, DIM) + randn(HEADS, 10, DIM)
        pick = torch.randint(10, (rows,), generator=generator)
        self.prefix_key = (clusters[:, pick] + spread * randn(HEADS, rows, DIM)).to(dtype)
        self.prefix_value = (randn(HEADS, 10, VALUE_DIM)[:, pick] + 0.3 * randn(HEADS, rows, VALUE_DIM)).to(dtype)
        self.query = randn(batch, 2 * HEADS, length, DIM).to(dtype)
        self.key, self.value = (randn(batch, HEADS, length, dim).to(dtype) for dim in (DIM, VALUE_DIM))
        self.attention = ntk_attention(self.query, self.key, self.value, is_causal=True, return_lse=True)

    def convert(self, *args, **options):
        options = {"query": self.query, "attention": self.attention, "return_report": True} | options
        return prefix_to_state(self.prefix_key, self.prefix_value, *args, **options)

    def errors(self, state, batch_rows=slice(None)) -> torch.Tensor:
        """Returns the error of each state head, by the reference, from the inputs themselves."""
        inputs = [tensor[batch_rows] for tensor in (self.query, self.key, self.value)]
        exact = reference.prefix_attention(*inputs, self.prefix_key, self.prefix_value, is_causal=True)
        out = reference.ntk_attention(*inputs, state, is_causal=True)
        by_head = [tensor.unflatten(1, (HEADS, -1)).transpose(0, 1).flatten(1) for tensor in (out - exact, exact)]
        return by_head[0].norm(dim=1) / by_head[1].norm(dim=1)


STATES = {
    "elu": (("elu",), {"centers": None}),
    "taylor1": (("taylor1",), {}),
    "taylor1, 3 centres": (("taylor1",), {"centers": 3}),
    "taylor2": (("taylor2",), {}),
    "rows": ((None,), {"num_rows": 12}),
    "taylor1 and rows": (("taylor1",), {"num_rows": 12}),
    "taylor1, rows, kept rows": (("taylor1",), {"num_rows": 12, "keep": 3}),
}


def outshining(spread: float) -> Sample:
    """Returns a sample half of whose prefix lies far from all queries, the further the larger `spread`."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    sample, far = Sample(rows=1), spread * torch.ones(DIM) / DIM**0.5
    sample.prefix_key = torch.cat([far + randn(HEADS, 200, DIM), -far + randn(HEADS, 100, DIM)], dim=1)
    sample.prefix_value = torch.cat([1 + randn(HEADS, 200, VALUE_DIM), -1 + randn(HEADS, 100, VALUE_DIM)], dim=1)
    sample.query, sample.key = far + randn(4, 2 * HEADS, 64, DIM), far + randn(4, HEADS, 64, DIM)
    sample.value = randn(4, HEADS, 64, VALUE_DIM)
    sample.attention = ntk_attention(sample.query, sample.key, sample.value, is_causal=True, return_lse=True)
    return sample
