"""What a conversion has achieved, on queries that it was not fitted to."""

from dataclasses import dataclass

from torch import Tensor

_FAILED = 0.5  # of a relative error: above it a head is named as one that does not compress


@dataclass(frozen=True)
class ConversionReport:
    """Relative errors ‖out − exact‖ / ‖exact‖ of attention with the state, head by head, on the held-out queries.

    The held-out queries also chose among a few states of each head (ridges, or steps of a descent), and with `budget`
    what they are made of, so the error on other text can be larger. `str()` gives all of it as text.

    Attributes:
        error: [Hs], with the state.
        closed_form_error: [Hs], with the state as it was before it was fitted.
        no_prefix_error: [Hs], of leaving the prefix out.
        prefix_share: [Hs], the share of the attention that the exact prefix has, ρ, mean over the queries.
        method: "closed_form", "least_squares" or "gradient".
        ridge: of each head by least squares, None where the closed form was best; None by other methods.
        held_out_queries: how many queries of a state head the errors are measured on.
        rows_per_head: r·C + R: rows of the state's Z and its own rows.
        kept_rows: of these, rows of the prefix that were kept exactly.
        state_bytes, prefix_bytes: what is to be kept instead of what.
        break_even: rows of an exact prefix that cost as much arithmetic as the state, r·C / 2 + R.
        tried: by what they were made of, the errors of all states that were fitted, mean over the heads (of those that
            are not NaN). The state is the best of them.
    """

    error: Tensor
    closed_form_error: Tensor
    no_prefix_error: Tensor
    prefix_share: Tensor
    method: str
    ridge: list[float | None] | None
    held_out_queries: int
    rows_per_head: int
    kept_rows: int
    state_bytes: int
    prefix_bytes: int
    break_even: float
    tried: dict[str, float]

    @property
    def incompressible_heads(self) -> list[int]:
        """Heads whose error stays above 0.5: they attend to single rows that no small state can hold."""
        return [head for head, error in enumerate(self.error.tolist()) if not error <= _FAILED]

    def __str__(self) -> str:
        worst = int(self.error.argmax())
        lines = [
            f"relative error on {self.held_out_queries:,} held-out queries a head: median {self.error.median():.3f}, "
            f"mean {self.error.mean():.3f}, worst {self.error[worst]:.3f} (head {worst})",
            f"in closed form: mean {self.closed_form_error.mean():.3f}; without the prefix: mean "
            f"{self.no_prefix_error.mean():.3f}",
            f"share of the attention that the prefix has: mean {self.prefix_share.mean():.2f}",
            f"{self.rows_per_head:,} rows a head ({self.kept_rows} of the prefix kept exactly), "
            f"{self.state_bytes / 2**10:,.0f} KiB instead of {self.prefix_bytes / 2**10:,.0f} KiB",
            f"as much arithmetic as an exact prefix of about {self.break_even:,.0f} rows",
        ]
        if len(self.tried) > 1:
            lines.append("tried: " + ", ".join(f"{made_of}: {error:.3f}" for made_of, error in self.tried.items()))
        if self.incompressible_heads:
            named = ", ".join(f"{head} ({self.error[head]:.2f})" for head in self.incompressible_heads)
            lines.append(f"heads that do not compress: {named}")
        return "\n".join(lines)
