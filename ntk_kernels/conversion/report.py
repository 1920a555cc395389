"""`ConversionReport`: how well a state does what its prefix does, on queries that the fit has not seen."""

from dataclasses import dataclass

from torch import Tensor

_MAX_ERROR = 0.5  # relative error of a head that counts as compressed


@dataclass(frozen=True)
class ConversionReport:
    """Relative errors ‖out − exact‖ / ‖exact‖ of attention with the state, per head, on the held-out queries.

    The held-out queries also choose among a few states of each head (ridges, or steps of a descent) and, with `budget`,
    among recipes, so the error on other text can be larger. `str()` prints the whole report.

    Attributes:
        error: [Hs], with the state.
        closed_form_error: [Hs], with the state that the fit started from.
        no_prefix_error: [Hs], without the prefix.
        prefix_share: [Hs], share ρ of the attention that goes to the exact prefix, mean over the queries.
        method: "closed_form", "least_squares" or "gradient".
        ridge: ridge of each head by least squares, None where the closed form was best; None for other methods.
        held_out_queries: number of queries of a state head on which errors are measured.
        rows_per_head: C·r + R, rows of Z and exact rows.
        kept_rows: number of those rows that are exact rows of the prefix.
        state_bytes, prefix_bytes: memory of the state and of the prefix that it replaces.
        break_even: number of rows of an exact prefix that cost as much arithmetic as the state, C·r / 2 + R.
        tried: error of every state that was fitted, by what it is made of; mean over the heads whose error is not NaN.
            The state is the best of them.
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
        """Heads with an error above 0.5: they attend to single rows, which no small state can hold."""
        return [head for head, error in enumerate(self.error.tolist()) if _failed(error)]

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
            lines.append("tried: " + ", ".join(f"{recipe}: {error:.3f}" for recipe, error in self.tried.items()))
        if self.incompressible_heads:
            named = ", ".join(f"{head} ({self.error[head]:.2f})" for head in self.incompressible_heads)
            lines.append(f"heads that do not compress: {named}")
        return "\n".join(lines)


def _failed(error: float) -> bool:
    """Returns whether a relative error is above the limit, or NaN."""
    return not error <= _MAX_ERROR
