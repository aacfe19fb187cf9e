"""Result of a benchmark, and its printed form.

{"bench", "dataset", "seeds", "rows": [{…}], "claims": [{"claim", "value", "target", "holds"}], "plot", "failed"}
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Claim:
    """Claim, judged from the rows."""

    claim: str
    value: float
    target: float
    holds: bool


def at_least(claim: str, value: float, target: float) -> Claim:
    """Returns a claim that a value reaches its target."""
    return Claim(claim, value, target, value >= target)


def at_most(claim: str, value: float, target: float) -> Claim:
    """Returns a claim that a value stays within its target."""
    return Claim(claim, value, target, value <= target)


@dataclass(frozen=True)
class BenchResult:
    """Result of a benchmark; see the module for the JSON.

    Attributes:
        plot: path of a PNG, or empty.
        failed: error that ended the benchmark early, or empty; the rows are those measured before.
    """

    bench: str
    dataset: str
    seeds: int
    rows: list[dict[str, Any]]
    claims: list[Claim]
    plot: str = ""
    failed: str = ""

    @property
    def holds(self) -> bool:
        """True if the benchmark finished and every claim holds."""
        return not self.failed and all(claim.holds for claim in self.claims)

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain objects, rows included."""
        # A plain list: asdict would make another list of rows that are kept in a file, without the rows.
        return asdict(replace(self, rows=list(self.rows)))


def render(result: BenchResult, console: Console) -> None:
    """The rows, then each claim and whether it holds."""
    table = Table(title=f"{result.bench} on {result.dataset}, {result.seeds} seeds", title_justify="left")
    columns = list(dict.fromkeys(name for row in result.rows for name in row))
    for column in columns:
        words = any(isinstance(row.get(column), str) for row in result.rows)
        table.add_column(column.replace("_", " "), justify="left" if words else "right")
    for row in result.rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console.print(table)
    for claim in result.claims:
        mark = ("holds", "green") if claim.holds else ("does not hold", "red")
        console.print(Text.assemble(mark, f"  {claim.claim}: {claim.value:.4g} (target {claim.target:g})"))
    if result.failed:
        console.print(Text.assemble(("not finished", "red"), f"  {result.failed}"))
    if result.plot:
        console.print(f"plot: {result.plot}")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, list):
        return " ".join(_cell(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
