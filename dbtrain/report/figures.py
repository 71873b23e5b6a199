"""The most important figures of a run, for the page's summary."""

from __future__ import annotations

from dataclasses import dataclass

from dbtrain.report.curves import mean
from dbtrain.report.run import METRICS, SPEED, VALIDATION, Run

MOST_SCORES = 4  # in the summary; a table has all of them
SLOW_DATA = 0.1  # share of the time waiting for data above which the page points it out


@dataclass(frozen=True)
class Figure:
    label: str
    value: str
    note: str = ""


def short(value: float) -> str:
    """A number with four digits, and without an exponent if it is ordinary."""
    return f"{value:.4g}"


def of_run(run: Run) -> list[Figure]:
    """Losses, scores, speed and memory, as far as the run folder has them."""
    found = [
        _held_out(run, "held_out_instance", "Held-out loss, instance"),
        _held_out(run, "held_out_prior", "Held-out loss, class"),
        *_scores(run),
        _trained(run, "loss_instance", "Training loss, instance"),
        _trained(run, "loss_prior", "Training loss, class"),
        _not_finite(run),
        _speed(run),
        _memory(run),
    ]
    return [figure for figure in found if figure]


def _held_out(run: Run, key: str, label: str) -> Figure | None:
    steps, values = run.values(VALIDATION, key)
    known = [(value, step) for step, value in zip(steps, values, strict=True) if value is not None]
    if not known:
        return None
    (first, _), (last, at), (least, best) = known[0], known[-1], min(known)
    if len(known) == 1:
        return Figure(label, short(last), f"at step {at} only")
    change = f"{100 * (last / first - 1):+.0f}%, ".replace("-", "−") if first else ""
    risen = f", {short(least)}; it has risen since" if best != at else ""
    return Figure(label, f"{short(first)} → {short(last)}", f"{change}lowest at step {best}{risen}")


def _trained(run: Run, key: str, label: str) -> Figure | None:
    steps, values = run.values(METRICS, key)
    tenth = max(1, len(steps) // 10)
    first, last = mean(values[:tenth]), mean(values[-tenth:])
    if first is None or last is None:
        return None
    return Figure(label, f"{short(first)} → {short(last)}", "means of the first and last tenth of the steps")


def _scores(run: Run) -> list[Figure]:
    shown = [
        Figure(name.replace("_", " ").capitalize(), short(value), run.score_labels.get(name, ""))
        for name, value in list(run.scores.items())[:MOST_SCORES]
    ]
    best = [str(row["step"]) for row in run.checkpoint_scores if row.get("suggested")]
    if best:
        shown.insert(0, Figure("Suggested checkpoint", f"step {', '.join(best)}", "by its scores"))
    return shown


def _not_finite(run: Run) -> Figure | None:
    steps, values = run.values(METRICS, "loss")
    bad = [step for step, value in zip(steps, values, strict=True) if value is None]
    return Figure("NaN or infinite losses", str(len(bad)), f"first at step {bad[0]}") if bad else None


def _speed(run: Run) -> Figure | None:
    rate = _median(run, "samples_per_s")
    if rate is None:
        return None
    step, wait = _median(run, "step_ms"), mean(run.values(SPEED, "wait_share")[1])
    parts = [f"{step:.0f} ms per step"] if step is not None else []
    if wait is not None:
        parts.append(
            f"{wait:.1%} of the time waiting for data{', which is a lot' if wait > SLOW_DATA else ''}"
        )
    return Figure("Speed", f"{rate:.3g} samples/s", ", ".join(parts))


def _memory(run: Run) -> Figure | None:
    known = [value for value in run.values(SPEED, "peak_gib")[1] if value is not None]
    return Figure("Peak memory", f"{max(known):.2f} GiB", "of rank 0") if known else None


def _median(run: Run, key: str) -> float | None:
    known = sorted(value for value in run.values(SPEED, key)[1] if value is not None)
    return known[len(known) // 2] if known else None
